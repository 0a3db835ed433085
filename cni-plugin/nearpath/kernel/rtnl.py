"""Links, qdiscs and filters of a network namespace, by rtnetlink(7).

u32 keys in front of the network header, which match MAC addresses, need our own packing (u32.py).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from errno import EINVAL

from nearpath.kernel.netlink import (
    ACK,
    CREATE,
    EXCL,
    GONE,
    NESTED,
    REQUEST,
    NetlinkError,
    Socket,
    attribute,
    attributes,
    number,
    text,
)

# linux/rtnetlink.h
_NEWLINK, _GETLINK = 16, 18
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
# linux/if_link.h: struct ifinfomsg, IFLA_*
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFF_UP = 1
_ADDRESS, _IFNAME, _MTU, _LINK_PEER, _MASTER, _LINKINFO = 1, 3, 4, 5, 10, 18
_EXT_MASK, _LINK_NETNSID, _XDP = 29, 37, 43
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_DATA = 1, 2, 5
_BR_STP_STATE, _BR_VLAN_FILTERING = 5, 7
_BRPORT_ISOLATED, _BRPORT_LOCKED = 33, 39
_TUN_TYPE, _IFF_TAP = 3, 2
_XDP_ATTACHED = 2
# struct tcmsg, TCA_*
_TC = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_KIND, _OPTIONS, _CHAIN, _INGRESS_BLOCK, _EGRESS_BLOCK = 1, 2, 11, 13, 14
_INGRESS = 0xFFFFFFF1  # TC_H_INGRESS = TC_H_CLSACT
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_…)
_ALL = 0x0003  # ETH_P_ALL; filters take it in network byte order


class RtnlError(NetlinkError):
    """rtnetlink refused a request."""


@dataclass(frozen=True)
class Link:
    """A network device.

    Attributes:
        kind: of its driver, e.g. ``veth``, ``bridge``; ``tap`` and ``tun`` for both halves of
            that driver; empty for hardware.
        address: MAC address.
        master: index of the bridge or the like that it is a port of, or 0.
        up: administratively.
        peer: index of a veth's other end, or 0; in another namespace if ``peer_elsewhere``.
        stp, vlan_filtering: of a bridge.
        port_policy: a bridge's port that is isolated or locked.
        xdp: an XDP program is attached.
    """

    index: int
    name: str
    kind: str = ""
    mtu: int = 1500
    address: bytes = b""
    master: int = 0
    up: bool = True
    peer: int = 0
    peer_elsewhere: bool = False
    stp: bool = False
    vlan_filtering: bool = False
    port_policy: bool = False
    xdp: bool = False


@dataclass(frozen=True)
class Qdisc:
    """An ``ingress`` or ``clsact`` qdisc; ``shared`` if its filters belong to other devices too."""

    index: int
    kind: str
    shared: bool = False


@dataclass(frozen=True)
class Filter:
    """A filter; ``options`` are those of its kind (TCA_OPTIONS)."""

    index: int
    kind: str
    priority: int
    handle: int
    chain: int
    options: bytes


class Rtnl(Socket):
    """An rtnetlink socket of the namespace that the thread is in; a context that closes it."""

    error = RtnlError

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    # -- links -------------------------------------------------------------------------------

    def bridges(self, most: int) -> list[Link]:
        """``ip -detail link show type bridge``: the first ones."""
        kind = attribute(_INFO_KIND, b"bridge\0")
        wanted = attribute(_LINKINFO | NESTED, kind)
        return self._links(wanted, most)

    def ports(self, bridge: int, most: int) -> list[Link]:
        """``ip -detail link show master <bridge>``: the first ones."""
        found = self._links(attribute(_MASTER, struct.pack("=I", bridge)), most)
        return [link for link in found if link.master == bridge]

    def link(self, index: int) -> Link | None:
        """``ip -detail link show`` of one device, or None if it is not there."""
        body = _LINK.pack(0, 0, index, 0, 0) + attribute(_EXT_MASK, struct.pack("=I", _SKIP_STATS))
        try:
            (answer,) = self.ask(f"look at link {index}", _GETLINK, REQUEST, body, 1)
        except RtnlError as error:
            if error.errno in GONE:
                return None
            raise
        return _link(answer)

    def _links(self, wanted: bytes, most: int) -> list[Link]:
        skip = attribute(_EXT_MASK, struct.pack("=I", _SKIP_STATS))
        body = _LINK.pack(0, 0, 0, 0, 0) + skip + wanted
        return [_link(answer) for answer in self.dump("list links", _GETLINK, body, most)]

    # -- qdiscs ------------------------------------------------------------------------------

    def qdiscs(self, most: int) -> dict[int, Qdisc]:
        """``tc qdisc show ingress`` of the whole namespace: by the index of the device.

        Args:
            most: qdiscs of any kind to look at.
        """
        found = {}
        for answer in self.dump("list qdiscs", _GETQDISC, _TC.pack(0, 0, 0, 0, 0), most):
            _, index, _, parent, _ = _TC.unpack_from(answer)
            if parent == _INGRESS:
                known = attributes(answer, _TC.size)
                shared = bool(number(known.get(_INGRESS_BLOCK)) | number(known.get(_EGRESS_BLOCK)))
                found[index] = Qdisc(index, text(known.get(_KIND)), shared)
        return found

    def add_ingress(self, index: int) -> None:
        """Make an ``ingress`` qdisc.

        Raises:
            RtnlError: errno EEXIST if there is one, also a ``clsact``.
        """
        # tc qdisc add dev <index> ingress
        body = _TC.pack(0, index, 0xFFFF0000, _INGRESS, 0) + attribute(_KIND, b"ingress\0")
        flags = REQUEST | ACK | CREATE | EXCL
        self.ask(f"make an ingress qdisc on link {index}", _NEWQDISC, flags, body)

    def delete_ingress(self, index: int) -> None:
        """Delete it with all filters on it; none, or no such device, is fine."""
        # tc qdisc del dev <index> ingress
        body = _TC.pack(0, index, 0xFFFF0000, _INGRESS, 0) + attribute(_KIND, b"ingress\0")
        self._gone_is_fine(f"delete the ingress qdisc of link {index}", _DELQDISC, body)

    # -- filters -----------------------------------------------------------------------------

    def filters(self, index: int, parent: int, most: int, priority: int = 0) -> list[Filter]:
        """``tc filter show dev <index> ingress|egress [prio <priority>]``: the first ones.

        Of each kind also entries that are no filters: u32's hash tables, with handles whose
        last twelve bits are zero.
        """
        body = _TC.pack(0, index, 0, parent, priority << 16)
        try:
            found = self.dump(f"list filters of link {index}", _GETTFILTER, body, most)
        except RtnlError as error:
            if error.errno in GONE:
                return []
            raise
        return [entry for entry in map(_filter, found) if entry.index == index]

    def add_filter(self, index: int, priority: int, handle: int, kind: str, options: bytes) -> None:
        """Add a filter for all protocols at ingress.

        Raises:
            RtnlError: errno EEXIST if there is one of this handle.
        """
        # tc filter add dev <index> ingress prio <priority> handle <handle> protocol all <kind> …
        body = _TC.pack(0, index, handle, INGRESS, priority << 16 | socket.htons(_ALL))
        body += attribute(_KIND, kind.encode() + b"\0")
        body += attribute(_OPTIONS | NESTED, options)
        flags = REQUEST | ACK | CREATE | EXCL
        self.ask(f"add a {kind} filter to link {index}", _NEWTFILTER, flags, body)

    def delete_filter(self, entry: Filter) -> None:
        """Delete a filter at ingress; none of the kind, or no such device, is fine."""
        # tc filter del dev <index> ingress prio <priority> handle <handle> protocol all <kind>
        info = entry.priority << 16 | socket.htons(_ALL)
        body = _TC.pack(0, entry.index, entry.handle, INGRESS, info)
        body += attribute(_KIND, entry.kind.encode() + b"\0")
        what = f"delete a {entry.kind} filter of link {entry.index}"
        self._gone_is_fine(what, _DELTFILTER, body)

    def delete_priority(self, index: int, priority: int, kind: str) -> None:
        """Delete all filters of a priority at ingress; none, or no such device, is fine."""
        # tc filter del dev <index> ingress prio <priority> protocol all <kind>
        body = _TC.pack(0, index, 0, INGRESS, priority << 16 | socket.htons(_ALL))
        body += attribute(_KIND, kind.encode() + b"\0")
        what = f"delete {kind} filters of link {index}"
        self._gone_is_fine(what, _DELTFILTER, body)

    def _gone_is_fine(self, what: str, kind: int, body: bytes) -> None:
        try:
            self.ask(what, kind, REQUEST | ACK, body)
        except RtnlError as error:
            # Of a filter whose qdisc is gone it only says so in words (net/sched/cls_api.c).
            no_qdisc = error.errno == EINVAL and "Parent Qdisc" in error.said
            if error.errno not in GONE and not no_qdisc:
                raise


def _link(answer: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(answer)
    known = attributes(answer, _LINK.size)
    info = attributes(known.get(_LINKINFO, b""))
    kind = text(info.get(_INFO_KIND))
    data = attributes(info.get(_INFO_DATA, b""))
    port = attributes(info.get(_INFO_SLAVE_DATA, b""))
    if kind == "tun" and number(data.get(_TUN_TYPE)) == _IFF_TAP:
        kind = "tap"
    bridge = data if kind == "bridge" else {}
    return Link(
        index=index,
        name=text(known.get(_IFNAME)),
        kind=kind,
        mtu=number(known.get(_MTU)),
        address=known.get(_ADDRESS, b""),
        master=number(known.get(_MASTER)),
        up=bool(flags & _IFF_UP),
        peer=number(known.get(_LINK_PEER)) if kind == "veth" else 0,
        peer_elsewhere=kind == "veth" and _LINK_NETNSID in known,
        stp=bool(number(bridge.get(_BR_STP_STATE))),
        vlan_filtering=bool(number(bridge.get(_BR_VLAN_FILTERING))),
        port_policy=bool(number(port.get(_BRPORT_ISOLATED)) | number(port.get(_BRPORT_LOCKED))),
        xdp=bool(number(attributes(known.get(_XDP, b"")).get(_XDP_ATTACHED))),
    )


def _filter(answer: bytes) -> Filter:
    _, index, handle, _, info = _TC.unpack_from(answer)
    known = attributes(answer, _TC.size)
    chain, options = number(known.get(_CHAIN)), known.get(_OPTIONS, b"")
    return Filter(index, text(known.get(_KIND)), info >> 16, handle, chain, options)
