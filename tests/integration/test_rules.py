"""Each rule of the switch at work, switched off live, and the same program on the kernel path.

Streams have test_streaming, revalidation test_policy, the guards test_guards.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from helpers.waiting import in_recv
from nearpath.datapath import settings, tables

from .conftest import TIMEOUT

if TYPE_CHECKING:
    from .conftest import Lab

SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000  # linux/socket.h; not in the socket module


def _ask(client: socket.socket, server: socket.socket, count: int) -> None:
    """Ask and answer; content compared."""
    for number in range(count):
        for sender, reader in ((client, server), (server, client)):
            word = b"%08d" % number
            sender.sendall(word)
            assert reader.recv(100) == word


def test_redirect_off_keeps_sockets_in_the_map(lab: Lab) -> None:
    """They join, everything takes the kernel path, and switched on again the lane goes on."""
    settings.write(lab.place, redirect=0)
    client, server = lab.pair()
    with client, server:
        _ask(client, server, 10)
        assert (lab.reason("joined"), lab.reason("redirect_off"), lab.redirected) == (2, 20, 0)
        settings.write(lab.place, redirect=1)
        _ask(client, server, 10)
        assert lab.redirected == 20


@pytest.mark.parametrize("probation", [1, 3, 8])
def test_probation_keeps_the_first_messages_out(lab: Lab, probation: int) -> None:
    """Of each direction, until the connection's kind has proved that its readers are fit."""
    settings.write(lab.place, probation=probation, proven=0)
    client, server = lab.pair()
    with client, server:
        _ask(client, server, 20)
    # The client may have sent its first before the server's side had joined.
    kept = lab.reason("probation") + lab.reason("peer_not_joined")
    assert kept == 2 * probation
    assert lab.redirected == 2 * (20 - probation)


def test_proven_readers_waive_probation(lab: Lab) -> None:
    """After so many connections that were read to their end by fit calls; others start anew."""
    settings.write(lab.place, probation=2, proven=3)
    for round_ in range(5):
        before = lab.redirected
        client, server = lab.pair()
        with client, server:
            _ask(client, server, 5)
            if round_ < 3:
                assert lab.redirected - before == 2 * (5 - 2)
            else:
                assert lab.redirected - before == 2 * 5
        wait_until(lambda: lab.connections == 0, "the connection to be forgotten")
    assert lab.reason("waived") == 2 * 2
    # Another port is another kind of connection.
    before = lab.redirected
    with lab.right.listen(port=5001) as listener:
        client = lab.left.connect("10.77.0.2", 5001)
        server, _ = listener.accept()
    with client, server:
        _ask(client, server, 5)
        assert lab.redirected - before == 2 * (5 - 2)


def test_a_reader_that_reads_nothing_proves_nothing(lab: Lab) -> None:
    """Connections that end without a message leave no record of how they are read."""
    settings.write(lab.place, probation=2, proven=1)
    for _ in range(4):
        client, server = lab.pair()
        client.close()
        server.close()
        wait_until(lambda: lab.connections == 0, "the connection to be forgotten")
    client, server = lab.pair()
    with client, server:
        _ask(client, server, 5)
    assert lab.reason("waived") == 0


def test_a_low_water_mark_keeps_the_lane_away(lab: Lab) -> None:
    """SO_RCVLOWAT: poll says readable at that many bytes, on either path."""
    for enabled in (False, True):
        lab.register(enabled=enabled)
        client, server = lab.pair()
        with client, server:
            _ask(client, server, 3)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)
            client.sendall(b"abc")
            assert not select.select([server], [], [], 0.05)[0]
            client.sendall(b"def")
            assert select.select([server], [], [], TIMEOUT)[0]
            assert server.recv(100) == b"abcdef"
            server.sendall(b"answer")
            assert client.recv(100) == b"answer"
    assert lab.reason("low_water") == 1
    assert lab.reason("not_drained") == 1
    assert lab.redirected == 6 + 1


@pytest.mark.parametrize("early", [True, False], ids=["before connect", "while connected"])
def test_senders_with_zero_copy_leave(lab: Lab, early: bool) -> None:
    """SO_ZEROCOPY before connect: never in; later: everything by kernel, and then out."""
    with lab.right.listen() as listener:
        if early:
            listener.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)  # accepted sockets inherit it
        client = lab.left.connect("10.77.0.2")
        server, _ = listener.accept()
    with client, server:
        _ask(client, server, 5)
        if early:
            assert lab.redirected == 0
            assert (lab.reason("joined"), lab.reason("zerocopy")) == (1, 1)
            return
        assert lab.redirected == 10
        server.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        _ask(client, server, 5)
        wait_until(lambda: lab.reason("left_zerocopy") == 1, "the socket to leave")
        # The client is still in, but its peer is not; what it sends takes the kernel path.
        _ask(client, server, 5)
        (connection,) = tables.paired(lab.place)
        assert connection.wants_out == ("", "zerocopy")
        assert connection.leaving == 0b10


