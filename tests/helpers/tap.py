"""Both ends of a virtual machine's wire, frame by frame: a process on the tap, and one outside.

    Outside (packet socket on the host veth) ═ eth0-nic ─ k6t-eth0 ─ tap0 ═ Tap (/dev/net/tun)
                                                             │
                                                          Watcher (what the bridge got)

Frames go in and come out with the header that virtio-net has (struct virtio_net_hdr), so what is
known of segments and of checksums that are still to be computed is seen too.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.commands import PATIENCE, CommandError
from nearpath.kernel import netns as namespaces

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
# CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6; the last two since Linux 6.2
_OFFLOADS = (0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40, 0x01 | 0x02 | 0x04 | 0x08)
# linux/if_packet.h
_SOL_PACKET, _ADD_MEMBERSHIP, _PACKET_VNET_HDR = 263, 1, 15
_MR_PROMISC = 1
_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33
_ROOM = 16 << 20
# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_HEADER = struct.Struct("=BBHHHH")
_LONGEST = 70000
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 0, 1, 4, 5


@dataclass(frozen=True)
class Frame:
    """A frame, and what virtio_net_hdr says about it."""

    data: bytes
    flags: int = 0
    gso_type: int = GSO_NONE
    header: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def packed(self) -> bytes:
        """As it is written."""
        numbers = (self.header, self.gso_size, self.csum_start, self.csum_offset)
        return _HEADER.pack(self.flags, self.gso_type, *numbers) + self.data

    @staticmethod
    def unpacked(data: bytes) -> Frame:
        """As it was read."""
        flags, gso_type, *numbers = _HEADER.unpack_from(data)
        return Frame(data[_HEADER.size :], flags, gso_type, *numbers)


class _End:
    """A descriptor that frames come out of; a context that closes it."""

    descriptor: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)

    def drain(self) -> list[Frame]:
        """All that has come so far."""
        found = []
        while select.select([self.descriptor], [], [], 0)[0]:
            found.append(Frame.unpacked(os.read(self.descriptor, _LONGEST)))
        return found

    def receive(self, text: bytes, timeout: float = 2) -> Frame:
        """Wait for the frame that has this text in it; others are thrown away.

        Raises:
            CommandError: it did not come in time.
        """
        end = time.monotonic() + timeout * PATIENCE
        while (left := end - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], left)[0]:
                frame = Frame.unpacked(os.read(self.descriptor, _LONGEST))
                if text in frame.data:
                    return frame
        raise CommandError(f"no frame with {text!r} came within {timeout:g} s")


class Tap(_End):
    """The virtual machine's side of a tap, as a hypervisor opens it.

    Args:
        netns: path of the namespace that has the tap.
        offloads: announce that the machine takes segments and unfinished checksums.
        queues: that the tap was made with; one of them is opened.
    """

    def __init__(self, netns: str, name: str, *, offloads: bool = True, queues: int = 0) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        if queues > 1:
            flags |= _IFF_MULTI_QUEUE
        with namespaces.entered(netns):
            self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(
                    self.descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags)
                )
                fcntl.ioctl(self.descriptor, _TUNSETVNETHDRSZ, struct.pack("=i", _HEADER.size))
                if offloads:
                    self._set_offloads()
            except OSError:
                os.close(self.descriptor)
                raise

    def _set_offloads(self) -> None:
        for number, offloads in enumerate(_OFFLOADS):
            try:
                fcntl.ioctl(self.descriptor, _TUNSETOFFLOAD, offloads)
            except OSError:
                if number == len(_OFFLOADS) - 1:
                    raise
            else:
                return

    def send(self, frame: Frame | bytes) -> None:
        """As if the virtual machine had sent it."""
        os.write(self.descriptor, (Frame(frame) if isinstance(frame, bytes) else frame).packed())


class Outside(_End):
    """A packet socket on a device that is not the pod's, for what the machine sends and gets."""

    def __init__(self, netns: str, name: str) -> None:
        self._socket = _packet_socket(netns, name, headers=True)
        self.descriptor = self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def send(self, frame: Frame | bytes) -> None:
        """Out of the device."""
        self._socket.send((Frame(frame) if isinstance(frame, bytes) else frame).packed())


class Watcher:
    """What a bridge gets from its ports, seen by a packet socket in promiscuous mode on it."""

    def __init__(self, netns: str, bridge: str) -> None:
        self._socket = _packet_socket(netns, bridge, headers=False)
        index = _index(netns, bridge)
        request = struct.pack("=iHH8s", index, _MR_PROMISC, 0, b"")
        self._socket.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def saw(self, text: bytes) -> int:
        """How many frames with this text came since the last call.

        Ask when the frame has arrived elsewhere, for the bridge has had it before that.
        """
        found = 0
        while select.select([self._socket], [], [], 0)[0]:
            data, sender = self._socket.recvfrom(_LONGEST)
            found += text in data and sender[2] != socket.PACKET_OUTGOING
        return found


def _index(netns: str, name: str) -> int:
    with namespaces.entered(netns):
        return socket.if_nametoindex(name)


def _packet_socket(netns: str, name: str, *, headers: bool) -> socket.socket:
    with namespaces.entered(netns):
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        if headers:
            opened.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        opened.bind((name, _ETH_P_ALL))
    except OSError:
        opened.close()
        raise
    return opened
