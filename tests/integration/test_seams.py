"""No bytes sent by TCP behind unread redirected ones, for readers that would not look there.

A read of a socket in a sockmap ends where the redirected bytes end. Programs that take a
short read for all there is wait for an event that has been (careful: edge-triggered epoll), or
close (hasty: having seen EPOLLRDHUP). Blocking readers and level-triggered ones come back anyway.
"""

from __future__ import annotations

import hashlib
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from helpers.waiting import in_recv, waits
from nearpath.datapath import settings, tables

from .conftest import TIMEOUT

if TYPE_CHECKING:
    from .conftest import Lab

EDGE = select.EPOLLIN | select.EPOLLET | select.EPOLLRDHUP
LEVEL = select.EPOLLIN | select.EPOLLRDHUP
SECONDS = 5.0  # without an event: the reader hangs


def _pattern(size: int) -> bytes:
    return hashlib.shake_128(size.to_bytes(8, "big")).digest(size)


class _Careful:
    """An event-driven reader that takes a short read for all there is; ``got`` at the end.

    Args:
        events: with EPOLLET it waits for the next event after a short read, unless it knows
            of the end, as nginx and tokio do; without, a short read after EPOLLRDHUP is the end,
            as for HAProxy.
        pause: seconds to sleep before each read, like a proxy whose client is slow.
        chunk: bytes to ask for.
    """

    def __init__(
        self, server: socket.socket, events: int, pause: float = 0, chunk: int = 1 << 16
    ) -> None:
        server.setblocking(False)
        self._server, self._events, self._pause, self._chunk = server, events, pause, chunk
        self._epoll = select.epoll()
        self._epoll.register(server, events)
        self.got = bytearray()
        self.hung = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        ending = False
        while True:
            ready = self._epoll.poll(SECONDS)
            if not ready:
                self.hung = True
                return
            while True:
                time.sleep(self._pause)
                try:
                    part = self._server.recv(self._chunk)
                except BlockingIOError:
                    break
                self.got += part
                if not part:
                    return
                ending = ending or bool(ready[0][1] & select.EPOLLRDHUP)
                if len(part) < self._chunk:
                    if ending and not self._events & select.EPOLLET:
                        return
                    if not ending:
                        break

    def end(self) -> bytes:
        """Everything that it has read, once it believes that this was all."""
        self._thread.join(60)
        self._epoll.close()
        assert not self.hung, f"the reader hangs after {len(self.got)} bytes"
        return bytes(self.got)


def _pour(client: socket.socket, data: bytes, size: int) -> None:
    client.setblocking(True)
    for start in range(0, len(data), size):
        client.sendall(data[start : start + size])
    client.shutdown(socket.SHUT_WR)


@pytest.fixture
def careful(lab: Lab) -> Lab:
    """A datapath with the rule on, as a node has it."""
    settings.write(lab.place, careful=1)
    return lab


@pytest.mark.parametrize("events", [EDGE, LEVEL], ids=["edge", "level"])
@pytest.mark.parametrize("rule", [1, 0], ids=["careful", "control"])
def test_a_seam_that_a_careful_reader_would_not_see(lab: Lab, events: int, rule: int) -> None:
    """Too much for the receive buffer's share, and then the end: one read or two?"""
    settings.write(lab.place, careful=rule)
    client, server = lab.pair()
    with client, server, select.epoll() as epoll:
        epoll.register(server, events)
        server.setblocking(False)
        client.sendall(b"a" * 1000)
        client.sendall(b"b" * 100_000)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(epoll.poll(0.1)[0][1] & select.EPOLLRDHUP), "the end to arrive")
        time.sleep(0.1)
        first = len(server.recv(1 << 20))
        again = epoll.poll(0.1)
    if rule:
        assert first == 101_000
        assert lab.reason("careful") >= 1
    else:  # what the rule is for: 100,000 bytes are unread, and nobody says so
        assert first == 1000
        assert bool(again) == (events == LEVEL)


