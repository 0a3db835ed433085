"""The demo: kernel path against nearpath, between the same two pods, in one go.

Each size is measured ``rounds`` times on both paths in turn (A B, B A, A B, …), so that
whatever else the machine does hits both alike; the medians are compared. What the lane's
counters say decides whether a run counts: a run on the wrong path is an error, not a number.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nearpath import VERSION, state
from nearpath.datapath import loader, unloader
from nearpath.errors import NearpathError
from nearpath.kernel import features, mounts, throwaway
from nearpath.lanes import socket as lane
from nearpath.node import chain, demo_pods, demo_qperf

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nearpath.node.demo_pods import Pod
    from nearpath.node.interrupt import Interrupts
    from nearpath.place import Place

LATENCY, BANDWIDTH = "tcp_lat", "tcp_bw"
UNITS = {LATENCY: "µs", BANDWIDTH: "MB/s"}
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
QUICK_SIZES = (1, 64, 1024, 16384)
KERNEL, NEARPATH = "kernel", "nearpath"
# Closer than this is a tie: medians of a few runs do not tell such paths apart.
_TIE = 0.03
# Part of the messages of a latency run that must have been redirected for it to count.
_MOST = 0.9


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        sizes: of the messages, in bytes.
        rounds: runs of each size on each path.
        seconds: of one run, a whole number (qperf).
        two_cpus: pin the two ends to two CPUs instead of one.
    """

    sizes: Sequence[int] = SIZES
    rounds: int = 3
    seconds: int = 1
    two_cpus: bool = False

    @property
    def runs(self) -> int:
        """Number of runs of qperf."""
        return 2 * len(self.sizes) * self.rounds * 2

    def cpus(self) -> tuple[int, int]:
        """CPUs of client and server, the last ones that we may use (0 serves interrupts)."""
        usable = sorted(os.sched_getaffinity(0))
        if self.two_cpus and len(usable) < 2:
            raise NearpathError("only one CPU may be used", "leave out --two-cpus")
        return (usable[-2] if self.two_cpus else usable[-1]), usable[-1]


@dataclass
class Series:
    """The runs of one test at one size; values in µs or MB/s."""

    test: str
    size: int
    values: dict[str, list[float]] = field(default_factory=lambda: {KERNEL: [], NEARPATH: []})
    lane_shares: list[float] = field(default_factory=list)

    def median(self, path: str) -> float:
        """The median of the runs on one path."""
        return statistics.median(self.values[path])

    @property
    def ratio(self) -> float:
        """Of nearpath to the kernel path: of latencies below 1 is better, of bandwidths above 1."""
        return self.median(NEARPATH) / self.median(KERNEL)

    @property
    def winner(self) -> str:
        """``kernel``, ``nearpath`` or ``tie``."""
        if abs(self.ratio - 1) <= _TIE:
            return "tie"
        return NEARPATH if (self.ratio < 1) == (self.test == LATENCY) else KERNEL

    @property
    def lane_share(self) -> float:
        """Part of the messages of the nearpath runs that were redirected (0 to 1)."""
        return statistics.median(self.lane_shares)


@dataclass(frozen=True)
class Outcome:
    """All series, and under what conditions they were measured."""

    plan: Plan
    pinning: str
    series: list[Series]
    guards: str = "attached"

    @property
    def conditions(self) -> dict[str, str]:
        """What a number is worth nothing without."""
        rounds, seconds = self.plan.rounds, self.plan.seconds
        what = f"medians of {rounds} runs" if rounds > 1 else "one run"
        return {
            "kernel": features.release(),
            "congestion control": demo_pods.CONGESTION_CONTROL,
            "path": demo_pods.PATH,
            "pinning": self.pinning,
            "runs": f"{what} of {seconds} s on each path, interleaved",
            "guards": self.guards,
        }

    def report(self) -> dict[str, Any]:
        """For programs."""
        conditions = {key.replace(" ", "_"): value for key, value in self.conditions.items()}
        return {
            "version": VERSION,
            **conditions,
            "rounds": self.plan.rounds,
            "seconds": self.plan.seconds,
            "results": [
                {
                    "test": each.test,
                    "size": each.size,
                    "unit": UNITS[each.test],
                    KERNEL: each.median(KERNEL),
                    NEARPATH: each.median(NEARPATH),
                    "ratio": each.ratio,
                    "winner": each.winner,
                    "lane_share": each.lane_share,
                    "kernel_runs": each.values[KERNEL],
                    "nearpath_runs": each.values[NEARPATH],
                }
                for each in self.series
            ],
        }


@dataclass(frozen=True)
class Counts:
    """The two pods' counters of the socket lane, added up."""

    joined: int
    redirected: int
    by_kernel: int

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.joined - before.joined,
            self.redirected - before.redirected,
            self.by_kernel - before.by_kernel,
        )


def counts(place: Place, pods: Sequence[Pod]) -> Counts:
    """What the lane has done for these pods so far."""
    known = lane.by_pod(place)
    mine = [known[pod.cookie] for pod in pods if pod.cookie in known]
    return Counts(
        sum(pod["reasons"].get("joined", 0) for pod in mine),
        sum(pod["redirected_messages"] for pod in mine),
        sum(pod["kernel_messages"] for pod in mine),
    )


