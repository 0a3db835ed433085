"""The BPF file system, in which maps, programs and links outlive the processes that made them."""

from __future__ import annotations

import ctypes
import os

from nearpath.errors import Unavailable
from nearpath.kernel.cgroup import mounts

BPFFS = "/sys/fs/bpf"
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8  # linux/mount.h


def bpffs_mounted(path: str = BPFFS) -> bool:
    """True if ``path`` is on a BPF file system."""
    try:
        path = os.path.realpath(path)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            # The longest mount point above the path; of equal ones the last is on top.
            best, kind_of_best = "", ""
            for _, point, kind in mounts(lines):
                below = path == point or path.startswith(point.rstrip("/") + "/")
                if below and len(point) >= len(best):
                    best, kind_of_best = point, kind
    except OSError:
        return False
    return kind_of_best == "bpf"


def ensure_bpffs(path: str = BPFFS) -> None:
    """Make sure that ``path`` is on a BPF file system; mount one at /sys/fs/bpf if not.

    Raises:
        Unavailable: ``no-bpffs``.
    """
    if bpffs_mounted(path):
        return
    if path == BPFFS or path.startswith(BPFFS + "/"):
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mount(b"bpf", BPFFS.encode(), b"bpf", _MS_NOSUID_NODEV_NOEXEC, b"mode=0700")
        if result == 0 and bpffs_mounted(path):
            return
        text = os.strerror(ctypes.get_errno())
        raise Unavailable(
            "no-bpffs", f"cannot mount bpffs at {BPFFS}: {text}", f"mount -t bpf bpf {BPFFS}"
        )
    raise Unavailable("no-bpffs", f"{path} is not on a BPF file system", f"mount -t bpf bpf {path}")
