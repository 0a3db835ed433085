"""Frames that a virtual machine sends or gets, and which way each has to take.

Each has a token in it, by which it is known again. Whether a frame arrives, and how, must not
depend on the lane; only the way does.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.tap import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, Frame

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER_MAC = "02:00:00:00:77:77"
GUEST_IP, OTHER_IP = "10.7.0.2", "10.7.0.1"
GUEST_IP6, OTHER_IP6 = "fd07::2", "fd07::1"
SIZES = (60, 61, 64, 65, 127, 128, 255, 512, 1000, 1023, 1499, 1500)  # bytes of an IP packet


@dataclass(frozen=True)
class Case:
    """One frame.

    Attributes:
        token: bytes in it that no other frame has.
        lane: it is to be redirected; else it goes by the bridge.
    """

    name: str
    token: bytes
    frame: Frame
    lane: bool


def token() -> bytes:
    """Six bytes that also do as a unicast MAC address."""
    return b"\x06" + os.urandom(5)


def _mac(data: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in data)


class Builder:
    """Frames in one direction.

    Args:
        source, target: MAC addresses.
        addresses: IPv4 of source and target, IPv6 of source and target.
    """

    def __init__(self, source: str, target: str, addresses: tuple[str, str, str, str]) -> None:
        from scapy.layers.inet import IP
        from scapy.layers.inet6 import IPv6
        from scapy.layers.l2 import Ether

        self._ether, self._ip, self._ip6 = Ether, IP, IPv6
        self._source, self._target = source, target
        self._from4, self._to4, self._from6, self._to6 = addresses

    def ether(self, target: str = "", **fields: Any) -> Any:
        return self._ether(src=self._source, dst=target or self._target, **fields)

    def ip4(self, **fields: Any) -> Any:
        return self._ip(**{"src": self._from4, "dst": self._to4, **fields})

    def ip6(self, **fields: Any) -> Any:
        return self._ip6(**{"src": self._from6, "dst": self._to6, **fields})

    def cases(self) -> list[Case]:
        """All of them."""
        found = [*self._unicast(), *self._to_groups(), *self._tagged(), *self._segments()]
        return [
            Case(name, mark, Frame(bytes(frame)) if not isinstance(frame, Frame) else frame, lane)
            for name, mark, frame, lane in found
        ]

    def _unicast(self) -> Iterator[tuple[str, bytes, Any, bool]]:
        from scapy.layers.inet import ICMP, TCP, UDP, IPOption
        from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, IPv6ExtHdrHopByHop
        from scapy.layers.l2 import ARP

        udp, tcp = UDP(sport=1111, dport=2222), TCP(sport=1111, dport=2222, flags="PA")
        options = IPOption(b"\x94\x04\0\0")  # router alert
        for name, packet in (
            ("udp4", self.ip4() / udp),
            ("tcp4", self.ip4() / tcp),
            ("icmp4", self.ip4() / ICMP()),
            ("udp4 with IP options", self.ip4(options=[options]) / udp),
            ("first fragment", self.ip4(flags="MF", id=7) / udp),
            ("later fragment", self.ip4(frag=100, id=7, proto=17)),
            ("unknown IP protocol", self.ip4(proto=253)),
            ("udp4 to port 67 of another machine", self.ip4() / UDP(sport=68, dport=67)),
            ("udp6", self.ip6() / udp),
            ("tcp6", self.ip6() / tcp),
            ("icmp6 echo", self.ip6() / ICMPv6EchoRequest()),
            ("udp6 with extension header", self.ip6() / IPv6ExtHdrHopByHop() / udp),
        ):
            mark = token()
            yield name, mark, self.ether() / packet / (mark * 3), True
        for size in SIZES:
            mark = token()
            payload = mark + bytes(size - 28 - len(mark))
            yield f"{size} B", mark, self.ether() / self.ip4() / udp / payload, True
        mark = token()
        arp = ARP(op="is-at", hwsrc=_mac(mark), psrc=self._from4, pdst=self._to4)
        yield "ARP reply", mark, self.ether() / arp, True
        mark = token()
        advertisement = ICMPv6ND_NA(tgt=self._from6) / mark
        yield (
            "neighbour advertisement",
            mark,
            self.ether() / self.ip6(hlim=255) / advertisement,
            True,
        )
        mark = token()
        yield "unknown protocol", mark, self.ether(type=0x88B5) / (mark + bytes(46)), True

    def _to_groups(self) -> Iterator[tuple[str, bytes, Any, bool]]:
        from scapy.layers.dhcp import BOOTP, DHCP
        from scapy.layers.inet import UDP
        from scapy.layers.inet6 import (
            ICMPv6ND_NS,
            ICMPv6ND_RA,
            ICMPv6ND_RS,
            ICMPv6NDOptSrcLLAddr,
        )
        from scapy.layers.l2 import ARP

        everybody = self.ether("ff:ff:ff:ff:ff:ff")
        mark = token()
        request = ARP(op="who-has", hwsrc=_mac(mark), psrc=self._from4, pdst=self._to4)
        yield "ARP request", mark, everybody / request, False
        mark = token()
        broadcast = self.ip4(dst="255.255.255.255")
        yield "broadcast", mark, everybody / broadcast / UDP(dport=2222) / mark, False
        mark = token()
        discover = BOOTP(chaddr=mark, xid=7) / DHCP(options=[("message-type", "discover"), "end"])
        nobody = "0.0.0.0"  # noqa: S104 - the source address of a client that has none yet
        dhcp = self.ip4(src=nobody, dst="255.255.255.255") / UDP(sport=68, dport=67) / discover
        yield "DHCP discover", mark, everybody / dhcp, False
        mark = token()
        group = self.ether("01:00:5e:01:02:03") / self.ip4(dst="239.1.2.3", ttl=4)
        yield "multicast 4", mark, group / UDP(dport=2222) / mark, False
        for name, message in (
            ("neighbour solicitation", ICMPv6ND_NS(tgt=self._to6)),
            ("router solicitation", ICMPv6ND_RS()),
            ("router advertisement", ICMPv6ND_RA()),
        ):
            mark = token()
            packet = self.ip6(dst="ff02::1", hlim=255) / message
            packet /= ICMPv6NDOptSrcLLAddr(lladdr=_mac(mark))
            yield name, mark, self.ether("33:33:00:00:00:01") / packet, False

    def _tagged(self) -> Iterator[tuple[str, bytes, Any, bool]]:
        from scapy.layers.inet import UDP
        from scapy.layers.l2 import Dot1AD, Dot1Q

        udp = UDP(sport=1111, dport=2222)
        for name, tags in (
            ("tagged", Dot1Q(vlan=100, prio=5)),
            ("tagged for priority alone", Dot1Q(vlan=0, prio=6)),
            ("tagged twice", Dot1AD(vlan=5) / Dot1Q(vlan=100)),
        ):
            mark = token()
            yield name, mark, self.ether() / tags / self.ip4() / udp / mark, True
        mark = token()
        all_of_them = self.ether("ff:ff:ff:ff:ff:ff") / Dot1Q(vlan=100)
        broadcast = self.ip4(dst="255.255.255.255") / UDP(sport=68, dport=67)
        yield "tagged DHCP", mark, all_of_them / broadcast / mark, False

    def _segments(self) -> Iterator[tuple[str, bytes, Any, bool]]:
        """What a machine sends that leaves segments and checksums to the hardware."""
        from scapy.layers.inet import TCP, UDP

        mark = token()
        # With the checksum of the pseudo header alone, as the driver leaves it.
        short = bytearray(bytes(self.ether() / self.ip4() / UDP(sport=1, dport=2) / mark))
        struct.pack_into("!H", short, 40, _pseudo_header(bytes(short[26:34]), 17, 8 + len(mark)))
        frame = Frame(bytes(short), NEEDS_CSUM, csum_start=34, csum_offset=6)
        yield "checksum to be computed", mark, frame, True
        for name, kind, size, ip in (
            ("64 KB of segments 4", GSO_TCPV4, 1448, self.ip4()),
            ("64 KB of segments 6", GSO_TCPV6, 1428, self.ip6()),
        ):
            mark = token()
            payload = mark + bytes(64000)
            whole = bytearray(bytes(self.ether() / ip / TCP(sport=1, dport=2, flags="A") / payload))
            start = 34 if kind == GSO_TCPV4 else 54
            addresses = bytes(whole[26:34] if kind == GSO_TCPV4 else whole[22:54])
            partial = _pseudo_header(addresses, 6, len(whole) - start)
            struct.pack_into("!H", whole, start + 16, partial)
            frame = Frame(bytes(whole), NEEDS_CSUM, kind, start + 20, size, start, 16)
            yield name, mark, frame, True


def datagrams(source: str, target: str) -> Case:
    """Many UDP datagrams in one frame (USO, since Linux 6.2)."""
    from scapy.layers.inet import UDP

    builder = Builder(source, target, (GUEST_IP, OTHER_IP, GUEST_IP6, OTHER_IP6))
    mark = token()
    udp = UDP(sport=1111, dport=2222)
    whole = bytearray((builder.ether() / builder.ip4() / udp / (mark + bytes(30000))).build())
    partial = _pseudo_header(bytes(whole[26:34]), 17, len(whole) - 34)
    struct.pack_into("!H", whole, 40, partial)
    frame = Frame(bytes(whole), NEEDS_CSUM, GSO_UDP_L4, 42, 1400, 34, 6)
    return Case("datagrams", mark, frame, lane=True)


def _pseudo_header(addresses: bytes, protocol: int, length: int) -> int:
    data = addresses + struct.pack("!HH", protocol, length)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def from_guest(guest: str, target: str = OTHER_MAC) -> list[Case]:
    """Frames that the virtual machine sends."""
    return Builder(guest, target, (GUEST_IP, OTHER_IP, GUEST_IP6, OTHER_IP6)).cases()


def to_guest(guest: str, source: str = OTHER_MAC) -> list[Case]:
    """Frames that it gets."""
    return Builder(source, guest, (OTHER_IP, GUEST_IP, OTHER_IP6, GUEST_IP6)).cases()
