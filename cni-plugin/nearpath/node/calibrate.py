"""Find out which streams this node carries faster in the lane than by the kernel path.

    sender ── eth0 ══ veth ── bridge ── veth ══ eth0 ── receiver

Three nameless network namespaces (both ends, and the bridge between them) and a datapath with
pins, run directory and cgroup of its own: the node's pods and settings are not touched, and
nothing has a name that could stay behind but the pins and the cgroup. Two connections are
open at the same time, one in the lane, one native; a stream is sent by each in turn.

The path is the shortest that pods have in practice (no address translation, no filter), so
on the node's own path the lane gains rather more.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearpath import VERSION
from nearpath.datapath import loader, settings, tables, unloader
from nearpath.errors import NearpathError
from nearpath.kernel import cgroup, features, mounts, netns, throwaway
from nearpath.lanes import socket as lane
from nearpath.node import streams
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nearpath.node.interrupt import Interrupts
    from nearpath.node.streams import Worker

SIZES = (1, 16, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
ROUNDS = 7
# Of one run: long enough for TCP's batching to settle, short enough for SIZES x ROUNDS.
SECONDS = 0.04
KERNEL, LANE = "kernel", "lane"
ONE_CPU, TWO_CPUS = "one CPU", "two CPUs"
# A size that loses less than this between two that win is taken for noise.
_HOLE = 0.95
_NOISY = 0.35
_SENDER, _RECEIVER, _NETMASK = "198.18.0.1", "198.18.0.2", "255.255.255.252"
_NAME = "nearpath-calibrate-"
_PINS = "-calibrate-"


@dataclass
class Result:
    """Streams of one message size.

    Attributes:
        rates: medians in bytes per second, by arrangement and path.
        lane_share: part of the messages in the lane that were redirected, the smallest.
        scatter: of each median's runs, the distance between the quartiles, to the median.
    """

    size: int
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    lane_share: float = 0.0
    scatter: list[float] = field(default_factory=list)

    def ratio(self, arrangement: str) -> float:
        """The lane's rate to the kernel path's."""
        rates = self.rates[arrangement]
        return rates[LANE] / rates[KERNEL]

    @property
    def worst(self) -> float:
        """The smaller of the ratios."""
        return min(self.ratio(arrangement) for arrangement in self.rates)


def choose(worst: Mapping[int, float]) -> dict[str, int]:
    """The range of message sizes in which streams are better off in the lane.

    One range, for the programs know one. It begins and ends with sizes that do not lose; what
    loses a little between two that win is noise, and so is not what ends a range. Of several
    ranges, the one with the greatest gain.

    Args:
        worst: ratio of the lane to the kernel path by message size.

    Returns:
        The settings ``stream_from`` and ``stream_to``; both ANY_SIZE if no size wins.
    """
    ranges: list[list[int]] = [[]]
    for size in sorted(worst):
        if worst[size] < _HOLE:
            ranges.append([])
        elif worst[size] >= 1 or ranges[-1]:  # none begins with a hole
            ranges[-1].append(size)
    for each in ranges:
        while each and worst[each[-1]] < 1:  # nor ends with one
            each.pop()
    best = max(ranges, key=lambda each: sum(math.log(worst[size]) for size in each))
    best = best or max(ranges, key=len)  # all ratios exactly 1
    if not best:
        return {"stream_from": settings.ANY_SIZE, "stream_to": settings.ANY_SIZE}
    largest = best[-1] == max(worst)
    return {"stream_from": best[0], "stream_to": settings.ANY_SIZE if largest else best[-1] + 1}


@dataclass(frozen=True)
class Outcome:
    """What was measured, and what follows."""

    results: list[Result]
    cpus: dict[str, tuple[int, int]]

    @property
    def thresholds(self) -> dict[str, int]:
        """Settings by name."""
        return choose({each.size: each.worst for each in self.results})

    @property
    def scatter(self) -> float:
        """How much the runs of one measurement differ, typically; a quiet node has under 0.2."""
        return statistics.median(value for each in self.results for value in each.scatter)

    @property
    def noisy(self) -> bool:
        """Something else kept the CPUs busy: measure again."""
        return self.scatter > _NOISY

    def report(self) -> dict[str, Any]:
        """For programs, and to be stored."""
        return {
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "nearpath": VERSION,
            "congestion_control": features.sysctl("net.ipv4.tcp_congestion_control"),
            "path": "veth + bridge",
            "cpus": {name: list(pair) for name, pair in self.cpus.items()},
            "rounds": ROUNDS,
            "scatter": round(self.scatter, 3),
            "noisy": self.noisy,
            "results": [
                {
                    "size": each.size,
                    "bytes_per_second": {
                        name: {path: round(rate) for path, rate in rates.items()}
                        for name, rates in each.rates.items()
                    },
                    "ratio": {name: round(each.ratio(name), 3) for name in each.rates},
                    "worst": round(each.worst, 3),
                    "lane_share": round(each.lane_share, 3),
                }
                for each in self.results
            ],
        }


def arrangements() -> dict[str, tuple[int, int]]:
    """CPUs of sender and receiver by name: the last that we may use (0 serves interrupts)."""
    usable = sorted(os.sched_getaffinity(0))
    found = {ONE_CPU: (usable[-1], usable[-1])}
    if len(usable) > 1:
        found[TWO_CPUS] = usable[-2], usable[-1]
    return found


# -- the laboratory ----------------------------------------------------------------------------


def _private(place: Place, pid: int, run_dir: str) -> Place:
    root = place.cgroup or cgroup.v2_root()
    return Place(run_dir, f"{place.pin_dir}{_PINS}{pid}", f"{root}/{_NAME}{pid}")


def sweep(place: Place) -> None:
    """Remove what a calibration left that was killed (-9); its namespaces went with it."""

    def dead(name: str) -> bool:
        pid = name.partition(_PINS)[2].partition("-")[0]
        return pid.isdigit() and not os.path.exists(f"/proc/{pid}")

    for path in Path(place.pin_dir).parent.glob(f"{Path(place.pin_dir).name}{_PINS}*"):
        if dead(path.name):
            for directory in path.iterdir():
                unloader.remove_pins(str(directory))
            path.rmdir()
    for path in Path(place.cgroup or cgroup.v2_root()).glob(f"{_NAME}*"):
        if dead(path.name):
            path.rmdir()
    for path in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        if dead(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _namespaces() -> Iterator[tuple[int, int]]:
    """Both ends' network namespaces, connected by a bridge in a third; descriptors."""
    with ExitStack() as stack:

        def made() -> int:
            descriptor = throwaway.new_netns()
            stack.callback(os.close, descriptor)
            return descriptor

        between, *ends = made(), made(), made()
        try:
            with netns.entered(_path(between)):
                for number, end in enumerate(ends):
                    throwaway.add_veth(f"port{number}", "eth0", end)
                throwaway.add_bridge("bridge", "port0", "port1")
            for end, address in zip(ends, (_SENDER, _RECEIVER), strict=True):
                with netns.entered(_path(end)):
                    throwaway.set_address("eth0", address, _NETMASK)
        except OSError as error:
            raise NearpathError(f"cannot connect network namespaces: {error.strerror}") from error
        yield ends[0], ends[1]


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


