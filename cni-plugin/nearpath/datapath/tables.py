"""The maps of the socket lane, typed: mirrors bpf/nearpath.h (a unit test compares them).

Every function opens the pinned map, does its work and closes it: a plugin process makes one
or two such calls in its life.
"""

from __future__ import annotations

import struct
from errno import ENOENT

from nearpath.datapath.maps import Map
from nearpath.errors import BpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nearpath.place import Place

POD_SOCKET_LANE = 1  # struct pod.flags

# enum counter of bpf/nearpath.h, in its order; the names are what users see.
MESSAGES = ("redirected_messages", "redirected_bytes", "kernel_messages", "kernel_bytes")
REASONS = (
    "joined",
    "left_streaming",
    "left",
    "stayed",
    "paused",
    "peer_not_joined",
    "revalidate",
    "streaming",
    "peer_left",
    "not_drained",
    "receiver_behind",
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
_SETTINGS = struct.Struct("=II")
_SEQUENCES = struct.Struct("=II")
_CONNECTION = struct.Struct("=16Q6I3Q")
_COUNTERS = struct.Struct(f"={len(COUNTERS)}Q")
# Cookies start at 1 (net/core/net_namespace.c): 0 keeps the counts of pods that are gone.
GONE = 0


def _pods(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/pods", _COOKIE.size, _POD.size)


def _settings(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/settings", 4, _SETTINGS.size)


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
            fields = _CONNECTION.unpack(value)
            if fields[16] == 0b11:  # joined: both sides
                result[GONE] += 1
                for cookie in {fields[2], fields[3]}:
                    result[cookie] = result.get(cookie, 0) + 1
    return result


def _change(place: Place, field: int, value: int) -> None:
    with _settings(place) as settings:
        fields = list(_SETTINGS.unpack(settings.lookup(bytes(4)) or bytes(_SETTINGS.size)))
        fields[field] = value
        settings.update(bytes(4), _SETTINGS.pack(*fields))


def set_paused(place: Place, paused: bool) -> None:
    """Pause or resume: paused, no socket joins and every message takes the kernel path."""
    _change(place, 0, int(paused))


def set_revalidate(place: Place, milliseconds: int) -> None:
    """Longest time that a direction of a connection stays off the kernel path while it sends.

    Args:
        milliseconds: 0 for ever.
    """
    _change(place, 1, milliseconds)


def is_paused(place: Place) -> bool:
    """True if the lane is paused."""
    with _settings(place) as settings:
        value = settings.lookup(bytes(4))
    return value is not None and _SETTINGS.unpack(value)[0] != 0


def sockets_left(directory: str) -> int:
    """Number of sockets in the sockhash pinned under ``directory``; 0 if there is none."""
    try:
        with Map.pinned(f"{directory}/sockets", _SEQUENCES.size, 4) as sockets:
            return sum(1 for _ in sockets.keys())  # noqa: SIM118 - no dictionary
    except BpfError as error:
        if error.errno == ENOENT:
            return 0
        raise
