"""Offloads of a device: what ``ethtool -k`` shows and ``-K`` sets, by ifindex.

By generic netlink (family ethtool, since Linux 5.6), not by the ioctl of the same purpose:
that one takes a name, and names in a pod's namespace are the pod's to change between our
look-up and the call. pyroute2 brings the socket and the shape of a bitset; it has no message
for features, so that is here.

The kernel keeps three sets per device. ``changeable`` (hw_features) are those that somebody
may switch, ``wanted`` those that somebody has switched on, ``active`` those that are on:
without checksum offload the kernel takes segmentation offload out of ``active`` and leaves it
in ``wanted`` (netdev_fix_features), and a tap takes out what its guest has not negotiated.
So whoever puts ``wanted`` back gets every consequence back.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import ENODEV, ENOENT
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
from pyroute2.netlink.generic import GenericNetlinkSocket  # type: ignore[import-untyped]
from pyroute2.netlink.generic.ethtool import ethtoolbitset, ethtoolheader  # type: ignore[import-untyped]

from nearpath.errors import NearpathError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_FAMILY = "ethtool"
_VERSION = 1  # ETHTOOL_GENL_VERSION
# linux/ethtool_netlink.h
_FEATURES_GET, _FEATURES_SET = 11, 12
_HEADER, _BITS, _BIT = (
    "ETHTOOL_A_FEATURES_HEADER",
    "ETHTOOL_A_BITSET_BITS",
    "ETHTOOL_A_BITSET_BITS_BIT",
)
_NAME, _VALUE = "ETHTOOL_A_BITSET_BIT_NAME", "ETHTOOL_A_BITSET_BIT_VALUE"
_FLAG_OMIT_REPLY = 1 << 1  # ETHTOOL_FLAG_OMIT_REPLY

# linux/if_ether.h: the protocols under which a packet socket receives IP.
_RECEIVES_IP = {"0003", "0800", "86dd"}  # ETH_P_ALL, ETH_P_IP, ETH_P_IPV6
_MOST_BYTES = 4 << 20  # of /proc/net/packet: some 60,000 sockets


class OffloadError(NearpathError):
    """The offloads of a device cannot be read or set."""


class _Features(genlmsg):  # type: ignore[misc]  # pyroute2 has no types
    """A message of ETHTOOL_MSG_FEATURES_*."""

    prefix = "ETHTOOL_A_FEATURES_"
    nla_map = (
        ("ETHTOOL_A_FEATURES_UNSPEC", "none"),
        (_HEADER, "ethtoolheader"),
        ("ETHTOOL_A_FEATURES_HW", "ethtoolbitset"),
        ("ETHTOOL_A_FEATURES_WANTED", "ethtoolbitset"),
        ("ETHTOOL_A_FEATURES_ACTIVE", "ethtoolbitset"),
        ("ETHTOOL_A_FEATURES_NOCHANGE", "ethtoolbitset"),
    )
    ethtoolheader = ethtoolheader
    ethtoolbitset = ethtoolbitset


@dataclass(frozen=True)
class Features:
    """The offloads of a device by their names in ``ethtool -k``, e.g. ``tx-checksum-sctp``."""

    changeable: frozenset[str]
    wanted: frozenset[str]
    active: frozenset[str]


class Door:
    """Offloads of the devices in the network namespace that the thread is in when this is made.

    Use as a context. For one thread.

    Raises:
        Unavailable: the kernel was built without CONFIG_ETHTOOL_NETLINK.
    """

    def __init__(self) -> None:
        self._socket = GenericNetlinkSocket()
        # A family that is not there is an error of ours, not a line in pyroute2's log.
        self._socket.asyncore.module_err_level = "debug"
        try:
            self._socket.bind(_FAMILY, _Features)
        except (NetlinkError, OSError) as error:
            self._socket.close()
            if getattr(error, "code", 0) == ENOENT:
                raise Unavailable(
                    "no-ethtool-netlink",
                    "the kernel has no netlink family ethtool",
                    "it needs CONFIG_ETHTOOL_NETLINK",
                ) from error
            raise OffloadError(f"cannot open the netlink family {_FAMILY}: {error}") from error

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def features(self, index: int) -> Features | None:
        """The offloads of the device with this ifindex; None if there is none.

        ``ethtool -k``

        Raises:
            OffloadError: the kernel refuses, or answers something else.
        """
        answers = self._ask(_FEATURES_GET, index, NLM_F_REQUEST)
        if answers is None:
            return None
        if len(answers) != 1:
            raise OffloadError(f"no answer about the offloads of device {index}")
        (answer,) = answers
        return Features(
            _names(answer, "HW", masked=True), _names(answer, "WANTED"), _names(answer, "ACTIVE")
        )

    def want(self, index: int, wanted: Mapping[str, bool]) -> bool:
        """Switch offloads of the device with this ifindex on or off; False if it is gone.

        ``ethtool -K``. All or none of them; whether they take is seen by features().

        Args:
            wanted: changeable ones by their names; others are an error.

        Raises:
            OffloadError: the kernel refuses.
        """
        bits = [
            [_BIT, {"attrs": [[_NAME, name], *([[_VALUE, True]] if on else [])]}]
            for name, on in wanted.items()
        ]
        bitset = {"attrs": [[_BITS, {"attrs": bits}]]}
        answers = self._ask(
            _FEATURES_SET,
            index,
            NLM_F_REQUEST | NLM_F_ACK,
            ("ETHTOOL_A_FEATURES_WANTED", bitset),
        )
        return answers is not None

    def _ask(
        self, command: int, index: int, flags: int, *attributes: tuple[str, Any]
    ) -> list[Any] | None:
        """Send one request; the answers, or None if there is no such device."""
        message = _Features()
        message["cmd"] = command
        message["version"] = _VERSION
        header: list[list[Any]] = [["ETHTOOL_A_HEADER_DEV_INDEX", index]]
        if command == _FEATURES_SET:
            header.append(["ETHTOOL_A_HEADER_FLAGS", _FLAG_OMIT_REPLY])
        message["attrs"] = [(_HEADER, {"attrs": header}), *attributes]
        try:
            # The kernel answers within sendmsg(2), so this never waits for somebody else.
            return list(
                self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=flags)
            )
        except NetlinkError as error:
            if error.code == ENODEV:
                return None
            verb = "set" if command == _FEATURES_SET else "read"
            raise OffloadError(
                f"cannot {verb} the offloads of device {index}: {error.args[-1]}"
            ) from error
        except OSError as error:
            raise OffloadError(
                f"cannot ask for the offloads of device {index}: {error.strerror or error}"
            ) from error


def _names(answer: Any, which: str, masked: bool = False) -> frozenset[str]:
    """Names of the bits that are set in one of the bitsets of an answer.

    Args:
        masked: the bitset lists all bits, those that are set with a value; others list only
            the bits that are set (net/ethtool/bitset.c).
    """
    bits = answer.get_attr(f"ETHTOOL_A_FEATURES_{which}").get_attr(_BITS)
    if bits is None:
        return frozenset()
    return frozenset(
        bit.get_attr(_NAME) for bit in bits.get_attrs(_BIT) if bit.get_attr(_VALUE) or not masked
    )


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
