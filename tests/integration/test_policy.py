"""Policy stays in charge: accelerated flows are seen by the kernel path again and again."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import run, wait_until
from helpers.netns import inside
from nearpath.datapath import settings
from nearpath.kernel import netns

from .conftest import PORT, TIMEOUT

if TYPE_CHECKING:
    from .conftest import Lab

INTERVAL = 0.3  # seconds
_POLICY = """
add table inet guard
add chain inet guard input { type filter hook input priority 0; }
"""
_DROP = "add rule inet guard input tcp dport 5000 drop"
_SERVICE = """
add table ip service
add chain ip service prerouting { type nat hook prerouting priority -100; }
add rule ip service prerouting tcp dport 80 redirect to :5000
"""


def _nft(lab: Lab, rules: str) -> None:
    run([*inside(lab.right.netns), "nft", rules])


class _Busy:
    """Asks and is answered without a pause; ``answers`` counts, ``failed`` says how it ended."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.answers = 0
        self.failed = ""
        self.stop = False
        client.setblocking(True)
        server.setblocking(True)
        self._threads = [
            threading.Thread(target=self._ask, args=(client,)),
            threading.Thread(target=self._answer, args=(server,)),
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: socket.socket) -> None:
        number = 0
        while not self.stop:
            question = number.to_bytes(8, "big")
            client.sendall(question)
            if client.recv(8) != question:
                self.failed = f"another answer than {question!r}"
                return
            number += 1
            self.answers = number

    def _answer(self, server: socket.socket) -> None:
        while question := server.recv(8):
            server.sendall(question)

    def join(self, client: socket.socket) -> None:
        """Stop asking; the answerer sees the end of the stream."""
        self.stop = True
        self._threads[0].join(TIMEOUT)
        client.shutdown(socket.SHUT_WR)
        self._threads[1].join(TIMEOUT)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self.failed


def test_each_direction_takes_the_kernel_path_once_per_interval(lab: Lab) -> None:
    """A busy connection, both ways: about one message each per interval, the rest the lane."""
    settings.write(lab.place, revalidate_ms=100)
    client, server = lab.pair()
    with client, server:
        begin = time.monotonic()
        while time.monotonic() - begin < 1.0:
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            server.sendall(b"answer")
            assert client.recv(100) == b"answer"
    # A loaded machine may sleep through intervals, or through the end of the second.
    assert 4 <= lab.reason("revalidate") <= 24
    assert lab.kernel == lab.reason("revalidate")
    assert lab.redirected > 1000


def test_an_idle_connection_goes_by_the_kernel_path_first(lab: Lab) -> None:
    """After a pause policy is asked before anything is redirected."""
    settings.write(lab.place, revalidate_ms=50)
    client, server = lab.pair()
    with client, server:
        time.sleep(0.1)
        client.sendall(b"late")
        assert server.recv(100) == b"late"
        client.sendall(b"again")
        assert server.recv(100) == b"again"
    assert (lab.reason("revalidate"), lab.redirected) == (1, 1)


@pytest.mark.smoke
def test_a_new_rule_stops_a_busy_connection_and_its_removal_frees_it(lab: Lab) -> None:
    """Dropped on the kernel path, the connection stays there until TCP gets through again."""
    settings.write(lab.place, revalidate_ms=int(INTERVAL * 1000))
    _nft(lab, _POLICY)
    client, server = lab.pair()
    with client, server:
        busy = _Busy(client, server)
        wait_until(lambda: lab.redirected > 1000, "the connection to be in the lane")
        _nft(lab, _DROP)
        time.sleep(2 * INTERVAL)
        stopped, redirected = busy.answers, lab.redirected
        time.sleep(3 * INTERVAL)
        assert (busy.answers, lab.redirected) == (stopped, redirected)
        _nft(lab, "flush chain inet guard input")
        wait_until(lambda: busy.answers > stopped + 1000, "TCP to recover", TIMEOUT)
        assert lab.redirected > redirected
        busy.join(client)


@pytest.mark.parametrize("revalidate", [True, False], ids=["revalidating", "control"])
def test_conntrack_keeps_the_entry_of_a_busy_translated_connection(
    lab: Lab, *, revalidate: bool
) -> None:
    """Established timeout of 2 s, 4 s busy in the lane: does the close still get through?

    Without revalidation the entry expires, the client's FIN is not translated any more, and
    the server never hears of the end.
    """
    settings.write(lab.place, revalidate_ms=1000 if revalidate else 0)
    _nft(lab, _SERVICE)
    with netns.entered(lab.right.netns):
        timeout = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
        timeout.write_text("2", encoding="ascii")
    with lab.right.listen() as listener:
        client = lab.left.connect("10.77.0.2", 80)
        server, _ = listener.accept()
    server.settimeout(1)
    assert server.getsockname()[1] == PORT
    with client, server:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            client.sendall(b"busy")
            assert server.recv(100) == b"busy"
            time.sleep(0.001)
        client.close()
        try:
            ended = server.recv(1) == b""
        except TimeoutError:
            ended = False
    assert ended == revalidate
    assert lab.redirected > 100
