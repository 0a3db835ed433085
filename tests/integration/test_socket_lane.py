"""The socket lane moves the same bytes, past the stack, and only where it may."""

from __future__ import annotations

import hashlib
import itertools
import random
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from helpers.capture import capture
from helpers.commands import run, wait_until
from helpers.netns import inside
from nearpath.datapath import settings, unloader
from nearpath.kernel import features, netns
from nearpath.lanes import socket as lane

from .conftest import PORT, TIMEOUT, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

IPPROTO_MPTCP = 262


def read(connection: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes, or fewer at the end of the stream."""
    parts = []
    while size:
        part = connection.recv(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def converse(client: socket.socket, server: socket.socket, messages: int) -> None:
    """Ask and answer with content of random sizes; both sides must see the same bytes."""
    seed = random.Random(messages)
    for _ in range(messages):
        question, answer = seed.randbytes(seed.randint(1, 5000)), seed.randbytes(700)
        client.sendall(question)
        assert read(server, len(question)) == question
        server.sendall(answer)
        assert read(client, len(answer)) == answer


@pytest.mark.smoke
@pytest.mark.parametrize("address", ["10.77.0.2", "fd77::2", "::ffff:10.77.0.2"])
def test_a_conversation_takes_the_lane(lab: Lab, address: str) -> None:
    """IPv4, IPv6, v4-mapped: intact, counted, and the veth sees the handshake alone."""
    with ExitStack() as stack:
        with netns.entered(lab.left.netns):
            seen = stack.enter_context(capture("eth0"))
        client, server = lab.pair(address)
        with client, server:
            assert lab.connections == 1
            converse(client, server, 200)
        wait_until(lambda: lab.connections == 0, "the closed connection to be forgotten")
    on_wire = seen.on_port(PORT)
    assert (on_wire.syn, on_wire.syn_ack) == (1, 1)
    assert on_wire.fin == 2
    assert on_wire.payload_bytes == 0
    assert lab.redirected == 400
    assert lab.kernel == 0
    assert lab.reason("joined") == 2


def test_without_the_lane_the_veth_sees_everything(lab: Lab) -> None:
    """The control: the same conversation of pods that do not take part."""
    lab.register(enabled=False)
    with ExitStack() as stack:
        with netns.entered(lab.left.netns):
            seen = stack.enter_context(capture("eth0"))
        client, server = lab.pair()
        with client, server:
            converse(client, server, 200)
    assert seen.on_port(PORT).payload_segments >= 400
    assert lab.redirected == 0
    assert lab.reason("joined") == 0


def test_counters_belong_to_the_pod_that_sent(lab: Lab) -> None:
    """Per pod: what its own sockets sent; the counts outlive the pod in the totals."""
    client, server = lab.pair()
    with client, server:
        for _ in range(3):
            client.sendall(b"12345")
            read(server, 5)
        server.sendall(b"1234567")
        read(client, 7)
        by_pod = lane.by_pod(lab.place)
    left, right = by_pod[lab.left.cookie], by_pod[lab.right.cookie]
    assert (left["redirected_messages"], left["redirected_bytes"]) == (3, 15)
    assert (right["redirected_messages"], right["redirected_bytes"]) == (1, 7)
    assert left["connections"] == right["connections"] == 1
    lane.unregister(lab.place, lab.left.cookie)
    lane.unregister(lab.place, lab.left.cookie)
    assert lab.left.cookie not in lane.by_pod(lab.place)
    assert lab.redirected == 4


@pytest.mark.parametrize("unknown", ["left", "right"])
def test_a_pod_that_is_not_registered_stays_out(lab: Lab, unknown: str) -> None:
    """Both sockets must belong to pods of this node that we know."""
    lane.unregister(lab.place, getattr(lab, unknown).cookie)
    client, server = lab.pair()
    with client, server:
        converse(client, server, 20)
        assert lab.connections == 0
    assert lab.reason("joined") == 0
    assert lab.redirected == 0
    assert lab.reason("peer_elsewhere") == 1


def test_a_pod_talking_to_itself_takes_the_lane(lab: Lab) -> None:
    """Over its own loopback: an application and its sidecar."""
    with lab.left.listen() as listener:
        client = lab.left.connect("127.0.0.1")
        server, _ = listener.accept()
    with client, server:
        converse(client, server, 50)
        assert lane.by_pod(lab.place)[lab.left.cookie]["connections"] == 1
    assert lab.redirected == 100


@pytest.mark.smoke
@pytest.mark.parametrize(
    "rule",
    [
        (
            "add chain ip nat prerouting {{ type nat hook prerouting priority -100; }};"
            "add rule ip nat prerouting tcp dport 80 redirect to :{port}"
        ),
        (
            "add chain ip nat prerouting {{ type nat hook prerouting priority -100; }};"
            "add chain ip nat input {{ type nat hook input priority 100; }};"
            "add rule ip nat prerouting tcp dport 80 redirect to :{port};"
            "add rule ip nat input tcp dport {port} snat to 10.77.0.99"
        ),
    ],
    ids=["redirect", "redirect and source"],
)
def test_translated_connections_are_paired(lab: Lab, rule: str) -> None:
    """Both ends see different addresses; the sequence numbers are the same."""
    script = "add table ip nat;" + rule.format(port=PORT)
    run([*inside(lab.right.netns), "nft", script])
    with lab.right.listen() as listener:
        client = lab.left.connect("10.77.0.2", 80)
        server, _ = listener.accept()
    with client, server:
        assert client.getpeername() != server.getsockname()
        converse(client, server, 20)
    assert lab.redirected == 40


@pytest.mark.smoke
def test_bytes_sent_by_tcp_are_read_before_redirected_ones(lab: Lab) -> None:
    """Kernel path → lane only when the reader has read everything sent by TCP."""
    client, server = lab.pair()
    with client, server:
        settings.write(lab.place, paused=1)
        client.sendall(b"first-")
        settings.write(lab.place, paused=0)
        client.sendall(b"second-")
        client.sendall(b"third")
        assert read(server, 18) == b"first-second-third"
        assert lab.redirected == 0
        assert lab.reason("paused") == 1
        assert lab.reason("not_drained") == 2
        client.sendall(b"fourth")
        assert read(server, 6) == b"fourth"
        assert lab.redirected == 1


def test_half_read_tcp_bytes_count_as_unread(lab: Lab) -> None:
    """Drained means to the last byte, not that a read has happened."""
    client, server = lab.pair()
    with client, server:
        settings.write(lab.place, paused=1)
        client.sendall(b"abcdef")
        settings.write(lab.place, paused=0)
        assert read(server, 5) == b"abcde"
        client.sendall(b"ghi")
        assert read(server, 4) == b"fghi"
        assert lab.redirected == 0


def test_redirected_bytes_are_read_before_later_tcp_ones(lab: Lab) -> None:
    """Lane → kernel path is in order at any time."""
    client, server = lab.pair()
    with client, server:
        client.sendall(b"first-")
        settings.write(lab.place, paused=1)
        client.sendall(b"second-")
        settings.write(lab.place, paused=0)
        client.sendall(b"third")
        assert read(server, 18) == b"first-second-third"
        assert lab.redirected == 1
        assert lab.reason("not_drained") == 1


def test_random_switching_keeps_the_stream(lab: Lab) -> None:
    """Pause and resume at any moment under a stream in both directions."""
    client, server = lab.pair()
    size, stop = 2 << 20, threading.Event()
    digests: dict[str, str] = {}

    def send(connection: socket.socket, seed: int) -> None:
        source = random.Random(seed)
        data = source.randbytes(size)
        digests[f"sent {seed}"] = hashlib.blake2b(data).hexdigest()
        at = 0
        while at < size:
            at += connection.send(data[at : at + source.choice([1, 7, 100, 500, 1500, 20000])])

    def receive(connection: socket.socket, seed: int) -> None:
        source, digest, left = random.Random(-seed), hashlib.blake2b(), size
        while left:
            part = connection.recv(source.choice([1, 50, 4096, 65536]))
            assert part
            left -= len(part)
            digest.update(part)
        digests[f"received {seed}"] = digest.hexdigest()

    def switch() -> None:
        while not stop.wait(0.002):
            settings.write(lab.place, paused=1)
            settings.write(lab.place, paused=0)

    with client, server:
        threads = [
            threading.Thread(target=send, args=(client, 1)),
            threading.Thread(target=receive, args=(server, 1)),
            threading.Thread(target=send, args=(server, 2)),
            threading.Thread(target=receive, args=(client, 2)),
        ]
        switcher = threading.Thread(target=switch)
        for thread in [*threads, switcher]:
            thread.start()
        for thread in threads:
            thread.join(60)
        stop.set()
        switcher.join()
        assert not any(thread.is_alive() for thread in threads)
    assert digests["sent 1"] == digests["received 1"]
    assert digests["sent 2"] == digests["received 2"]
    assert lab.redirected > 100
    assert lab.reason("not_drained") + lab.reason("receiver_behind") > 0


def _fill(sender: socket.socket, most: int = 64 << 20) -> int:
    """Send until nothing more is taken for half a second; the bytes taken."""
    sender.setblocking(False)
    taken, block = 0, bytes(range(256)) * 64
    sizes = itertools.cycle([100, 16000, 1000])
    idle_since = time.monotonic()
    while taken < most and time.monotonic() - idle_since < 0.5:
        try:
            at = taken % 256
            taken += sender.send(block[at : at + next(sizes)])
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    return taken


def _drain(reader: socket.socket, size: int) -> float:
    """Read ``size`` bytes of _fill's pattern; the longest pause between two reads in s."""
    got, longest = 0, 0.0
    before = time.monotonic()
    pattern = bytes(range(256)) * 1025
    while got < size:
        part = reader.recv(1 << 18)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
        at = got % 256
        assert part == pattern[at : at + len(part)]
        got += len(part)
    return longest


def _wake(lab: Lab, buffer: int) -> tuple[int, float]:
    """A reader that sleeps until nothing more is taken, then reads all.

    Returns:
        Bytes that were taken from the sender, and the longest pause while they were read.
    """
    with lab.right.listen() as listener:
        if buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client = lab.left.connect("10.77.0.2")
        server, _ = listener.accept()
    server.settimeout(TIMEOUT)
    with client, server:
        taken = _fill(client)
        pause = _drain(server, taken)
        # And it is not stuck.
        client.settimeout(TIMEOUT)
        client.sendall(b"next")
        assert read(server, 4) == b"next"
    return taken, pause


@pytest.mark.parametrize("buffer", [0, 4096, 1 << 20], ids=["default", "4 KiB", "1 MiB"])
def test_a_reader_that_sleeps_holds_no_more_than_on_the_kernel_path(lab: Lab, buffer: int) -> None:
    """Back-pressure: TCP's window takes over, and the stream goes on as soon as it is read."""
    lab.register(enabled=False)
    held_by_kernel, _ = _wake(lab, buffer)
    lab.register()
    runs = [_wake(lab, buffer) for _ in range(3)]
    assert lab.redirected > 0
    assert lab.reason("receiver_behind") + lab.reason("not_drained") > 0
    assert max(taken for taken, _ in runs) <= 1.5 * held_by_kernel, (held_by_kernel, runs)
    # Not left to TCP's timers, which start at 200 ms and would show each time.
    assert min(pause for _, pause in runs) < 0.15, runs


def _half_close(lab: Lab, prelude: int, think: float) -> tuple[list[bytes], str]:
    """SHUT_WR after ``prelude`` round trips, then a blocking read of a late answer."""
    client, server = lab.pair()
    client.setblocking(True)
    server.setblocking(True)

    def serve() -> None:
        with server:
            while data := server.recv(100):
                server.sendall(data.upper())
            time.sleep(think)
            server.sendall(b"late answer")

    thread = threading.Thread(target=serve)
    thread.start()
    got, error = [], ""
    with client:
        for _ in range(prelude):
            client.sendall(b"ping")
            got.append(read(client, 4))
        client.shutdown(socket.SHUT_WR)
        try:
            while part := client.recv(100):
                got.append(part)
        except OSError as caught:
            error = repr(caught)
        thread.join(TIMEOUT)
    return got, error


@pytest.mark.parametrize("prelude", [0, 1, 20])
@pytest.mark.parametrize("think", [0.0, 0.01, 0.1])
def test_half_close_then_a_blocking_read(lab: Lab, prelude: int, think: float) -> None:
    """The reader waits for the late answer: no EAGAIN, no loss, whatever came before.

    tcp_bpf_recvmsg alone would return EAGAIN when the FIN is acknowledged.
    """
    for _ in range(10):
        got, error = _half_close(lab, prelude, think)
        assert not error
        assert b"".join(got) == b"PING" * prelude + b"late answer"
    assert lab.reason("left") >= 10


@pytest.mark.smoke
def test_half_close_keeps_what_is_redirected_and_unread(lab: Lab) -> None:
    """Leaving the map would destroy it, so the socket stays."""
    client, server = lab.pair()
    with client, server:
        server.sendall(b"redirected and unread")
        client.shutdown(socket.SHUT_WR)
        assert server.recv(10) == b""
        server.sendall(b", and so does what follows")
        server.close()
        assert read(client, 100) == b"redirected and unread, and so does what follows"
    assert lab.reason("stayed") >= 1
    assert lab.redirected == 2, "no bytes by TCP behind what is unread"


def _reset(client: socket.socket, server: socket.socket) -> None:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    wait_until(lambda: client.getsockopt(6, 11, 1)[0] == 7, "the client to be reset")


def _close(_: socket.socket, server: socket.socket) -> None:
    server.close()


def _write_after(client: socket.socket) -> list[str]:
    outcome = []
    for _ in range(4):
        try:
            client.send(b"x")
            outcome.append("ok")
        except OSError as error:
            outcome.append(type(error).__name__)
        time.sleep(0.02)
    try:
        outcome.append(repr(client.recv(10)))
    except OSError as error:
        outcome.append(type(error).__name__)
    return outcome


@pytest.mark.parametrize("end", [_reset, _close])
def test_a_closed_peer_looks_the_same(
    lab: Lab, end: Callable[[socket.socket, socket.socket], None]
) -> None:
    """Writes to a peer that has closed or reset give the errors of the kernel path."""
    outcomes = []
    for enabled in (False, True):
        lab.register(enabled=enabled)
        client, server = lab.pair()
        with client, server:
            converse(client, server, 3)
            end(client, server)
            outcomes.append(_write_after(client))
    assert outcomes[0] == outcomes[1]
    assert lab.redirected == 6


@pytest.mark.parametrize("fallback", [False, True], ids=["fallback out", "fallback in"])
@pytest.mark.parametrize("listening", [False, True], ids=["tcp listener", "mptcp listener"])
@pytest.mark.parametrize("calling", [False, True], ids=["tcp client", "mptcp client"])
def test_mptcp_sockets_stay_out(lab: Lab, listening: bool, calling: bool, fallback: bool) -> None:
    """Nor do plain TCP connections of MPTCP listeners join, but where the kernel has the fixes.

    Those are what every server built with Go 1.24 and newer has.
    """
    if fallback:
        assert features.mptcp_children_are_safe(features.version()), "a test machine's kernel has"
    settings.write(lab.place, mptcp_fallback=int(fallback))
    with netns.entered(lab.right.netns):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP * listening)
    with netns.entered(lab.left.netns):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP * calling)
    with listener, client:
        listener.settimeout(TIMEOUT)
        client.settimeout(TIMEOUT)
        listener.bind(("", PORT))
        listener.listen()
        client.connect(("10.77.0.2", PORT))
        server, _ = listener.accept()
        with server:
            converse(client, server, 20)
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            server.sendall(b"farewell")
            assert read(client, 8) == b"farewell"
    if calling or (listening and not fallback):
        assert lab.redirected == 0
        assert lab.reason("mptcp") + lab.reason("ulp") >= 1
    else:
        assert 40 <= lab.redirected <= 41, "the farewell may take either path"


