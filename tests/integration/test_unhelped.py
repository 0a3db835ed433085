"""Connections that the lane cannot help leave it and run at native speed; others stay."""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from helpers import mesh
from helpers.commands import wait_until
from nearpath.datapath import settings, unloader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Lab

SIZE = 100_000
MESSAGE = bytes(range(250)) * (SIZE // 250)
LIMIT = 2  # MiB; the default would take longer
MESSAGES = (LIMIT << 20) // SIZE  # nearly as much


@pytest.fixture
def lab(lab: Lab) -> Lab:
    """A datapath with a low limit."""
    settings.write(lab.place, unhelped_kib=LIMIT << 10)
    return lab


@contextmanager
def _pair(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = lab.pair()
    client.setblocking(True)
    server.setblocking(True)
    with client, server:
        yield client, server


@contextmanager
def _kernel_path(lab: Lab) -> Iterator[None]:
    settings.write(lab.place, redirect=0)
    yield
    settings.write(lab.place, redirect=1)


def _stream(
    sender: socket.socket, reader: socket.socket, count: int, message: bytes = MESSAGE
) -> None:
    """So many messages, each read to its last byte before the next one is sent."""
    for _ in range(count):
        thread = threading.Thread(target=sender.sendall, args=(message,))
        thread.start()
        assert mesh.read(reader, len(message)) == message
        thread.join()


@pytest.mark.parametrize("behind", [1000, 0], ids=["behind", "control"])
@pytest.mark.parametrize("direction", ["client", "server"])
def test_a_reader_that_is_always_behind(lab: Lab, direction: str, behind: int) -> None:
    """Some bytes sent by TCP are always unread, so that nothing may be redirected."""
    with _pair(lab) as (client, server):
        sender, reader = (client, server) if direction == "client" else (server, client)
        with _kernel_path(lab):
            # Lets TCP's receive buffer grow, so that a whole message may be redirected.
            _stream(sender, reader, 20, 10 * MESSAGE)
            assert lab.reason("left_unhelped") == 0, "what was switched off does not count"
            first = MESSAGE[:behind] + b"!"
            sender.sendall(first)
        assert mesh.read(reader, 1) == first[:1]
        unread = first[1:]
        for _ in range(2 * MESSAGES):
            sender.sendall(MESSAGE)
            assert mesh.read(reader, SIZE) == (unread + MESSAGE)[:SIZE]
            unread = (unread + MESSAGE)[SIZE:]
        assert mesh.read(reader, behind) == unread
        assert lab.reason("left_unhelped") == bool(behind)
        if not behind:
            assert lab.redirected == 2 * MESSAGES
            return
        assert lab.redirected == 0
        assert unloader.sockets_left(lab.place.layout_dir) == 1
        counted = lab.kernel
        sender.sendall(b"native")
        assert mesh.read(reader, 6) == b"native"
        assert lab.kernel == counted
        # The other side follows with what it sends.
        for word in (b"answer", b"another"):
            reader.sendall(word)
            assert mesh.read(sender, len(word)) == word
        wait_until(lambda: lab.reason("left_unhelped") == 2, "the reader's socket to leave")
        assert unloader.sockets_left(lab.place.layout_dir) == 0
        reader.shutdown(socket.SHUT_WR)
        assert sender.recv(1) == b""
    wait_until(lambda: lab.connections == 0, "the connection to be forgotten")


def test_what_helps_one_way_is_kept(lab: Lab) -> None:
    """Questions that must not be redirected, answers that may: the connection stays."""
    with _pair(lab) as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)  # nothing is redirected to it
        for _ in range(4 * MESSAGES):
            _stream(client, server, 1)
            server.sendall(b"answer")
            assert mesh.read(client, 6) == b"answer"
        assert lab.redirected == 4 * MESSAGES
        assert lab.reason("low_water") > 0
        assert lab.reason("left_unhelped") == lab.reason("unhelped") == 0
        # Without answers it is of no use any more.
        _stream(client, server, 2 * MESSAGES)
        assert lab.reason("left_unhelped") == 1


@pytest.mark.parametrize("limit", [LIMIT, 0])
def test_off(lab: Lab, limit: int) -> None:
    """Zero switches the rule off."""
    settings.write(lab.place, unhelped_kib=limit << 10)
    with _pair(lab) as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        _stream(client, server, 2 * MESSAGES)
        assert lab.reason("left_unhelped") == bool(limit)


def _both_ways(ends: tuple[socket.socket, socket.socket], data: bytes) -> list[bytes]:
    """Send the data from each end, without waiting in any call; what each has read."""
    sent, got = [0, 0], [bytearray(), bytearray()]
    for end in ends:
        end.setblocking(False)
    while min(map(len, got)) < len(data):
        unsent = [end for end, done in zip(ends, sent, strict=True) if done < len(data)]
        readable, writable, _ = select.select(ends, unsent, [], 20)
        assert readable or writable, f"nothing moves after {sent} sent, {list(map(len, got))} read"
        for number, end in enumerate(ends):
            with suppress(BlockingIOError):
                if end in writable:
                    sent[number] += end.send(data[sent[number] : sent[number] + SIZE])
                if end in readable:
                    got[number] += end.recv(1 << 18)
    return [bytes(part) for part in got]


def test_under_way(lab: Lab) -> None:
    """Both sockets leave in the middle of streams both ways: every byte arrives, in order."""
    ends = client, server = lab.pair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
    data = os.urandom(1 << 20) * (6 * LIMIT)
    with client, server:
        assert _both_ways(ends, data) == [data, data]
    assert lab.reason("left_unhelped") == 2
