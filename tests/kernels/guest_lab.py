"""Two pods on the kernel that runs this, TCP connections between them, and measurements.

     netns a                       netns b
     10.77.0.1, fd77::1  ──veth──  10.77.0.2, fd77::2

For scripts that run as root in a machine of their own; see vm.py.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from contextlib import contextmanager, suppress

from nearpath.datapath import loader, tables
from nearpath.kernel import netns
from nearpath.lanes import socket as lane
from nearpath.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pair = tuple[socket.socket, socket.socket]

SO_MEMINFO = 55  # asm-generic/socket.h
POD_A, POD_B = "/run/netns/a", "/run/netns/b"
BLOCKED = 8  # seconds after which a blocking call has hung
CHECK = 25  # seconds for one check

# How a connection is addressed: (listener's family and address, client's family and address).
WAYS = {
    "v4": ((socket.AF_INET, "10.77.0.2"), (socket.AF_INET, "10.77.0.2")),
    "v6": ((socket.AF_INET6, "fd77::2"), (socket.AF_INET6, "fd77::2")),
    "mapped_server": ((socket.AF_INET6, "::"), (socket.AF_INET, "10.77.0.2")),
    "mapped_client": ((socket.AF_INET, "10.77.0.2"), (socket.AF_INET6, "::ffff:10.77.0.2")),
}


class CheckError(Exception):
    """A check has seen something that must not be."""


def expect(condition: object, what: str) -> None:
    """Fail the check with ``what`` unless ``condition`` holds."""
    if not condition:
        raise CheckError(what)


class Lab:
    """Both pods, their listeners, and the datapath."""

    def __init__(self) -> None:
        self.place = Place()
        for command in (
            "netns add a",
            "netns add b",
            "link add va netns a type veth peer name vb netns b",
        ):
            self._ip(*command.split())
        for pod, number in (("a", 1), ("b", 2)):
            for command in (
                f"address add 10.77.0.{number}/24 dev v{pod}",
                f"address add fd77::{number}/64 dev v{pod} nodad",
                f"link set v{pod} up",
                "link set lo up",
            ):
                self._ip("-n", pod, *command.split())
        self.cookies = netns.cookie(POD_A), netns.cookie(POD_B)
        self.listeners: dict[str, socket.socket] = {}

    def reset(self) -> None:
        """Inherit nothing from a check that failed: new listeners in pod b, not paused."""
        if loader.is_loaded(self.place):
            tables.set_paused(self.place, False)
            # Emulated, a check takes seconds: what it counts must not depend on that.
            tables.set_revalidate(self.place, 0)
        for listener in self.listeners.values():
            listener.close()
        with netns.entered(POD_B):
            for way, ((family, address), _) in WAYS.items():
                listener = socket.socket(family, socket.SOCK_STREAM)
                listener.settimeout(BLOCKED)
                listener.bind((address, 0))
                listener.listen(16)
                self.listeners[way] = listener

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=20, stdout=sys.stderr)

    def lane(self, enabled: bool) -> None:
        """Let new connections of both pods take the lane, or none."""
        for cookie in self.cookies:
            lane.register(self.place, cookie, enabled)

    def connect(self, way: str = "v4") -> socket.socket:
        """A new connection from pod a; its reads and writes block up to BLOCKED seconds."""
        (family, address) = WAYS[way][1]
        with netns.entered(POD_A):
            client = socket.socket(family, socket.SOCK_STREAM)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_blocking(client)
        client.connect((address, self.listeners[way].getsockname()[1]))
        return client

    def accept(self, way: str = "v4") -> socket.socket:
        """The other end of a connection, in pod b."""
        server, _ = self.listeners[way].accept()
        server.settimeout(None)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_blocking(server)
        return server

    @contextmanager
    def pair(self, way: str = "v4") -> Iterator[Pair]:
        """Both ends of a new connection, client first."""
        with self.connect(way) as client, self.accept(way) as server:
            yield client, server

    def totals(self) -> dict[str, int]:
        """The lane's counters, flat."""
        totals = lane.totals(self.place)
        flat = {name: totals[name] for name in tables.MESSAGES}
        flat.update(totals["reasons"])
        return flat

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Filled at the end with how much every counter has risen inside."""
        before = self.totals()
        risen: dict[str, int] = {}
        try:
            yield risen
        finally:
            for name, value in self.totals().items():
                if value != before.get(name, 0):
                    risen[name] = value - before.get(name, 0)


def limit_blocking(sock: socket.socket) -> None:
    """Let blocking calls end with EAGAIN after BLOCKED seconds; they stay blocking calls.

    settimeout() would make the descriptor non-blocking, and test another path of the kernel.
    """
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", BLOCKED, 0))


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes, or fewer if the stream ends before."""
    parts, have = [], 0
    while have < size:
        part = sock.recv(min(size - have, 1 << 18))
        if not part:
            break
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def receive_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    return receive(sock, 1 << 62)


def charged(sock: socket.socket) -> int:
    """Bytes of receive memory that the kernel has charged to the socket (sk_rmem_alloc)."""
    return int(struct.unpack("=I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4))[0])


def buffer_size(sock: socket.socket) -> int:
    """The socket's sk_rcvbuf."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def warm_up(client: socket.socket, server: socket.socket, times: int = 3) -> None:
    """Requests and answers until both directions are what they will be."""
    for _ in range(times):
        for sender, receiver in ((client, server), (server, client)):
            sender.sendall(b"warm-up")
            expect(receive(receiver, 7) == b"warm-up", "warm-up arrives")


def tcp_statistics(*names: str) -> dict[str, int]:
    """Sums of both pods' counters of these names in /proc/net/netstat."""
    found = dict.fromkeys(names, 0)
    for pod in (POD_A, POD_B):
        with netns.entered(pod), open("/proc/thread-self/net/netstat", encoding="ascii") as file:
            lines = file.read().splitlines()
        for titles, values in zip(lines[::2], lines[1::2], strict=True):
            for title, value in zip(titles.split(), values.split(), strict=True):
                if title in found:
                    found[title] += int(value)
    return found


def slab() -> int:
    """Kernel memory in slabs that cannot be reclaimed, bytes."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("SUnreclaim")) * 1024


def tcp_pages() -> int:
    """Pages that all TCP sockets of the machine have charged."""
    with open("/proc/net/sockstat", encoding="ascii") as lines:
        words = next(line.split() for line in lines if line.startswith("TCP:"))
    return int(words[words.index("mem") + 1])


@contextmanager
def child(work: Callable[[], object]) -> Iterator[None]:
    """A process that runs ``work`` beside us; its failure fails the check."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            signal.alarm(CHECK)
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
    expect(status == 0, f"the other process ended with {os.waitstatus_to_exitcode(status)}")
