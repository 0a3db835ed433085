"""Running what tap_plan.py lists: every point on every arm in turn, on one and the same VM.

From arm to arm only the rules and offloads change, by lanes.vm.attend(), as the watcher of
nearpath changes them. The arm with the unmodified bridge has nothing of ours anywhere.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import tap_lab
from bench.lane import cpus
from bench.tap_plan import ARMS, BRIDGE, JOBS, LATENCY, Arm, Point
from bench.tap_report import TapSeries
from nearpath.errors import NearpathError
from nearpath.kernel import netns, rtnl
from nearpath.lanes import tap, vm, vm_state
from nearpath.lanes.vm_state import Wanted
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.tap_lab import Lab, Reading, Times
    from nearpath.node.interrupt import Interrupts

# A round is calm if others had no more of the CPU; a few per cent are the start of a process.
_CALM = 0.15
# A lane is taken if at least this part of a conversation's messages took it.
_MOST = 0.9


@dataclass(frozen=True)
class _Round:
    runs: dict[Arm, Reading]

    @property
    def disturbed(self) -> float:
        """Of the run that was disturbed most."""
        return max(reading.disturbed for reading in self.runs.values())


class Bench:
    """The VM, ready to be measured on every arm; used inside `ready`.

    Attributes:
        spare: rounds that may still be run beyond those asked for.
        disturbed: rounds so far that count though others had much of the CPU.
    """

    def __init__(self, lab: Lab, place: Place, times: Times, stop: Interrupts) -> None:
        self.spare = 0
        self.disturbed = 0
        self._lab = lab
        self._place = place
        self._times = times
        self._stop = stop
        self._cookie = netns.cookie(lab.vm.netns)

    def check(self) -> None:
        """One conversation on each arm: does it take the way that it is meant to take?

        Raises:
            NearpathError: it does not.
        """
        point = Point(LATENCY, 64, 1)
        for arm in ARMS:
            self.switch(arm)
            before = self._taken()
            reading = self._lab.ask(point, JOBS[point.test], self._times)
            taken = min(
                after - earlier for after, earlier in zip(self._taken(), before, strict=True)
            )
            if arm.mode == BRIDGE and taken:
                raise NearpathError(f"{taken} packets took the lane with {arm.name}")
            if arm.mode != BRIDGE and taken < _MOST * reading.messages:
                raise NearpathError(
                    f"with {arm.name} only {taken} of {reading.messages} messages took the lane"
                )

    def _taken(self) -> tuple[int, int]:
        """Packets that the lane has carried to the VM and from it."""
        with netns.entered(self._lab.vm.netns), rtnl.Rtnl() as pod:
            (counts,) = tap.counts(pod, tap.observe(pod)).values()
        return counts["to_vm"]["packets"], counts["from_vm"]["packets"]

    def switch(self, arm: Arm) -> None:
        """Bring rules and offloads to those of an arm.

        Raises:
            NearpathError: another mode is in force then.
        """
        mode = tap.OFF if arm.mode == BRIDGE else arm.mode
        wanted = Wanted(mode, "", arm.checksum, insist=False)
        with netns.entered(self._lab.node), vm_state.lock(self._place):
            now = vm.attend(self._place, self._cookie, self._lab.vm.netns, wanted)
        (wire,) = now["wires"]
        if (wire["mode"], wire["checksum"]) != (mode, arm.checksum):
            raise NearpathError(f"{arm.name} is not in force: {_in_force(wire)}")

    def measure(self, point: Point) -> TapSeries:
        """All rounds of a point.

        As many rounds more as others have disturbed, while there are spare ones, but not more
        than twice as many in all; the calmest count.
        """
        self._lab.set_netfilter(point.netfilter)
        rounds: list[_Round] = []
        calm = 0
        most = min(2 * point.rounds, point.rounds + self.spare)
        while len(rounds) < point.rounds or (calm < point.rounds and len(rounds) < most):
            rounds.append(self._round(point, len(rounds)))
            calm += rounds[-1].disturbed <= _CALM
        self.spare -= len(rounds) - point.rounds
        self.disturbed += max(0, point.rounds - calm)
        series = TapSeries(point)
        for each in sorted(rounds, key=lambda each: each.disturbed)[: point.rounds]:
            for arm in point.arms:
                series.add(arm, each.runs[arm].value, each.runs[arm].p99)
        return series

    def _round(self, point: Point, number: int) -> _Round:
        """Every arm once, beginning with another one than in the round before."""
        first = number % len(point.arms)
        runs = {}
        for arm in (*point.arms[first:], *point.arms[:first]):
            self._stop.check()
            self.switch(arm)
            runs[arm] = self._lab.ask(point, JOBS[point.test], self._times)
        return _Round(runs)


def _in_force(wire: dict[str, Any]) -> str:
    reasons = " ".join(filter(None, (wire["reason"], wire["checksum_reason"])))
    return f"{wire['mode']}, {wire['checksum']} ({reasons})"


@contextmanager
def ready(times: Times, stop: Interrupts) -> Iterator[Bench]:
    """Make the node and the VM; nothing is left at the end."""
    (cpu, _) = cpus(1)
    prefix = f"np-bench-{os.getpid()}-"
    with tap_lab.lab(cpu) as lab, tempfile.TemporaryDirectory(prefix=prefix) as directory:
        bench = Bench(lab, Place(f"{directory}/run"), times, stop)
        bench.check()
        yield bench
