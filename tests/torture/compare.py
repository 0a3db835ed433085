"""What two runs of a program saw differently, and whether a known limit explains it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torture.arena import Trace
    from torture.programs import Program

_NOTHING = "nothing"


@dataclass(frozen=True)
class Difference:
    """One thing that was seen otherwise in the lane.

    Attributes:
        step: during which; the number of steps means the end of the program.
        what: who did or looked at what, e.g. ``c0 recv (step 3)`` or ``s0 events``.
        kernel, lane: what was seen there; None: nothing at this step.
    """

    step: int
    what: str
    kernel: Any
    lane: Any

    def __str__(self) -> str:
        kernel, lane = (_NOTHING if x is None else x for x in (self.kernel, self.lane))
        return f"step {self.step}: {self.what}: kernel path {kernel}, lane {lane}"

    @property
    def side(self) -> str:
        """``c`` or ``s``: whose observation it is."""
        return self.what[0]

    @property
    def begun(self) -> int:
        """The step that began the call, which may have slept since; -1: no call."""
        return int(self.what.rsplit(" ", 1)[1][:-1]) if self.what.endswith(")") else -1


@dataclass(frozen=True)
class Case:
    """A difference with all that a limit may ask about."""

    program: Program
    kernel: Trace
    lane: Trace
    difference: Difference
    guarded: bool


@dataclass(frozen=True)
class Limit:
    """A difference that the README tells of.

    Attributes:
        name: for the report.
        covers: True if it explains the case.
        ends: what follows cannot be compared any more.
    """

    name: str
    covers: Callable[[Case], bool]
    ends: bool = True


@dataclass
class Verdict:
    """What came of comparing two runs.

    Attributes:
        failures: differences of the first step with one that no limit explains.
        limits: names of the limits that explained others.
    """

    failures: list[Difference] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def differences(kernel: Trace, lane: Trace, *, guarded: bool = False) -> list[list[Difference]]:
    """For each step what differs, in order.

    Args:
        guarded: how much there is to read was not asked in the lane.
    """
    found = []
    for number in range(max(len(kernel), len(lane))):
        ours = kernel[number] if number < len(kernel) else {}
        theirs = lane[number] if number < len(lane) else {}
        found.append(
            [
                Difference(number, what, ours.get(what), theirs.get(what))
                for what in {**ours, **theirs}
                if ours.get(what) != theirs.get(what) and not (guarded and what.endswith(" unread"))
            ]
        )
    return found


def judge(
    program: Program, kernel: Trace, lane: Trace, limits: Sequence[Limit], *, guarded: bool
) -> Verdict:
    """Compare two runs up to the first difference that nothing explains.

    Args:
        guarded: the guards were at work in the lane.
    """
    verdict = Verdict()
    for step in differences(kernel, lane, guarded=guarded):
        unexplained, over = [], False
        for difference in step:
            case = Case(program, kernel, lane, difference, guarded)
            limit = next((limit for limit in limits if limit.covers(case)), None)
            if limit is None:
                unexplained.append(difference)
                continue
            if limit.name not in verdict.limits:
                verdict.limits.append(limit.name)
            over |= limit.ends
        if over:
            break
        if unexplained:
            verdict.failures = unexplained
            break
    return verdict
