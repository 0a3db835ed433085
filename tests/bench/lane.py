"""Running what plan.py lists: every point on every arm in turn.

An arm is a cgroup: the programs see only the sockets of processes in theirs, so nothing has
to be switched between two runs, and the kernel path's runs have no program near them.

    np-bench-<pid>/kernel      nothing attached
    np-bench-<pid>/nearpath    our datapath, loaded privately; both pods registered
    np-bench-<pid>/other0 …    what somebody else's command attaches there
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import lab as labs
from bench import load
from bench.lab import CLIENT, HEAVY, PEER, SERVER
from bench.plan import JOBS, LATENCY, OFF_NODE, QPERF_NAMES, STREAM_NODELAY, Point
from bench.report import KERNEL, NEARPATH, Series
from nearpath.datapath import loader, settings, tables, unloader
from nearpath.errors import NearpathError
from nearpath.kernel import cgroup, mounts, throwaway
from nearpath.lanes import socket as socket_lane
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.lab import Lab
    from nearpath.node.interrupt import Interrupts

_NAME = "np-bench-"
_PORT, _QPERF_PORT = 5000, 5100
# A control run counts as accelerated if it keeps this part off the wire.
_MOST = 0.9
# A round is calm if others had no more of the CPU. On one CPU more, for the kernel's threads
# that free the sockets of many short connections count as others.
_CALM_ONE, _CALM_TWO = 0.25, 0.15


@dataclass(frozen=True)
class Other:
    """Somebody else's accelerator.

    Attributes:
        name: for the tables.
        on: command that attaches it to the cgroup $NEARPATH_BENCH_CGROUP and nothing else.
        off: command that takes it away again.
    """

    name: str
    on: str
    off: str

    @classmethod
    def parse(cls, text: str) -> Other:
        """``NAME:command that switches on:command that switches off``.

        Raises:
            ValueError: something else.
        """
        parts = text.split(":")
        if len(parts) != 3 or not all(part.strip() for part in parts):
            raise ValueError(f"not NAME:ON:OFF: {text!r}")
        if parts[0] in {KERNEL, NEARPATH}:
            raise ValueError(f"the name {parts[0]} is taken")
        return cls(*parts)


@dataclass(frozen=True)
class Arm:
    """One way to run a point.

    Attributes:
        name: KERNEL, NEARPATH or the name of an Other.
        cgroup: directory.
        number: of the arm, from 0.
    """

    name: str
    cgroup: str
    number: int

    @property
    def port(self) -> int:
        """Of our own load's server."""
        return _PORT + self.number

    @property
    def qperf_ports(self) -> tuple[int, int]:
        """Of qperf: control and data."""
        return _QPERF_PORT + 2 * self.number, _QPERF_PORT + 2 * self.number + 1


@dataclass(frozen=True)
class Times:
    """Length of a run of load.c, in ms; warm is not measured."""

    warm_ms: int = 15
    measure_ms: int = 65


def cpus(number: int) -> tuple[int, int]:
    """CPUs of client and server, the last ones that we may use (0 serves interrupts)."""
    usable = sorted(os.sched_getaffinity(0))
    if number > len(usable):
        raise NearpathError(f"only {len(usable)} CPU may be used")
    return usable[-number], usable[-1]


@dataclass(frozen=True)
class _Round:
    """Of each arm what was read, and the bytes on the client's veth per unit of work."""

    runs: list[tuple[load.Reading, float]]

    @property
    def disturbed(self) -> float:
        """Of the run that was disturbed most."""
        return max(reading.disturbed for reading, _ in self.runs)


