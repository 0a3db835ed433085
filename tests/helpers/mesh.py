"""A node of its own for the mesh: bridge, routes and rules in a namespace that plays the node.

              ┌───────────────── node (a namespace) ─────────────────┐
    outside ──┤ uplink 192.0.2.1  br0 10.88.0.1, fd88::1             │
   192.0.2.2  │                    │p1        │p2        │p3         │
              └────────────────────┼──────────┼──────────┼───────────┘
                               eth0 .11   eth0 .12   eth0 .13            pods (namespaces)

Two ways that primary plugins connect pods, for netfilter meets the packets at different places:

    bridged   pods share a subnet; netfilter sees bridged packets (br_netfilter), as kube-proxy
              needs with Flannel's bridge
    routed    pods have /32 and /128 addresses and send everything to the node, as with Calico

Nothing of the machine's own namespace is touched.
"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import PATIENCE, CommandError, run
from helpers.netns import inside, namespace
from nearpath.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20.0 * PATIENCE
GATEWAY, GATEWAY6 = "10.88.0.1", "fd88::1"
NODE_IP, OUTSIDE_IP = "192.0.2.1", "192.0.2.2"
_BRIDGE_SYSCTLS = Path("/proc/sys/net/bridge")


@dataclass(frozen=True)
class Stack:
    """A network stack in a namespace of its own: a pod, the node, or a machine elsewhere.

    Attributes:
        netns: path of the namespace.
        cookie: its name in the datapath's maps.
        ips: IPv4 address, then IPv6 address.
        port: in the node's namespace, the other end of a pod's eth0; else empty.
    """

    netns: str
    cookie: int
    ips: tuple[str, ...]
    port: str = ""

    @property
    def inside(self) -> tuple[str, ...]:
        """Words to put before a command that shall run here."""
        return inside(self.netns)

    @property
    def name(self) -> str:
        """As ``ip netns`` knows it."""
        return Path(self.netns).name

    def run(self, *words: str, text: str = "") -> str:
        """Run a command here; its standard output."""
        return run([*self.inside, *words], text=text).stdout

    def sysctl(self, name: str, value: str) -> None:
        """Set one of net.*, e.g. ``ipv4/ip_forward``."""
        with netns.entered(self.netns):
            Path("/proc/sys/net", name).write_text(value, encoding="ascii")

    def listen(self, port: int, family: int = socket.AF_INET) -> socket.socket:
        """A listener on every address."""
        with netns.entered(self.netns):
            listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.settimeout(SECONDS)
        listener.bind(("" if family == socket.AF_INET else "::", port))
        listener.listen(128)
        return listener

    def connect(self, address: str, port: int, source: int = 0) -> socket.socket:
        """A connection from here; ``source`` is the local port, 0 for any."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with netns.entered(self.netns):
            connection = socket.socket(family)
        connection.settimeout(SECONDS)
        if source:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            connection.bind(("", source))
        connection.connect((address, port))
        return connection


@dataclass(frozen=True)
class Node:
    """The namespace that plays the node, its pods, and a machine that is not on it."""

    host: Stack
    pods: tuple[Stack, ...]
    outside: Stack


def accept(listener: socket.socket) -> socket.socket:
    """The next connection, with the time limit of all our sockets."""
    connection, _ = listener.accept()
    connection.settimeout(SECONDS)
    return connection


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


def talk(client: socket.socket, server: socket.socket, messages: int, size: int = 100) -> None:
    """Ask and answer ``messages`` times; each side sees the other's bytes and no others.

    The content is random and differs from connection to connection.
    """
    content = random.Random()
    for _ in range(messages):
        question, answer = content.randbytes(size), content.randbytes(size)
        client.sendall(question)
        assert read(server, size) == question
        server.sendall(answer)
        assert read(client, size) == answer


def bursts(content: random.Random) -> list[bytes]:
    """Up to 20 writes of up to 30,000 bytes."""
    return [content.randbytes(content.randint(1, 30_000)) for _ in range(content.randint(1, 20))]


def pump(source: socket.socket, parts: list[bytes], *, end: bool = False) -> None:
    """Write them, and then the end of the stream if asked."""
    for part in parts:
        source.sendall(part)
    if end:
        source.shutdown(socket.SHUT_WR)


def read_to_the_end(source: socket.socket, sink: socket.socket, parts: list[bytes]) -> bytes:
    """What one end reads while the other writes these and ends its stream."""
    sender = threading.Thread(target=pump, args=(source, parts), kwargs={"end": True})
    sender.start()
    arrived = b"".join(iter(partial(sink.recv, 65_536), b""))
    sender.join(SECONDS)
    return arrived


