"""inotify(7): be told when files of a directory come, change their name or go."""

from __future__ import annotations

import ctypes
import os

from nearpath.errors import NearpathError

# sys/inotify.h
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_ONLYDIR, _DONT_FOLLOW = 0x01000000, 0x02000000
_EVENTS = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLYDIR | _DONT_FOLLOW


class Directories:
    """Watches directories that exist; readable (select, poll) when something has happened.

    Raises:
        NearpathError: a directory is not there, or the kernel is out of watches.
    """

    def __init__(self, *paths: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self._descriptor < 0:
            raise _error("cannot watch directories")
        for path in paths:
            if libc.inotify_add_watch(self._descriptor, os.fsencode(path), _EVENTS) < 0:
                error = _error(f"cannot watch directory {path}")
                self.close()
                raise error

    def fileno(self) -> int:
        """For select(2) and its kin."""
        return self._descriptor

    def drain(self) -> None:
        """Read all events; what they say is not kept, for they may have been too many."""
        try:
            while os.read(self._descriptor, 65536):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Calling it twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _error(what: str) -> NearpathError:
    number = ctypes.get_errno()
    remedy = "raise fs.inotify.max_user_instances and max_user_watches" if number != 2 else ""
    return NearpathError(f"{what}: {os.strerror(number)}", remedy)
