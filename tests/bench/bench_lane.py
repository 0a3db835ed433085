"""The socket lane against the kernel path: latency, streams, connections, off-node traffic.

Needs root. Makes a node of its own out of network namespaces, loads the datapath privately
into a cgroup of its own, and leaves nothing behind; the node's own nearpath is not disturbed.
Every run on one path is followed by one on the other (A B, B A, …), each with a connection
of its own, both ends pinned. Rounds in which others had much of the CPU are run again, and
there are more of them where it is not clear yet whether a target is reached (--patience); on a
machine that is not quiet `nice -n -20` helps too. Columns:

    kernel, nearpath   medians of the runs
    ratio, worst       of the lane to the kernel path: median of the rounds, and the worst round
    p99                ratio of the 99th percentiles of single turns, where there are turns
    saved              of the kernel path's bytes on the client's veth
    target             met, not met; "?": it lies within the 95 % confidence interval of the
                       ratio, so that this run does not tell. The exit status ignores it.

Paths: light and heavy, see lab.py. Load: load.c, and qperf where the time allows (it runs
for whole seconds and leaves Nagle's algorithm on).

    bench_lane.py                    everything, 12 to 30 minutes, by how noisy the machine is
    bench_lane.py --quick            about 2 minutes
    bench_lane.py --only heavy --only cubic --only latency
    bench_lane.py --against "NAME:COMMAND ON:COMMAND OFF"
        also somebody else's accelerator, on the same load and path. COMMAND ON attaches it to
        the cgroup $NEARPATH_BENCH_CGROUP and nowhere else, COMMAND OFF takes it away again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import time
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cni-plugin"), str(ROOT / "tests")]

# One of so many rounds may be run again.
_SPARE = 4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.lane import Other
    from bench.plan import Point
    from bench.report import Series


def _arguments() -> argparse.Namespace:
    from bench.lane import Other
    from nearpath.datapath import settings

    def other(text: str) -> Other:
        try:
            return Other.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def setting(text: str) -> tuple[str, int]:
        name, _, value = text.partition("=")
        try:
            settings.check(name, int(value))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return name, int(value)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, no qperf")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="on each path")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="light, heavy, cubic, bbr, one-cpu, two-cpus, or part of a test's name; may be "
        "repeated: of one kind any, of different kinds all",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=4,
        metavar="N",
        help="up to N times as many rounds where they do not tell whether a target is reached "
        "(default: %(default)s)",
    )
    parser.add_argument("--against", action="append", default=[], type=other, metavar="NAME:ON:OFF")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=NUMBER",
        help="a setting of the datapath, e.g. stream_messages=0; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    return parser.parse_args()


def chosen(points: Sequence[Point], words: Sequence[str]) -> list[Point]:
    """The points that the words of --only leave."""
    from bench.lab import PATHS
    from bench.plan import BBR, CUBIC

    kinds: dict[str, list[str]] = {}
    for word in words:
        kind = "test"
        for name, values in (
            ("path", tuple(PATHS)),
            ("control", (CUBIC, BBR)),
            ("cpus", ("one-cpu", "two-cpus")),
        ):
            kind = name if word in values else kind
        kinds.setdefault(kind, []).append(word)

    def fits(point: Point) -> bool:
        facts = {
            "path": point.path,
            "control": point.control,
            "cpus": "one-cpu" if point.cpus == 1 else "two-cpus",
        }
        return all(
            any(word in point.test for word in values) if kind == "test" else facts[kind] in values
            for kind, values in kinds.items()
        )

    return [point for point in points if fits(point)]


@contextmanager
def _progress(points: Sequence[Point], arms: int) -> Iterator[Callable[[Point], None]]:
    """A bar on a terminal, else a line per group, on stderr; told of each point that begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from bench.report import size_text

    console = Console(stderr=True)
    seconds = sum(point.seconds for point in points) * arms
    print(
        f"bench_lane: {len(points)} points on {arms} arms, about {seconds / 60:.0f} min",
        file=sys.stderr,
        flush=True,
    )
    if not console.is_terminal:
        said: set[tuple[str, str, int, str]] = set()

        def say(point: Point) -> None:
            step = (point.path, point.control, point.cpus, point.test)
            if step not in said:
                said.add(step)
                print(f"bench_lane: {_describe(point)}", file=sys.stderr, flush=True)

        yield say
        return
    bar = Progress(
        TextColumn("{task.description:<60}"), BarColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("", total=seconds)

        def show(point: Point) -> None:
            what = f"{_describe(point)} {size_text(point.size)}"
            bar.update(task, description=what, advance=point.seconds * arms)

        yield show


def _describe(point: Point) -> str:
    return f"{point.path}, {point.control}, {point.cpus} CPU: {point.test}"


def _measure(
    points: Sequence[Point], others: Sequence[Other], changes: dict[str, int], patience: int
) -> tuple[list[Series], dict[str, str]]:
    """Run everything; the series, and the conditions without which they mean nothing."""
    from bench import lane
    from bench.lab import use_congestion_control
    from nearpath.node.interrupt import Interrupts

    series: list[Series] = []
    times = lane.Times()
    conditions = _conditions(times)
    rounds = sum(point.rounds for point in points)
    begin = time.monotonic()
    with (
        Interrupts() as stop,
        lane.ready(others, changes, times, stop) as bench,
        _progress(points, 2 + len(others)) as progress,
    ):
        conditions |= bench.facts()
        bench.spare, bench.patience = rounds // _SPARE, patience
        for path, of_path in groupby(points, lambda point: point.path):
            with bench.lab(path) as made:
                conditions[f"{path} path"] = made.details
                for control, of_control in groupby(of_path, lambda point: point.control):
                    use_congestion_control(control, made)
                    for point in of_control:
                        progress(point)
                        series.append(bench.measure(made, point))
    conditions["noise"] = (
        f"others had much of the CPU in {bench.disturbed} of {bench.rounds} rounds, after "
        f"{rounds // _SPARE - bench.spare} were run again"
    )
    conditions["taken"] = f"{(time.monotonic() - begin) / 60:.1f} min"
    return series, conditions


def _conditions(times: Any) -> dict[str, str]:
    from bench.lane import cpus
    from bench.present import machine
    from nearpath import VERSION
    from nearpath.datapath.bundle import object_path
    from nearpath.place import LAYOUT

    built = dt.datetime.fromtimestamp(os.stat(object_path("socket_lane")).st_mtime, dt.UTC)
    first, last = cpus(min(2, len(os.sched_getaffinity(0))))
    return {
        "nearpath": f"{VERSION}, layout {LAYOUT}, programs of {built:%Y-%m-%d %H:%M} UTC",
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "kernel": os.uname().release,
        "machine": machine(),
        "pinning": f"one CPU: both ends on {last}; two: client on {first}, server on {last}",
        "runs": f"{times.measure_ms} ms after {times.warm_ms} ms of warming up (qperf: 1 s), "
        "interleaved, a new connection each",
        "load": "plain read(2) and write(2) of one message, one connection at a time",
    }


def _markdown(series: Sequence[Series], conditions: dict[str, str]) -> str:
    from bench.report import summary, tables

    facts = "\n".join(f"- **{key}**: {value}" for key, value in conditions.items())
    preface = (
        "Written by `tests/bench/bench_lane.py --markdown`; run it on your node, for these "
        "numbers depend on kernel,\nCPU and path. Values are medians of the runs. *ratio*: of "
        "the lane to the kernel path, median of the\nrounds; *worst*: the worst round; *p99*: "
        "ratio of the 99th percentiles of single turns; *saved*: of the\nkernel path's bytes on "
        "the client's veth. A question mark: the target lies within the 95 % confidence\n"
        "interval of the ratio.\n"
    )
    parts = [
        "# Socket lane: bench\n",
        preface,
        facts + "\n",
        summary(series).markdown(),
        *(table.markdown() for table in tables(series)),
    ]
    return "\n".join(parts)


def main() -> int:
    """Measure and print."""
    from bench.plan import points
    from bench.present import present
    from bench.report import summary, tables
    from nearpath.errors import NearpathError
    from nearpath.node.interrupt import Interrupted

    options = _arguments()
    if os.geteuid() != 0:
        raise SystemExit("bench_lane.py needs root: it makes network namespaces and loads BPF")
    wanted = chosen(points(quick=options.quick, rounds=options.rounds), options.only)
    if not wanted:
        raise SystemExit("bench_lane.py: --only leaves nothing")
    try:
        series, conditions = _measure(wanted, options.against, dict(options.set), options.patience)
    except NearpathError as error:
        raise SystemExit(f"bench_lane.py: {error}") from error
    except Interrupted as stopped:
        return 128 + stopped.signal
    if options.markdown:
        options.markdown.write_text(_markdown(series, conditions), encoding="utf-8")
    found = (*tables(series), summary(series))
    present(conditions, series, found, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
