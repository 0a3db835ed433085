"""Offloads of a device: what ``ethtool -k`` shows and ``-K`` sets, by ifindex.

By generic netlink (family ethtool, since Linux 5.6), not by the ioctl of the same purpose:
that one takes a name, and names in a pod's namespace are the pod's to change between our
look-up and the call.

The kernel keeps three sets per device. ``changeable`` (hw_features) are those that somebody
may switch, ``wanted`` those that somebody has switched on, ``active`` those that are on:
without checksum offload the kernel takes segmentation offload out of ``active`` and leaves it
in ``wanted`` (netdev_fix_features), and a tap takes out what its guest has not negotiated.
So whoever puts ``wanted`` back gets every consequence back.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from errno import ENODEV, ENOENT
from typing import TYPE_CHECKING

from nearpath.errors import NearpathError, Unavailable
from nearpath.kernel.netlink import (
    ACK,
    NESTED,
    REQUEST,
    NetlinkError,
    Socket,
    attribute,
    attributes,
    each,
    number,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_NETLINK_GENERIC = 16  # linux/netlink.h
# linux/genetlink.h: struct genlmsghdr {u8 cmd, version; u16 reserved}; the family of families
_MESSAGE = struct.Struct("=BBxx")
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_FAMILY, _VERSION = b"ethtool\0", 1
# linux/ethtool_netlink.h
_FEATURES_GET, _FEATURES_SET = 11, 12
_HEADER, _HW, _WANTED, _ACTIVE = 1, 2, 3, 4  # ETHTOOL_A_FEATURES_*
_INDEX, _FLAGS = 1, 3  # ETHTOOL_A_HEADER_*
_OMIT_REPLY = 1 << 1  # ETHTOOL_FLAG_OMIT_REPLY
_BITS, _BIT = 3, 1  # ETHTOOL_A_BITSET_BITS, ETHTOOL_A_BITSET_BITS_BIT
_NAME, _VALUE = 2, 3  # ETHTOOL_A_BITSET_BIT_*

# linux/if_ether.h: the protocols under which a packet socket receives IP.
_RECEIVES_IP = {"0003", "0800", "86dd"}  # ETH_P_ALL, ETH_P_IP, ETH_P_IPV6
_MOST_BYTES = 4 << 20  # of /proc/net/packet: some 60,000 sockets


class OffloadError(NearpathError):
    """The offloads of a device cannot be read or set."""


@dataclass(frozen=True)
class Features:
    """The offloads of a device by their names in ``ethtool -k``, e.g. ``tx-checksum-sctp``."""

    changeable: frozenset[str]
    wanted: frozenset[str]
    active: frozenset[str]


class Door(Socket):
    """Offloads of the devices in the network namespace that the thread is in when this is made.

    Use as a context. For one thread.

    Raises:
        Unavailable: the kernel was built without CONFIG_ETHTOOL_NETLINK.
    """

    def __init__(self) -> None:
        super().__init__(_NETLINK_GENERIC)
        body = _MESSAGE.pack(_GET_FAMILY, 1) + attribute(_FAMILY_NAME, _FAMILY)
        try:
            (answer,) = self.ask("find the netlink family ethtool", _CONTROL, REQUEST, body, 1)
        except NetlinkError as error:
            self.close()
            if error.errno != ENOENT:
                raise OffloadError(error.message) from error
            raise Unavailable(
                "no-ethtool-netlink",
                "the kernel has no netlink family ethtool",
                "it needs CONFIG_ETHTOOL_NETLINK",
            ) from error
        except BaseException:
            self.close()
            raise
        self._family = number(attributes(answer, _MESSAGE.size).get(_FAMILY_ID))

    def features(self, index: int) -> Features | None:
        """The offloads of the device with this ifindex; None if there is none.

        ``ethtool -k``

        Raises:
            OffloadError: the kernel refuses, or answers something else.
        """
        body = _MESSAGE.pack(_FEATURES_GET, _VERSION) + _device(index, 0)
        what = f"read the offloads of device {index}"
        try:
            (answer,) = self.ask(what, self._family, REQUEST, body, 1)
        except NetlinkError as error:
            if error.errno == ENODEV:
                return None
            raise OffloadError(error.message) from error
        known = attributes(answer, _MESSAGE.size)
        if not {_HW, _WANTED, _ACTIVE} <= set(known):
            raise OffloadError(f"cannot {what}: the answer lacks them")
        return Features(
            _names(known[_HW], masked=True), _names(known[_WANTED]), _names(known[_ACTIVE])
        )

    def want(self, index: int, wanted: Mapping[str, bool]) -> bool:
        """Switch offloads of the device with this ifindex on or off; False if it is gone.

        ``ethtool -K``. All or none of them; whether they take is seen by features().

        Args:
            wanted: changeable ones by their names; others are an error.

        Raises:
            OffloadError: the kernel refuses.
        """
        bits = b""
        for name, on in wanted.items():
            bit = attribute(_NAME, name.encode() + b"\0")
            bits += attribute(_BIT | NESTED, bit + (attribute(_VALUE, b"") if on else b""))
        bitset = attribute(_WANTED | NESTED, attribute(_BITS | NESTED, bits))
        body = _MESSAGE.pack(_FEATURES_SET, _VERSION) + _device(index, _OMIT_REPLY) + bitset
        try:
            self.ask(f"set the offloads of device {index}", self._family, REQUEST | ACK, body)
        except NetlinkError as error:
            if error.errno == ENODEV:
                return False
            raise OffloadError(error.message) from error
        return True


def _device(index: int, flags: int) -> bytes:
    header = attribute(_INDEX, struct.pack("=I", index))
    if flags:
        header += attribute(_FLAGS, struct.pack("=I", flags))
    return attribute(_HEADER | NESTED, header)


def _names(bitset: bytes, masked: bool = False) -> frozenset[str]:
    """Names of the bits that are set in a bitset.

    Args:
        masked: the bitset lists all bits, those that are set with a value; others list only
            the bits that are set (net/ethtool/bitset.c).
    """
    found = (attributes(bit) for bit in each(attributes(bitset).get(_BITS, b""), _BIT))
    names = {text(bit.get(_NAME)) for bit in found if _VALUE in bit or not masked}
    # Bridges have one without a name, which ethtool(8) does not show either (6.12).
    return frozenset(names - {""})


def packet_socket_indexes() -> set[int]:
    """Ifindexes to which somebody has bound a packet socket that receives IP.

    Of the network namespace that the thread is in. Sockets bound to no device (``tcpdump -i
    any``) and to other protocols (ARP, LLDP) are not among them.

    Raises:
        OffloadError: the kernel's list cannot be read.
    """
    path = "/proc/thread-self/net/packet"
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return set()  # a kernel without packet sockets
    except OSError as error:
        raise OffloadError(f"cannot read {path}: {error.strerror}") from error
    found = set()
    # sk RefCnt Type Proto Iface R Rmem User Inode
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 4 and fields[3] in _RECEIVES_IP and fields[4].isdigit():
            found.add(int(fields[4]))
    return found - {0}
