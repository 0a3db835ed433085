"""The tap lane against the bridge in a virtual machine's pod: round trips and streams of UDP.

Needs root. Makes a node of its own out of network namespaces, with a pod laid out as KubeVirt's
bridge binding lays it out and a process on the tap in the guest's place (tap.c), and leaves
nothing behind. Both ends are pinned to one CPU. On one and the same VM every run on one arm is
followed by one on the next, round by round; rounds in which others had much of the CPU are run
again. Arms are

    bridge     KubeVirt's own way; with "keep" nothing is touched: the baseline of all ratios
    mirror     u32 and mirred between tap and pod NIC
    redirect   bpf_redirect between them
    peer       bpf_redirect_peer from the tap to the host's end of the pod NIC

each with checksums "keep" (as found: here offload is on everywhere), "skip" (made sure of) and
"software" (offload off). Columns:

    ratio      to the unmodified bridge of the same round: median of the rounds
    worst      of the rounds
    target     met, not met; "?": it lies within the 95 % confidence interval of the ratio, so
               that this run does not tell. The exit status ignores it.

    bench_tap.py                    everything, about 6 minutes
    bench_tap.py --quick            about 1 minute
    bench_tap.py --only "round trip" --only stream
    bench_tap.py --markdown docs/bench-tap-lane.md --picture docs/bench-tap-lane.svg
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cni-plugin"), str(ROOT / "tests")]

# One of so many rounds may be run again.
_SPARE = 4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.tap_lab import Times
    from bench.tap_plan import Point
    from bench.tap_report import TapSeries


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="on each arm")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="part of a test's name; may be repeated, any of them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write text and tables there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write an SVG there")
    return parser.parse_args()


def chosen(points: Sequence[Point], words: Sequence[str]) -> list[Point]:
    """The points that the words of --only leave."""
    return [point for point in points if not words or any(word in point.test for word in words)]


@contextmanager
def _progress(points: Sequence[Point]) -> Iterator[Callable[[Point], None]]:
    """A bar on a terminal, else a line per point, on stderr; told of each point that begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    seconds = sum(point.seconds for point in points)
    print(
        f"bench_tap: {len(points)} points, about {seconds / 60:.0f} min",
        file=sys.stderr,
        flush=True,
    )
    if not console.is_terminal:
        yield lambda point: print(f"bench_tap: {_describe(point)}", file=sys.stderr, flush=True)
        return
    bar = Progress(
        TextColumn("{task.description:<50}"), BarColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("", total=seconds)
        done = 0.0

        def show(point: Point) -> None:
            nonlocal done
            bar.update(task, description=_describe(point), completed=done)
            done += point.seconds

        yield show


def _describe(point: Point) -> str:
    from bench.report import size_text

    plain = "" if point.netfilter else ", no netfilter"
    return f"{point.test} {size_text(point.size)}{plain}"


def _measure(points: Sequence[Point]) -> tuple[list[TapSeries], dict[str, str]]:
    """Run everything; the series, and the conditions without which they mean nothing."""
    from bench import tap_arms, tap_lab
    from nearpath.node.interrupt import Interrupts

    times = tap_lab.Times()
    conditions = _conditions(times)
    rounds = sum(point.rounds for point in points)
    begin = time.monotonic()
    series: list[TapSeries] = []
    with (
        Interrupts() as stop,
        tap_arms.ready(times, stop) as bench,
        _progress(points) as progress,
    ):
        bench.spare = rounds // _SPARE
        for point in points:
            progress(point)
            series.append(bench.measure(point))
    conditions["noise"] = (
        f"others had much of the CPU in {bench.disturbed} of {rounds} rounds, after "
        f"{rounds // _SPARE - bench.spare} were run again"
    )
    conditions["taken"] = f"{(time.monotonic() - begin) / 60:.1f} min"
    return series, conditions


def _conditions(times: Times) -> dict[str, str]:
    from bench.lane import cpus
    from bench.present import machine
    from nearpath import VERSION

    (cpu, _) = cpus(1)
    return {
        "nearpath": VERSION,
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "kernel": os.uname().release,
        "machine": machine(),
        "pinning": f"client and guest on CPU {cpu}, real-time priority",
        "path": "pod, veth, bridge without netfilter, veth, pod NIC, k6t bridge, tap; MTU 1,500",
        "runs": f"{times.measure_ms} ms after {times.warm_ms} ms of warming up, interleaved",
    }


def main() -> int:
    """Measure and print."""
    from bench.present import present
    from bench.tap_plan import points
    from bench.tap_report import summary, tables
    from nearpath.errors import NearpathError
    from nearpath.node.interrupt import Interrupted

    options = _arguments()
    if os.geteuid() != 0:
        raise SystemExit("bench_tap.py needs root: it makes network namespaces and loads BPF")
    wanted = chosen(points(quick=options.quick, rounds=options.rounds), options.only)
    if not wanted:
        raise SystemExit("bench_tap.py: --only leaves nothing")
    try:
        series, conditions = _measure(wanted)
    except NearpathError as error:
        raise SystemExit(f"bench_tap.py: {error}") from error
    except Interrupted as stopped:
        return 128 + stopped.signal
    if options.markdown:
        from bench.tap_text import markdown

        picture = options.picture.name if options.picture else ""
        options.markdown.write_text(markdown(series, conditions, picture), encoding="utf-8")
    if options.picture:
        from bench.tap_picture import svg

        options.picture.write_text(svg(series, conditions), encoding="utf-8")
    found = (*tables(series), summary(series))
    present(conditions, series, found, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
