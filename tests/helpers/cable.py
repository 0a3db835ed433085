"""A cable between two taps: what plays the virtual machine's NIC, or a node's network card.

Both ends are taps with a virtio_net_hdr before each frame, which says what is left to do: a
checksum to fill in (from where, to which place), a frame to cut into segments of a size. What
the kernel hands out by a tap is exactly what it hands to a card's driver.

    virtio     the header travels with the frame, as between a host and a guest with virtio-net.
               A namespace behind it is a guest with a whole network stack.
    card       what the header asks for is done, as hardware does it: sum the bytes from start to
               end, put the sum in its place; cut. Then the frame is plain, and so is
               everything that comes back.

The kernel asks for nothing that the end has not offered (``offers``): with none it computes and
cuts by itself before it hands a frame out.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nearpath.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
CHECKSUM, TSO4, TSO6 = 0x01, 0x02, 0x04  # TUN_F_*
SEGMENTS = CHECKSUM | TSO4 | TSO6

# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_HEADER = struct.Struct("=BBHHHH")
NEEDS_CSUM, DATA_VALID = 1, 2
_GSO_TCPV4, _GSO_TCPV6, _GSO_ECN = 1, 4, 0x80
_LONGEST = 1 << 17


@dataclass(frozen=True)
class Frame:
    """One frame that left the kernel by an end of the cable, as the kernel handed it out.

    Attributes:
        flags, gso_type, gso_size, start, offset: of its virtio_net_hdr.
        data: from the Ethernet header on.
    """

    flags: int
    gso_type: int
    gso_size: int
    start: int
    offset: int
    data: bytes

    @property
    def is_partial(self) -> bool:
        """True if its checksum is left to whoever gets it."""
        return bool(self.flags & NEEDS_CSUM)


@dataclass
class End:
    """One tap: where it is and what its kernel is offered.

    Attributes:
        netns: path of the namespace; the tap is made if it is not there.
        name: of the tap.
        offers: TUN_F_* bits; 0: everything is to be done before a frame is handed out.
        out: frames that left the kernel here.
    """

    netns: str
    name: str
    offers: int = SEGMENTS
    out: list[Frame] = field(default_factory=list)
    _descriptor: int = -1

    def plug(self) -> None:
        """Open the tap."""
        with netns.entered(self.netns):
            self._descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            request = struct.pack("16sH22x", self.name.encode(), flags)
            fcntl.ioctl(self._descriptor, _TUNSETIFF, request)
        self.offer(self.offers)

    def offer(self, bits: int) -> None:
        """What a guest's driver does when it starts, by way of qemu: say what it can take."""
        self.offers = bits
        fcntl.ioctl(self._descriptor, _TUNSETOFFLOAD, bits)

    def unplug(self) -> None:
        """Close it; a tap that we made goes."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        """For poll(2)."""
        return self._descriptor

    def receive(self) -> Frame | None:
        """The next frame that the kernel hands out, or None."""
        try:
            data = os.read(self._descriptor, _LONGEST)
        except BlockingIOError:
            return None
        flags, kind, _, size, start, offset = _HEADER.unpack_from(data)
        frame = Frame(flags, kind, size, start, offset, data[_HEADER.size :])
        self.out.append(frame)
        return frame

    def send(self, frame: Frame) -> None:
        """Hand a frame to the kernel; one that it does not want (device down) is lost."""
        header = _HEADER.pack(
            frame.flags, frame.gso_type, 0, frame.gso_size, frame.start, frame.offset
        )
        try:
            os.write(self._descriptor, header + frame.data)
        except OSError:
            pass


@dataclass
class Cable:
    """Two ends, and what happens to a frame in between.

    Attributes:
        near, far: the ends.
        through: what arrived at the far end, as it arrived.
        damage: applied to frames on their way from far to near; for bad cables.
    """

    near: End
    far: End
    is_card: bool
    through: list[Frame] = field(default_factory=list)
    damage: Callable[[bytes], bytes] | None = None

    def carry(self) -> None:
        """Move what is waiting at either end."""
        while frame := self.near.receive():
            for part in _finished(frame) if self.is_card else [frame]:
                self.through.append(part)
                self.far.send(part)
        while frame := self.far.receive():
            if self.damage:
                frame = Frame(0, 0, 0, 0, 0, self.damage(frame.data))
            self.near.send(frame)

    def forget(self) -> None:
        """Begin the records anew."""
        self.near.out.clear()
        self.far.out.clear()
        self.through.clear()


@contextmanager
def virtio(host: End, guest: End) -> Iterator[Cable]:
    """A guest's NIC: what host and guest leave to do is left to do on the other side."""
    with _laid(Cable(host, guest, is_card=False)) as cable:
        yield cable


