"""Guards: readers and writers that the lane would break are noticed in time.

These run where the kernel takes fentry. Each program runs on the kernel path too, and with
the guards switched off it breaks, which shows that it is the guards that help.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from nearpath.datapath import loader, settings

from .conftest import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .conftest import Lab

COUNT = 20
PROBATION = 8
TCP_ULP, SOL_TLS, TLS_TX = 31, 282, 1  # linux/tcp.h, linux/tls.h


@pytest.fixture
def guarded(lab: Lab) -> Lab:
    """A datapath whose guards are attached, with probation as a node has it."""
    assert loader.is_guarded(lab.place), loader.describe(lab.place)["no_guards_because"]
    settings.write(lab.place, probation=PROBATION)
    return lab


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def _spliced(server: socket.socket, size: int) -> bytes:
    """``size`` bytes by splice(2) into a pipe; fails after TIMEOUT instead of for ever."""
    server.setblocking(True)
    with _pipe() as (reader, writer):
        got: list[bytes] = []

        def splice() -> None:
            left = size
            while left:
                moved = os.splice(server.fileno(), writer, left)
                if not moved:
                    return
                got.append(os.read(reader, moved))
                left -= moved

        thread = threading.Thread(target=splice, daemon=True)
        thread.start()
        thread.join(3)
        if thread.is_alive():  # wake it: what it waits for never comes
            server.shutdown(socket.SHUT_RD)
            thread.join(TIMEOUT)
    return b"".join(got)


def by_splice(client: socket.socket, server: socket.socket) -> bytes:
    """A proxy that only ever splices."""
    got = b""
    for _ in range(COUNT):
        client.sendall(b"body")
        got += _spliced(server, 4)
    return got


def by_splice_after_a_header(client: socket.socket, server: socket.socket) -> bytes:
    """A proxy that reads the header and splices the body."""
    client.sendall(b"head")
    got = server.recv(4)
    for _ in range(COUNT - 1):
        client.sendall(b"body")
        got += _spliced(server, 4)
    return got


def by_wait_all(client: socket.socket, server: socket.socket) -> bytes:
    """recv with MSG_WAITALL, of messages that come in two parts."""
    server.setblocking(True)
    parts: list[bytes] = []

    def read() -> None:
        parts.extend(server.recv(4, socket.MSG_WAITALL) for _ in range(COUNT))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(COUNT):
        for half in (b"bo", b"dy"):
            client.sendall(half)
            time.sleep(0.005)  # so that the reader wakes for each
    client.shutdown(socket.SHUT_WR)
    reader.join(TIMEOUT)
    return b"|".join(parts)


def by_truncation(client: socket.socket, server: socket.socket) -> bytes:
    """recv with MSG_TRUNC and no buffer discards, and says how much."""
    libc_recv = __import__("ctypes").CDLL(None, use_errno=True).recv
    server.setblocking(True)
    sizes = []
    for number in range(COUNT):
        client.sendall(b"t" * (number + 1))
        sizes.append(libc_recv(server.fileno(), None, 100, socket.MSG_TRUNC))
    return repr(sizes).encode()


PROGRAMS = [by_splice, by_splice_after_a_header, by_wait_all, by_truncation]


@pytest.mark.smoke
@pytest.mark.needs_fentry
@pytest.mark.parametrize("program", PROGRAMS)
def test_unfit_readers_read_as_on_the_kernel_path(
    guarded: Lab, program: Callable[[socket.socket, socket.socket], bytes]
) -> None:
    """Same bytes; their sender's messages take the kernel path from the first call on."""
    outcomes = []
    for enabled in (False, True):
        guarded.register(enabled=enabled)
        client, server = guarded.pair()
        with client, server:
            outcomes.append(program(client, server))
    assert outcomes[0] == outcomes[1]
    assert guarded.redirected == 0
    assert guarded.reason("not_fit") >= COUNT - PROBATION
    assert guarded.reason("seen_splice") + guarded.reason("seen_flags") == 1


