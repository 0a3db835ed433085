"""``nearpath connections``: who talks to whom through the lane, and by which path now."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from nearpath.cli import output
from nearpath.cli.show import REASONS, size

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMIT = 200
_ROOM = 100  # columns in which the longest IPv6 address has its line
# What a reason means of one connection; of the others show.REASONS says it.
_WORDS = {
    "left": "its FIN is sent",
    "streaming": "it streams messages of a size that TCP carries faster",
    "unhelped": "so much in a row took the kernel path that the lane is of no use to it",
    "duplex": "a task reads it while another writes",
    "zerocopy": "it sends with MSG_ZEROCOPY",
    "revalidate": "just this message: policy and conntrack are to see the flow now and then",
}


def add(commands: output.Commands) -> None:
    """Add the command of this module."""
    parser = output.add_command(
        commands,
        "connections",
        "connections in the lane: their pods, path now, and bytes by path",
        "List the live connections between two pods of this node that are paired in the lane,\n"
        "the busiest first. Each has two rows, one per side: what that side calls the two\n"
        "addresses (they differ where something translates them, as a ClusterIP or a sidecar\n"
        "does), and what it has sent by which path.",
        "examples:\n"
        "  nearpath connections\n"
        "  nearpath connections --pod shop/cart-7d9f8 --limit 20\n"
        "  nearpath connections --json | jq '.[] | select(.client.path == \"kernel\")'\n\n"
        "paths:\n"
        "  lane     from socket to socket\n"
        "  kernel   its socket is in the lane, but its last message took the kernel path, or\n"
        "           the next one will; below it the reason\n"
        "  native   its socket has left the lane for good and runs as if there was none;\n"
        "           messages and bytes are those from before\n"
        "  -        nothing sent yet\n\n"
        "With --json all connections are printed, in no order, unless there is a --limit.\n"
        "Connections that never joined are not listed; `nearpath status` counts the reasons.",
    )
    output.add_json(parser)
    parser.add_argument("--pod", type=_pod, metavar="NAMESPACE/NAME", help="only those of this pod")
    parser.add_argument(
        "--limit", type=_count, metavar="N", help=f"at most so many (table: {_LIMIT})"
    )
    parser.set_defaults(run=_connections)


def _pod(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not slash or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"not NAMESPACE/NAME: {text!r}")
    return namespace, name


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"not a number from 1 to 10000000: {text!r}")
    return int(text)


def _connections(arguments: argparse.Namespace) -> int:
    from nearpath.datapath import loader
    from nearpath.node import connections

    place = output.root_place()
    cookies = connections.cookies_of(place, *arguments.pod) if arguments.pod else None
    if arguments.json and not arguments.limit:
        _stream(connections.live(place, cookies))
        return output.EXIT_DONE
    shown, count = connections.busiest(place, arguments.limit or _LIMIT, cookies)
    if arguments.json:
        _stream(iter(shown))
    elif not loader.is_loaded(place):
        print("no connections: the datapath is not loaded")
    elif not shown:
        print("no connections: none is paired in the lane now")
    else:
        _print(shown)
        if count > len(shown):
            print(f"{count - len(shown):,} more; see --limit and --pod")
    return output.EXIT_DONE


def _stream(shown: Iterator[dict[str, Any]]) -> None:
    """A JSON array, a line per connection, without holding all of them."""
    separator = "["
    for connection in shown:
        print(separator, json.dumps(connection), sep="\n" if separator == "[" else "")
        separator = ","
    print("[]" if separator == "[" else "]")


def _endpoint(endpoint: dict[str, Any]) -> str:
    ip, port = endpoint["ip"], endpoint["port"]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _name(side: dict[str, Any]) -> str:
    if not side["namespace"] and not side["name"]:
        return f"netns cookie {side['netns_cookie']}"
    return output.plain(f"{side['namespace'] or '-'}/{side['name'] or '-'}")


def _duration(seconds: float | None) -> str:
    """At most six characters."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} m" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _print(shown: list[dict[str, Any]]) -> None:
    right = ("lane", "kernel", "idle")
    table = output.table("pod", "local → remote", "path", *right, right=right)
    target = output.console()
    for column in table.columns[1:]:
        # Where there is room, names of pods are broken and addresses are not.
        column.no_wrap = column is not table.columns[1] or target.width >= _ROOM
    reasons = set()
    for connection in shown:
        for name, side in connection.items():
            reasons |= {side["reason"]} - {""}
            sent = (
                f"{side[f'{path}_messages']:,}\n{size(side[f'{path}_bytes'])}"
                for path in ("redirected", "kernel")
            )
            table.add_row(
                f"{name}\n{_name(side)}",
                f"{_endpoint(side['local'])} →\n{_endpoint(side['remote'])}",
                f"{side['path'] or '-'}\n{side['reason']}".rstrip(),
                *sent,
                _duration(side["idle_seconds"]),
                style="" if side["path"] in {"lane", ""} else "yellow",
                end_section=name == "server",
            )
    target.print(table)
    print("sent by each side: messages and bytes through the lane, and by the kernel path")
    for reason in sorted(reasons):
        meaning = _WORDS.get(reason) or REASONS.get(reason, "").partition(": ")[2]
        print(f"  {reason:<16} {meaning}")
