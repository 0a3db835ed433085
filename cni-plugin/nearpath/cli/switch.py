"""``nearpath load`` and ``unload``: switch the datapath on and off, gently."""

from __future__ import annotations

import argparse
import sys

from nearpath.cli import output
from nearpath.errors import NearpathError


def add(commands: output.Commands) -> None:
    """Add the commands of this module."""
    parser = output.add_command(
        commands,
        "load",
        "load the datapath now, or upgrade it",
        "Load the programs, or replace those of another version, and register the pods that\n"
        "are recorded; likewise the watcher of virtual machines. Usually not needed: the first\n"
        "pod's ADD loads. It is needed after `nearpath unload`, and after an upgrade of nearpath.",
        "examples:\n"
        "  nearpath load\n"
        "  nearpath unload && nearpath load --max-connections 100000\n\n"
        "Established connections stay on the path they have; new ones take the lane.\n"
        "A pause stays until `nearpath resume`. So do settings that were changed, also over an\n"
        "upgrade, and the room of a datapath that is loaded already.",
    )
    output.add_json(parser)
    parser.add_argument(
        "--max-connections",
        type=_room,
        default=0,
        metavar="N",
        help="accelerated connections to have room for, 1024 to 1048576 (default: by memory, "
        "one per 256 KiB)",
    )
    parser.set_defaults(run=_load)

    parser = output.add_command(
        commands,
        "unload",
        "switch it off; no connection loses a byte",
        "Pause: no socket joins any more and every message takes the kernel path. Then wait\n"
        "for the sockets in the maps to be closed by their owners. Maps and programs stay\n"
        "until then, for removing a socket with unread data would lose it. Virtual machines go\n"
        "back to their bridge, with the offloads that they had. Pods that start before the next\n"
        "`nearpath load` are taken in by it.",
        "examples:\n"
        "  nearpath unload\n"
        "  nearpath unload --timeout 0    do not wait; what is left goes with a later unload\n\n"
        "exit status: 0 also if sockets are still open after the timeout: the lane is off.",
    )
    output.add_json(parser)
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for open sockets (default 30)",
    )
    parser.set_defaults(run=_unload)


def _seconds(text: str) -> float:
    """A number of seconds up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"not a number from 0 to 86400: {text!r}")
    return value


def _room(text: str) -> int:
    """A number of connections that the maps can be made for."""
    if not text.isdecimal() or not 1024 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"not a number from 1024 to 1048576: {text!r}")
    return int(text)


def _load(arguments: argparse.Namespace) -> int:
    from nearpath.datapath import changes, loader, sizes
    from nearpath.node import register, taps

    place = output.root_place()
    wanted = arguments.max_connections
    changed = loader.load(place, wanted)
    registered = register.recorded(place)
    kept = changes.read(place)
    failed = taps.pause(place, paused=bool(kept.get("paused")))
    renewed = taps.renew_watcher(place)
    maps = sizes.of_pinned(place)
    shown = {**loader.describe(place), "changed": changed, "registered": registered, "maps": maps}
    shown["watcher"] = renewed
    shown["settings"] = kept
    if arguments.json:
        output.print_json(shown)
        return output.EXIT_DONE
    print("loaded" if changed else "already loaded", f"at {shown['pins']}")
    if kept:
        values = ", ".join(f"{name}={value}" for name, value in kept.items())
        print(f"settings that were changed before and stay so: {values}")
    for name in changes.unusable(place):
        print(f"a change of the setting {name} is lost: this version has no use for it")
    room = maps["connections"]
    if wanted and room != wanted:
        print(f"room for {room} connections, as when it was loaded: `nearpath unload` first")
    if registered:
        print(f"registered {registered} recorded pods that the programs did not know")
    if renewed:
        print("started a watcher of virtual machines")
    for text in failed.values():
        print(f"nearpath: virtual machine: {text}", file=sys.stderr)
    return output.EXIT_DONE


def _unload(arguments: argparse.Namespace) -> int:
    from nearpath.datapath import loader, unloader
    from nearpath.node import taps

    place = output.root_place()
    target = sys.stderr if arguments.json else sys.stdout

    def report(step: str) -> None:
        print(step, file=target, flush=True)

    shown = unloader.unload(place, report, arguments.timeout)
    taps.stop_watcher(place)
    failed = taps.attend_all(place)  # the tap lanes go by the mark that the unload left
    for text in failed.values():
        print(f"nearpath: virtual machine: {text}", file=sys.stderr)
    if loader.is_loaded(place):
        raise NearpathError("the datapath is loaded again", "somebody ran `nearpath load`")
    if arguments.json:
        output.print_json(shown)
    elif not shown["drained"]:
        print(f"{shown['remaining']} sockets are still open: they keep working, on the kernel path")
    return output.EXIT_DONE