@pytest.mark.parametrize("events", [EDGE, LEVEL], ids=["edge", "level"])
@pytest.mark.parametrize("size", [700, 5000, 60_000])
def test_bulk_for_careful_readers_is_whole(careful: Lab, events: int, size: int) -> None:
    """Streams of 3 MB, many times: nothing is cut off, nobody hangs."""
    data = _pattern(3_000_000)
    for enabled in (False, True, True, True, True):
        careful.register(enabled=enabled)
        client, server = careful.pair()
        with client, server:
            reader = _Careful(server, events)
            _pour(client, data, size)
            assert reader.end() == data
    assert careful.redirected == 0
    assert careful.reason("careful") > 0


def _questions(
    client: socket.socket, server: socket.socket, events: int, count: int, *, reads_on: bool
) -> None:
    """Each is read by an event-driven reader; ``reads_on``: which asks again, until EAGAIN."""
    client.setblocking(True)
    server.setblocking(False)
    with select.epoll() as epoll:
        epoll.register(server, events)
        for _ in range(count):
            client.sendall(b"question")
            assert epoll.poll(SECONDS)
            assert server.recv(100) == b"question"
            if reads_on:
                with pytest.raises(BlockingIOError):
                    server.recv(100)


def _answers(lab: Lab, events: int, count: int) -> None:
    """Questions to a blocking reader, whose answers an event-driven one waits for."""
    client, server = lab.pair()
    client.setblocking(False)
    server.setblocking(True)

    def answer() -> None:
        while word := server.recv(100):
            server.sendall(word.upper())

    with client, server, select.epoll() as epoll:
        epoll.register(client, events)
        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(count):
            wait_until(lambda: in_recv(thread), "the server to wait")
            client.sendall(b"question")
            assert epoll.poll(SECONDS)
            assert client.recv(100) == b"QUESTION"
        client.shutdown(socket.SHUT_WR)
        thread.join(TIMEOUT)
    wait_until(lambda: lab.connections == 0, "the connection to be forgotten")


def test_each_direction_has_its_own_reader(careful: Lab) -> None:
    """What a patient one reads takes the lane, what a careful one reads does not."""
    _answers(careful, EDGE, 50)
    assert (careful.redirected, careful.kernel) == (50, 50)
    assert careful.reason("careful") == 50


def test_a_kind_of_reader_is_remembered(careful: Lab) -> None:
    """A client that answers at once, before it can be seen to wait: known from the others."""
    settings.write(careful.place, proven=3)
    for number in range(5):
        before = careful.redirected
        client, server = careful.pair()
        client.setblocking(True)
        server.setblocking(True)
        with client, server:
            client.sendall(b"early")  # nobody can have waited for this one
            first = careful.redirected - before
            assert first == (1 if number >= 3 else 0)
            assert server.recv(100) == b"early"
            reader = threading.Thread(target=server.recv, args=(100,))
            reader.start()
            wait_until(lambda: in_recv(reader), "the server to wait")  # noqa: B023
            client.sendall(b"late")
            reader.join(TIMEOUT)
            assert careful.redirected - before == first + 1
        wait_until(lambda: careful.connections == 0, "the connection to be forgotten")


def test_a_reader_that_turns_careful_is_noticed(careful: Lab) -> None:
    """It waits in recv at first, and is then handed to edge-triggered epoll."""
    client, server = careful.pair()
    server.setblocking(True)
    with client, server, select.epoll() as epoll:
        reader = threading.Thread(target=server.recv, args=(100,))
        reader.start()
        wait_until(lambda: in_recv(reader), "the server to wait")
        client.sendall(b"by the lane")
        reader.join(TIMEOUT)
        assert careful.redirected == 1
        epoll.register(server, EDGE)
        client.sendall(b"not any more")
        assert server.recv(100) == b"not any more"
        epoll.unregister(server)
        client.sendall(b"nor later")
        assert server.recv(100) == b"nor later"
        assert careful.redirected == 1
        (connection,) = tables.paired(careful.place)
        assert connection.reader == ("", "careful")


