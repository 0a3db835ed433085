"""The memory that unread bytes take is charged to their reader, and given back.

How much that may be is in test_memory.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from helpers.commands import wait_until

if TYPE_CHECKING:
    from .conftest import Lab

_SO_MEMINFO = 55  # asm-generic/socket.h


def _charged(connection: socket.socket) -> int:
    """Bytes of receive memory that the kernel has charged to the socket (sk_rmem_alloc)."""
    info = connection.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4)
    return int(struct.unpack("=I", info)[0])


def _wait_until_charged(connection: socket.socket, size: int) -> None:
    wait_until(lambda: _charged(connection) >= size, f"{size} bytes to be charged")


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 18))
        assert part
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _warm_up(client: socket.socket, server: socket.socket) -> None:
    for _ in range(3):
        for sender, receiver in ((client, server), (server, client)):
            sender.sendall(b"warm-up")
            assert _receive(receiver, 7) == b"warm-up"


def _tcp_pages() -> int:
    """Pages that all TCP sockets of the machine have charged."""
    with open("/proc/net/sockstat", encoding="ascii") as lines:
        words = next(line.split() for line in lines if line.startswith("TCP:"))
    return int(words[words.index("mem") + 1])


def test_redirected_bytes_are_charged_to_the_reader(lab: Lab) -> None:
    """And not any more when they are read; the control too, though with more per byte."""
    for enabled in (True, False):
        lab.register(enabled=enabled)
        before = lab.redirected
        client, server = lab.pair()
        with client, server:
            _warm_up(client, server)
            assert _charged(server) == 0
            for _ in range(10):
                client.sendall(b"m" * 1000)
            _wait_until_charged(server, 10_000)
            assert len(_receive(server, 10_000)) == 10_000
            assert _charged(server) == 0
        assert lab.redirected - before == 16 * enabled


def test_closed_connections_give_tcps_memory_back(lab: Lab) -> None:
    """Also those that were closed with redirected bytes unread."""
    # Each CPU may keep up to 256 pages for itself (SK_MEMORY_PCPU_RESERVE).
    most = _tcp_pages() + 256 * (os.cpu_count() or 1)
    for _ in range(30):
        client, server = lab.pair()
        with client, server:
            client.setblocking(False)
            with suppress(BlockingIOError):
                for _ in range(200):
                    client.send(bytes(10_000))
    assert lab.redirected > 100
    wait_until(lambda: lab.connections == 0, "all connections to be forgotten")
    wait_until(lambda: _tcp_pages() <= most, "TCP to give its memory back")
