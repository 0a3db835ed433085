"""Network namespaces: open, compare, enter, and read the cookie of one."""

from __future__ import annotations

import os
import struct
from _socket import AF_UNIX, SOCK_DGRAM, SOL_SOCKET, socket

from nearpath.errors import NearpathError
from nearpath.kernel.syscall import SETNS, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

CLONE_NEWNET = 0x40000000  # linux/sched.h
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14


class NetnsError(NearpathError):
    """A network namespace cannot be opened or entered."""


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: a FIFO at this path must not hang us.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise NetnsError(f"cannot open network namespace {path!r}: {text}") from error


def _setns(descriptor: int, path: str) -> None:
    try:
        syscall(SETNS, descriptor, CLONE_NEWNET)
    except OSError as error:
        text = error.strerror
        raise NetnsError(f"cannot enter network namespace {path!r}: {text}") from error


def is_own(path: str) -> bool:
    """True if ``path`` is the namespace that this process is in.

    Raises:
        NetnsError: it cannot be opened.
    """
    descriptor = _open(path)
    try:
        theirs = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    ours = os.stat("/proc/self/ns/net")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


class entered:  # noqa: N801 - reads as a verb: with entered(path)
    """Context: this thread is in the network namespace at ``path``.

    Sockets opened inside stay in that namespace. The caller must be single-threaded or
    accept that only its own thread moves.

    Raises:
        NetnsError: not a network namespace, or no permission.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._back = -1

    def __enter__(self) -> None:
        target = _open(self._path)
        try:
            self._back = _open("/proc/self/ns/net")
            _setns(target, self._path)
        except BaseException:
            if self._back >= 0:
                os.close(self._back)
            raise
        finally:
            os.close(target)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            _setns(self._back, "/proc/self/ns/net")
        finally:
            os.close(self._back)


def current_cookie() -> int:
    """Cookie of the namespace that this thread is in: u64, unique until reboot, never 0.

    Raises:
        NetnsError: the kernel is older than 5.14 (SO_NETNS_COOKIE).
    """
    with_socket = socket(AF_UNIX, SOCK_DGRAM)
    try:
        data = with_socket.getsockopt(SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError as error:
        raise NetnsError(
            f"cannot read the network namespace cookie: {error.strerror}",
            "nearpath needs Linux 5.14 or newer",
        ) from error
    finally:
        with_socket.close()
    cookie: int = struct.unpack("=Q", data)[0]
    return cookie


def cookie(path: str) -> int:
    """Cookie of the network namespace at ``path``; see current_cookie."""
    with entered(path):
        return current_cookie()
