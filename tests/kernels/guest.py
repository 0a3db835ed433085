"""The pytest plugin of a guest: tells the host, line by line, what becomes of each test.

Each line is a JSON object with one of these keys:

    collected  IDs of all tests that are to run; with "kernel", its release
    started    ID of the test that runs now
    test       its ID; with "outcome" (passed, failed, skipped), "text" and "seconds"
    status     pytest's exit status

A test also fails when the kernel has complained meanwhile.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPLAINTS = re.compile(
    r"WARNING:|BUG:|Oops|refcount_t|Call Trace|use-after-free|rcu.*stall|blocked for more than"
)


class _Result:
    """What the phases of one test have said so far."""

    def __init__(self) -> None:
        self.outcome = "passed"
        self.texts: list[str] = []
        self.seconds = 0.0

    def fail(self, text: str) -> None:
        self.outcome = "failed"
        self.texts.append(text)


class Reporter:
    """Writes the lines; see above."""

    def __init__(self, output: TextIO, log: int) -> None:
        self._output = output
        self._log = log
        self._result = _Result()
        self._complaints()

    def _say(self, **line: object) -> None:
        print(json.dumps(line), file=self._output, flush=True)

    def _complaints(self) -> list[str]:
        """What the kernel has complained about since the last call."""
        found: list[str] = []
        with suppress(BlockingIOError):
            while True:
                line = os.read(self._log, 8192).decode("utf-8", "replace")
                if _COMPLAINTS.search(line):
                    found.append(line.splitlines()[0].partition(";")[2])
        return found

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Name the tests."""
        ids = [item.nodeid for item in session.items]
        self._say(collected=ids, kernel=os.uname().release)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as a failed test."""
        if report.failed:
            self._say(test=report.nodeid, outcome="failed", text=report.longreprtext, seconds=0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """One test from its set-up to its end."""
        self._say(started=item.nodeid)
        self._result = result = _Result()
        outcome = yield
        if complaints := self._complaints():
            result.fail("the kernel has complained:\n" + "\n".join(complaints[:20]))
        self._say(
            test=item.nodeid,
            outcome=result.outcome,
            text="\n".join(result.texts),
            seconds=round(result.seconds, 2),
        )
        return outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of the test, or a subtest."""
        result = self._result
        result.seconds += report.duration
        if report.failed:
            result.fail(report.longreprtext)
            result.texts.extend(f"-- {title} --\n{text}" for title, text in report.sections)
        elif report.skipped and result.outcome == "passed":
            result.outcome = "skipped"
            # (file, line, reason), but for expected failures, which have a traceback
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            result.texts.append(reason.removeprefix("Skipped: "))
            if hasattr(report, "wasxfail"):
                result.outcome = "passed"

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Say that this was all."""
        self._say(status=int(exitstatus))


def pytest_configure(config: pytest.Config) -> None:
    """Write to descriptor 3, which the guest's init has opened."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    config.pluginmanager.register(Reporter(os.fdopen(3, "w", encoding="ascii"), log))
