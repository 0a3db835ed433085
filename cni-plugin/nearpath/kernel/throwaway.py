"""Things of the kernel made for a moment: nameless network namespaces, and wires in them.

Links are made by netlink and ioctl, for no tool such as ``ip`` need be installed on a node.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from nearpath.errors import NearpathError
from nearpath.kernel import mounts, netns
from nearpath.kernel.netlink import ACK, CREATE, EXCL, REQUEST, Socket, attribute
from nearpath.kernel.syscall import UNSHARE, syscall

_OWN_NETNS = "/proc/self/ns/net"
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_SIOCBRADDBR, _SIOCBRDELBR, _SIOCBRADDIF = 0x89A0, 0x89A1, 0x89A2
_IFF_UP = 1
# linux/rtnetlink.h, linux/if_link.h, linux/veth.h
_RTM_NEWLINK = 16
_NO_LINK = bytes(16)  # struct ifinfomsg that leaves everything open
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1


def new_netns() -> int:
    """A new network namespace with its loopback up; it lives as long as the descriptor.

    Nothing names it, so whatever kills this process takes the namespace and the devices
    in it away. Other programs reach it as ``/proc/<our pid>/fd/<descriptor>``.

    Raises:
        NearpathError: not permitted, or no namespaces in this kernel.
    """
    with netns.entered(_OWN_NETNS):  # to come back from what unshare makes
        try:
            syscall(UNSHARE, netns.CLONE_NEWNET)
        except OSError as error:
            raise NearpathError(f"cannot make a network namespace: {error.strerror}") from error
        descriptor = os.open(_OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_up("lo")
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def set_up(ifname: str, up: bool = True) -> None:
    """``ip link set <ifname> up|down``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", ifname.encode(), 0)
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        flags = flags | _IFF_UP if up else flags & ~_IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", ifname.encode(), flags))


def add_veth(ifname: str, peer: str, peer_netns: int) -> None:
    """``ip link add <ifname> type veth peer name <peer> netns <descriptor>``.

    Raises:
        NearpathError: the kernel refused.
    """
    far = attribute(_IFLA_IFNAME, peer.encode() + b"\0")
    far += attribute(_IFLA_NET_NS_FD, struct.pack("=i", peer_netns))
    pair = attribute(_VETH_INFO_PEER, _NO_LINK + far)
    link = attribute(_IFLA_INFO_KIND, b"veth") + attribute(_IFLA_INFO_DATA, pair)
    body = _NO_LINK + attribute(_IFLA_IFNAME, ifname.encode() + b"\0")
    body += attribute(_IFLA_LINKINFO, link)
    with Socket(socket.NETLINK_ROUTE) as control:
        control.ask(f"make veth {ifname}", _RTM_NEWLINK, REQUEST | ACK | EXCL | CREATE, body)


def add_bridge(ifname: str, *ports: str) -> None:
    """``ip link add <ifname> type bridge`` with these links as its ports, all up.

    Raises:
        OSError: the kernel refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCBRADDBR, struct.pack("16s", ifname.encode()))
        for port in ports:
            index = socket.if_nametoindex(port)
            fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", ifname.encode(), index))
            set_up(port)
    set_up(ifname)


def set_address(ifname: str, address: str, netmask: str) -> None:
    """``ip address add <address>/<netmask> dev <ifname>`` for IPv4, and up.

    Raises:
        OSError: the kernel refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            packed = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, struct.pack("16s16s8x", ifname.encode(), packed))
    set_up(ifname)


def delete_bridge(ifname: str) -> None:
    """``ip link del <ifname>`` for a bridge; none of that name is fine.

    Raises:
        NearpathError: not a bridge, or the kernel refused.
    """
    try:
        set_up(ifname, False)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCBRDELBR, struct.pack("16s", ifname.encode()))
    except OSError as error:
        if os.path.exists(f"/sys/class/net/{ifname}"):
            text = f"cannot remove bridge {ifname}: {error.strerror}"
            raise NearpathError(text, f"ip link del {ifname}") from error


def unmount_bpffs_if_empty() -> bool:
    """Unmount /sys/fs/bpf if nothing is pinned there; True if it was unmounted."""
    names = set(os.listdir(mounts.BPFFS)) - {"maps.debug", "progs.debug"}  # the kernel's own
    if names:
        return False
    result: int = ctypes.CDLL(None, use_errno=True).umount2(mounts.BPFFS.encode(), 0)
    return result == 0