@pytest.mark.smoke
@pytest.mark.needs_fentry
def test_careful_readers_that_read_on_take_the_lane(careful: Lab) -> None:
    """Edge-triggered, but until EAGAIN, as Envoy and Go do: seen by the guards."""
    client, server = careful.pair()
    count = 60
    with client, server:
        _questions(client, server, EDGE, count, reads_on=True)
        assert careful.redirected >= count - 20
    # The next of the kind: as soon as it has read on, too, for it may be another program.
    for reads_on in (True, False):
        before = careful.redirected
        client, server = careful.pair()
        with client, server:
            _questions(client, server, EDGE, 10, reads_on=reads_on)
        assert careful.redirected - before == (8 if reads_on else 0)


@pytest.mark.smoke
def test_hasty_readers_prove_nothing_by_reading_on(careful: Lab) -> None:
    """Like HAProxy: until EAGAIN, but for the one read when data and the end come together."""
    for _ in range(3):
        client, server = careful.pair()
        with client, server:
            _questions(client, server, LEVEL, 30, reads_on=True)
            (connection,) = tables.paired(careful.place)
            assert connection.reader[1] == "hasty"
        wait_until(lambda: careful.connections == 0, "the connection to be forgotten")
    # The next of the kind is known, also before it waits.
    client, server = careful.pair()
    with client, server:
        client.sendall(b"early")
        assert server.recv(100) == b"early"
        reader = _Careful(server, LEVEL)
        data = _pattern(300_000)
        _pour(client, data, 5000)
        assert reader.end() == data
    assert careful.redirected == 0


@pytest.mark.parametrize("how", ["blocking", "level-triggered epoll", "poll"])
def test_patient_readers_may_have_seams(careful: Lab, how: str) -> None:
    """They come back for the rest, so bulk for them goes on in the lane as the buffer allows."""
    data = _pattern(4_000_000)
    got = bytearray()
    client, server = careful.pair()

    def read() -> None:
        epoll, poll = select.epoll(), select.poll()
        if how == "blocking":
            server.setblocking(True)
        elif how == "poll":
            poll.register(server, select.POLLIN)
        else:
            epoll.register(server, select.EPOLLIN)
        while len(got) < len(data):
            if how == "poll":
                assert poll.poll(SECONDS * 1000)
            elif how != "blocking":
                assert epoll.poll(SECONDS)
            got.extend(server.recv(1 << 16))
        epoll.close()

    with client, server:
        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: waits(reader), "the reader to wait")
        client.setblocking(True)
        for start in range(0, len(data), 4096):
            client.sendall(data[start : start + 4096])
        reader.join(TIMEOUT)
        (connection,) = tables.paired(careful.place)
    assert bytes(got) == data
    assert connection.reader[1] == "patient"
    assert careful.redirected > 100


def test_a_reader_of_unknown_ways_counts_as_careful(careful: Lab) -> None:
    """Before accept() nobody waits: what comes then must not have a seam either."""
    with careful.right.listen() as listener:
        client = careful.left.connect("10.77.0.2")
        wait_until(lambda: careful.reason("joined") == 2, "both to join")
        client.sendall(b"a" * 1000)
        client.sendall(b"b" * 100_000)
        assert (careful.redirected, careful.reason("reader_unknown")) == (0, 1)
        server, _ = listener.accept()
        with client, server:
            assert len(server.recv(1 << 20)) > 64_000, "both, as far as the window lets them"


def test_a_socket_that_has_shut_down_cannot_send(lab: Lab) -> None:
    """Also if it had to stay in the map: EPIPE, and nothing after the end of the stream."""
    for enabled in (False, True):
        lab.register(enabled=enabled)
        client, server = lab.pair()
        with client, server:
            server.sendall(b"unread")
            client.shutdown(socket.SHUT_RDWR)
            assert server.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                client.sendall(b"too late")
            assert server.recv(1) == b""
    assert lab.reason("stayed") == 1
    assert lab.reason("closing") == 1