def test_a_backlogged_connection_keeps_early_messages(lab: Lab) -> None:
    """What arrives before accept() is there after it."""
    with lab.right.listen() as listener:
        client = lab.left.connect("10.77.0.2")
        for word in (b"one ", b"two ", b"three"):
            client.sendall(word)
        time.sleep(0.05)
        server, _ = listener.accept()
    with client, server:
        assert read(server, 13) == b"one two three"
    assert lab.redirected == 3


def test_many_connections_leave_nothing_in_the_maps(lab: Lab) -> None:
    """Closed from either side, half-closed, reset: the tables are empty afterwards."""
    source = random.Random(7)
    with lab.right.listen() as listener:
        for _ in range(600):
            client = lab.left.connect("10.77.0.2")
            server, _ = listener.accept()
            if source.random() < 0.7:
                client.sendall(b"q")
                if source.random() < 0.8:
                    assert read(server, 1) == b"q"
            if source.random() < 0.3:
                client.shutdown(socket.SHUT_WR)
            if source.random() < 0.2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            first, second = source.sample([client, server], 2)
            first.close()
            second.close()
    wait_until(lambda: lab.connections == 0, "all connections to be forgotten")
    wait_until(
        lambda: unloader.sockets_left(lab.place.layout_dir) == 0, "the map sockets to be empty"
    )
    assert lab.reason("joined") == 1200
