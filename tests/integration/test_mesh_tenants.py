"""Two tenants on one node: same pod addresses, same ports, at the same time.

    node of tenant "red"                      node of tenant "blue"
    10.88.0.11:40000 ──▶ 10.88.0.12:8080      10.88.0.11:40000 ──▶ 10.88.0.12:8080

Each tenant has a namespace of its own for bridge, routes and rules, as overlapping VPCs have.
All four pods are registered with one datapath. Every address and port of every connection,
down to the client's source port, is the same for both tenants; only the bytes differ.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from helpers import mesh
from helpers.mesh_lane import load
from helpers.mesh_proxy import sidecar
from helpers.mesh_rules import (
    APP_PORT,
    OUTBOUND,
    PASSTHROUGH,
    SERVICE_PORT,
    VIP,
    kube_proxy,
    restore,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.mesh import Node
    from helpers.mesh_lane import Lane
    from nearpath.place import Place

SOURCE = 40_000
INBOUND_SOURCE = 41_000
TENANTS = ("red", "blue")
ROUNDS = 2000
# Bytes of one message, and how many are under way at a time.
SIZE, DEPTH = 64, 4


@pytest.fixture
def tenants() -> Iterator[dict[str, Node]]:
    """Two pods each, and a service whose endpoint is the second."""
    with ExitStack() as stack:
        made = {name: stack.enter_context(mesh.node(2)) for name in TENANTS}
        for node in made.values():
            restore(node.host, kube_proxy([node.pods[1].ips[0]]))
        yield made


@pytest.fixture
def lane(place: Place, tenants: dict[str, Node]) -> Lane:
    """One datapath that knows all four pods."""
    loaded = load(place)
    for node in tenants.values():
        loaded.register(*node.pods)
    return loaded


def _message(tenant: str, side: str, number: int) -> bytes:
    """Belongs to one place in one stream of one tenant, and to no other."""
    return hashlib.shake_128(f"{tenant} {side} {number}".encode()).digest(SIZE)


def _ask(tenant: str, client: socket.socket, wrong: list[str]) -> None:
    for first in range(0, ROUNDS, DEPTH):
        for number in range(first, first + DEPTH):
            client.sendall(_message(tenant, "ask", number))
        for number in range(first, first + DEPTH):
            if mesh.read(client, SIZE) != _message(tenant, "answer", number):
                wrong.append(f"{tenant}: answer {number}")
                return


def _answer(tenant: str, server: socket.socket, wrong: list[str]) -> None:
    for number in range(ROUNDS):
        if mesh.read(server, SIZE) != _message(tenant, "ask", number):
            wrong.append(f"{tenant}: question {number}")
            return
        server.sendall(_message(tenant, "answer", number))


def busy_at_once(pairs: dict[str, tuple[socket.socket, socket.socket]]) -> None:
    """All pairs talk at the same time; each end gets exactly its own tenant's bytes."""
    wrong: list[str] = []
    threads = []
    for tenant, (client, server) in pairs.items():
        threads += [
            threading.Thread(target=_ask, args=(tenant, client, wrong)),
            threading.Thread(target=_answer, args=(tenant, server, wrong)),
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(mesh.SECONDS)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def open_pairs(
    tenants: dict[str, Node], stack: ExitStack, address: str, port: int
) -> dict[str, tuple[socket.socket, socket.socket]]:
    """A connection of each tenant, from the same source port: (client, server)."""
    pairs = {}
    for name, node in tenants.items():
        with node.pods[1].listen(APP_PORT) as listener:
            client = stack.enter_context(node.pods[0].connect(address, port, SOURCE))
            pairs[name] = client, stack.enter_context(mesh.accept(listener))
        for end in pairs[name]:  # else the control waits for delayed acknowledgements
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    clients = [pair[0] for pair in pairs.values()]
    servers = [pair[1] for pair in pairs.values()]
    for ends in (clients, servers):
        assert len({end.getsockname() for end in ends}) == 1
        assert len({end.getpeername() for end in ends}) == 1
    return pairs


@pytest.mark.parametrize("by", ["pod IP", "cluster IP"])
def test_same_addresses_and_ports(lane: Lane, tenants: dict[str, Node], by: str) -> None:
    """Pod to pod: two connections that no address tells apart."""
    address, port = ("10.88.0.12", APP_PORT) if by == "pod IP" else (VIP, SERVICE_PORT)
    with ExitStack() as stack:
        pairs = open_pairs(tenants, stack, address, port)
        hops = lane.hops()
        assert len(hops) == len(TENANTS)
        assert len({(hop.local, hop.remote) for hop in hops}) == 1
        assert {hop.pods for hop in hops} == {
            (node.pods[0].cookie, node.pods[1].cookie) for node in tenants.values()
        }
        busy_at_once(pairs)
        for hop in lane.hops():
            assert hop.redirected == (ROUNDS, ROUNDS)
            assert hop.kernel == (0, 0)
    for node in tenants.values():
        for pod in node.pods:
            assert lane.counts(pod)["redirected_messages"] == ROUNDS


def test_same_addresses_through_sidecars(lane: Lane, tenants: dict[str, Node]) -> None:
    """Proxies on both sides: 127.0.0.6 and its port are the same in both server pods."""
    with ExitStack() as stack:
        for node in tenants.values():
            stack.enter_context(sidecar(node.pods[0]))
            stack.enter_context(sidecar(node.pods[1], source_port=INBOUND_SOURCE))
        pairs = open_pairs(tenants, stack, VIP, SERVICE_PORT)
        for _, server in pairs.values():
            assert server.getpeername() == (PASSTHROUGH, INBOUND_SOURCE)
        busy_at_once(pairs)
        hops = lane.hops()
        for node in tenants.values():
            a, b = (pod.cookie for pod in node.pods)
            mine = [hop for hop in hops if set(hop.pods) <= {a, b}]
            assert sorted(hop.pods for hop in mine) == sorted([(a, a), (a, b), (b, b)])
            for hop in mine:
                # Proxies pass on what they have, so between them messages are fewer.
                assert all(0 < count <= ROUNDS for count in hop.redirected)
        # Hop 1 and 3 look alike in both tenants, from both ends.
        outbound = {hop.local for hop in hops if hop.local[1][1] == OUTBOUND}
        inbound = {(hop.local, hop.remote) for hop in hops if hop.local[0][0] == PASSTHROUGH}
        assert len(outbound) == len(inbound) == 1
        assert len(hops) == 3 * len(TENANTS)


def test_without_the_lane(place: Place, tenants: dict[str, Node]) -> None:
    """The control: the same talk of pods that do not take part."""
    lane = load(place)
    for node in tenants.values():
        lane.register(*node.pods, enabled=False)
    with ExitStack() as stack:
        busy_at_once(open_pairs(tenants, stack, VIP, SERVICE_PORT))
        assert not lane.hops()
    assert not any(lane.counts(pod) for node in tenants.values() for pod in node.pods)
