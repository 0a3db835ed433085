"""What bench_lane.py measures, in which order and for how long, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from bench.lab import HEAVY, LIGHT

CUBIC, BBR = "cubic", "bbr"
# Tests, as the tables name them.
LATENCY, STREAM, STREAM_NODELAY = "latency", "stream", "stream, Nagle off"
REQUEST, CONNECT = "connect, request, close", "connect, close"
OFF_LATENCY, OFF_STREAM, OFF_REQUEST = "off-node latency", "off-node stream", "off-node requests"
QPERF_LATENCY, QPERF_STREAM = "qperf tcp_lat", "qperf tcp_bw"
UNITS = {
    **dict.fromkeys((LATENCY, OFF_LATENCY, QPERF_LATENCY), "µs"),
    **dict.fromkeys((STREAM, STREAM_NODELAY, OFF_STREAM, QPERF_STREAM), "MB/s"),
    **dict.fromkeys((REQUEST, CONNECT, OFF_REQUEST), "/s"),
}
QPERF_NAMES = {QPERF_LATENCY: "tcp_lat", QPERF_STREAM: "tcp_bw"}
# Test of load.c (see there), by ours; and those that go to the peer elsewhere.
JOBS = {
    **dict.fromkeys((LATENCY, OFF_LATENCY), "lat"),
    **dict.fromkeys((STREAM, STREAM_NODELAY, OFF_STREAM), "stream"),
    **dict.fromkeys((REQUEST, OFF_REQUEST), "request"),
    CONNECT: "connect",
}
OFF_NODE = (OFF_LATENCY, OFF_STREAM, OFF_REQUEST)

KiB = 1024
_LATENCY_SIZES = (1, 16, 64, 256, KiB, 4 * KiB, 16 * KiB)
_STREAM_SIZES = (1, 16, 64, 256, KiB, 4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB)
_QUICK_LATENCY = (1, KiB, 16 * KiB)
_QUICK_STREAM = (1, 64, KiB, 16 * KiB, 256 * KiB)
_OFF_LATENCY_SIZES = (1, 16 * KiB)
_OFF_STREAM_SIZES = (KiB, 64 * KiB)
# Differences of a few per cent are sought here, so more runs.
_FINE = (REQUEST, CONNECT, *OFF_NODE)


@dataclass(frozen=True)
class Point:
    """One thing that is measured on every path in turn.

    Attributes:
        path: LIGHT or HEAVY.
        control: congestion control.
        cpus: 1 or 2 for both ends together.
        test: one of the names above.
        size: of a message in bytes; 0: the test has none.
        rounds: runs on each path.
    """

    path: str
    control: str
    cpus: int
    test: str
    size: int
    rounds: int

    @property
    def seconds(self) -> float:
        """About how long the runs on one path take, with the start of a process each."""
        return self.rounds * (1.1 if self.test in QPERF_NAMES else 0.095)

    @property
    def less_is_better(self) -> bool:
        """Of the values."""
        return UNITS[self.test] == "µs"

    @property
    def target(self) -> float | None:
        """What the ratio to the kernel path is to reach; None: nothing is asked.

        At most it where less is better, else at least it. Gains are asked for where there is
        something to gain: on the heavy path, and in latency on one CPU, for on two most of it
        is the wake-up of the other one. That nothing is lost is asked for everywhere.
        """
        if self.test in {LATENCY, QPERF_LATENCY}:
            return 0.5 if self.path == HEAVY and self.cpus == 1 else None
        if self.test in {STREAM, STREAM_NODELAY, QPERF_STREAM}:
            return 1.2 if self.path == HEAVY and KiB <= self.size <= 16 * KiB else 0.95
        if self.test in OFF_NODE:
            return 1 / 0.99 if self.less_is_better else 0.99
        return 0.97 if self.test == REQUEST else None


def _tests(*, quick: bool) -> list[tuple[str, int]]:
    streams = _QUICK_STREAM if quick else _STREAM_SIZES
    return [
        *((LATENCY, size) for size in (_QUICK_LATENCY if quick else _LATENCY_SIZES)),
        *((STREAM, size) for size in streams),
        *((STREAM_NODELAY, size) for size in streams),
        (REQUEST, 0),
        (CONNECT, 0),
        *((OFF_LATENCY, size) for size in _OFF_LATENCY_SIZES),
        *((OFF_STREAM, size) for size in _OFF_STREAM_SIZES),
        (OFF_REQUEST, 0),
    ]


def _qperf_tests() -> list[tuple[str, int]]:
    return [
        *((QPERF_LATENCY, size) for size in _LATENCY_SIZES),
        *((QPERF_STREAM, size) for size in _STREAM_SIZES),
    ]


def points(*, quick: bool, rounds: int = 0) -> list[Point]:
    """Everything that is measured, in groups of the same path, control and CPUs.

    Args:
        quick: fewer sizes, fewer rounds, no qperf, and four of the eight combinations.
        rounds: on each path; 0: as many as the time allows, fewer with bbr.
    """
    main = {(HEAVY, CUBIC, 1), (HEAVY, CUBIC, 2), (HEAVY, BBR, 1), (LIGHT, CUBIC, 1)}
    combinations = [
        (path, control, cpus)
        for path in (HEAVY, LIGHT)
        for control in (CUBIC, BBR)
        for cpus in (1, 2)
        if not quick or (path, control, cpus) in main
    ]
    result: list[Point] = []
    for path, control, cpus in combinations:
        usual = rounds or (5 if quick else 7 if control == BBR else 9)
        for test, size in _tests(quick=quick):
            count = usual if rounds or test not in _FINE else 2 * usual - 1
            result.append(Point(path, control, cpus, test, size, count))
        if (path, control, cpus) == (HEAVY, CUBIC, 1) and not quick:
            # qperf's streams have several speeds on each path; three rounds do not tell.
            result += [
                Point(path, control, cpus, test, size, rounds or (7 if test == QPERF_STREAM else 3))
                for test, size in _qperf_tests()
            ]
    return result
