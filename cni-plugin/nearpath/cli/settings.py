"""``nearpath settings``, ``pause`` and ``resume``: the rules of the lane, live."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nearpath.cli import output
from nearpath.errors import NearpathError

if TYPE_CHECKING:
    from nearpath.place import Place

_SAID = {
    (True, True): "paused: no socket joins, every message takes the kernel path",
    (True, False): "paused already",
    (False, True): "resumed",
    (False, False): "was not paused",
}


def add(commands: output.Commands) -> None:
    """Add the commands of this module."""
    parser = output.add_command(
        commands,
        "settings",
        "show or change the rules by which each message chooses its path",
        "Show the settings of the loaded datapath, or change some. They hold from the next\n"
        "message on, also for established connections, and until they are changed back or the\n"
        "node restarts, over upgrades too. Of a rule, 0 is off.",
        "examples:\n"
        "  nearpath settings\n"
        "  nearpath settings revalidate_ms=250        policy binds four times as fast\n"
        "  nearpath settings stream_messages=0        streams stay in the lane\n"
        "  nearpath settings --json | jq '.[] | select(.value != .default)'\n\n"
        "Without some rules connections break (bytes change places, readers hang, memory fills)\n"
        "or the kernel does: such a change needs --unsafe and is for experiments only.\n"
        "stream_from and stream_to are what `nearpath calibrate` finds out.\n\n"
        "exit status: 0 done; 1 not loaded, or refused: then nothing was changed.",
    )
    output.add_json(parser)
    parser.add_argument("--unsafe", action="store_true", help="also what breaks connections")
    parser.add_argument(
        "changes", nargs="*", type=_change, metavar="NAME=VALUE", help="settings to change"
    )
    parser.set_defaults(run=_settings)

    parser = output.add_command(
        commands,
        "pause",
        "every message takes the kernel path, at once; `resume` reverses",
        "Pause the lanes: no socket joins any more and every message takes the kernel path from\n"
        "now on, and frames of virtual machines pass their bridge again. Established\n"
        "connections go on and lose nothing; what was redirected before is read first. Programs\n"
        "and maps stay, so `nearpath resume` takes effect at once, also for the connections\n"
        "that are in the lane; those made meanwhile stay on the kernel path.",
        "example:\n  nearpath pause && nearpath status\n\n"
        "To take nearpath out for good, use `nearpath unload`. A pause ends with `resume`,\n"
        "with `unload`, and with the node; not with an upgrade.\n\n"
        "exit status: 0 also if it was paused already; 1 nothing is loaded.",
    )
    output.add_json(parser)
    parser.set_defaults(run=_pause)

    parser = output.add_command(
        commands,
        "resume",
        "end a pause",
        "Let sockets join and messages take the lane again after `nearpath pause`.",
        "example:\n  nearpath resume\n\nexit status: 0 also if there was no pause; 1 not loaded.",
    )
    output.add_json(parser)
    parser.set_defaults(run=_resume)


def _change(text: str) -> tuple[str, int]:
    """NAME=VALUE; the value in decimal, or in hexadecimal after 0x."""
    name, equals, value = text.partition("=")
    try:
        number = int(value, 16 if value[:2].lower() == "0x" else 10)
    except ValueError:
        number = -1
    if not equals or not name or number < 0:
        raise argparse.ArgumentTypeError(f"not NAME=VALUE with a whole number: {text!r}")
    return name, number


def danger(name: str, value: int) -> str:
    """What a change would break; empty if it is safe."""
    from nearpath.datapath import settings
    from nearpath.kernel import features

    if name in settings.UNSAFE and value == 0:
        return "without this rule connections break"
    if name == "probation" and value == 0:
        return "the guards see how a reader reads only while it is on probation"
    if name != "mptcp_fallback" or not value:
        return ""
    if features.mptcp_children_are_safe(features.version()):
        return ""
    return "this kernel may crash when a child of an MPTCP listener is in a sockmap"


def _write(place: Place, changes: dict[str, int]) -> dict[str, int]:
    """Change settings of the loaded datapath under the node lock; those from before.

    Raises:
        NearpathError: nothing is loaded.
    """
    from nearpath import state
    from nearpath.datapath import changes as changed
    from nearpath.datapath import loader, settings

    if not loader.is_loaded(place):  # before the lock: it makes the run directory
        raise _not_loaded()
    with state.Lock(place):
        if not loader.is_loaded(place):
            raise _not_loaded()
        before = settings.read(place)
        settings.write(place, **changes)
        changed.note(place, changes)
    return before


def _not_loaded() -> NearpathError:
    return NearpathError("the datapath is not loaded", "nearpath load")


def _settings(arguments: argparse.Namespace) -> int:
    from nearpath.datapath import loader, settings

    place = output.root_place()
    changes: dict[str, int] = dict(arguments.changes)
    for name, value in changes.items():
        try:
            settings.check(name, value)
        except ValueError as error:
            raise NearpathError(str(error)) from error
        problem = danger(name, value)
        if problem and not arguments.unsafe:
            raise NearpathError(f"{name}={value} is unsafe: {problem}", "--unsafe does it anyway")
    if changes:
        before = _write(place, changes)
        if not arguments.json:
            for name, value in changes.items():
                print(f"{name}: {before[name]} → {value}")
            return output.EXIT_DONE
    if not loader.is_loaded(place):
        raise _not_loaded()
    now = settings.read(place)
    if arguments.json:
        output.print_json(
            [
                {
                    "name": name,
                    "value": now[name],
                    "default": default,
                    "least": least,
                    "most": most,
                    "meaning": meaning,
                }
                for name, (default, (least, most), meaning) in settings.SETTINGS.items()
            ]
        )
        return output.EXIT_DONE
    shown = output.table("setting", "value", "default", "meaning", right=("value", "default"))
    for name, (default, _, meaning) in settings.SETTINGS.items():
        style = "" if now[name] == default else "yellow"
        shown.add_row(name, _number(now[name]), _number(default), meaning, style=style)
    output.console().print(shown)
    return output.EXIT_DONE


def _number(value: int) -> str:
    from nearpath.datapath import settings

    return "any" if value == settings.ANY_SIZE else str(value)


def _pause(arguments: argparse.Namespace) -> int:
    return _switch(arguments, paused=1)


def _resume(arguments: argparse.Namespace) -> int:
    return _switch(arguments, paused=0)


def _switch(arguments: argparse.Namespace, paused: int) -> int:
    from nearpath.datapath import loader
    from nearpath.node import taps

    place = output.root_place()
    machines = taps.totals(place)
    changed = machines["paused"] != bool(paused) if machines["pods"] else False
    # A node may have virtual machines and no datapath, if its kernel has no use for one.
    if loader.is_loaded(place) or not machines["pods"]:
        changed = _write(place, {"paused": paused})["paused"] != paused
    failed = taps.pause(place, paused=bool(paused))
    if arguments.json:
        output.print_json({"paused": bool(paused), "changed": changed, "failed": len(failed)})
    else:
        print(_SAID[bool(paused), changed])
    if failed:
        raise NearpathError(
            f"{len(failed)} virtual machines not yet: {next(iter(failed.values()))}"
        )
    return output.EXIT_DONE
