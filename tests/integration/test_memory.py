"""Kernel memory: nothing is left of very many connections, and a sleeping reader holds little.

Very many are 30,000, or as many as NEARPATH_CONNECTIONS says: with a million it takes minutes.
Memory is read from /proc/slabinfo and /proc/net/sockstat, which are the whole machine's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import PATIENCE, wait_until
from helpers.streams import streams
from nearpath.datapath import settings
from nearpath.datapath.maps import Map
from nearpath.kernel import netns

from .conftest import TIMEOUT

if TYPE_CHECKING:
    from .conftest import Lab

SERVER = "10.77.0.2"
CONNECTIONS = int(os.environ.get("NEARPATH_CONNECTIONS", "30000"))
# Objects that come and go with everything else on the machine; beyond, that many per mille
# of the connections would be a leak of one of their kinds (streams.c has 16 ways to end).
NOISE, PER_MILLE = 3000, 30
_SO_MEMINFO = 55
_RMEM_ALLOC_AND_RCVBUF = struct.Struct("=2I")  # of SK_MEMINFO_…, linux/sock_diag.h


def _slabs() -> dict[str, tuple[int, int]]:
    """Objects in use and their size of the caches that sockets and BPF use, by name."""
    found = {}
    for line in Path("/proc/slabinfo").read_text(encoding="ascii").splitlines()[2:]:
        name, active, _, size = line.split()[:4]
        if name.startswith(("kmalloc-", "TCP", "sock_", "skbuff", "request_sock", "bpf")):
            found[name] = (int(active), int(size))
    return found


def _sockstat() -> dict[str, int]:
    """Of TCP: inuse (of this namespace), orphan, tw, alloc, mem (pages)."""
    for line in Path("/proc/net/sockstat").read_text(encoding="ascii").splitlines():
        if line.startswith("TCP:"):
            words = line.split()[1:]
            return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    raise AssertionError("no TCP in sockstat")


# -- many connections ------------------------------------------------------------------------


def _many_ports(lab: Lab) -> None:
    """Let the pods open connections faster than TIME-WAIT gives ports back."""
    for pod in (lab.left, lab.right):
        with netns.entered(pod.netns):
            for name, value in (("ip_local_port_range", "1024 65535"), ("tcp_max_tw_buckets", "0")):
                Path(f"/proc/sys/net/ipv4/{name}").write_text(value, encoding="ascii")


def _churn(lab: Lab, directory: Path, connections: int, timeout: float) -> float:
    """Open, use and close so many connections in all the ways there are; seconds."""
    kinds = ("churn", "churn", "churn")
    begin = time.monotonic()
    with streams(
        directory, lab.left.netns, lab.right.netns, SERVER, kinds, count=connections // len(kinds)
    ) as running:
        running.wait(timeout)
        assert running.connections == connections // len(kinds) * len(kinds)
    return time.monotonic() - begin


def _grown(before: dict[str, tuple[int, int]], allowed: int) -> dict[str, int]:
    """Caches with so many more objects than before."""
    after = _slabs()
    more = {name: active - before.get(name, (0, 0))[0] for name, (active, _) in after.items()}
    return {name: count for name, count in more.items() if count > allowed}


def _is_back(before: dict[str, tuple[int, int]], allowed: int) -> bool:
    return not _grown(before, allowed)


@pytest.mark.timeout((120 + CONNECTIONS // 500) * PATIENCE)
def test_nothing_is_left_of_many_connections(lab: Lab, tmp_path: Path) -> None:
    """Maps, sockets and slabs are as before, like after as many on the kernel path."""
    settings.write(lab.place, probation=1)
    _many_ports(lab)
    limit = (30 + CONNECTIONS / 1000) * PATIENCE
    # What is allocated once: caches per CPU, and hash tables that grow.
    _churn(lab, tmp_path, 3000, 30 * PATIENCE)
    joined = lab.reason("joined")
    allowed = NOISE + CONNECTIONS * PER_MILLE // 1000
    alloc = _sockstat()["alloc"]
    seconds = {}
    for path in ("kernel path", "lane"):
        lab.register(enabled=path == "lane")
        before = _slabs()
        seconds[path] = _churn(lab, tmp_path, CONNECTIONS, limit)
        wait_until(lambda: _sockstat()["alloc"] < alloc + 100, "the sockets to be gone", 20)
        wait_until(functools.partial(_is_back, before, allowed), f"memory of the {path}", 20)
        print(path, f"{seconds[path]:.1f} s", "grown:", _grown(before, 100))
    # All but those that were reset before the server knew of them.
    assert lab.reason("joined") - joined > 1.9 * CONNECTIONS
    for name in ("sockets", "connections"):
        with Map.pinned_unknown(f"{lab.place.layout_dir}/{name}") as table:
            assert list(table.keys()) == []
    for name, most in (("half_open", 0), ("readers", 6), ("pods", 2)):
        with Map.pinned_unknown(f"{lab.place.layout_dir}/{name}") as table:
            assert len(list(table.keys())) <= most, name


def test_what_is_left_would_be_seen(lab: Lab) -> None:
    """The control: connections that are still there show in the same numbers."""
    before, count = _slabs(), 1000
    with ExitStack() as stack:
        with lab.right.listen() as listener:
            for _ in range(count):
                stack.enter_context(lab.left.connect(SERVER))
                stack.enter_context(listener.accept()[0])
        grown = _grown(before, count)
        assert any(name.startswith("TCP") for name in grown)
        # sk_psock, and storage of facts.
        assert sum(more for name, more in grown.items() if name.startswith("kmalloc")) > count
    wait_until(lambda: not _grown(before, NOISE), "the sockets' memory to be free", 20)


# -- readers that sleep ----------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Kernel memory of connections whose readers sleep, per connection in bytes.

    Attributes:
        reader: what is queued at the reader: as its buffer counts it, and the kernel's
            structures around redirected messages, which nothing counts.
        full: what the reader's buffer may hold.
        total: of both ends, in pages and slabs.
        taken: what the sender could send.
    """

    reader: int
    full: int
    total: int
    taken: int


