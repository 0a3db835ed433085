"""Killing a program at a chosen system call, with strace's tampering."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Everything by which the plugin can change something outside of itself, and the waits.
CALLS = (
    *("bpf", "openat", "write", "rename", "fsync", "fdatasync", "flock", "setns"),
    *("mkdir", "unlink", "rmdir", "mount"),
)
# How requests reach the kernel's network configuration.
NETLINK = ("sendto", "sendmsg")
_LINE = re.compile(r"^(?:\d+\s+)?(\w+)\((.*)$")


@dataclass(frozen=True)
class Step:
    """The ``ordinal``-th time (from 1) that a run makes this system call.

    Attributes:
        arguments: and the result, as strace shows them.
    """

    call: str
    ordinal: int
    arguments: str

    def __str__(self) -> str:
        return f"{self.call} #{self.ordinal} ({self.arguments[:100]})"

    @property
    def failed(self) -> bool:
        """The call did nothing, so being killed before it is being killed before the next."""
        return "= -1 E" in self.arguments

    def killed_here(self) -> tuple[str, ...]:
        """Words to put before a program to kill -9 it as it enters this call."""
        inject = f"inject={self.call}:signal=KILL:when={self.ordinal}"
        return ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={self.call}", "-e", inject)


def traced(log: Path, calls: tuple[str, ...] = CALLS) -> tuple[str, ...]:
    """Words to put before a program to write its calls to a file for `steps`."""
    return ("strace", "-f", "-qq", "-s", "200", "-o", str(log), "-e", f"trace={','.join(calls)}")


def steps(log: Path, wanted: Callable[[Step], bool]) -> list[Step]:
    """The traced calls, in order, for which ``wanted`` is true."""
    seen: Counter[str] = Counter()
    found = []
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:  # signals, exits, and the second halves of interrupted calls
            continue
        call, arguments = match.groups()
        seen[call] += 1
        step = Step(call, seen[call], arguments)
        if wanted(step):
            found.append(step)
    return found
