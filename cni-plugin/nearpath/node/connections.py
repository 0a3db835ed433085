"""The paired connections of this node, with their pods, paths and reasons.

A connection is described from both sides, for whatever translates addresses on the way
(ClusterIP, sidecar redirect) makes them differ. What a side's entry says of path, messages
and bytes is about what that side sends.
"""

from __future__ import annotations

import heapq
import ipaddress
import time
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.datapath import loader, settings, tables
from nearpath.errors import NearpathError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nearpath.datapath.tables import Connection
    from nearpath.place import Place

CLIENT, SERVER = 0, 1
SIDES = ("client", "server")
LANE, KERNEL, NATIVE = "lane", "kernel", "native"
_MAPPED = bytes(10) + b"\xff\xff"
# Reasons of the last message that say nothing about the next one.
_REDIRECTED = tables.MESSAGES[0]


def pods(place: Place) -> dict[int, tuple[str, str]]:
    """Namespace and name of each recorded pod by netns cookie."""
    found: dict[int, tuple[str, str]] = {}
    for record in state.records(place):
        identity = record.get("pod")
        cookie = state.cookie_of(record)
        if cookie and isinstance(identity, dict):
            name = str(identity.get("namespace", "")), str(identity.get("name", ""))
            if any(name):
                found.setdefault(cookie, name)
    return found


def address(packed: bytes) -> str:
    """An address for people and programs; v4-mapped ones as ``::ffff:10.0.0.1``."""
    if len(packed) == 16 and packed.startswith(_MAPPED):
        return f"::ffff:{ipaddress.IPv4Address(packed[12:])}"
    return str(ipaddress.ip_address(packed))


def path_now(connection: Connection, side: int, rules: dict[str, int]) -> tuple[str, str]:
    """Path of the next message that a side sends, as far as can be told, and why not the lane.

    Args:
        rules: the settings of the datapath.

    Returns:
        ``lane``, ``kernel``, ``native`` (its socket has left the map, or is leaving it, for
        good) or an empty text if it has sent nothing yet; and a counter's name or empty.
    """
    if connection.leaving & 1 << side:
        return NATIVE, connection.wants_out[side] or "left"
    sent = connection.redirected_messages[side] + connection.kernel_messages[side]
    if rules.get("paused"):
        return KERNEL, "paused"
    if not rules.get("redirect", 1):
        return KERNEL, "redirect_off"
    if connection.wants_out[side]:
        return KERNEL, connection.wants_out[side]
    if connection.leaving & 1 << (not side):
        return KERNEL, "peer_left"
    if connection.blocked[side] and rules.get("guards", 1):
        return KERNEL, connection.blocked[side]
    if not sent:
        return "", ""
    if connection.path[side] == _REDIRECTED:
        return LANE, ""
    return KERNEL, connection.path[side]


def traffic(connection: Connection) -> int:
    """Bytes that a connection has carried, both ways by both paths, since it is in the map."""
    total = sum(connection.redirected_bytes) + sum(connection.kernel_bytes)
    return int(total)


class Describer:
    """Turns entries of the map into what people and programs see.

    Args:
        known: see pods().
        rules: the settings of the datapath.
    """

    def __init__(self, known: dict[int, tuple[str, str]], rules: dict[str, int]) -> None:
        self._known = known
        self._rules = rules

    def describe(self, connection: Connection) -> dict[str, Any]:
        """One connection.

        Returns:
            ``{"client": side, "server": side}``, a side being ``{"namespace", "name",
            "netns_cookie", "local": {"ip", "port"}, "remote": {"ip", "port"}, "path",
            "reason", "reader", "redirected_messages", "redirected_bytes", "kernel_messages",
            "kernel_bytes", "idle_seconds"}``; see path_now(). ``reader`` tells how
            this side reads: one of tables.READERS. Of a native side the counts
            end when it left, and idle_seconds is null.
        """
        return {name: self._side(connection, side) for side, name in enumerate(SIDES)}

    def _side(self, connection: Connection, side: int) -> dict[str, Any]:
        namespace, name = self._known.get(connection.netns[side], ("", ""))
        local, local_port, remote, remote_port = connection.endpoints[side]
        path, reason = path_now(connection, side, self._rules)
        last = max(connection.kernel_at[side], connection.redirected_at[side])
        idle = max(time.monotonic_ns() - last, 0) / 1e9
        return {
            "namespace": namespace,
            "name": name,
            "netns_cookie": connection.netns[side],
            "local": {"ip": address(local), "port": local_port},
            "remote": {"ip": address(remote), "port": remote_port},
            "path": path,
            "reason": reason,
            "reader": connection.reader[side],
            "redirected_messages": connection.redirected_messages[side],
            "redirected_bytes": connection.redirected_bytes[side],
            "kernel_messages": connection.kernel_messages[side],
            "kernel_bytes": connection.kernel_bytes[side],
            "idle_seconds": None if path == NATIVE else round(idle, 3),
        }


def cookies_of(place: Place, namespace: str, name: str) -> set[int]:
    """Cookies of a pod.

    Raises:
        NearpathError: no such pod is recorded.
    """
    found = {cookie for cookie, pod in pods(place).items() if pod == (namespace, name)}
    if not found:
        raise NearpathError(f"no pod {namespace}/{name} is recorded on this node", "nearpath pods")
    return found


def live(place: Place, cookies: set[int] | None = None) -> Iterator[dict[str, Any]]:
    """Every live paired connection, described, in no order and with little memory.

    Args:
        cookies: only those with an end in one of these namespaces.
    """
    if not loader.is_loaded(place):
        return
    describer = Describer(pods(place), settings.read(place))
    for connection in _wanted(place, cookies):
        yield describer.describe(connection)


def busiest(
    place: Place, limit: int, cookies: set[int] | None = None
) -> tuple[list[dict[str, Any]], int]:
    """The connections that have carried most, described, and how many there are in all.

    Only ``limit`` of them are held in memory.
    """
    if not loader.is_loaded(place):
        return [], 0
    describer = Describer(pods(place), settings.read(place))
    count = 0

    def counted() -> Iterator[Connection]:
        nonlocal count
        for connection in _wanted(place, cookies):
            count += 1
            yield connection

    # The key makes the order of equals (all idle, say) the same every time.
    first = heapq.nsmallest(limit, counted(), key=lambda each: (-traffic(each), each.key))
    return [describer.describe(each) for each in first], count


def _wanted(place: Place, cookies: set[int] | None) -> Iterator[Connection]:
    for connection in tables.paired(place):
        if cookies is None or not cookies.isdisjoint(connection.netns):
            yield connection
