"""``nearpath calibrate``: which streams does this node carry faster in the lane?"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nearpath.cli import output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from nearpath.node.calibrate import Outcome


def add(commands: output.Commands) -> None:
    """Add the command of this module."""
    parser = output.add_command(
        commands,
        "calibrate",
        "measure which streams this node carries faster in the lane",
        "A sender that streams messages without being answered is better off in the lane if they\n"
        "are large, and on the kernel path if they are small, for TCP gathers those. From which\n"
        "size on depends on CPU, kernel and congestion control: this measures it, in about 15 s,\n"
        "between two throwaway network namespaces, with both ends on one CPU and on two. Streams\n"
        "of a size that is not slower in the lane, on one CPU or two, stay in it; others leave.\n\n"
        "The result is stored for this kernel and used at once by a loaded datapath and by\n"
        "later loads. The node's pods, settings and connections are not touched meanwhile, but\n"
        "for the load of two busy CPUs. Everything made is removed, also after Ctrl-C.",
        "examples:\n"
        "  nearpath calibrate\n"
        "  nearpath calibrate --dry-run     measure and show, change nothing\n"
        "  nearpath calibrate --reset       back to the defaults, without measuring\n\n"
        "when: once on each kind of node, while it is quiet (best when it is being set up or\n"
        "drained), and again after a change of kernel, of CPU, or of the node's default\n"
        "congestion control. A calibration of another kernel is ignored. Without any, nearpath\n"
        "uses defaults that suited the machines it was tried on; request and response traffic\n"
        "does not depend on it.\n\n"
        "The network between the two ends is the shortest that pods have (veth and a bridge, no\n"
        "filter, no address translation): on a longer path the lane gains rather more.\n\n"
        "exit status: 0 measured; 1 it could not; 130 or 143 interrupted: nothing was changed.",
    )
    output.add_json(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="measure, but change nothing")
    choice.add_argument("--reset", action="store_true", help="forget what was measured")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from nearpath.datapath import calibration, settings
    from nearpath.node import calibrate
    from nearpath.node.interrupt import Interrupts

    place = output.root_place()
    if arguments.reset:
        defaults = {name: settings.DEFAULTS[name] for name in calibration.THRESHOLDS}
        forgotten = calibration.forget(place)
        applied = calibration.apply(place, defaults)
        if arguments.json:
            output.print_json({"thresholds": defaults, "reset": forgotten, "applied": applied})
        else:
            print("forgotten" if forgotten else "there was no calibration")
            print(_sentence(defaults, applied))
        return output.EXIT_DONE
    runs = len(calibrate.SIZES) * len(calibrate.arrangements())
    # Workers are forked: no thread of a progress bar may run then.
    with Interrupts() as interrupts, _progress(runs) as progress:
        outcome = calibrate.run(place, interrupts, progress)
    found, details = outcome.thresholds, outcome.report()
    applied = False
    if not arguments.dry_run:
        calibration.write(place, found, details)
        applied = calibration.apply(place, found)
    if arguments.json:
        stored = not arguments.dry_run
        output.print_json({"thresholds": found, "stored": stored, "applied": applied, **details})
        return output.EXIT_DONE
    _print(outcome, details)
    print(_sentence(found, applied, stored=not arguments.dry_run))
    return output.EXIT_DONE


@contextmanager
def _progress(runs: int) -> Iterator[Callable[[str], None]]:
    """One line on a terminal, rewritten; a few lines elsewhere; on stderr."""
    terminal = sys.stderr.isatty()
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        if terminal:
            print(f"\r\x1b[Kcalibrating {done}/{runs}: {what}", end="", file=sys.stderr, flush=True)
        elif done % 5 == 1:
            print(f"nearpath calibrate: {done}/{runs}, {what}", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _sentence(found: dict[str, int], applied: bool, stored: bool = True) -> str:
    """What the thresholds mean and where they hold now."""
    from nearpath.cli.show import kept_streams

    text = f"streams {kept_streams(found['stream_from'], found['stream_to'])}"
    if not stored:
        return f"{text} would be the result; nothing was changed"
    return f"{text}: {'in use now' if applied else 'used when the datapath is loaded'}"


def _print(outcome: Outcome, details: dict[str, Any]) -> None:
    from nearpath.cli.show import size
    from nearpath.node.calibrate import KERNEL, LANE

    names = list(outcome.cpus)
    heads = [f"{what}, {name}" for name in names for what in ("kernel", "lane", "ratio")]
    table = output.table("size", *heads, "worse", right=("size", *heads, "worse"))
    found = outcome.thresholds
    for each in outcome.results:
        cells = []
        for name in names:
            cells += [f"{each.rates[name][path] / 1e6:,.1f}" for path in (KERNEL, LANE)]
            cells.append(f"{each.ratio(name):.2f}")
        stays = found["stream_from"] <= each.size < found["stream_to"]
        table.add_row(
            size(each.size).replace(".0 ", " "),
            *cells,
            f"{each.worst:.2f}",
            style="green" if stays else "",
        )
    output.console().print(table)
    print("MB/s of a one-way stream by message size; ratio: lane / kernel path; medians of")
    print(f"{details['rounds']} interleaved runs, {details['congestion_control']}")
    if outcome.noisy:
        print(
            f"this node is busy: runs of the same kind differ by {outcome.scatter:.0%}; "
            "calibrate again when it is quiet"
        )
