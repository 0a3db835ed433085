"""Whole streams between two processes, in random portions: in order, complete, and ended as usual.

Each runs on the kernel path too ("control"), where the same must hold.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import struct
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from nearpath.datapath import loader, settings, unloader

from .conftest import TIMEOUT, Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Seconds for one blocking call and for the process beside us.
BLOCKED = TIMEOUT
BOTH_PATHS = pytest.mark.parametrize("enabled", [True, False], ids=["lane", "control"])


def limit_blocking(connection: socket.socket) -> None:
    """Let blocking calls end with EAGAIN after BLOCKED seconds; they stay blocking calls.

    settimeout() would make the descriptor non-blocking, and test another path of the kernel.
    """
    connection.setblocking(True)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(BLOCKED), 0))


def receive(connection: socket.socket, size: int = 1 << 62) -> bytes:
    """Exactly ``size`` bytes, or what comes up to the end of the stream."""
    parts, have = [], 0
    while have < size:
        part = connection.recv(min(size - have, 1 << 18))
        if not part:
            break
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def warm_up(client: socket.socket, server: socket.socket, times: int = 1) -> None:
    """Requests and answers until both directions are what they will be."""
    for _ in range(times):
        for sender, receiver in ((client, server), (server, client)):
            sender.sendall(b"warm-up")
            assert receive(receiver, 7) == b"warm-up"


@contextmanager
def pair(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, client first, that block."""
    client, server = lab.pair()
    with client, server:
        limit_blocking(client)
        limit_blocking(server)
        yield client, server


