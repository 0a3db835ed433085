"""What the socket lane did for a mesh: counters by pod, connections by hop, captures."""

from __future__ import annotations

import ipaddress
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from helpers.capture import Seen, capture
from helpers.commands import wait_until
from helpers.mesh_rules import APP_PORT, INBOUND, OUTBOUND, SERVICE_PORT
from nearpath.datapath import loader, settings, tables
from nearpath.kernel import netns
from nearpath.lanes import socket as lane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from helpers.capture import Capture
    from helpers.mesh import Node, Stack
    from helpers.traffic import Conversation
    from nearpath.place import Place

MESSAGES = 100
SIZE = 200
# The server's digest of the whole stream, after the client's half-close (peer.py).
FAREWELL = 32
# A conversation's path: for each of its connections the numbers of the client's pod and the
# server's.
Hops = tuple[tuple[int, int], ...]


@dataclass
class Observed:
    """What the lane counted and what crossed interfaces, by the pods' numbers.

    Attributes:
        counts: messages and reasons by name, of the sockets of each pod.
        veths: of each pod's veth, at the node's end.
        loopbacks: of each pod's loopback, where every segment is seen twice: going out and
            coming in.
    """

    counts: list[Counter[str]] = field(default_factory=list)
    veths: list[Seen] = field(default_factory=list)
    loopbacks: list[Seen] = field(default_factory=list)

    def assert_lane(self, hops: Hops) -> None:
        """One conversation of MESSAGES times SIZE each way took the lane on every hop.

        Exactly these messages go by the kernel path: the farewell on each hop, for its reader
        has left the lane with its half-close; and the first message of a client that has sent
        before the server's socket had seen the end of the handshake. Bytes are counted once
        each; a proxy may send one message in two (where its ring buffer wraps).
        """
        for pod, counts in enumerate(self.counts):
            called = sum(client == pod for client, _ in hops)
            served = sum(server == pod for _, server in hops)
            early = counts["peer_not_joined"]
            assert early <= called
            assert counts["joined"] == called + served
            assert counts["peer_left"] == served
            assert counts["kernel_messages"] == served + early
            assert counts["kernel_bytes"] == served * FAREWELL + early * SIZE
            sent = (called + served) * MESSAGES - early
            assert counts["redirected_bytes"] == sent * SIZE
            more = counts["redirected_messages"] - sent
            assert 0 <= more <= (called + served if len(hops) > 1 else 0)
            assert counts["peer_elsewhere"] == 0
        # Twice as much: on a slow machine TCP may repeat a lone segment (tail loss probe).
        by_kernel = 2 * sum(counts["kernel_messages"] for counts in self.counts)
        assert all(seen.payload_segments <= by_kernel for seen in self.veths)
        assert all(seen.payload_segments <= 2 * by_kernel for seen in self.loopbacks)

    def assert_kernel_path(self, hops: Hops) -> None:
        """The lane had no part in a conversation, and all of it crossed the interfaces."""
        assert not any(counts["joined"] for counts in self.counts)
        assert not any(counts["redirected_messages"] for counts in self.counts)
        whole = 2 * MESSAGES * SIZE + FAREWELL
        for client, server in hops:
            if client == server and self.loopbacks[client].payload_bytes:
                assert self.loopbacks[client].payload_bytes >= 2 * whole
            else:
                assert all(self.veths[pod].payload_bytes >= whole for pod in (client, server))


Address = tuple[str, int]


@dataclass(frozen=True)
class Hop:
    """A live connection of the lane; pairs are (client, server).

    Attributes:
        pods: cookies of the two ends' namespaces.
        redirected: messages that each end has sent by the lane.
        kernel: the same by the kernel path.
        bytes: that each end has sent, by both.
        local: address and port of each end, as its application sees it.
        remote: address and port of the other end, as each sees it.
    """

    pods: tuple[int, int]
    redirected: tuple[int, int]
    kernel: tuple[int, int]
    bytes: tuple[int, int]
    local: tuple[Address, Address]
    remote: tuple[Address, Address]


