"""The maps of the socket lane, typed: mirrors bpf/nearpath.h (a unit test compares them).

Every function opens the pinned map, does its work and closes it: a plugin process makes one
or two such calls in its life.
"""

from __future__ import annotations

import struct

from nearpath.datapath.maps import Map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nearpath.place import Place

POD_SOCKET_LANE = 1  # struct pod.flags

# enum counter of bpf/nearpath.h, in its order; the names are what users see.
MESSAGES = ("redirected_messages", "redirected_bytes", "kernel_messages", "kernel_bytes")
REASONS = (
    "joined",
    "waived",
    "left_streaming",
    "left_unhelped",
    "left_duplex",
    "left_zerocopy",
    "left_ioctl",
    "left",
    "stayed",
    "seen_splice",
    "seen_flags",
    "seen_ioctl",
    "paused",
    "redirect_off",
    "peer_not_joined",
    "closing",
    "streaming",
    "unhelped",
    "duplex",
    "zerocopy",
    "ioctl",
    "not_fit",
    "reader_unknown",
    "careful",
    "urgent",
    "ulp_set",
    "low_water",
    "probation",
    "revalidate",
    "not_drained",
    "receiver_behind",
    "peer_left",
    "redirect_failed",
    "peer_elsewhere",
    "ulp",
    "mptcp",
    "socket_busy",
    "map_full",
    "join_failed",
)
COUNTERS = (*MESSAGES, *REASONS)

_COOKIE = struct.Struct("=Q")
_POD = struct.Struct("=I")
_SEQUENCES = struct.Struct("=II")
# struct connection: eight pairs of u64, then as named; two struct endpoint, four u64.
_CONNECTION = struct.Struct("=16Q4Q5I2I2I2I2II2I" + 2 * "16s16s4H" + "4Q")
_COUNTERS = struct.Struct(f"={len(COUNTERS)}Q")
_NETNS, _NETNS_AT = struct.Struct("=2Q"), 2 * 8
_JOINED, _JOINED_AT = struct.Struct("=I"), 20 * 8
READERS = ("", "patient", "careful", "hasty")  # enum reader_kind of bpf/nearpath.h
_AF_INET = 2
BOTH = 0b11  # Connection.joined, Connection.leaving
# Cookies start at 1 (net/core/net_namespace.c): 0 keeps the counts of pods that are gone.
GONE = 0


class Connection:
    """One entry of the map connections; pairs are (client, server).

    Attributes:
        key: both initial sequence numbers plus one, the client's first.
        netns: cookies.
        kernel_at, redirected_at: CLOCK_MONOTONIC, nanoseconds; 0: never.
        redirected_messages, redirected_bytes, kernel_messages, kernel_bytes: sent.
        joined, leaving, waived: a bit per side, the client's is the lowest.
        wants_out, blocked, path: counter names; "" for none.
        reader: who was seen to read on each side, one of READERS.
        endpoints: per side (local address, local port, remote address, remote port), the
            addresses as bytes, 4 or 16 of them.
    """

    __slots__ = (
        "blocked",
        "endpoints",
        "joined",
        "kernel_at",
        "kernel_bytes",
        "kernel_messages",
        "key",
        "leaving",
        "netns",
        "path",
        "reader",
        "redirected_at",
        "redirected_bytes",
        "redirected_messages",
        "waived",
        "wants_out",
    )

    def __init__(self, key: tuple[int, ...], fields: tuple[Any, ...]) -> None:
        self.key = key
        self.netns = fields[2:4]
        self.kernel_at = fields[4:6]
        self.redirected_at = fields[6:8]
        self.redirected_messages = fields[8:10]
        self.redirected_bytes = fields[10:12]
        self.kernel_messages = fields[12:14]
        self.kernel_bytes = fields[14:16]
        self.joined, self.leaving, self.waived = fields[20:23]
        self.wants_out = tuple(_name(number) for number in fields[25:27])
        self.blocked = tuple(_name(number) for number in fields[27:29])
        self.path = tuple(COUNTERS[number] for number in fields[29:31])
        self.reader = tuple(READERS[number] for number in fields[31:33])
        self.endpoints = _endpoint(*fields[36:42]), _endpoint(*fields[42:48])