class Bench:
    """The arms, ready to measure; used inside `ready`.

    Attributes:
        spare: rounds that may still be run beyond those asked for.
        patience: times those asked for that may be run until a verdict is sure.
        rounds: that count so far.
        disturbed: of these, those in which others had much of the CPU.
    """

    def __init__(self, place: Place, arms: Sequence[Arm], times: Times, stop: Interrupts) -> None:
        self.place = place
        self.arms = arms
        self.spare = 0
        self.patience = 1
        self.rounds = 0
        self.disturbed = 0
        self._times = times
        self._stop = stop

    @contextmanager
    def lab(self, path: str) -> Iterator[Lab]:
        """The node with this path, its pods registered, and each arm on its way.

        Raises:
            NearpathError: an arm does not take the way that it is meant to take.
        """
        ports = [port for arm in self.arms for port in (arm.port, *arm.qperf_ports)]
        with labs.lab(path, ports) as made, ExitStack() as stack:
            for cookie in made.cookies:
                socket_lane.register(self.place, cookie)
                stack.callback(socket_lane.unregister, self.place, cookie)
            self._check(made)
            yield made

    def facts(self) -> dict[str, str]:
        """What is measured: the state of our datapath."""
        guarded = loader.is_guarded(self.place)
        changed = [
            f"{name} {value}"
            for name, value in settings.read(self.place).items()
            if value != settings.DEFAULTS[name]
        ]
        return {
            "guards": "attached" if guarded else "none, this kernel refuses them",
            "settings": ", ".join(changed) or "defaults",
        }

    def _check(self, made: Lab) -> None:
        """One run of each arm: does it take the way that it is meant to take?"""
        job = load.Job("lat", 64, False, self._times.warm_ms, self._times.measure_ms)
        found = Series(Point(made.path, "", 1, LATENCY, job.size, 1))
        for arm in self.arms:
            client, server = self._sides(made, arm, 1, SERVER)
            with load.serving(server, job, arm.port) as serving:
                before = made.veth_bytes()
                reading = load.ask(client, job, made.address, arm.port, serving, one_cpu=True)
                wire = (made.veth_bytes() - before) / reading.work
            found.add(arm.name, reading.value, reading.p99, wire)
            if arm.name != KERNEL and found.share(arm.name) < _MOST:
                raise NearpathError(
                    f"{arm.name} kept only {found.share(arm.name):.0%} of a conversation off "
                    f"the {made.path} path: nothing would be measured"
                )
        if made.path == HEAVY and not labs.conntrack_entries(made):
            raise NearpathError("the heavy path has no conntrack: it would not be one")

    def _sides(self, made: Lab, arm: Arm, count: int, server: str) -> tuple[load.Where, load.Where]:
        """Where client and server run; the peer elsewhere has no accelerator."""
        first, last = cpus(count)
        elsewhere = self.arms[0].cgroup if server == PEER else arm.cgroup
        return (
            load.Where(made.netns[CLIENT], arm.cgroup, first),
            load.Where(made.netns[server], elsewhere, last),
        )

    def measure(self, made: Lab, point: Point) -> Series:
        """All rounds of a point.

        While they do not tell whether its target is reached twice as many, up to `patience`
        times those asked for: small messages with Nagle's algorithm on have several speeds
        on the kernel path itself, and a connection keeps the one that it has begun with.
        """
        limit = _CALM_ONE if point.cpus == 1 else _CALM_TWO
        before = self._counters()
        with ExitStack() as stack:
            runs = [self._run(stack, made, arm, point) for arm in self.arms]
            rounds: list[_Round] = []
            wanted = point.rounds
            while True:
                calmest = load.gather(
                    rounds, partial(self._round, made, runs), limit, wanted, self.spare
                )
                self.spare -= len(rounds) - len(calmest)
                series = self._series(point, calmest)
                if not series.unsure(NEARPATH) or wanted >= point.rounds * self.patience:
                    break
                wanted = min(2 * wanted, point.rounds * self.patience)
        changes = {key: value - before.get(key, 0) for key, value in self._counters().items()}
        series.counters = {key: value for key, value in changes.items() if value}
        self.rounds += wanted
        self.disturbed += max(0, wanted - load.calm(rounds, limit))
        return series

    def _series(self, point: Point, rounds: Sequence[_Round]) -> Series:
        series = Series(point)
        for each in rounds:
            for arm, (reading, wire) in zip(self.arms, each.runs, strict=True):
                series.add(arm.name, reading.value, reading.p99, wire)
        return series

    def _counters(self) -> dict[str, int]:
        """The lane's, of the whole node: messages and bytes by path, and the reasons."""
        totals = socket_lane.totals(self.place)
        reasons: dict[str, int] = totals["reasons"]
        return {key: totals[key] for key in tables.MESSAGES} | reasons

    def _round(self, made: Lab, runs: Sequence[Callable[[], load.Reading]], number: int) -> _Round:
        """Every arm once, beginning with another one than in the round before."""
        found: dict[int, tuple[load.Reading, float]] = {}
        for step in range(len(runs)):
            self._stop.check()
            index = (number + step) % len(runs)
            before = made.veth_bytes()
            reading = runs[index]()
            found[index] = reading, (made.veth_bytes() - before) / reading.work
        return _Round([found[index] for index in range(len(runs))])

    def _run(
        self, stack: ExitStack, made: Lab, arm: Arm, point: Point
    ) -> Callable[[], load.Reading]:
        """Start the server of an arm; what runs the client once."""
        off_node = point.test in OFF_NODE
        address = made.peer if off_node else made.address
        client, server = self._sides(made, arm, point.cpus, PEER if off_node else SERVER)
        if point.test in QPERF_NAMES:
            stack.enter_context(load.serving_qperf(server, arm.qperf_ports[0]))
            test = QPERF_NAMES[point.test]
            return lambda: load.ask_qperf(client, test, point.size, address, arm.qperf_ports, 1)
        job = load.Job(
            JOBS[point.test],
            max(point.size, 1),
            point.test == STREAM_NODELAY,
            self._times.warm_ms,
            self._times.measure_ms,
        )
        serving = stack.enter_context(load.serving(server, job, arm.port))
        one = point.cpus == 1
        return lambda: load.ask(client, job, address, arm.port, serving, one_cpu=one)