@contextmanager
def process(work: Callable[[], object]) -> Iterator[None]:
    """A process that runs ``work`` beside us; its failure fails the test."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            signal.alarm(int(BLOCKED))
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        raise
    _, status = os.waitpid(number, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the other process has failed"


@pytest.mark.parametrize(
    ("listening", "calling"),
    [("::", "10.77.0.2"), ("10.77.0.2", "::ffff:10.77.0.2")],
    ids=["server", "client"],
)
def test_one_end_may_have_a_mapped_address(lab: Lab, listening: str, calling: str) -> None:
    """IPv6 sockets that talk IPv4, at one end only."""
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with lab.right.listen(family) as listener:
        client = lab.left.connect(calling)
        server, _ = listener.accept()
    with client, server:
        assert client.family != server.family
        warm_up(client, server, 50)
    assert (lab.reason("joined"), lab.redirected) == (2, 100)


@BOTH_PATHS
def test_random_writes_and_reads_stay_in_order(lab: Lab, *, enabled: bool) -> None:
    """By one thread that pauses and resumes the lane meanwhile: any state meets any other."""
    lab.register(enabled=enabled)
    source = random.Random(17)
    with pair(lab) as ends:
        warm_up(*ends)
        for end in ends:
            end.setblocking(False)
        sent, read, counter = [b"", b""], [b"", b""], 0
        for _ in range(3000):
            side = source.randrange(2)
            kind = source.random()
            if kind < 0.02:
                settings.write(lab.place, paused=int(source.random() < 0.4))
            elif kind < 0.5:
                counter += 1
                data = struct.pack("=I", counter) * source.choice((1, 10, 100, 2000))
                with suppress(BlockingIOError):
                    sent[side] += data[: ends[side].send(data)]
            else:
                with suppress(BlockingIOError):
                    read[1 - side] += ends[side].recv(source.choice((1, 50, 3000, 100000)))
        for side in (0, 1):
            limit_blocking(ends[1 - side])
            read[side] += receive(ends[1 - side], len(sent[side]) - len(read[side]))
            assert read[side] == sent[side]
    if enabled:
        assert lab.redirected > 100 < lab.kernel
    else:
        assert lab.redirected == 0


def _duplex(connection: socket.socket, seed: int, size: int) -> None:
    """Stream both ways at once: send noise of ``seed``, receive and compare that of -seed."""
    mine, theirs = random.Random(seed).randbytes(size), random.Random(-seed + 99).randbytes(size)
    sizes = random.Random(seed)
    problems: list[OSError] = []

    def write() -> None:
        view = memoryview(mine)
        try:
            while view:
                cut = sizes.choice((1, 200, 1400, 9000, 60000))
                connection.sendall(view[:cut])
                view = view[cut:]
                if sizes.random() < 0.02:
                    time.sleep(0.002)
        except OSError as error:
            problems.append(error)

    # Not a blocking read beside a blocking write: in the lane that may see EAGAIN (a limit).
    connection.settimeout(BLOCKED)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    got = receive(connection, size)
    thread.join(BLOCKED)
    assert not thread.is_alive()
    assert not problems
    at = next((i for i, (x, y) in enumerate(zip(got, theirs, strict=False)) if x != y), -1)
    assert got == theirs, f"bytes differ from {at} on, {len(got)} of {size} arrived"


@BOTH_PATHS
def test_two_processes_stream_to_each_other(lab: Lab, *, enabled: bool) -> None:
    """While somebody pauses and resumes."""
    lab.register(enabled=enabled)
    size, stop = 2 << 20, threading.Event()

    def flicker() -> None:
        while not stop.wait(0.05):
            settings.write(lab.place, paused=1)
            time.sleep(0.005)
            settings.write(lab.place, paused=0)

    with pair(lab) as (client, server), process(partial(_duplex, server, 99 - 5, size)):
        thread = threading.Thread(target=flicker)
        thread.start()
        try:
            _duplex(client, 5, size)
        finally:
            stop.set()
            thread.join()
    assert (lab.redirected > 0) == enabled


@BOTH_PATHS
def test_a_writer_may_close_at_once(lab: Lab, *, enabled: bool) -> None:
    """A late reader gets all of it, then the end of the stream."""
    lab.register(enabled=enabled)
    source = random.Random(13)
    for _ in range(60):
        with pair(lab) as (client, server):
            warm_up(client, server)
            data = source.randbytes(source.choice((1, 3000, 20000)))
            client.sendall(data)
            client.close()
            assert receive(server) == data
    assert lab.redirected >= 120 * enabled
    assert (lab.redirected > 0) == enabled


@BOTH_PATHS
def test_a_reader_that_has_gone_resets(lab: Lab, *, enabled: bool) -> None:
    """Both directions shut, something unread that keeps it in the map: its peer hears of it."""
    lab.register(enabled=enabled)
    with pair(lab) as (client, server):
        warm_up(client, server)
        server.sendall(b"unread")
        client.shutdown(socket.SHUT_RD)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"too late")
        error = partial(server.getsockopt, socket.SOL_SOCKET, socket.SO_ERROR)
        wait_until(lambda: error() == errno.EPIPE, "the reset")
        assert client.recv(100) == b"unread"
    assert lab.redirected == 3 * enabled


def _serve_half_closed(listener: socket.socket, count: int, early: bytes) -> None:
    """Per connection: an echo, then read to the end of the stream, then answer and close."""
    source = random.Random(11)
    for number in range(count):
        server, _ = listener.accept()
        with server:
            limit_blocking(server)
            if number % 2:
                server.sendall(receive(server, 4))
            server.sendall(early)
            answer = hashlib.sha256(receive(server)).digest()
            answer += source.randbytes(source.randrange(40000))
            cut = source.randrange(len(answer))
            server.sendall(answer[:cut])
            if number % 5 == 0:
                time.sleep(0.003)  # the client is in recv() when its FIN is acknowledged
            server.sendall(answer[cut:])


def _receive_patiently(connection: socket.socket, again: list[str]) -> bytes:
    """Everything up to the end of the stream; goes on after EAGAIN and notes how soon it came."""
    parts: list[bytes] = []
    while True:
        began = time.monotonic()
        try:
            part = connection.recv(1 << 18)
        except BlockingIOError:
            took = time.monotonic() - began
            if took > BLOCKED - 1:
                raise
            again.append(f"{took * 1e3:.0f} ms")
            continue
        if not part:
            return b"".join(parts)
        parts.append(part)


def _half_close(lab: Lab, count: int, calm: float, early: bytes) -> list[str]:
    """Half-close ``count`` connections, check each answer; the calls that got EAGAIN."""
    requests, answers = random.Random(12), random.Random(11)
    again: list[str] = []
    with (
        lab.right.listen() as listener,
        process(partial(_serve_half_closed, listener, count, early)),
    ):
        for number in range(count):
            request = requests.randbytes(requests.choice((1, 100, 5000, 30000)))
            rest = answers.randbytes(answers.randrange(40000))
            expected = early + hashlib.sha256(request).digest() + rest
            answers.randrange(len(rest) + 32)
            with lab.left.connect("10.77.0.2") as client:
                limit_blocking(client)
                if number % 2:
                    client.sendall(b"echo")
                    receive(client, 4)
                client.sendall(request)
                time.sleep(calm)
                client.shutdown(socket.SHUT_WR)
                assert _receive_patiently(client, again) == expected, f"connection {number}"
    return again


@BOTH_PATHS
@pytest.mark.parametrize(
    ("count", "calm", "early", "tolerated"),
    [
        (60, 0.02, b"", 0),
        # The server is still reading the request, in parallel, when the FIN comes.
        (200, 0, b"", 20),
        # And the answer is on its way already.
        (100, 0, b"early" * 2000, 50),
    ],
    ids=["calm", "at once", "in full flow"],
)
def test_half_closed_connections_get_whole_answers(
    lab: Lab, count: int, calm: float, early: bytes, tolerated: int, *, enabled: bool
) -> None:
    """shutdown(SHUT_WR), then a blocking read of the whole answer, as on the kernel path.

    A socket cannot leave the lane while redirected bytes are unread or may be on their way.
    If it has to stay, and its reader finds nothing when the FIN is acknowledged, a blocking
    read gets EAGAIN (a limit), for tcp_bpf_recvmsg waits only once. No byte is lost in any case.

    Args:
        calm: seconds between the request and the end of the stream.
        early: sent by the server before it reads the request.
        tolerated: how many reads may see EAGAIN.
    """
    lab.register(enabled=enabled)
    again = _half_close(lab, count, calm, early)
    assert len(again) <= tolerated * enabled, again
    assert (lab.reason("left") + lab.reason("stayed") > 0) == enabled


def _pause(lab: Lab) -> None:
    settings.write(lab.place, paused=1)


def _unload(lab: Lab) -> None:
    unloader.unload(lab.place, lambda _: None, 0)


@pytest.mark.parametrize("before", [_pause, _unload])
def test_half_closes_while_the_lane_goes(lab: Lab, before: Callable[[Lab], None]) -> None:
    """Connections in the lane half-close as usual, also while it is paused or draining."""
    again: list[str] = []
    with ExitStack() as stack:
        pairs = [stack.enter_context(pair(lab)) for _ in range(60)]
        for client, server in pairs:
            warm_up(client, server)
        assert lab.redirected == 120
        before(lab)
        for client, server in pairs:
            # The answer comes when the client has been in recv() for a while.
            def answer(server: socket.socket = server) -> None:
                receive(server)
                time.sleep(0.005)
                server.sendall(b"answer")
                server.close()

            thread = threading.Thread(target=answer)
            thread.start()
            client.shutdown(socket.SHUT_WR)
            assert _receive_patiently(client, again) == b"answer"
            thread.join(BLOCKED)
    assert not again
    loader.load(lab.place)
