"""Watching checksums: which packets on a device carry one, and whether it is right.

A packet socket is told of each packet whether its checksum is still to be computed
(PACKET_AUXDATA, TP_STATUS_CSUMNOTREADY); scapy says whether the bytes have a right one.
"""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from helpers.commands import CommandError
from nearpath.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA = 263, 6, 8
_SO_RCVBUFFORCE = 33
_QUEUE_BYTES = 64 << 20
_CSUM_NOT_READY = 1 << 3  # TP_STATUS_CSUMNOTREADY
_LONGEST = 1 << 17


@dataclass(frozen=True)
class Packet:
    """A packet as it passed a device.

    Attributes:
        data: from the Ethernet header on.
        is_partial: its checksum is left to whoever gets it.
        is_outgoing: the device sent it; else received.
    """

    data: bytes
    is_partial: bool
    is_outgoing: bool


def port_of(frame: bytes, port: int) -> bool:
    """True if a frame is UDP or TCP from or to this port, with payload.

    By hand, for scapy takes some hundred times as long to say no.
    """
    if frame[12:14] == b"\x08\x00" and len(frame) > 34:
        protocol, start = frame[23], 14 + (frame[14] & 0x0F) * 4
    elif frame[12:14] == b"\x86\xdd" and len(frame) > 54:
        protocol, start = frame[20], 54
    else:
        return False
    if protocol not in {socket.IPPROTO_TCP, socket.IPPROTO_UDP} or len(frame) < start + 8:
        return False
    header = (frame[start + 12] >> 4) * 4 if protocol == socket.IPPROTO_TCP else 8
    return port in struct.unpack_from("!HH", frame, start) and len(frame) > start + header


@lru_cache(maxsize=10_000)
def is_right(frame: bytes) -> bool:
    """True if the TCP or UDP checksum in a frame is the one that scapy computes."""
    from scapy.layers.inet import TCP, UDP
    from scapy.layers.l2 import Ether

    packet = Ether(frame)
    kind = TCP if TCP in packet else UDP
    found = packet[kind].chksum
    del packet[kind].chksum
    return bool(Ether(bytes(packet))[kind].chksum == found)


@contextmanager
def watching(path: str, name: str, port: int) -> Iterator[list[Packet]]:
    """Collect the UDP and TCP packets with payload on a port that pass a device.

    Args:
        path: of the network namespace.
        name: of the device.

    Raises:
        CommandError: packets were lost.
    """
    found: list[Packet] = []
    with netns.entered(path):
        watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with watcher:
        watcher.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
        watcher.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        watcher.bind((name, _ETH_P_ALL))
        watcher.setblocking(False)
        yield found
        while True:
            try:
                data, ancillary, _, sender = watcher.recvmsg(_LONGEST, 64)
            except BlockingIOError:
                break
            if port_of(data, port):
                (status,) = struct.unpack_from("=I", ancillary[0][2])
                outgoing = sender[2] == socket.PACKET_OUTGOING
                found.append(Packet(data, bool(status & _CSUM_NOT_READY), outgoing))
        lost = struct.unpack("=II", watcher.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
    if lost:
        raise CommandError(f"the capture on {name} lost {lost} packets")


def checksum_errors(path: str) -> dict[str, int]:
    """Packets that a namespace's stack has dropped for their checksum: TCP and UDP by version.

    TCP counts both versions together.
    """
    with netns.entered(path), open("/proc/thread-self/net/snmp", encoding="ascii") as file:
        lines = [line.split() for line in file]
    with netns.entered(path), open("/proc/thread-self/net/snmp6", encoding="ascii") as file:
        six = dict(line.split() for line in file)
    counts = {
        names[0]: dict(zip(names[1:], values[1:], strict=True))
        for names, values in zip(lines[::2], lines[1::2], strict=True)
    }
    return {
        "tcp": int(counts["Tcp:"]["InCsumErrors"]),
        "udp4": int(counts["Udp:"]["InCsumErrors"]),
        "udp6": int(six["Udp6InCsumErrors"]),
    }