@pytest.mark.needs_fentry
@pytest.mark.parametrize("program", [by_splice, by_truncation])
def test_without_the_guards_they_break(
    guarded: Lab, program: Callable[[socket.socket, socket.socket], bytes]
) -> None:
    """The control: it is the guards that make the difference."""
    settings.write(guarded.place, guards=0, probation=0)
    guarded.register(enabled=False)
    client, server = guarded.pair()
    with client, server:
        expected = program(client, server)
    guarded.register()
    client, server = guarded.pair()
    with client, server:
        outcome: bytes | None = None
        try:
            outcome = program(client, server)
        except OSError:
            pass
    assert outcome != expected


@pytest.mark.needs_fentry
def test_one_unfit_reader_speaks_for_its_kind(guarded: Lab) -> None:
    """The next connections of that kind do not even start; others do, and so does the way back."""

    def connection(port: int) -> tuple[socket.socket, socket.socket]:
        with guarded.right.listen(port=port) as listener:
            client = guarded.left.connect("10.77.0.2", port)
            server, _ = listener.accept()
        server.settimeout(TIMEOUT)
        return client, server

    client, server = connection(5001)
    with client, server:
        assert by_splice_after_a_header(client, server) == b"head" + b"body" * (COUNT - 1)
    assert guarded.redirected == 0
    client, server = connection(5001)
    with client, server:
        for _ in range(COUNT):
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            server.sendall(b"answer")
            assert client.recv(100) == b"answer"
    assert guarded.redirected == COUNT - PROBATION, "answers only"
    before = guarded.redirected
    client, server = connection(5002)
    with client, server:
        for _ in range(COUNT):
            client.sendall(b"question")
            assert server.recv(100) == b"question"
    assert guarded.redirected - before == COUNT - PROBATION


@pytest.mark.needs_fentry
def test_urgent_data_is_urgent(guarded: Lab) -> None:
    """send with MSG_OOB: that byte and what follows it take the kernel path."""
    outcomes = []
    for enabled in (False, True):
        guarded.register(enabled=enabled)
        client, server = guarded.pair()
        with client, server:
            for _ in range(COUNT):
                client.sendall(b"ordinary")
                assert server.recv(100) == b"ordinary"
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b"def")
            wait_until(lambda: _arrived(server), "the bytes to arrive")  # noqa: B023
            outcomes.append((server.recv(1, socket.MSG_OOB), server.recv(100)))
    assert outcomes == [(b"!", b"def")] * 2
    assert guarded.reason("urgent") >= 2


def _arrived(server: socket.socket) -> bool:
    """True if what follows the urgent byte can be read."""
    server.setblocking(False)
    try:
        return server.recv(100, socket.MSG_PEEK) == b"def"
    except BlockingIOError:
        return False


def _kernel_tls(connection: socket.socket) -> None:
    """AES-GCM-128 with a key that everybody knows (struct tls12_crypto_info_aes_gcm_128)."""
    connection.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    info = struct.pack("=HH8s16s4s8s", 0x0303, 51, bytes(8), b"k" * 16, b"salt", bytes(8))
    connection.setsockopt(SOL_TLS, TLS_TX, info)


@pytest.mark.needs_tls
def test_kernel_tls_that_is_switched_on_later(lab: Lab) -> None:
    """kTLS starts after the handshake, so on a socket that is in the lane already.

    Kernels with the fixes of 2025 refuse the keys then, and programs go on with TLS of their
    own (a limit of the README); with older ones nothing leaves in the clear.
    """
    client, server = lab.pair()
    with client, server:
        for _ in range(3):
            client.sendall(b"handshake")
            assert server.recv(100) == b"handshake"
            server.sendall(b"finished")
            assert client.recv(100) == b"finished"
        assert lab.redirected == 6
        refused = 0
        try:
            _kernel_tls(client)
        except OSError as error:
            refused = error.errno or 0
        assert refused in {0, errno.EINVAL}
        if not refused:
            client.sendall(b"secret")
            record = server.recv(100)
            assert record[:3] == b"\x17\x03\x03"
            assert b"secret" not in record
            assert lab.reason("ulp_set") >= 1
        assert lab.redirected == 6
