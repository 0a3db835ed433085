"""Network links by ioctl: just what ADD needs, without the start-up cost of pyroute2.

A netlink library such as pyroute2 takes about 230 ms to import, several times the whole
budget of an ADD.
"""

from __future__ import annotations

import fcntl
import os
import struct
from _socket import AF_INET, SOCK_DGRAM, if_indextoname, if_nametoindex, socket

from nearpath.kernel.syscall import address

_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x00000003
_ETHTOOL_GSTRINGS = 0x0000001B
_ETHTOOL_GSTATS = 0x0000001D
_ETH_SS_STATS = 1
_STRING = 32  # ETH_GSTRING_LEN
_MOST_STATS = 4096


def _ethtool(control: socket, ifname: str, buffer: bytearray) -> None:
    request = struct.pack("16sP16x", os.fsencode(ifname)[:15], address(buffer))
    fcntl.ioctl(control, _SIOCETHTOOL, request)


def veth_peer_index(ifname: str) -> int | None:
    """Index of the other end of a veth, in the current network namespace's view.

    Asks the driver's ``peer_ifindex`` statistic (drivers/net/veth.c, since Linux 4.2), for
    prevResult need not name the host end. None: no such link, or not a veth.
    """
    control = socket(AF_INET, SOCK_DGRAM)
    try:
        # struct ethtool_drvinfo: cmd, driver[32], version[32], fw[32], bus[32], erom[32],
        # reserved2[12], n_priv_flags, n_stats, testinfo_len, eedump_len, regdump_len
        info = bytearray(struct.pack("=I192x", _ETHTOOL_GDRVINFO))
        _ethtool(control, ifname, info)
        if bytes(info[4:36]).rstrip(b"\0") != b"veth":
            return None
        (count,) = struct.unpack_from("=I", info, 4 + 5 * 32 + 12 + 4)
        if not 0 < count <= _MOST_STATS:
            return None
        names = bytearray(
            struct.pack("=III", _ETHTOOL_GSTRINGS, _ETH_SS_STATS, count) + bytes(32 * count)
        )
        _ethtool(control, ifname, names)
        values = bytearray(struct.pack("=II", _ETHTOOL_GSTATS, count) + bytes(8 * count))
        _ethtool(control, ifname, values)
        for number in range(count):
            start = 12 + number * _STRING
            if bytes(names[start : start + _STRING]).rstrip(b"\0") == b"peer_ifindex":
                (index,) = struct.unpack_from("=Q", values, 8 + number * 8)
                return int(index)
    except OSError:
        return None
    finally:
        control.close()
    return None


def exists(ifname: str) -> bool:
    """True if the current network namespace has a link of this name."""
    try:
        if_nametoindex(ifname)
    except (OSError, ValueError):
        return False
    return True


def name_of(index: int) -> str | None:
    """Name of the link with this index in the current network namespace, or None."""
    try:
        return if_indextoname(index)
    except (OSError, OverflowError):
        return None
