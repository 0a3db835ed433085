"""Running what tap_plan.py lists: every point on every arm in turn, on one and the same VM.

From arm to arm only the rules and offloads change, as the watcher of nearpath changes them.
The arm with the unmodified bridge has nothing of ours anywhere.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench import load, tap_lab
from bench.lane import cpus
from bench.tap_plan import ARMS, BRIDGE, JOBS, LATENCY, Arm, Point
from bench.tap_report import TapSeries
from nearpath.errors import NearpathError
from nearpath.kernel import netns, offload, rtnl
from nearpath.lanes import checksum, tap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.tap_lab import Lab, Reading, Times
    from nearpath.node.interrupt import Interrupts

# A round is calm if others had no more of the CPU; up to 15 % are the start of a process.
_CALM = 0.25
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

    def __init__(self, lab: Lab, machine: Machine, times: Times, stop: Interrupts) -> None:
        self.spare = 0
        self.disturbed = 0
        self._lab = lab
        self._machine = machine
        self._times = times
        self._stop = stop

    def check(self) -> None:
        """One conversation on each arm: does it take the way that it is meant to take?

        Raises:
            NearpathError: it does not.
        """
        point = Point(LATENCY, 64, 1)
        for arm in ARMS:
            self._machine.switch(arm)
            before = self._machine.taken()
            reading = self._lab.ask(point, JOBS[point.test], self._times)
            both = zip(self._machine.taken(), before, strict=True)
            taken = min(after - earlier for after, earlier in both)
            if arm.mode == BRIDGE and taken:
                raise NearpathError(f"{taken} packets took the lane with {arm.name}")
            if arm.mode != BRIDGE and taken < _MOST * reading.messages:
                raise NearpathError(
                    f"with {arm.name} only {taken} of {reading.messages} messages took the lane"
                )

    def measure(self, point: Point) -> TapSeries:
        """All rounds of a point; see load.gather()."""
        self._lab.set_netfilter(point.netfilter)
        rounds: list[_Round] = []
        calmest = load.gather(rounds, partial(self._round, point), _CALM, point.rounds, self.spare)
        self.spare -= len(rounds) - point.rounds
        self.disturbed += max(0, point.rounds - load.calm(rounds, _CALM))
        series = TapSeries(point)
        for each in calmest:
            for arm in point.arms:
                series.add(arm, each.runs[arm].value, each.runs[arm].p99)
        return series

    def _round(self, point: Point, number: int) -> _Round:
        """Every arm once, beginning with another one than in the round before."""
        first = number % len(point.arms)
        runs = {}
        for arm in (*point.arms[first:], *point.arms[:first]):
            self._stop.check()
            self._machine.switch(arm)
            runs[arm] = self._lab.ask(point, JOBS[point.test], self._times)
        return _Round(runs)


class Machine:
    """Rules and offloads of the VM, switched by the steps of lanes.vm.attend().

    Not by attend() itself: it looks at the offloads each time, which takes longer than a run.
    """

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        with netns.entered(lab.vm.netns):
            self._pod = stack.enter_context(rtnl.Rtnl())
            pod_offloads = stack.enter_context(offload.Door())
        with netns.entered(lab.node):
            host = stack.enter_context(rtnl.Rtnl())
            self._doors = {
                checksum.POD: pod_offloads,
                checksum.HOST: stack.enter_context(offload.Door()),
            }
            end = tap.host_end(host, lab.host_veth)
        if end is None:
            raise NearpathError(f"{tap_lab.HOST_VETH} is not there")
        self._netns, self._node = lab.vm.netns, lab.node
        self._ends = {lab.vm.nic_index: end}
        self._devices = [
            checksum.Device(checksum.POD, lab.vm.tap_index, lab.vm.names.tap, checksum.TAP),
            checksum.Device(checksum.POD, lab.vm.nic_index, lab.vm.names.nic, checksum.NIC),
            checksum.Device(
                checksum.POD, lab.vm.bridge_index, lab.vm.names.bridge, checksum.BRIDGE
            ),
            checksum.Device(checksum.HOST, end.index, end.name, checksum.VETH),
        ]
        self._made: set[int] = set()
        self._changes: list[checksum.Change] = []
        self._checksum = ""

    def switch(self, arm: Arm) -> None:
        """Bring rules and offloads to those of an arm.

        Raises:
            NearpathError: another mode is in force then.
        """
        if arm.checksum != self._checksum:
            self._switch_checksum(arm.checksum)
        mode = tap.OFF if arm.mode == BRIDGE else arm.mode
        with netns.entered(self._netns):
            plan = tap.plan(tap.observe(self._pod), mode, self._made, self._ends)
            self._made = plan.made
            tap.execute(self._pod, plan)
        (outcome,) = plan.outcomes
        if outcome.mode != mode:
            raise NearpathError(f"{arm.name}: the mode is {outcome.mode} ({outcome.reason})")

    def _switch_checksum(self, mode: str) -> None:
        # software is taken back first: skip leaves alone what it finds switched off.
        steps = (checksum.KEEP, mode) if self._checksum == checksum.SOFTWARE else (mode,)
        for wanted in dict.fromkeys(steps):
            with netns.entered(self._node):  # whose packet sockets are looked at
                work = checksum.work_out(self._doors, wanted, [self._devices], self._changes)
            checksum.execute(self._doors, work.plan.steps)
            self._changes = work.plan.record
        (verdict,) = work.verdicts
        if verdict != (mode, ""):
            raise NearpathError(
                f"instead of {mode}, checksums are {verdict.mode} ({verdict.reason})"
            )
        self._checksum = mode

    def taken(self) -> tuple[int, int]:
        """Packets that the lane has carried to the VM and from it."""
        with netns.entered(self._netns):
            (counts,) = tap.counts(self._pod, tap.observe(self._pod)).values()
        return counts["to_vm"]["packets"], counts["from_vm"]["packets"]


@contextmanager
def ready(times: Times, stop: Interrupts) -> Iterator[Bench]:
    """Make the node and the VM; nothing is left at the end."""
    (cpu, _) = cpus(1)
    with tap_lab.lab(cpu) as lab, ExitStack() as stack:
        bench = Bench(lab, Machine(lab, stack), times, stop)
        bench.check()
        yield bench
