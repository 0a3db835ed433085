"""What has become of the tests in a guest, from the lines that guest.py wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from helpers import needs

if TYPE_CHECKING:
    from .vm import Outcome


class Report:
    """What a guest has said, line by line (guest.py)."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self.kernel = ""
        self.collected: list[str] = []
        self.status = -1
        self.results: dict[str, dict[str, Any]] = {}
        self._running = "no test"
        for line in outcome.written.splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:
                break  # the guest has stopped in the middle of a line

    def _take(self, said: dict[str, Any]) -> None:
        if "collected" in said:
            self.collected, self.kernel = said["collected"], said["kernel"]
        elif "started" in said:
            self._running = said["started"]
        elif "test" in said:
            self.results[said["test"]] = said
            self._running = "no test"
        else:
            self.status = said["status"]

    def check(self, name: str) -> None:
        """Fail, or be skipped, as the test of this ID in the guest; fail if it did not end."""
        result = self.results.get(name)
        if result is None:
            pytest.fail(f"it did not run to its end; see {self._outcome.console}", pytrace=False)
        outcome, text = result["outcome"], result["text"]
        if outcome == "skipped" and needs.excused(text, self.kernel):
            pytest.skip(text)
        if outcome == "skipped":
            pytest.fail(f"skipped without an excuse: {text}", pytrace=False)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)

    def check_end(self) -> None:
        """Fail unless the guest has come to its end and every failure has been named."""
        said = self._outcome.end_of_console()
        if self._outcome.problem or self.status < 0:
            problem = self._outcome.problem or "the guest stopped"
            seconds = self._outcome.seconds
            pytest.fail(f"{problem}, running {self._running}, after {seconds:.0f} s\n{said}")
        named = any(result["outcome"] == "failed" for result in self.results.values())
        if not self.collected or self.status not in ({0, 1} if named else {0}):
            pytest.fail(f"pytest ended with status {self.status}\n{said}")