def _uncharged() -> int:
    """Bytes in the cache of struct sk_msg, which surrounds a redirected message."""
    active, size = _slabs()["kmalloc-1k"]
    return active * size


def _settled() -> int:
    """The same, once what is freed with a delay is free."""
    seen = [_uncharged()]

    def rests() -> bool:
        time.sleep(0.05)
        seen.append(_uncharged())
        return abs(seen[-1] - seen[-2]) < 1 << 14

    wait_until(rests, "memory to settle")
    return seen[-1]


def _fill(senders: list[socket.socket], size: int, most: int) -> int:
    """Send messages in turn, so that it is no stream, until nothing more is taken.

    Args:
        most: messages of each; the rest is sent in larger ones, or it would take minutes.
    """
    taken, messages, begin = 0, 0, time.monotonic()
    block, rest = bytes(size), bytes(max(size, 2048))
    moved = begin
    # Longer than TCP's shortest retransmission timer.
    while time.monotonic() - moved < 0.25:
        for sender in senders:
            with contextlib.suppress(BlockingIOError):
                taken += sender.send(block if messages < most else rest)
                moved = time.monotonic()
        messages += 1
    return taken


def _sleepers(lab: Lab, count: int, size: int, buffer: int, sending: int = 16384) -> Held:
    """Connections with readers that never read, filled up.

    Args:
        size: of the messages.
        buffer: SO_RCVBUF of the readers; 0: the kernel's choice.
        sending: SO_SNDBUF of the senders; it is full on both paths, and large by default.
    """
    with ExitStack() as stack:
        pairs = []
        with lab.right.listen() as listener:
            if buffer:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            for _ in range(count):
                client = stack.enter_context(lab.left.connect(SERVER))
                server, _ = listener.accept()
                pairs.append((client, stack.enter_context(server)))
        for client, server in pairs:
            if sending:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sending)
            client.setblocking(False)
            server.settimeout(TIMEOUT)
        slabs, pages = _settled(), _sockstat()["mem"]
        taken = _fill([client for client, _ in pairs], size, 600)
        slabs, pages = _uncharged() - slabs, _sockstat()["mem"] - pages
        queued = full = 0
        for _, server in pairs:
            words = server.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _RMEM_ALLOC_AND_RCVBUF.size)
            allocated, full = _RMEM_ALLOC_AND_RCVBUF.unpack(words)
            queued += allocated
    wait_until(lambda: lab.connections == 0, "the connections to be forgotten")
    total = slabs + pages * os.sysconf("SC_PAGE_SIZE")
    return Held((queued + max(slabs, 0)) // count, full, total // count, taken // count)


@pytest.mark.parametrize(
    ("buffer", "size"),
    [
        *((0, size) for size in (1, 64, 512, 4096, 65536)),
        *((16384, size) for size in (1, 512, 4096, 16384)),
        *((1 << 20, size) for size in (64, 4096)),
    ],
)
def test_sleeping_readers_hold_little_more_than_on_the_kernel_path(
    lab: Lab, buffer: int, size: int
) -> None:
    """At most half as much again, whatever SO_RCVBUF (0: default) and the messages' size."""
    count = 5 if buffer > 1 << 17 else 40
    lab.register(enabled=False)
    kernel = _sleepers(lab, count, size, buffer)
    lab.register()
    in_lane = _sleepers(lab, count, size, buffer)
    print(kernel, in_lane, f"{in_lane.reader / kernel.reader:.2f}")
    # A message that is larger than what may be left unread never takes the lane.
    assert lab.redirected >= count or size > (buffer or 1 << 17)
    # The kernel path may stop a segment short of full or one beyond.
    assert in_lane.reader <= 1.5 * max(kernel.reader, kernel.full)
    assert in_lane.taken <= 1.5 * kernel.taken


def test_two_hundred_sleeping_readers(lab: Lab) -> None:
    """Pages and slabs of the whole machine, both ends together."""
    lab.register(enabled=False)
    kernel = _sleepers(lab, 200, 700, 0)
    lab.register()
    in_lane = _sleepers(lab, 200, 700, 0)
    print(kernel, in_lane)
    assert in_lane.total <= 1.5 * kernel.total


@pytest.mark.parametrize("size", [1000, 16384])
def test_sleeping_readers_of_senders_with_large_buffers(lab: Lab, size: int) -> None:
    """Both ends together, with the buffers that the kernel gives them."""
    lab.register(enabled=False)
    kernel = _sleepers(lab, 20, size, 0, sending=0)
    lab.register()
    in_lane = _sleepers(lab, 20, size, 0, sending=0)
    print(kernel, in_lane, f"{in_lane.total / kernel.total:.2f}")
    assert in_lane.total <= 1.5 * kernel.total
