"""Switches of the socket lane's rules: struct settings of bpf/nearpath.h, live.

A rule that is switched off (0) does not count in the choice of a message's path; which
message takes which path is in bpf/path.h. The defaults are what was measured to be safe and
fast; those of a stream's sizes are replaced by what `nearpath calibrate` has found.
"""

from __future__ import annotations

import struct

from nearpath.datapath.maps import Map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nearpath.place import Place

ANY_SIZE = 0xFFFFFFFF
_SWITCH = (0, 1)
_MILLISECONDS = (0, 3_600_000)
_COUNT = (0, 1_000_000)
_KIBIBYTES = (0, 1 << 24)

# name: (default, (least, most), what it does). In the order of struct settings.
SETTINGS: dict[str, tuple[int, tuple[int, int], str]] = {
    "paused": (0, _SWITCH, "no socket joins, every message takes the kernel path"),
    "redirect": (1, _SWITCH, "off: sockets join, but every message takes the kernel path"),
    "guards": (1, _SWITCH, "heed what the guards saw: readers that the lane would break"),
    # Proxies read a header with recv and splice the rest: more than one message.
    "probation": (8, _COUNT, "messages each way that first take the kernel path; see proven"),
    # Enough to have seen a keep-alive pool, few enough for a busy service's first second.
    "proven": (16, _COUNT, "connections with fit readers that waive probation; 0: none do"),
    # Off only where every event-driven program is known to read until EAGAIN.
    "careful": (1, _SWITCH, "readers must be known to read on after a short read"),
    # Policy that is tightened binds an accelerated connection after this time at the latest;
    # one message a second costs nothing measurable.
    "revalidate_ms": (1000, _MILLISECONDS, "one message each way per interval by the kernel path"),
    # Without it bytes change places: for experiments only.
    "drained": (1, _SWITCH, "never redirect while bytes sent by TCP are unread (keeps order)"),
    # At 100 TCP finds the buffer full, drops, and waits for its retransmission timer.
    "receiver_percent": (50, (0, 100), "of its receive buffer that a reader may leave unread"),
    # Each redirected message takes 1 KiB that the receive buffer does not count.
    "unread_messages": (256, _COUNT, "redirected messages that a reader may leave unread"),
    # Less than a burst of a few pipelined requests must not count as a stream.
    "stream_messages": (64, _COUNT, "messages one way in a row that make a stream; 0: none"),
    # Nagle and auto-corking gather what comes within this time.
    "stream_gap_us": (200, _COUNT, "longest pause inside a stream, in microseconds"),
    "stream_from": (1024, (0, ANY_SIZE), "bytes: streams of smaller messages leave the lane"),
    "stream_to": (ANY_SIZE, (0, ANY_SIZE), "bytes: streams of messages this large leave it too"),
    # More than send and receive buffers hold: a reader is drained by then, or never.
    "unhelped_kib": (32 << 10, _KIBIBYTES, "KiB in a row by the kernel path, and both ends leave"),
    "duplex": (1, _SWITCH, "sockets with a reader asleep beside a writer leave the lane"),
    # On by default only where the kernel has the fixes of December 2025 (loader).
    "mptcp_fallback": (0, _SWITCH, "plain TCP connections of MPTCP listeners may join"),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
# Switched off, these break connections: for experiments and tests.
UNSAFE = frozenset({"drained", "receiver_percent", "guards", "unread_messages", "careful"})

_STRUCT = struct.Struct(f"={len(SETTINGS)}I")
_KEY = bytes(4)


def _map(place: Place) -> Map:
    return Map.pinned(f"{place.layout_dir}/settings", len(_KEY), _STRUCT.size)


def read(place: Place) -> dict[str, int]:
    """All settings of the loaded datapath by name.

    Raises:
        BpfError: errno ENOENT if nothing is loaded.
    """
    with _map(place) as settings:
        value = settings.lookup(_KEY) or bytes(_STRUCT.size)
    return dict(zip(SETTINGS, _STRUCT.unpack(value), strict=True))


def write(place: Place, **changes: int) -> None:
    """Change settings of the loaded datapath; they hold from the next message on.

    Not atomic against another writer: those that change the same setting hold the node lock.

    Raises:
        ValueError: no such setting, or a value out of its range; the text is for people.
    """
    for name, value in changes.items():
        check(name, value)
    with _map(place) as settings:
        before = settings.lookup(_KEY) or bytes(_STRUCT.size)
        values = dict(zip(SETTINGS, _STRUCT.unpack(before), strict=True))
        values.update(changes)
        settings.update(_KEY, _STRUCT.pack(*values.values()))


def check(name: str, value: int) -> None:
    """Refuse what is no setting or out of range.

    Raises:
        ValueError: the text is for people.
    """
    if name not in SETTINGS:
        raise ValueError(f"there is no setting {name}; there are: {', '.join(SETTINGS)}")
    least, most = SETTINGS[name][1]
    if not least <= value <= most:
        raise ValueError(f"setting {name} must be from {least} to {most}")
