"""Be told when links or traffic control of a network namespace change (rtnetlink(7))."""

from __future__ import annotations

import os
import socket

from nearpath.errors import NearpathError
from nearpath.kernel import netns

_RTMGRP_LINK, _RTMGRP_TC = 0x1, 0x8  # linux/rtnetlink.h
# A pod decides how much happens in its namespace. What does not fit is dropped by the
# kernel, and that something was dropped is all that we need to know.
_ROOM = 16384


class LinkEvents:
    """Readable (select, poll) when links, qdiscs or filters of a namespace have changed.

    Keeps the namespace alive while it is open.

    Args:
        path: of the namespace.
        cookie: of the one that it must be; see kernel/netns.py.

    Raises:
        NearpathError: it cannot be entered, or it is another one.
    """

    def __init__(self, path: str, cookie: int) -> None:
        with netns.entered(path):
            if netns.current_cookie() != cookie:
                raise NearpathError(f"{path!r} is another network namespace by now")
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
            self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_TC))
        except OSError as error:
            self._socket.close()
            text = f"cannot watch links in {path!r}: {error.strerror or os.strerror(0)}"
            raise NearpathError(text) from error

    def fileno(self) -> int:
        """For select(2) and its kin."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Throw away what has come so far; True if there was anything."""
        some = False
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return some
            except OSError:  # ENOBUFS: more has happened than there was room for
                pass
            some = True

    def close(self) -> None:
        """Calling it twice is fine."""
        self._socket.close()
