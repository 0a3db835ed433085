"""The limits of the README, each pinned: what the kernel path does and what the lane does.

When one of these fails because the lane has become better, take the limit out of the README.
Where the kernel takes fentry, the guards keep the lane from most of them (test_guards).
The opt-out for all of them is the annotation ``nearpath.io/socket-lane: "off"``, which is the
first column.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from nearpath.datapath import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Lab

_TCP_INFO_BYTES_ACKED = slice(120, 128)  # struct tcp_info.tcpi_bytes_acked, linux/tcp.h


def _outcome(action: Callable[[], object]) -> str:
    try:
        return str(action())
    except OSError as error:
        return type(error).__name__


def _arrived(server: socket.socket) -> None:
    wait_until(lambda: select.select([server], [], [], 0)[0], "the bytes to arrive")


def splice(client: socket.socket, server: socket.socket) -> str:
    """splice(2) from the socket: proxies, Go's io.Copy between connections."""
    client.sendall(b"spliced")
    _arrived(server)
    reader, writer = os.pipe()
    try:
        server.setblocking(False)
        return _outcome(lambda: os.splice(server.fileno(), writer, 100, flags=2))
    finally:
        os.close(reader)
        os.close(writer)


def wait_all(client: socket.socket, server: socket.socket) -> str:
    """recv with MSG_WAITALL: all of it, or part?"""
    server.setblocking(True)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(server.recv(6, socket.MSG_WAITALL)))
    reader.start()
    time.sleep(0.05)
    client.sendall(b"abc")
    time.sleep(0.05)
    client.sendall(b"def")
    reader.join(5)
    return str(got)


def truncate(client: socket.socket, server: socket.socket) -> str:
    """recv with MSG_TRUNC and no buffer: bytes thrown away unseen."""
    client.sendall(b"thrown away")
    _arrived(server)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.recv(server.fileno(), None, 11, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
    return os.strerror(ctypes.get_errno()) if result < 0 else str(result)


def urgent(client: socket.socket, server: socket.socket) -> str:
    """send with MSG_OOB: urgent, or one byte more in the stream?"""
    client.send(b"!", socket.MSG_OOB)
    time.sleep(0.05)
    server.setblocking(False)
    return _outcome(lambda: server.recv(1))


def information(client: socket.socket, server: socket.socket) -> str:
    """TCP_INFO's tcpi_bytes_acked after 100 bytes."""
    client.sendall(b"i" * 100)
    assert len(server.recv(100)) == 100
    time.sleep(0.1)
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return str(int.from_bytes(info[_TCP_INFO_BYTES_ACKED], "little") >= 100)


def close_unread(client: socket.socket, server: socket.socket) -> str:
    """The receiver closes with bytes unread: reset, or an orderly end?"""
    client.sendall(b"never read")
    _arrived(server)
    server.close()
    time.sleep(0.05)
    return _outcome(lambda: client.recv(1))


@pytest.mark.parametrize(
    ("program", "kernel_path", "lane"),
    [
        (splice, "7", "BlockingIOError"),
        (wait_all, "[b'abcdef']", "[b'abc']"),
        (truncate, "11", "Bad address"),
        (urgent, "BlockingIOError", "b'!'"),
        (information, "True", "False"),
        (close_unread, "ConnectionResetError", "b''"),
    ],
)
def test_a_known_difference(
    lab: Lab, program: Callable[[socket.socket, socket.socket], str], kernel_path: str, lane: str
) -> None:
    """Run the program on the kernel path and in the lane, where no guard watches."""
    settings.write(lab.place, guards=0)
    outcomes = []
    for enabled in (False, True):
        lab.register(enabled=enabled)
        client, server = lab.pair()
        with client, server:
            outcomes.append(program(client, server))
    assert outcomes == [kernel_path, lane]


def test_a_blocking_reader_beside_a_blocked_writer_may_see_eagain(lab: Lab) -> None:
    """Two threads on one socket, one in recv, one in a send that waits for room.

    tcp_bpf_recvmsg waits only once, and the kernel wakes it when there is room to write. No
    byte is lost: a reader that tries again goes on. On the kernel path it sleeps on.
    """
    client, server = lab.pair()
    client.setblocking(True)
    server.setblocking(True)
    seen: list[str] = []
    size = 32 << 20

    def read() -> None:
        while True:
            try:
                seen.append(repr(client.recv(5)))
                break
            except BlockingIOError:
                seen.append("EAGAIN")

    def write() -> None:
        client.sendall(bytes(size))

    with client, server:
        reader, writer = threading.Thread(target=read), threading.Thread(target=write)
        reader.start()
        writer.start()
        time.sleep(0.5)
        left = size
        while left:
            left -= len(server.recv(1 << 20))
        server.sendall(b"reply")
        reader.join(10)
        writer.join(10)
    assert seen[-1] == "b'reply'"
    assert "EAGAIN" in seen
