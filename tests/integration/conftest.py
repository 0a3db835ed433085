"""A datapath of one's own: private pins, run directory and sub-cgroup, and two pods.

    pod left ── eth0 10.77.0.1, fd77::1 ═══ veth ═══ eth0 10.77.0.2, fd77::2 ── pod right

The sockets are this process's own, made inside the pods; the programs see them because the
process sits in the sub-cgroup while a test runs.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import PATIENCE, run
from helpers.leaks import nothing_left
from helpers.netns import namespace, preserved_sysctls
from nearpath.datapath import loader, settings, unloader
from nearpath.kernel import cgroup, netns
from nearpath.lanes import socket as lane
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 5000
TIMEOUT = 20.0 * PATIENCE


@dataclass(frozen=True)
class Pod:
    """One network namespace that the datapath may know."""

    name: str
    netns: str
    cookie: int

    def listen(self, family: int = socket.AF_INET, port: int = PORT) -> socket.socket:
        """A listener on every address; AF_INET6 ones take IPv4 clients too (v4-mapped)."""
        with netns.entered(self.netns):
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.settimeout(TIMEOUT)
            listener.bind(("" if family == socket.AF_INET else "::", port))
            listener.listen(64)
            return listener

    def connect(self, address: str, port: int = PORT) -> socket.socket:
        """A connection from this pod."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with netns.entered(self.netns):
            connection = socket.socket(family)
        connection.settimeout(TIMEOUT)
        connection.connect((address, port))
        return connection


class Lab:
    """A loaded datapath and two pods; ``reasons`` and ``lane`` read its counters."""

    def __init__(self, place: Place, left: Pod, right: Pod) -> None:
        self.place = place
        self.left = left
        self.right = right

    def register(self, *, enabled: bool = True) -> None:
        """Let both pods take the lane, or not."""
        for pod in (self.left, self.right):
            lane.register(self.place, pod.cookie, enabled)

    def pair(self, address: str = "10.77.0.2") -> tuple[socket.socket, socket.socket]:
        """A connection from left to right: (client, server)."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.right.listen(family) as listener:
            client = self.left.connect(address)
            server, _ = listener.accept()
        server.settimeout(TIMEOUT)
        return client, server

    @property
    def redirected(self) -> int:
        """Messages that took the lane so far."""
        return int(lane.totals(self.place)["redirected_messages"])

    @property
    def kernel(self) -> int:
        """Messages of joined sockets that took the kernel path so far."""
        return int(lane.totals(self.place)["kernel_messages"])

    @property
    def connections(self) -> int:
        """Live paired connections."""
        return int(lane.totals(self.place)["connections"])

    def reason(self, name: str) -> int:
        """Count of one reason so far."""
        return int(lane.totals(self.place)["reasons"].get(name, 0))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A private place whose cgroup this process is in; nothing may be left of it."""
    root = cgroup.v2_root()
    name = f"np-node-{secrets.token_hex(4)}"  # a name that nothing_left looks for
    chosen = Place(f"{tmp_path}/run", f"/sys/fs/bpf/{name}", f"{root}/{name}")
    before = Path("/proc/self/cgroup").read_text(encoding="ascii")
    home = next(line[3:] for line in before.splitlines() if line.startswith("0::"))
    with nothing_left():
        Path(chosen.cgroup).mkdir()
        Path(chosen.cgroup, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        try:
            yield chosen
        finally:
            Path(root + home, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
            left = unloader.unload(chosen, lambda _: None, 5)
            Path(chosen.cgroup).rmdir()
        assert left == {"drained": True, "remaining": 0}


@pytest.fixture
def pods() -> Iterator[tuple[Pod, Pod]]:
    """The two pods, connected by one veth, with cubic as congestion control."""
    with ExitStack() as stack:
        paths = [stack.enter_context(namespace()) for _ in range(2)]
        names = [Path(path).name for path in paths]
        run(
            [
                *["ip", "link", "add", "eth0", "netns", names[0], "type", "veth"],
                *["peer", "name", "eth0", "netns", names[1]],
            ]
        )
        for number, name in enumerate(names, start=1):
            in_pod = ["ip", "-n", name]
            run([*in_pod, "address", "add", f"10.77.0.{number}/24", "dev", "eth0"])
            run([*in_pod, "address", "add", f"fd77::{number}/64", "dev", "eth0", "nodad"])
            run([*in_pod, "link", "set", "eth0", "up"])
        # Other namespaces may only use what the first one allows (tcp_cong.c).
        stack.enter_context(preserved_sysctls("net/ipv4/tcp_allowed_congestion_control"))
        allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
        allowed.write_text(allowed.read_text(encoding="ascii").strip() + " cubic", encoding="ascii")
        for path in paths:
            with netns.entered(path):
                chosen = Path("/proc/sys/net/ipv4/tcp_congestion_control")
                chosen.write_text("cubic", encoding="ascii")
        left, right = (
            Pod(name, path, netns.cookie(path)) for name, path in zip(names, paths, strict=True)
        )
        yield left, right


@pytest.fixture
def lab(place: Place, pods: tuple[Pod, Pod]) -> Lab:
    """A loaded datapath that knows both pods."""
    loader.ensure(place)
    # Off, so that a slow machine does not change what the tests count (test_policy has it on),
    # so that they count the same with and without guards (test_guards has them on), and since
    # a test that sends and then reads is never seen to wait for data (test_seams has it on).
    settings.write(place, revalidate_ms=0, probation=0, careful=0)
    lab = Lab(place, *pods)
    lab.register()
    return lab