@contextmanager
def node(pods: int = 2, *, routed: bool = False) -> Iterator[Node]:
    """A node with pods and a machine outside; connected, without any netfilter rule.

    Args:
        pods: how many.
        routed: pods send everything to the node, instead of sharing a subnet; see above.
    """
    with ExitStack() as stack:
        if not routed:
            stack.enter_context(_bridge_netfilter())
        path = stack.enter_context(namespace())
        host = Stack(path, netns.cookie(path), (GATEWAY, GATEWAY6))
        for name, value in (
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            # A router that sends packets back where they came from tells the sender of a
            # shorter way; pods of a routed node have none.
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            # Addresses are chosen here; looking for duplicates takes seconds.
            ("ipv6/conf/default/accept_dad", "0"),
        ):
            host.sysctl(name, value)
        on_host = ["ip", "-n", host.name]
        run([*on_host, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"])
        run([*on_host, "address", "add", f"{GATEWAY}/24", "dev", "br0"])
        run([*on_host, "address", "add", f"{GATEWAY6}/64", "dev", "br0", "nodad"])
        run([*on_host, "link", "set", "br0", "up"])
        if _BRIDGE_SYSCTLS.exists():
            for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
                host.sysctl(f"bridge/{name}", "0" if routed else "1")
        made = [
            _pod(stack.enter_context(namespace()), host, number, routed=routed)
            for number in range(1, pods + 1)
        ]
        yield Node(host, tuple(made), _outside(stack.enter_context(namespace()), host))


def _pod(path: str, host: Stack, number: int, *, routed: bool) -> Stack:
    pod = Stack(
        path, netns.cookie(path), (f"10.88.0.{10 + number}", f"fd88::{10 + number}"), f"p{number}"
    )
    pod.sysctl("ipv6/conf/default/accept_dad", "0")
    # IPv6 has no switch for sending them; see send_redirects in node().
    pod.sysctl("ipv6/conf/default/accept_redirects", "0")
    _cable(host, pod.port, pod, "eth0")
    run(["ip", "-n", host.name, "link", "set", pod.port, "master", "br0"])
    if not routed:
        # A pod that is sent back to itself by a translation on the bridge leaves by the port
        # that it came from (hairpinMode of the bridge plugin).
        run(
            [
                *["ip", "-n", host.name, "link", "set", pod.port],
                *["type", "bridge_slave", "hairpin", "on"],
            ]
        )
    for family, address, gateway, length in (
        ("-4", pod.ips[0], GATEWAY, 32 if routed else 24),
        ("-6", pod.ips[1], GATEWAY6, 128 if routed else 64),
    ):
        in_pod = ["ip", "-n", pod.name, family]
        nodad = ["nodad"] if family == "-6" else []
        run([*in_pod, "address", "add", f"{address}/{length}", "dev", "eth0", *nodad])
        if routed:
            run([*in_pod, "route", "add", gateway, "dev", "eth0"])
        run([*in_pod, "route", "add", "default", "via", gateway, "dev", "eth0"])
    return pod


def _outside(path: str, host: Stack) -> Stack:
    outside = Stack(path, netns.cookie(path), (OUTSIDE_IP,))
    _cable(host, "uplink", outside, "eth0")
    run(["ip", "-n", host.name, "address", "add", f"{NODE_IP}/24", "dev", "uplink"])
    run(["ip", "-n", outside.name, "address", "add", f"{OUTSIDE_IP}/24", "dev", "eth0"])
    run(["ip", "-n", outside.name, "route", "add", "10.88.0.0/24", "via", NODE_IP])
    return outside


def _cable(host: Stack, port: str, other: Stack, ifname: str) -> None:
    run(
        [
            *["ip", "link", "add", port, "netns", host.name, "type", "veth"],
            *["peer", "name", ifname, "netns", other.name],
        ]
    )
    run(["ip", "-n", host.name, "link", "set", port, "up"])
    run(["ip", "-n", other.name, "link", "set", ifname, "up"])


@contextmanager
def _bridge_netfilter() -> Iterator[None]:
    """br_netfilter is loaded; if we load it, the machine's own bridges do not notice."""
    if _BRIDGE_SYSCTLS.exists():
        yield
        return
    run(["modprobe", "br_netfilter"])
    if not _BRIDGE_SYSCTLS.exists():
        raise CommandError("br_netfilter is loaded, but there is no /proc/sys/net/bridge")
    try:
        for sysctl in _BRIDGE_SYSCTLS.glob("bridge-nf-call-*"):
            sysctl.write_text("0", encoding="ascii")
        yield
    finally:
        run(["modprobe", "--remove", "br_netfilter"], check=False)