@contextmanager
def card(node: End, outside: End) -> Iterator[Cable]:
    """A network card and its wire: frames on it are plain, with all checksums."""
    outside.offers = 0
    with _laid(Cable(node, outside, is_card=True)) as cable:
        yield cable


@contextmanager
def _laid(cable: Cable) -> Iterator[Cable]:
    stop = os.eventfd(0)

    def work() -> None:
        poll = select.poll()
        for descriptor in (stop, cable.near.fileno(), cable.far.fileno()):
            poll.register(descriptor, select.POLLIN)
        while stop not in {descriptor for descriptor, _ in poll.poll()}:
            cable.carry()

    thread = threading.Thread(target=work, daemon=True)
    try:
        cable.near.plug()
        cable.far.plug()
        thread.start()
        try:
            yield cable
        finally:
            os.eventfd_write(stop, 1)
            thread.join(10)
    finally:
        cable.near.unplug()
        cable.far.unplug()
        os.close(stop)


# -- what a network card's hardware does -------------------------------------------------------


def _finished(frame: Frame) -> list[Frame]:
    """The plain frames that a card makes of what its driver was handed."""
    kind = frame.gso_type & ~_GSO_ECN
    if kind in {_GSO_TCPV4, _GSO_TCPV6}:
        return [_summed(part) for part in _segments(frame)]
    assert not kind, f"asked for segmentation that was not offered: {kind}"
    return [_summed(frame)]


def _summed(frame: Frame) -> Frame:
    """Fill the checksum in where the header says; the seed is there already."""
    if not frame.is_partial:
        return Frame(0, 0, 0, 0, 0, frame.data)
    data = bytearray(frame.data)
    place = frame.start + frame.offset
    data[place : place + 2] = (internet_checksum(data[frame.start :]) or 0xFFFF).to_bytes(2, "big")
    return Frame(0, 0, 0, 0, 0, bytes(data))


def internet_checksum(data: bytes | bytearray) -> int:
    """RFC 1071: the complement of the one's complement sum."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", bytes(data) + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    remainder: int = ~total & 0xFFFF
    return remainder


def _segments(frame: Frame) -> Iterator[Frame]:
    """Cut a TCP frame: lengths, sequence numbers, flags and IPv4's own checksum anew."""
    is_v4 = frame.gso_type & ~_GSO_ECN == _GSO_TCPV4
    network, transport = 14, frame.start
    head = frame.data[: transport + (frame.data[transport + 12] >> 4) * 4]
    payload = frame.data[len(head) :]
    (sequence,) = struct.unpack_from("!I", head, transport + 4)
    (identification,) = struct.unpack_from("!H", head, network + 4)
    flags = head[transport + 13]
    # The seed holds the length of the whole: take it out of the pseudo-header's sum.
    whole = len(frame.data) - transport
    (seed,) = struct.unpack_from("!H", head, transport + 16)
    for number, begin in enumerate(range(0, len(payload), frame.gso_size)):
        part = bytearray(head + payload[begin : begin + frame.gso_size])
        length = len(part) - transport
        is_last = begin + frame.gso_size >= len(payload)
        struct.pack_into("!I", part, transport + 4, (sequence + begin) & 0xFFFFFFFF)
        part[transport + 13] = flags & (0xFF if is_last else 0xF6) & (0xFF if not number else 0x7F)
        new_seed = (seed + (~whole & 0xFFFF) + length) % 0xFFFF
        struct.pack_into("!H", part, transport + 16, new_seed)
        if is_v4:
            struct.pack_into("!H", part, network + 2, len(part) - network)
            struct.pack_into("!H", part, network + 4, (identification + number) & 0xFFFF)
            struct.pack_into("!H", part, network + 10, 0)
            own = internet_checksum(part[network:transport])
            struct.pack_into("!H", part, network + 10, own)
        else:
            struct.pack_into("!H", part, network + 4, len(part) - network - 40)
        yield Frame(NEEDS_CSUM, 0, 0, transport, 16, bytes(part))
