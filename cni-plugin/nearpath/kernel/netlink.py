"""Netlink sockets (netlink(7)): requests, dumps with an end, and attributes.

Ours and not a library's, since what a pod has in its namespace is the pod's choice: a dump must
have an end, so it stops to keep answers after a number of entries. ARCHITECTURE.md has what a
library costs here.
"""

from __future__ import annotations

import os
import socket
import struct
from errno import ENODEV, ENOENT
from typing import TYPE_CHECKING

from nearpath.errors import NearpathError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

# linux/netlink.h
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
REQUEST, ACK, DUMP, EXCL, CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
NESTED = 0x8000
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_ACK_CAPPED, _ACK_TLVS = 0x100, 0x200
_NLMSGERR_ATTR_MSG = 1
_TYPE = 0x3FFF  # of an attribute, without the flags for nested and network byte order

_READ = 65536
_TIMEOUT = 5.0  # seconds; the kernel answers at once, and a watcher must not hang
_TRIES = 3
GONE = frozenset({ENODEV, ENOENT})

Attributes = dict[int, bytes]


class NetlinkError(NearpathError):
    """The kernel refused a request; ``errno`` says why, ``said`` the same in its own words."""

    def __init__(self, what: str, errno: int, said: str = "") -> None:
        text = f"cannot {what}: {os.strerror(errno)}"
        super().__init__(f"{text} ({said})" if said else text)
        self.errno = errno
        self.said = said


def attribute(kind: int, content: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def _walk(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Type and content of each attribute from ``start`` on."""
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            break
        yield kind & _TYPE, data[start + 4 : start + length]
        start += (length + 3) & ~3


def attributes(data: bytes, start: int = 0) -> Attributes:
    """The attributes from ``start`` on by their type; the last one of a type counts."""
    return dict(_walk(data, start))


def each(data: bytes, kind: int) -> Iterator[bytes]:
    """The contents of all attributes of a type."""
    return (content for found, content in _walk(data, 0) if found == kind)


def text(data: bytes | None) -> str:
    """A string of the kernel's; bytes that are no UTF-8 come escaped."""
    return (data or b"").partition(b"\0")[0].decode("utf-8", "backslashreplace")


def number(data: bytes | None) -> int:
    """An integer in host byte order, of whatever width; 0 if it is not there."""
    return int.from_bytes(data or b"", "little" if struct.pack("=H", 1)[0] else "big")


class Socket:
    """A netlink socket of the namespace that the thread is in; a context that closes it.

    Args:
        protocol: NETLINK_ROUTE, NETLINK_GENERIC, …
    """

    error = NetlinkError

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.settimeout(_TIMEOUT)
        # Errors come with the kernel's words and without our own request.
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Calling it twice is fine."""
        self._socket.close()

    def dump(self, what: str, kind: int, body: bytes, most: int) -> list[bytes]:
        """The first ``most`` messages of a dump, asked for again if the kernel's lists changed.

        Raises:
            NearpathError: see ask().
        """
        for _ in range(_TRIES):
            before = self._sequence
            found = self.ask(what, kind, REQUEST | DUMP, body, most)
            if self._sequence == before + 1:
                break
        return found

    def ask(self, what: str, kind: int, flags: int, body: bytes, most: int = 0) -> list[bytes]:
        """Send a request and read all of the answer; the first ``most`` messages of it.

        An interrupted dump (the kernel's lists have changed meanwhile) counts the sequence
        once more, so that dump() knows.

        Args:
            what: for the error, e.g. ``list links``.
            kind: type of the message.
            flags: REQUEST and others.

        Raises:
            NetlinkError: the kernel refused; of the class ``error``.
            NearpathError: it cannot be asked.
        """
        self._sequence += 1
        sequence, interrupted = self._sequence, False
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0)
        found: list[bytes] = []
        try:
            self._socket.send(header + body)
            for number_, flags_, payload in self._messages(sequence):
                interrupted |= bool(flags_ & _DUMP_INTERRUPTED)
                if number_ == _ERROR:
                    self._check(what, flags_, payload)
                if number_ in {_ERROR, _DONE}:
                    break
                if len(found) < most:
                    found.append(payload)
                if not flags & (DUMP | ACK):
                    break
        except OSError as error:
            raise NearpathError(f"cannot {what}: {error.strerror or error}") from error
        if interrupted:
            self._sequence += 1
        return found

    def _messages(self, sequence: int) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, payload) of what answers this request; others are late answers."""
        while True:
            data = self._socket.recv(_READ)
            start = 0
            while start + _HEADER.size <= len(data):
                length, kind, flags, number_, _ = _HEADER.unpack_from(data, start)
                if length < _HEADER.size:
                    break
                if number_ == sequence:
                    yield kind, flags, data[start + _HEADER.size : start + length]
                start += (length + 3) & ~3

    def _check(self, what: str, flags: int, payload: bytes) -> None:
        (result,) = struct.unpack_from("=i", payload)
        if result:
            said = ""
            if flags & _ACK_TLVS and flags & _ACK_CAPPED:
                start = 4 + _HEADER.size
                said = text(attributes(payload, start).get(_NLMSGERR_ATTR_MSG))
            raise self.error(what, -result, said)
