"""``nearpath demo``: measure the gain on this node, between two throwaway pods."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nearpath.cli import output
from nearpath.errors import NearpathError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nearpath.node.demo import Outcome, Plan, Series

_PICTURE = "nearpath-demo.svg"
_BAR = 40  # columns of the longest bar
_MOST_SIZES = 12
_STYLES = {"kernel": "yellow", "nearpath": "green", "tie": ""}


def add(commands: output.Commands) -> None:
    """Add the command of this module."""
    parser = output.add_command(
        commands,
        "demo",
        "measure the gain on this node, between two throwaway pods",
        "Make two pods with the installed CNI plugins and this program chained behind them,\n"
        "measure TCP latency and bandwidth between them with qperf, on the kernel path and\n"
        "through the socket lane in turn, and show the medians side by side: in a table, in\n"
        "bars and in an SVG picture. Where nearpath loses, it shows that too.\n\n"
        "Other pods of the node are not touched: the lane is switched for the demo's two pods\n"
        "only. Everything made is removed at the end, also after Ctrl-C; a datapath that was\n"
        "not loaded is unloaded again.",
        "examples:\n"
        "  nearpath demo                      about 100 s\n"
        "  nearpath demo --quick              4 sizes once, about 16 s\n"
        "  nearpath demo --rounds 5 --seconds 2 --output /tmp/demo.svg\n"
        "  nearpath demo --json > demo.json\n\n"
        "needs: qperf and the CNI plugins bridge and host-local\n"
        "  (apt-get install qperf containernetworking-plugins)\n\n"
        "exit status: 0 measured; 1 something is missing, or a run did not take the path it\n"
        "was meant to take; 130 or 143 interrupted.",
    )
    output.add_json(parser)
    parser.add_argument(
        "--rounds", type=_number(1, 100), metavar="N", help="runs per size and path (default 3)"
    )
    parser.add_argument(
        "--seconds", type=_number(1, 600), default=1, metavar="N", help="of one run (default 1)"
    )
    parser.add_argument("--quick", action="store_true", help="4 of the 8 sizes, one round")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        metavar="BYTES,…",
        help="of the messages (default: 1 to 16384 by fours)",
    )
    parser.add_argument(
        "--two-cpus",
        action="store_true",
        help="pin the two ends to two CPUs (default: both to one, which shows the stack's cost "
        "without that of waking another CPU)",
    )
    parser.add_argument(
        "--output", metavar="FILE", default=_PICTURE, help=f"picture (default ./{_PICTURE})"
    )
    parser.add_argument("--bin-dir", metavar="DIR", help="CNI plugins (/opt/cni/bin and others)")
    parser.set_defaults(run=_demo)


def _number(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"not a number from {low} to {high}: {text!r}")
        return int(text)

    return number


def _sizes(text: str) -> list[int]:
    """Sizes of messages, up to what still makes a picture."""
    number = _number(1, 1 << 20)
    sizes = sorted({number(part) for part in text.split(",")})
    if len(sizes) > _MOST_SIZES:
        raise argparse.ArgumentTypeError(f"more than {_MOST_SIZES} sizes: {text!r}")
    return sizes


def _demo(arguments: argparse.Namespace) -> int:
    from nearpath.node import chain, demo
    from nearpath.node.demo_picture import svg
    from nearpath.node.interrupt import Interrupts

    place = output.root_place()
    plan = demo.Plan(
        sizes=arguments.sizes or (demo.QUICK_SIZES if arguments.quick else demo.SIZES),
        rounds=arguments.rounds or (1 if arguments.quick else 3),
        seconds=arguments.seconds,
        two_cpus=arguments.two_cpus,
    )
    _check_writable(arguments.output)
    bin_dirs = (arguments.bin_dir,) if arguments.bin_dir else chain.PLUGIN_DIRS
    demo.check_ready(place, bin_dirs)
    with Interrupts() as interrupts, _progress(plan) as progress:
        outcome = demo.run(place, plan, bin_dirs, interrupts, progress)
    with open(arguments.output, "w", encoding="utf-8") as picture:
        picture.write(svg(outcome))
    path = os.path.abspath(arguments.output)
    if arguments.json:
        output.print_json({**outcome.report(), "picture": path})
    else:
        _print(outcome)
        print(f"\npicture: {path}")
    return output.EXIT_DONE


def _check_writable(path: str) -> None:
    """Say now, not after two minutes, that the picture has no place."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory) or os.path.isdir(path):
        raise NearpathError(f"cannot write {path}", "name a file in a directory that exists")


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else a line per size, on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    target = output.console(stderr=True)
    if not target.is_terminal:
        said = set()

        def say(what: str) -> None:
            step = what.partition(",")[0]
            if step not in said:
                said.add(step)
                print(f"nearpath demo: {step}", file=sys.stderr, flush=True)

        print(f"nearpath demo: {plan.runs} runs of {plan.seconds} s", file=sys.stderr, flush=True)
        yield say
        return
    bar = Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=target,
        transient=True,
        refresh_per_second=4,  # it runs beside the measurement
    )
    task = bar.add_task("making two pods", total=plan.runs)
    started = False

    def advance(what: str) -> None:
        nonlocal started
        bar.update(task, description=what, advance=1 if started else 0)
        started = True

    with bar:
        yield advance


def _print(outcome: Outcome) -> None:
    from nearpath.node.demo import BANDWIDTH, LATENCY

    target = output.console()
    for test, title in (
        (LATENCY, "TCP latency, one way, in µs (lower is better)"),
        (BANDWIDTH, "TCP bandwidth, in MB/s (higher is better)"),
    ):
        series = [each for each in outcome.series if each.test == test]
        target.print(f"\n{title}", style="bold")
        _print_table(series)
        _print_bars(series)
    print()
    for name, value in outcome.conditions.items():
        print(f"{name:<20} {value}")
    print("ratio                nearpath / kernel path; tie: within 3 %")
    print("in lane              part of the messages that were redirected (by the counters)")


def _print_table(series: list[Series]) -> None:
    from nearpath.node.demo import KERNEL, NEARPATH
    from nearpath.node.demo_picture import number, size_name

    shown = output.table(
        "size", "kernel path", "nearpath", "ratio", "in lane", "winner",
        right=("size", "kernel path", "nearpath", "ratio", "in lane"),
    )  # fmt: skip
    for each in series:
        shown.add_row(
            size_name(each.size),
            number(each.median(KERNEL)),
            number(each.median(NEARPATH)),
            f"{each.ratio:.2f}",
            f"{each.lane_share:.0%}",
            each.winner,
            style=_STYLES[each.winner],
        )
    output.console().print(shown)


def _print_bars(series: list[Series]) -> None:
    """Two bars per size; each size has its own scale, for bandwidths span three decades."""
    from rich.text import Text

    from nearpath.node.demo import KERNEL, NEARPATH
    from nearpath.node.demo_picture import number, size_name

    target = output.console()
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    target.print()
    for each in series:
        longest = max(each.median(path) for path in (KERNEL, NEARPATH))
        for path, style in ((KERNEL, "bright_black"), (NEARPATH, "green")):
            value = each.median(path)
            cells = "█" if utf8 else "#"
            label = size_name(each.size) if path == KERNEL else ""
            line = Text(f"{label:>7}  {path:<9}")
            line.append(cells * max(1, round(value / longest * _BAR)), style=style)
            line.append(f" {number(value)}")
            target.print(line)