def verify(run: str, path: str, messages: int, did: Counts) -> float:
    """Check that a run took the path that it was meant to take.

    Args:
        run: test and size, e.g. ``tcp_lat of 64 B``.
        messages: that qperf has sent.
        did: what the lane did meanwhile.

    Returns:
        Part of the messages that were redirected.

    Raises:
        NearpathError: it did not.
    """
    what = f"{run} on the {path} path"
    remedy = "nothing was measured; see `nearpath doctor` and `nearpath status`"
    if path == KERNEL:
        if did.joined or did.redirected:
            raise NearpathError(
                f"{what}: {did.joined} sockets joined the socket lane all the same", remedy
            )
        return 0.0
    # Both connections of a run (qperf's control and the data) have both their ends here.
    if did.joined < 2 * 2:
        raise NearpathError(f"{what}: only {did.joined} of 4 sockets joined the lane", remedy)
    share = did.redirected / max(messages, 1)
    if run.startswith(LATENCY) and share < _MOST:
        raise NearpathError(
            f"{what}: only {did.redirected} of {messages} messages were redirected", remedy
        )
    if not did.redirected:
        raise NearpathError(f"{what}: no message was redirected", remedy)
    return min(share, 1.0)


class _Before:
    """What there was before the demo, put back at the end."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._loaded = loader.is_loaded(place)
        self._mounted = mounts.bpffs_mounted(place.pin_dir)
        self._run_dir = os.path.lexists(place.run_dir)

    def restore(self) -> None:
        """Unload what the demo's ADD has loaded, unless a pod has come to need it."""
        if self._loaded or any(True for _ in state.records(self._place)):
            return
        if os.path.isdir(self._place.layout_dir):
            unloader.retire(self._place)
        if not self._mounted and not os.path.exists(self._place.pin_dir):
            with suppress(OSError):
                throwaway.unmount_bpffs_if_empty()
        if not self._run_dir:
            self._remove_run_dir()

    def _remove_run_dir(self) -> None:
        """Remove the run directory that the demo's ADD has made, unless a record is there."""
        place = self._place
        with suppress(OSError), state.Lock(place):
            with suppress(FileNotFoundError):
                os.rmdir(place.attachments_dir)  # fails if an ADD has come meanwhile
            for entry in os.scandir(place.run_dir):
                os.unlink(entry.path)
            os.rmdir(place.run_dir)


def run(
    place: Place,
    plan: Plan,
    bin_dirs: Sequence[str],
    interrupts: Interrupts,
    progress: Callable[[str], None],
) -> Outcome:
    """Make the pods, measure, and leave everything as it was.

    Args:
        progress: called before each run with what it is, ``plan.runs`` times.

    Raises:
        Interrupted: a signal came; everything is as it was.
        NearpathError: something is missing or failed; everything is as it was.
    """
    check_ready(place, bin_dirs)
    cpus = plan.cpus()
    demo_pods.sweep(place)
    with ExitStack() as stack:
        stack.callback(_Before(place).restore)
        pods = stack.enter_context(demo_pods.pods(bin_dirs, interrupts))
        qperf = demo_qperf.Qperf(pods[0], pods[1], cpus, interrupts)
        stack.enter_context(qperf.serving())
        guards = _guards(place)
        bench = _Bench(place, pods, qperf)
        series = [Series(test, size) for test in (LATENCY, BANDWIDTH) for size in plan.sizes]
        for each in series:
            for number in range(plan.rounds):
                paths = (KERNEL, NEARPATH) if number % 2 == 0 else (NEARPATH, KERNEL)
                for path in paths:
                    interrupts.check()
                    progress(f"{each.test} {each.size} B, {path}")
                    bench.run(each, path, plan.seconds)
    if plan.two_cpus:
        pinning = f"client on CPU {cpus[0]}, server on CPU {cpus[1]}"
    else:
        pinning = f"both ends on CPU {cpus[0]}"
    return Outcome(plan, pinning, series, guards)


def _guards(place: Place) -> str:
    """Whether they are attached, for without them the first messages need no probation."""
    if loader.is_guarded(place):
        return "attached"
    return "not attached, for this kernel refuses them: see `nearpath doctor`"


class _Bench:
    """Runs of qperf on either path between two pods."""

    def __init__(self, place: Place, pods: Sequence[Pod], qperf: demo_qperf.Qperf) -> None:
        self._place = place
        self._pods = pods
        self._qperf = qperf

    def run(self, series: Series, path: str, seconds: int) -> None:
        """One run on one path, added to the series."""
        for pod in self._pods:
            lane.register(self._place, pod.cookie, enabled=path == NEARPATH)
        before = counts(self._place, self._pods)
        reading = self._qperf.run(series.test, series.size, seconds)
        did = counts(self._place, self._pods) - before
        share = verify(f"{series.test} of {series.size} B", path, reading.messages, did)
        series.values[path].append(reading.value)
        if path == NEARPATH:
            series.lane_shares.append(share)


def check_ready(place: Place, bin_dirs: Sequence[str]) -> None:
    """Look for what the demo needs, before anything is made.

    Raises:
        NearpathError: names what is missing, and the remedy.
    """
    demo_qperf.executable()
    for kind in ("bridge", "host-local"):
        if chain.find_plugin(kind, bin_dirs) is None:
            raise NearpathError(
                f"CNI plugin {kind} is not in {', '.join(bin_dirs)}",
                "apt-get install containernetworking-plugins",
            )
    if os.path.exists(place.unloaded_file):
        raise NearpathError("an operator has unloaded nearpath on this node", "nearpath load")
    if loader.is_loaded(place) and loader.describe(place)["paused"]:
        raise NearpathError("nearpath is paused on this node", "nearpath resume")