@contextmanager
def ready(
    others: Sequence[Other], changes: dict[str, int], times: Times, stop: Interrupts
) -> Iterator[Bench]:
    """Load the datapath privately and switch the others on; nothing is left at the end.

    Args:
        changes: settings of the datapath that are not to be as they are by default.
    """
    load.build()
    _sweep()
    own = f"{_NAME}{os.getpid()}"
    top = Path(cgroup.v2_root(), own)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{own}-"))
        stack.callback(_remove, top)
        names = [KERNEL, NEARPATH, *(f"other{number}" for number in range(len(others)))]
        for name in names:
            Path(top, name).mkdir(parents=True)
        titles = [KERNEL, NEARPATH, *(other.name for other in others)]
        arms = [
            Arm(title, str(top / name), number)
            for number, (title, name) in enumerate(zip(titles, names, strict=True))
        ]
        place = Place(f"{directory}/run", f"/sys/fs/bpf/{own}", str(top / NEARPATH))
        if not mounts.bpffs_mounted(place.pin_dir):
            stack.callback(throwaway.unmount_bpffs_if_empty)
        stack.callback(unloader.unload, place, lambda _: None, 5)
        loader.ensure(place)
        # Also where the kernel refuses guards: a bench that leaves out what other nodes pay lies.
        chosen = {"probation": settings.DEFAULTS["probation"], **changes}
        settings.write(place, **chosen)
        for other, arm in zip(others, arms[2:], strict=True):
            stack.callback(_command, other.off, arm.cgroup)
            _command(other.on, arm.cgroup)
        yield Bench(place, arms, times, stop)


def _command(command: str, directory: str) -> None:
    """Run somebody else's command.

    Raises:
        NearpathError: it failed.
    """
    environ = {**os.environ, "NEARPATH_BENCH_CGROUP": directory}
    done = subprocess.run(
        shlex.split(command), env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise NearpathError(f"`{command}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _remove(top: Path) -> None:
    """Remove our cgroups; a killed process needs a moment to leave its own."""
    end = time.monotonic() + 5
    while top.exists():
        for directory in (*(path for path in top.iterdir() if path.is_dir()), top):
            with suppress(OSError):
                directory.rmdir()
        if time.monotonic() > end:
            raise NearpathError(f"cannot remove cgroup {top}")
        if top.exists():
            time.sleep(0.02)


def _sweep() -> None:
    """Remove what a bench left that was killed (-9): its namespaces went with it."""

    def dead(name: str) -> bool:
        pid = name.removeprefix(_NAME).partition("-")[0]
        return name.startswith(_NAME) and pid.isdigit() and not Path(f"/proc/{pid}").exists()

    pins = Path("/sys/fs/bpf")
    for name in filter(dead, os.listdir(pins) if pins.is_dir() else ()):
        with tempfile.TemporaryDirectory(prefix=_NAME) as directory:
            unloader.unload(Place(f"{directory}/run", f"{pins}/{name}"), lambda _: None, 5)
    root = Path(cgroup.v2_root())
    for name in filter(dead, os.listdir(root)):
        _remove(root / name)
    for path in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        if dead(path.name):
            shutil.rmtree(path, ignore_errors=True)
