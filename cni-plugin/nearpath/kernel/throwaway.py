"""Things of the kernel made for a moment: a nameless network namespace, a bridge to remove."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from nearpath.errors import NearpathError
from nearpath.kernel import mounts, netns
from nearpath.kernel.syscall import UNSHARE, syscall

_OWN_NETNS = "/proc/self/ns/net"
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCBRDELBR = 0x89A1
_IFF_UP = 1


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
            _set_up("lo", True)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def _set_up(ifname: str, up: bool) -> None:
    """``ip link set <ifname> up|down``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", ifname.encode(), 0)
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        flags = flags | _IFF_UP if up else flags & ~_IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", ifname.encode(), flags))


def delete_bridge(ifname: str) -> None:
    """``ip link del <ifname>`` for a bridge; none of that name is fine.

    Raises:
        NearpathError: not a bridge, or the kernel refused.
    """
    try:
        _set_up(ifname, False)
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
