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
import threading
import time
from dataclasses import dataclass, replace
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
_SOL_PACKET, _ADD_MEMBERSHIP, _PACKET_AUXDATA, _PACKET_VNET_HDR = 263, 1, 8, 15
# struct tpacket_auxdata: status, len, snaplen, mac, net, vlan_tci, vlan_tpid
_AUXDATA, _HAS_VLAN = struct.Struct("=IIIHHHH"), 1 << 4
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

    def _read(self) -> Frame:
        return Frame.unpacked(os.read(self.descriptor, _LONGEST))

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

    def send(self, frame: Frame | bytes) -> None:
        """Put a frame in."""
        os.write(self.descriptor, (Frame(frame) if isinstance(frame, bytes) else frame).packed())

    def drain(self) -> list[Frame]:
        """All that has come so far."""
        found = []
        while select.select([self.descriptor], [], [], 0)[0]:
            found.append(self._read())
        return found

    def receive(self, text: bytes, timeout: float = 2) -> Frame:
        """Wait for the frame that has this text in it; others are thrown away.

        Raises:
            CommandError: it did not come in time.
        """
        end = time.monotonic() + timeout * PATIENCE
        while (left := end - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], left)[0]:
                frame = self._read()
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


class Outside(_End):
    """A packet socket on a device that is not the pod's, for what the machine sends and gets.

    A VLAN tag that the kernel keeps beside the frame is put back into it.
    """

    def __init__(self, netns: str, name: str) -> None:
        self._socket = _packet_socket(netns, name, headers=True)
        self.descriptor = self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def _read(self) -> Frame:
        data, beside, _, _ = self._socket.recvmsg(_LONGEST, 256)
        frame = Frame.unpacked(data)
        for level, kind, content in beside:
            if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
                status, *_, tag, protocol = _AUXDATA.unpack_from(content)
                if status & _HAS_VLAN:
                    tagged = struct.pack("!HH", protocol, tag)
                    whole = frame.data[:12] + tagged + frame.data[12:]
                    return replace(
                        frame, data=whole, csum_start=frame.csum_start + 4 * bool(frame.csum_start)
                    )
        return frame


class Stream:
    """Numbered frames from one end to the other, from two threads; a context that stops them.

    Args:
        frame: its last four bytes take the number; so no checksum may cover them.
        token: in it.
        gap: seconds between two frames.
    """

    def __init__(
        self, sender: _End, receiver: _End, frame: bytes, token: bytes, gap: float = 0.0003
    ) -> None:
        self._ends = sender, receiver
        self._head, self._token, self._gap = frame[:-4], token, gap
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._receive),
            threading.Thread(target=self._send),
        ]
        self.sent = 0
        self.arrived: list[int] = []

    def _send(self) -> None:
        while not self._stop.is_set():
            self._ends[0].send(self._head + self.sent.to_bytes(4, "big"))
            self.sent += 1
            time.sleep(self._gap)

    def _receive(self) -> None:
        stopped = 0.0
        while not stopped or time.monotonic() < stopped + 0.5:
            if self._stop.is_set():
                stopped = stopped or time.monotonic()
            for frame in self._ends[1].drain():
                if self._token in frame.data:
                    self.arrived.append(int.from_bytes(frame.data[-4:], "big"))
            time.sleep(0.001)

    def lost(self) -> list[int]:
        """Numbers of those that did not arrive; ask when it has stopped."""
        return sorted(set(range(self.sent)) - set(self.arrived))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


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
            opened.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        opened.bind((name, _ETH_P_ALL))
    except OSError:
        opened.close()
        raise
    return opened
