"""Streams of small messages leave the lane and run at native speed; nothing else does."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from nearpath.datapath import settings, unloader

if TYPE_CHECKING:
    from .conftest import Lab

STREAK = 64  # of bpf/socket_lane.bpf.c
COUNT = 20_000


def _message(number: int, size: int) -> bytes:
    return (number % 251).to_bytes(1, "big") * size


def _stream(sender: socket.socket, reader: socket.socket, size: int) -> None:
    """COUNT messages one way, read and compared by a thread of its own."""
    wrong: list[int] = []

    def read() -> None:
        buffer = b""
        for number in range(COUNT):
            while len(buffer) < size:
                buffer += reader.recv(1 << 16)
            if buffer[:size] != _message(number, size):
                wrong.append(number)
            buffer = buffer[size:]

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(COUNT):
        sender.sendall(_message(number, size))
    thread.join(30)
    assert not thread.is_alive()
    assert not wrong


def _be_slow(lab: Lab) -> None:
    """Let this be a stream on an emulated machine too, where a message takes a millisecond."""
    settings.write(lab.place, stream_gap_us=100_000)


@pytest.mark.parametrize("direction", ["client", "server"])
@pytest.mark.parametrize("size", [1, 64, 1023])
def test_a_stream_of_small_messages_leaves(lab: Lab, size: int, direction: str) -> None:
    """Its sender is out of the map, every byte arrives, and answers still do."""
    _be_slow(lab)
    client, server = lab.pair()
    with client, server:
        sender, reader = (client, server) if direction == "client" else (server, client)
        _stream(sender, reader, size)
        assert lab.reason("left_streaming") == 1
        assert unloader.sockets_left(lab.place.layout_dir) == 1
        counted = lab.kernel + lab.redirected
        assert counted < COUNT * 0.9, "the rest is native and so not counted"
        for word in (b"answer", b"another"):
            reader.sendall(word)
            assert sender.recv(100) == word
            sender.sendall(word.upper())
            assert reader.recv(100) == word.upper()
        assert lab.reason("peer_left") >= 2
        sender.shutdown(socket.SHUT_WR)
        assert reader.recv(1) == b""
    wait_until(lambda: lab.connections == 0, "the connection to be forgotten")


def test_larger_messages_stay(lab: Lab) -> None:
    """From 1 KiB on the lane is faster, streams or not."""
    client, server = lab.pair()
    with client, server:
        _stream(client, server, 1024)
    assert lab.reason("streaming") == lab.reason("left_streaming") == 0


@pytest.mark.parametrize("size", [1, 64])
def test_senders_without_nagle_stay(lab: Lab, size: int) -> None:
    """TCP gathers nothing for them, so the lane is the faster way for smaller messages too."""
    client, server = lab.pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, server:
        _stream(client, server, size)
    assert lab.reason("streaming") == lab.reason("left_streaming") == 0


def test_answers_break_a_streak(lab: Lab) -> None:
    """However many small messages: with an answer now and then it is no stream."""
    client, server = lab.pair()
    with client, server:
        for _ in range(20):
            for _ in range(STREAK):
                client.sendall(b"q")
            got = 0
            while got < STREAK:
                got += len(server.recv(STREAK))
            server.sendall(b"a")
            assert client.recv(10) == b"a"
    assert lab.reason("streaming") == lab.reason("left_streaming") == 0


def test_slow_one_way_messages_stay(lab: Lab) -> None:
    """There is nothing to gather them with, and each gains from the shorter way."""
    client, server = lab.pair()
    with client, server:
        for _ in range(3 * STREAK):
            client.sendall(b"tick")
            assert server.recv(100) == b"tick"
            time.sleep(0.001)
    assert lab.reason("streaming") == 0
    assert lab.redirected == 3 * STREAK


def test_unread_answers_keep_the_sender_in(lab: Lab) -> None:
    """Leaving would destroy what was redirected to it and not read; it leaves afterwards."""
    _be_slow(lab)
    client, server = lab.pair()
    with client, server:
        server.sendall(b"unread")
        _stream(client, server, 16)
        assert lab.reason("streaming") > 0
        assert lab.reason("left_streaming") == 0
        assert client.recv(100) == b"unread"
        _stream(client, server, 16)
        assert lab.reason("left_streaming") == 1
