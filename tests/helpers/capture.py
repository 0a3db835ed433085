"""Watching the TCP segments that cross an interface, with a packet socket.

A packet socket captures from the moment it is bound, so there is no start-up to wait
for, and it tells how many packets it had to drop, so "no payload seen" is a fact.
"""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from helpers.commands import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ETH_P_ALL = 0x0003
_ETH_P_IP = 0x0800
_ETH_P_IPV6 = 0x86DD
_SOL_PACKET = 263
_PACKET_STATISTICS = 6  # struct tpacket_stats {u32 packets; u32 drops;}
_SO_RCVBUFFORCE = 33
# Some 60,000 small packets; the kernel charges about 1 KiB for each.
_QUEUE_BYTES = 64 << 20
_HEADERS = 256
_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10


@dataclass
class Seen:
    """What crossed the interface on one TCP port.

    Attributes:
        syn: SYN without ACK. syn_ack: SYN with ACK. fin, rst: as named.
        payload_segments: segments that carried at least one byte (a GSO packet is one).
        payload_bytes: their bytes, without headers.
    """

    syn: int = 0
    syn_ack: int = 0
    fin: int = 0
    rst: int = 0
    payload_segments: int = 0
    payload_bytes: int = 0


@dataclass
class Capture:
    """All that a packet socket saw; filled when its ``with`` block ends."""

    interface: str
    packets: list[tuple[int, bytes, int]] = field(default_factory=list)

    def on_port(self, port: int) -> Seen:
        """Count the segments that went to or came from a TCP port."""
        seen = Seen()
        for protocol, head, length in self.packets:
            segment = _tcp_segment(protocol, head, length)
            if segment is None or port not in segment[:2]:
                continue
            _, _, flags, payload = segment
            seen.syn += flags & (_SYN | _ACK) == _SYN
            seen.syn_ack += flags & (_SYN | _ACK) == _SYN | _ACK
            seen.fin += bool(flags & _FIN)
            seen.rst += bool(flags & _RST)
            seen.payload_segments += payload > 0
            seen.payload_bytes += payload
        return seen


def _tcp_segment(protocol: int, head: bytes, length: int) -> tuple[int, int, int, int] | None:
    """Source port, destination port, flags and payload bytes of a packet, if it is TCP."""
    if protocol == _ETH_P_IP and len(head) >= 20 and head[9] == socket.IPPROTO_TCP:
        start = (head[0] & 0x0F) * 4
        end = int.from_bytes(head[2:4], "big") or length
    elif protocol == _ETH_P_IPV6 and len(head) >= 40 and head[6] == socket.IPPROTO_TCP:
        start = 40
        end = 40 + int.from_bytes(head[4:6], "big") if head[4:6] != b"\0\0" else length
    else:
        return None
    if len(head) < start + 14:
        return None
    source, destination = struct.unpack_from("!HH", head, start)
    return source, destination, head[start + 13], end - start - (head[start + 12] >> 4) * 4


@contextmanager
def capture(interface: str) -> Iterator[Capture]:
    """Capture on an interface of our own namespace while the block runs.

    Raises:
        CommandError: packets were lost, so nothing can be concluded from the capture.
    """
    result = Capture(interface)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as watcher:
        watcher.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
        watcher.bind((interface, _ETH_P_ALL))
        watcher.setblocking(False)
        yield result
        buffer = bytearray(_HEADERS)
        while True:
            try:
                length, _, _, sender = watcher.recvmsg_into([buffer], 0, socket.MSG_TRUNC)
            except BlockingIOError:
                break
            head = bytes(buffer[: min(length, _HEADERS)])
            result.packets.append((sender[1], head, length))
        statistics = watcher.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        lost = struct.unpack("=II", statistics)[1]
    if lost:
        raise CommandError(f"the capture on {interface} lost {lost} packets")