@contextmanager
def _private_cgroup(path: str) -> Iterator[None]:
    try:
        os.mkdir(path)
    except OSError as error:
        raise NearpathError(f"cannot make cgroup {path}: {error.strerror}") from error
    try:
        yield
    finally:
        os.rmdir(path)


@contextmanager
def _datapath(place: Place) -> Iterator[None]:
    """Our own, loaded; its pins are gone at the end, also if loading was interrupted."""
    mounted = mounts.bpffs_mounted(place.pin_dir)
    try:
        loader.ensure(place, 1024)
        # What is asked is what a stream gains that stays in the lane.
        # Nothing leaves, and nothing waits until it is known how the workers read.
        settings.write(place, stream_messages=0, probation=0, careful=0)
        yield
    finally:
        if os.path.isdir(place.pin_dir):
            unloader.unload(place, lambda _: None, 5)
        if not mounted:
            with suppress(OSError):
                throwaway.unmount_bpffs_if_empty()


@contextmanager
def _laboratory(place: Place, interrupts: Interrupts) -> Iterator[_Bench]:
    """Both workers, with a connection of each kind between them."""
    with ExitStack() as stack:
        run_dir = tempfile.mkdtemp(prefix=f"{_NAME}{os.getpid()}-")
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        private = _private(place, os.getpid(), f"{run_dir}/run")
        stack.enter_context(_private_cgroup(private.cgroup))
        ends = stack.enter_context(_namespaces())
        # The workers end before the datapath goes, so that no socket is left in its maps.
        stack.enter_context(_datapath(private))
        interrupts.check()
        sender, receiver = (
            stack.enter_context(streams.Worker(name, _path(end), private.cgroup, interrupts))
            for name, end in zip(("sender", "receiver"), ends, strict=True)
        )
        port = receiver.do("listen", address=_RECEIVER)
        streams.connect(sender, receiver, KERNEL, _RECEIVER, port)
        for end in ends:
            lane.register(private, netns.cookie(_path(end)))
        streams.connect(sender, receiver, LANE, _RECEIVER, port)
        yield _Bench(private, sender, receiver)