def test_a_reader_asleep_beside_a_writer_leaves(lab: Lab) -> None:
    """Two threads on a blocking socket: no EAGAIN where the kernel path has none.

    tcp_bpf_recvmsg waits only once, and a writer that is woken for there is room again wakes
    the reader too. Seen at the first message by the kernel path, out with its acknowledgement.
    """
    settings.write(lab.place, probation=3)
    client, server = lab.pair()
    client.setblocking(True)
    server.setblocking(True)
    size = 32 << 20
    got: list[str] = []

    def read() -> None:
        """Every answer, whatever happens."""
        text = b""
        while not text.endswith(b"."):
            try:
                text += client.recv(5)
            except BlockingIOError:
                got.append("EAGAIN")
        got.append(text.decode())

    def drain(size: int) -> None:
        while size:
            size -= len(server.recv(min(size, 1 << 20)))

    with client, server:
        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(3):
            wait_until(lambda: in_recv(reader), "the reader to sleep")
            client.sendall(b"question")
            drain(8)
            server.sendall(b"answer ")
        wait_until(lambda: lab.reason("left_duplex") == 1, "the client to leave")
        server.sendall(b"all ")  # which the reader reads natively from here on
        writer = threading.Thread(target=client.sendall, args=(bytes(size),))
        writer.start()
        writer.join(0.5)
        assert writer.is_alive(), "the send buffer is full"
        drain(size)
        server.sendall(b"done.")
        reader.join(TIMEOUT)
        writer.join(TIMEOUT)
    assert got == ["answer answer answer all done."]


def test_one_task_that_asks_and_waits_stays(lab: Lab) -> None:
    """Asking and then sleeping in recv is no reason to leave, nor is one's peer that sleeps."""
    settings.write(lab.place, probation=2)
    client, server = lab.pair()
    client.setblocking(True)
    server.setblocking(True)

    def answer() -> None:
        while word := server.recv(100):
            server.sendall(word)

    with client, server:
        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(200):
            client.sendall(b"question")
            assert client.recv(100) == b"question"
        client.shutdown(socket.SHUT_WR)
        thread.join(TIMEOUT)
    assert lab.reason("left_duplex") == lab.reason("duplex") == 0
    assert lab.redirected >= 2 * (200 - 2)


def test_without_the_drained_rule_bytes_change_places(lab: Lab) -> None:
    """What the rule is for: the lane overtakes bytes that TCP has delivered and nobody read."""
    for drained, expected in ((1, b"kernel lane"), (0, b" lanekernel")):
        settings.write(lab.place, drained=drained, redirect=0)
        client, server = lab.pair()
        with client, server:
            client.sendall(b"kernel")
            assert select.select([server], [], [], TIMEOUT)[0]
            settings.write(lab.place, redirect=1)
            client.sendall(b" lane")
            got = b""
            while len(got) < len(expected):
                got += server.recv(100)
            assert got == expected


def test_settings_refuse_nonsense(lab: Lab) -> None:
    """Unknown names and values out of range change nothing."""
    before = settings.read(lab.place)
    for changes in ({"speed": 11}, {"receiver_percent": 101}, {"paused": 2}, {"stream_to": -1}):
        with pytest.raises(ValueError, match="setting"):
            settings.write(lab.place, **changes)
    assert settings.read(lab.place) == before


def _completed(client: socket.socket, server: socket.socket, size: int = 4096) -> bool:
    """Send one message with MSG_ZEROCOPY; did the kernel say that it is done with the pages?"""
    client.send(b"z" * size, MSG_ZEROCOPY)
    left = size
    while left:
        left -= len(server.recv(left))
    poll = select.poll()
    poll.register(client, 0)  # POLLERR is always reported
    return bool(poll.poll(300)) and bool(client.recvmsg(1, 512, socket.MSG_ERRQUEUE)[1])


def test_zero_copy_completes_once_the_sender_has_left(lab: Lab) -> None:
    """On every kernel, for it is native then; before that only from 6.5 on."""
    client, server = lab.pair()
    with client, server:
        _ask(client, server, 5)
        client.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        client.sendall(b"by the kernel path")
        assert server.recv(100) == b"by the kernel path"
        wait_until(lambda: lab.reason("left_zerocopy") == 1, "the socket to leave")
        assert _completed(client, server)


@pytest.mark.needs_kernel("6.5", "completions of MSG_ZEROCOPY for sockets in a sockmap")
def test_zero_copy_completes_at_once(lab: Lab) -> None:
    """Also the first message of a socket that is still in the map."""
    client, server = lab.pair()
    with client, server:
        _ask(client, server, 5)
        client.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        assert _completed(client, server)
