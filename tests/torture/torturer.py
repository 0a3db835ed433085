"""The campaign: programs from seeds, both runs, the verdict, and the smallest that fails."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torture.arena import StuckError
from torture.compare import Difference, Verdict, differences, judge
from torture.limits import LIMITS
from torture.shrink import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torture.arena import Trace
    from torture.compare import Limit
    from torture.programs import Program

_AGAIN = 3  # runs on the kernel path that must agree before a difference counts


class Runner(Protocol):
    """What runs programs; an Arena."""

    def run(self, program: Program, accelerated: bool) -> Trace:
        """Run a program and tell what was seen."""


@dataclass
class Failure:
    """A difference that no limit explains.

    Attributes:
        program: as generated. smallest: that still fails.
        differences: of the smallest.
        times, of: how often the smallest failed.
    """

    program: Program
    smallest: Program
    differences: list[Difference]
    times: int
    of: int

    def __str__(self) -> str:
        told = "\n".join(f"  {difference}" for difference in self.differences)
        return (
            f"{self.smallest}\nwhat differs ({self.times} of {self.of} runs):\n{told}\n"
            f"as JSON:\n{self.smallest.to_json()}"
        )


@dataclass
class Report:
    """What came of many programs.

    Attributes:
        flaky: seeds whose programs see different things on the kernel path alone.
        stuck: seeds whose programs could not be run to their end.
        limits: how many programs ran into each known limit.
    """

    programs: int = 0
    same: int = 0
    failures: list[Failure] = field(default_factory=list)
    flaky: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)
    limits: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        head = (
            f"{self.programs} programs: {self.same} same, {len(self.failures)} different, "
            f"{len(self.flaky)} not the same twice on the kernel path, {len(self.stuck)} stuck"
        )
        known = [f"  known limit: {name}: {count}" for name, count in self.limits.most_common()]
        return "\n".join([head, *known])


def kind(difference: Difference) -> str:
    """What a difference is about, without its place, so that shrinking keeps to it."""
    what = (difference.what.split() * 2)[1]

    def gist(seen: object) -> str:
        if isinstance(seen, list) and seen:
            texts = (str(part) for part in seen)
            return " ".join("#" if text[:1].isdigit() else text.split()[0] for text in texts)
        return str(seen) if isinstance(seen, str) else type(seen).__name__

    return f"{what}: {gist(difference.kernel)} / {gist(difference.lane)}"


class Torturer:
    """Runs programs and judges them.

    Args:
        runner: for both runs.
        limits: that explain differences.
        guarded: the guards are at work.
        shrink_seconds: for each failure.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Sequence[Limit] = LIMITS,
        *,
        guarded: bool = False,
        shrink_seconds: float = 60.0,
    ) -> None:
        self._runner = runner
        self._limits = limits
        self._guarded = guarded
        self._shrink_seconds = shrink_seconds
        self.report = Report()

    def verdict(self, program: Program) -> Verdict:
        """Run a program once on each path and compare."""
        return self._verdict(program, self._runner.run(program, False))

    def _verdict(self, program: Program, kernel: Trace) -> Verdict:
        lane = self._runner.run(program, True)
        return judge(program, kernel, lane, self._limits, guarded=self._guarded)

    def _is_flaky(self, program: Program, first: Trace) -> bool:
        """True if the kernel path alone does not show the same as the first time, every time."""
        return any(any(differences(first, self._runner.run(program, False))) for _ in range(_AGAIN))

    def fails_like(self, program: Program, kinds: set[str]) -> bool:
        """True if a difference of one of these kinds shows, and is not the program's own."""
        try:
            kernel = self._runner.run(program, False)
            failures = self._verdict(program, kernel).failures
            return bool(kinds & {kind(f) for f in failures}) and not self._is_flaky(program, kernel)
        except StuckError:
            return False

    def try_program(self, program: Program) -> Failure | None:
        """Run a program, judge it, shrink it if it fails, and take it into the report."""
        report = self.report
        report.programs += 1
        try:
            kernel = self._runner.run(program, False)
            verdict = self._verdict(program, kernel)
            flaky = bool(verdict.failures) and self._is_flaky(program, kernel)
        except StuckError:
            report.stuck.append(program.seed)
            return None
        report.limits.update(verdict.limits)
        if not verdict.failures:
            report.same += 1
            return None
        if flaky:
            report.flaky.append(program.seed)
            return None
        failure = self._shrunk(program, verdict)
        report.failures.append(failure)
        return failure

    def _shrunk(self, program: Program, verdict: Verdict) -> Failure:
        tries = 10
        kinds = {kind(difference) for difference in verdict.failures}
        smallest = shrink(program, lambda p: self.fails_like(p, kinds), self._shrink_seconds)
        seen, times = verdict.failures, 0
        for _ in range(tries):
            again = self.verdict(smallest).failures
            times += bool(again)
            seen = again or seen
        return Failure(program, smallest, seen, times, tries)

    def campaign(
        self,
        programs: Iterable[Program],
        seconds: float = 0,
        progress: Callable[[Report], None] = lambda _: None,
    ) -> Report:
        """Try programs until there are no more or the time is over.

        Args:
            seconds: 0: no limit.
            progress: called now and then.
        """
        end = time.monotonic() + seconds
        said = time.monotonic()
        for program in programs:
            if seconds and time.monotonic() > end:
                break
            self.try_program(program)
            if time.monotonic() - said > 10:
                progress(self.report)
                said = time.monotonic()
        return self.report
