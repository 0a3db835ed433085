"""Is a thread of this process asleep in the kernel, waiting for data?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading

# Numbers of system calls: x86-64 and arm64 (asm/unistd_64.h, asm-generic/unistd.h).
_RECVFROM = {"45", "207"}
_POLLS = {"7", "271", "73", "232", "281", "22"}  # poll, ppoll, epoll_wait, epoll_pwait


def _call(thread: threading.Thread) -> str:
    try:
        now = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text(encoding="ascii")
    except FileNotFoundError:  # it has ended
        return ""
    return now.split()[0]


def in_recv(thread: threading.Thread) -> bool:
    """True if it sleeps in recvfrom(2)."""
    return _call(thread) in _RECVFROM


def waits(thread: threading.Thread) -> bool:
    """True if it sleeps in recvfrom(2), poll(2) or epoll_wait(2)."""
    return _call(thread) in _RECVFROM | _POLLS