# -- measuring ---------------------------------------------------------------------------------


class _Bench:
    """Streams between two workers over either connection."""

    def __init__(self, place: Place, sender: Worker, receiver: Worker) -> None:
        self._place = place
        self._sender = sender
        self._receiver = receiver

    def pin(self, cpus: tuple[int, int]) -> None:
        self._sender.pin(cpus[0])
        self._receiver.pin(cpus[1])

    def rate(self, path: str, size: int, seconds: float, guess: float) -> float:
        """Bytes per second of a run that takes about so long if ``guess`` is right."""
        count = max(int(guess * seconds / size), 16)
        taken = streams.stream(self._sender, self._receiver, path, size, count)
        return size * count / taken

    def sent(self) -> tuple[int, int]:
        """Messages of the sender that were redirected, and that took the kernel path.

        Raises:
            NearpathError: its connection is not in the lane; nothing else may be.
        """
        paired = list(tables.paired(self._place))
        if len(paired) != 1 or paired[0].leaving:
            raise NearpathError(
                "the connection to be measured is not in the lane",
                "nothing was measured; see `nearpath doctor`",
            )
        return paired[0].redirected_messages[0], paired[0].kernel_messages[0]

    def measure(self, result: Result, arrangement: str, interrupts: Interrupts) -> None:
        """All rounds of one size in one arrangement, added to the result."""
        size = result.size
        # A first, short run tells how many messages a run takes, and warms up.
        guess = dict.fromkeys((KERNEL, LANE), size / (2e-6 + size / 2e9))
        for path, first in guess.items():
            guess[path] = self.rate(path, size, SECONDS / 4, first)
        before = self.sent()
        rates: dict[str, list[float]] = {KERNEL: [], LANE: []}
        for number in range(ROUNDS):
            for path in (KERNEL, LANE) if number % 2 == 0 else (LANE, KERNEL):
                interrupts.check()
                rates[path].append(self.rate(path, size, SECONDS, guess[path]))
                guess[path] = statistics.median(rates[path])
        redirected, by_kernel = (now - then for now, then in zip(self.sent(), before, strict=True))
        if not redirected:
            raise NearpathError(f"no message of {size} B was redirected: nothing was measured")
        result.rates[arrangement] = {path: statistics.median(all_) for path, all_ in rates.items()}
        for all_ in rates.values():
            low, middle, high = statistics.quantiles(all_, n=4)
            result.scatter.append((high - low) / middle)
        share = redirected / (redirected + by_kernel)
        result.lane_share = min(share, result.lane_share or share)


def run(
    place: Place,
    interrupts: Interrupts,
    progress: Callable[[str], None],
    sizes: Sequence[int] = SIZES,
) -> Outcome:
    """Measure, and leave everything as it was.

    Args:
        progress: called before each size with what it is, len(sizes) x CPU arrangements times.

    Raises:
        Interrupted: a signal came; everything is as it was.
        NearpathError: something is missing or failed; everything is as it was.
    """
    sweep(place)
    cpus = arrangements()
    results = [Result(size) for size in sizes]
    with _laboratory(place, interrupts) as bench:
        for name, pair in cpus.items():
            bench.pin(pair)
            for each in results:
                interrupts.check()
                progress(f"{each.size} B, {name}")
                bench.measure(each, name, interrupts)
    return Outcome(results, cpus)
