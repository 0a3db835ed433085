"""SIGINT and SIGTERM as a flag that long work looks at, instead of an exception anywhere.

An exception out of a signal handler can arrive between making a thing and noting that it
must be removed. A flag is looked at only where everything made is noted.
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess
    from types import FrameType, TracebackType


class Interrupted(Exception):
    """The user or the system asked to stop; not an error.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number


class Interrupts:
    """Context: SIGINT, SIGTERM and SIGHUP are noted; ``check()`` raises for them."""

    def __init__(self) -> None:
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._noted = self._noted or number

    def check(self) -> None:
        """Raise Interrupted if a signal was noted."""
        if self._noted:
            raise Interrupted(self._noted)

    def wait(self, process: subprocess.Popen[str], timeout: float) -> bool:
        """Wait for a child, at most ``timeout`` seconds; True if it has ended.

        Raises:
            Interrupted: a signal came; the child is still running.
        """
        end = time.monotonic() + timeout
        descriptor = os.pidfd_open(process.pid)
        try:
            ended = select.poll()
            ended.register(descriptor, select.POLLIN)
            while process.poll() is None:
                self.check()
                left = end - time.monotonic()
                if left <= 0:
                    return False
                # poll(2) goes on after a signal handler: look at the flag now and then.
                ended.poll(min(left, 0.1) * 1000)
        finally:
            os.close(descriptor)
        return True
