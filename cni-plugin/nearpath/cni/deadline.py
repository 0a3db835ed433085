"""The command's own deadline: a hung plugin blocks the whole container runtime.

A timer signal raises DeadlineExceeded in the main thread, wherever it is: reading stdin,
waiting for the node lock, loading programs. It is raised again every quarter of a second
until it is stopped or restarted, so code that swallows errors cannot outlive it for long.

Stdin has a limit of its own, and the command's counts from its end: on a node short of CPU the
runtime may need seconds between starting us and writing, and a DEL must not fail for that.
"""

from __future__ import annotations

import time

from nearpath.errors import DeadlineExceeded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from signal import ITIMER_REAL, SIGALRM, setitimer, signal
    from types import FrameType
    from typing import Any
else:  # the C module: `signal` wraps it in enums, which costs start-up time
    from _signal import ITIMER_REAL, SIGALRM, setitimer, signal

_AGAIN = 0.25  # seconds between two raises
_SHORTEST = 0.001  # a timer of 0 would be none


class Deadline:
    """A time limit in seconds, from ``start`` or ``restart`` on; use in the main thread only."""

    __slots__ = ("_armed", "_before", "_handler", "_started", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._armed = False
        self._started = 0.0
        self._before = (0.0, 0.0)
        self._handler: Any = None

    def _expired(self, _number: int, _frame: FrameType | None) -> None:
        if self._armed:
            raise DeadlineExceeded(f"the command's deadline of {self.seconds:g} s passed")

    def start(self) -> None:
        """Arm the timer; what used the timer before comes back with ``stop``."""
        self._started = time.monotonic()
        self._handler = signal(SIGALRM, self._expired)
        self._before = setitimer(ITIMER_REAL, max(self.seconds, _SHORTEST), _AGAIN)
        self._armed = True

    def restart(self, seconds: float) -> None:
        """Another limit, counted from now: for the next part of the work, or for clearing up."""
        self._armed = False  # first, so that a pending signal cannot interrupt this
        setitimer(ITIMER_REAL, max(seconds, _SHORTEST), _AGAIN)
        self.seconds = seconds
        self._armed = True

    def stop(self) -> None:
        """Disarm; calling it twice is fine."""
        self._armed = False
        if self._handler is None:
            return
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, self._handler)
        self._handler = None
        left, interval = self._before
        if left > 0:
            passed = time.monotonic() - self._started
            setitimer(ITIMER_REAL, max(left - passed, _SHORTEST), interval)