class Lane:
    """The loaded datapath of one test."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def register(self, *pods: Stack, enabled: bool = True) -> None:
        """Let the pods take the lane, or know them without."""
        for pod in pods:
            lane.register(self.place, pod.cookie, enabled)

    def counts(self, pod: Stack) -> Counter[str]:
        """Messages, bytes and reasons of a pod since the datapath was loaded."""
        shown = lane.by_pod(self.place).get(pod.cookie, lane.NOTHING)
        return Counter({name: shown[name] for name in tables.MESSAGES}) + Counter(shown["reasons"])

    def hops(self) -> list[Hop]:
        """Every live paired connection."""
        return [
            Hop(
                each.netns,
                each.redirected_messages,
                each.kernel_messages,
                (
                    each.redirected_bytes[0] + each.kernel_bytes[0],
                    each.redirected_bytes[1] + each.kernel_bytes[1],
                ),
                _both((ip, port) for ip, port, _, _ in each.endpoints),
                _both((ip, port) for _, _, ip, port in each.endpoints),
            )
            for each in tables.paired(self.place)
        ]

    def wait_forgotten(self) -> None:
        """Every connection is closed at both ends."""
        wait_until(
            lambda: tables.connections(self.place)[tables.GONE] == 0, "connections forgotten"
        )

    @contextmanager
    def observe(self, pods: Sequence[Stack], host: Stack) -> Iterator[Observed]:
        """Watch the pods of a node while the block runs; filled when all is closed again."""
        observed = Observed()
        before = [self.counts(pod) for pod in pods]
        with ExitStack() as stack:
            with netns.entered(host.netns):
                veths = [stack.enter_context(capture(pod.port)) for pod in pods]
            loopbacks = []
            for pod in pods:
                with netns.entered(pod.netns):
                    loopbacks.append(stack.enter_context(capture("lo")))
            yield observed
            self.wait_forgotten()
        observed.veths = [_segments(view) for view in veths]
        observed.loopbacks = [_segments(view) for view in loopbacks]
        observed.counts = [
            self.counts(pod) - earlier for pod, earlier in zip(pods, before, strict=True)
        ]

    def compare(
        self, node: Node, hops: Iterable[tuple[int, int]], converse: Callable[[], Conversation]
    ) -> Conversation:
        """Have a conversation with the lane off and with it on; both ends see the same.

        Args:
            node: its pods are registered afterwards.
            hops: the pods' numbers of the clients and servers on its way.
            converse: MESSAGES of SIZE each way, to a server on APP_PORT.
        """
        expected = tuple(hops)
        self.register(*node.pods, enabled=False)
        with self.observe(node.pods, node.host) as control:
            by_kernel = converse()
        control.assert_kernel_path(expected)
        self.register(*node.pods)
        with self.observe(node.pods, node.host) as accelerated:
            by_lane = converse()
        accelerated.assert_lane(expected)
        for talk in (by_kernel, by_lane):
            assert talk.intact
            assert talk.messages == MESSAGES
        assert by_kernel.peer == by_lane.peer
        return by_lane


def load(place: Place) -> Lane:
    """Load the datapath, without the rules that make counts depend on time and scheduling."""
    loader.ensure(place)
    settings.write(place, revalidate_ms=0, probation=0, careful=0)
    return Lane(place)


def _both(ends: Iterable[tuple[bytes, int]]) -> tuple[Address, Address]:
    client, server = ((str(ipaddress.ip_address(ip)), port) for ip, port in ends)
    return client, server


def _segments(view: Capture) -> Seen:
    """All segments of applications and proxies."""
    total = Seen()
    for port in (SERVICE_PORT, APP_PORT, OUTBOUND, INBOUND):
        for name, count in vars(view.on_port(port)).items():
            setattr(total, name, getattr(total, name) + count)
    return total