def _name(number: int) -> str:
    return COUNTERS[number] if number else ""


def _endpoint(
    local: bytes, remote: bytes, local_port: int, remote_port: int, family: int, _: int
) -> tuple[bytes, int, bytes, int]:
    size = 4 if family == _AF_INET else 16
    return local[:size], local_port, remote[:size], remote_port


def _pods(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/pods", _COOKIE.size, _POD.size)


def _counters(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/counters", _COOKIE.size, _COUNTERS.size, per_cpu=True)


def _connections(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/connections", _SEQUENCES.size, _CONNECTION.size)


def set_pod(place: Place, netns_cookie: int, flags: int) -> None:
    """Make a pod known to the programs, or change its flags (POD_SOCKET_LANE)."""
    with _pods(place) as pods:
        pods.update(_COOKIE.pack(netns_cookie), _POD.pack(flags))


def get_pod(place: Place, netns_cookie: int) -> int | None:
    """Flags of a pod, or None if the programs do not know it."""
    with _pods(place) as pods:
        value = pods.lookup(_COOKIE.pack(netns_cookie))
    if value is None:
        return None
    flags: int = _POD.unpack(value)[0]
    return flags


def all_pods(place: Place) -> dict[int, int]:
    """Flags of every pod that the programs know, by netns cookie."""
    with _pods(place) as pods:
        return {_COOKIE.unpack(key)[0]: _POD.unpack(value)[0] for key, value in pods.items()}


def delete_pod(place: Place, netns_cookie: int) -> bool:
    """Forget a pod and add its counts to those of the pods that are gone.

    Returns:
        False if the programs did not know it.
    """
    key = _COOKIE.pack(netns_cookie)
    with _pods(place) as pods:
        known = pods.delete(key)
    with _counters(place) as counters:
        value = counters.lookup(key)
        if value is not None and counters.delete(key):
            gone = _COOKIE.pack(GONE)
            before = counters.lookup(gone) or bytes(counters.value_size)
            both = zip(_words(before), _words(value), strict=True)
            counters.update(
                gone, struct.pack(f"={len(value) // 8}Q", *(old + new for old, new in both))
            )
    return known


def _words(value: bytes) -> tuple[int, ...]:
    return struct.unpack(f"={len(value) // 8}Q", value)


def counts(place: Place) -> dict[int, dict[str, int]]:
    """Counters by netns cookie (GONE: of pods deleted since), summed over the CPUs."""
    result = {}
    with _counters(place) as counters:
        for key, value in counters.items(chunk=64):
            words = _words(value)
            result[_COOKIE.unpack(key)[0]] = {
                name: sum(words[index :: len(COUNTERS)]) for index, name in enumerate(COUNTERS)
            }
    return result


def connections(place: Place) -> dict[int, int]:
    """Number of live paired connections by netns cookie; under GONE their total.

    A connection inside one pod counts once for it.
    """
    result: dict[int, int] = {GONE: 0}
    with _connections(place) as table:
        for _, value in table.items():  # noqa: PERF102 - no dictionary
            if _JOINED.unpack_from(value, _JOINED_AT)[0] == BOTH:
                result[GONE] += 1
                for cookie in set(_NETNS.unpack_from(value, _NETNS_AT)):
                    result[cookie] = result.get(cookie, 0) + 1
    return result


def paired(place: Place) -> Iterator[Connection]:
    """Every live paired connection, as it is at this moment."""
    with _connections(place) as table:
        for key, value in table.items():
            connection = Connection(_SEQUENCES.unpack(key), _CONNECTION.unpack(value))
            if connection.joined == BOTH:
                yield connection
