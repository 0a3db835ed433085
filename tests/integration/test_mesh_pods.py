"""Pod to pod without sidecars, through every translation that a node makes on the way.

Each conversation is had twice: with the lane off, where all of it crosses the veths, and with
the lane on, where the counters of both pods say what took which path, and the veths agree.
"""

from __future__ import annotations

import select
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from helpers import mesh
from helpers.mesh_lane import FAREWELL, MESSAGES, SIZE, load
from helpers.mesh_rules import (
    APP_PORT,
    SERVICE_PORT,
    VIP,
    VIP6,
    kube_proxy,
    kube_proxy_nft,
    nft,
    restore,
)
from helpers.traffic import converse, pour

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from helpers.mesh import Node, Stack
    from helpers.traffic import Conversation
    from nearpath.place import Place

IPV4, IPV6 = 0, 1  # index into Stack.ips
ROUTED = pytest.mark.parametrize("routed", [False, True], ids=["bridged", "routed"])
VERSION = pytest.mark.parametrize("version", [IPV4, IPV6], ids=["ipv4", "ipv6"])
RULES = pytest.mark.parametrize("rules", ["iptables", "nftables"])
CONNECTIONS = 40
TOTAL = 20_000_000
WRITE = 16_384


def talk(client: Stack, server: Stack, address: str, port: int = APP_PORT) -> Conversation:
    """The conversation that mesh_lane expects."""
    return converse(
        client.inside,
        server.inside,
        address,
        messages=MESSAGES,
        size=SIZE,
        listen=APP_PORT,
        port=port,
    )


def service(
    node: Node,
    rules: str,
    endpoints: Sequence[Stack],
    *,
    version: int = IPV4,
    masquerade_all: bool = False,
) -> str:
    """Make VIP:SERVICE_PORT of the endpoints' APP_PORT; returns the VIP."""
    addresses = [pod.ips[version] for pod in endpoints]
    if rules == "iptables":
        text = kube_proxy(addresses, masquerade_all=masquerade_all)
        restore(node.host, text, ipv6=version == IPV6)
    else:
        nft(node.host, kube_proxy_nft(addresses, masquerade_all=masquerade_all))
    return VIP6 if version == IPV6 else VIP


@ROUTED
@VERSION
def test_by_pod_ip(place: Place, version: int, *, routed: bool) -> None:
    """No translation: the server sees the client's own address."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        seen = load(place).compare(
            node, [(0, 1)], lambda: talk(client, server, server.ips[version])
        )
        assert seen.peer == client.ips[version]


@ROUTED
@VERSION
@RULES
def test_by_cluster_ip(place: Place, rules: str, version: int, *, routed: bool) -> None:
    """DNAT on the node: the client sees the service, the server sees the client."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        vip = service(node, rules, [server], version=version)
        seen = load(place).compare(node, [(0, 1)], lambda: talk(client, server, vip, SERVICE_PORT))
        assert seen.peer == client.ips[version]


@VERSION
@RULES
def test_masquerade(place: Place, rules: str, version: int) -> None:
    """DNAT and SNAT: neither end sees the other's address."""
    with mesh.node(2) as node:
        client, server = node.pods
        vip = service(node, rules, [server], version=version, masquerade_all=True)
        seen = load(place).compare(node, [(0, 1)], lambda: talk(client, server, vip, SERVICE_PORT))
        assert seen.peer == node.host.ips[version]


@ROUTED
@VERSION
@RULES
def test_hairpin(place: Place, rules: str, version: int, *, routed: bool) -> None:
    """A pod calls its own service: out by its veth and back, masqueraded. Both ends are its."""
    with mesh.node(1, routed=routed) as node:
        (pod,) = node.pods
        vip = service(node, rules, [pod], version=version)
        seen = load(place).compare(node, [(0, 0)], lambda: talk(pod, pod, vip, SERVICE_PORT))
        assert seen.peer == node.host.ips[version]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_inside_a_pod(place: Place, address: str) -> None:
    """Two containers of one pod by its loopback."""
    with mesh.node(1) as node:
        (pod,) = node.pods
        load(place).compare(node, [(0, 0)], lambda: talk(pod, pod, address))


@RULES
def test_a_service_with_two_endpoints(place: Place, rules: str) -> None:
    """The node picks one for each connection; each is found, and none is taken for another."""
    with mesh.node(3) as node, ExitStack() as stack:
        lane = load(place)
        lane.register(*node.pods)
        client, *servers = node.pods
        vip = service(node, rules, servers)
        listeners = [stack.enter_context(pod.listen(APP_PORT)) for pod in servers]
        pairs = []
        chosen = [0, 0]
        for _ in range(CONNECTIONS):
            asker = stack.enter_context(client.connect(vip, SERVICE_PORT))
            ready, _, _ = select.select(listeners, [], [], mesh.SECONDS)
            (listener,) = ready
            chosen[listeners.index(listener)] += 1
            pairs.append((asker, stack.enter_context(mesh.accept(listener))))
        # All at once: every connection's content goes to its own other end.
        for _ in range(3):
            for asker, answerer in pairs:
                mesh.talk(asker, answerer, 1)
        assert min(chosen) > 0, "one of them never: 1 in 2**39"
        expected = {
            (client.cookie, server.cookie): count
            for server, count in zip(servers, chosen, strict=True)
        }
        hops = lane.hops()
        assert {pods: sum(hop.pods == pods for hop in hops) for pods in expected} == expected
        assert len(hops) == CONNECTIONS
        assert {(hop.redirected, hop.kernel) for hop in hops} == {((3, 3), (0, 0))}
        assert lane.counts(client)["redirected_messages"] == 3 * CONNECTIONS
        for server, count in zip(servers, chosen, strict=True):
            assert lane.counts(server)["redirected_messages"] == 3 * count


@RULES
def test_bulk_by_cluster_ip(place: Place, rules: str) -> None:
    """A bulk transfer with its checksum: every byte is counted once, on one of the paths."""
    with mesh.node(2) as node:
        lane = load(place)
        client, server = node.pods
        vip = service(node, rules, [server])
        sent = TOTAL + -(-TOTAL // WRITE) * 16  # each write has a header of 16 bytes
        for enabled in (False, True):
            lane.register(*node.pods, enabled=enabled)
            with lane.observe(node.pods, node.host) as seen:
                poured = pour(
                    *(client.inside, server.inside, vip),
                    total=TOTAL,
                    size=WRITE,
                    listen=APP_PORT,
                    port=SERVICE_PORT,
                )
            assert poured.intact
            by_lane, by_kernel = (
                [counts[f"{path}_bytes"] for counts in seen.counts]
                for path in ("redirected", "kernel")
            )
            if enabled:
                assert by_lane[0] + by_kernel[0] == sent
                assert (by_lane[1], by_kernel[1]) == (0, FAREWELL)
                assert by_lane[0] > 0
                # What the veths saw is what the counters say: nothing else took this way.
                for veth in seen.veths:
                    assert abs(veth.payload_bytes - by_kernel[0] - FAREWELL) < sent // 100
            else:
                assert by_lane == by_kernel == [0, 0]
                assert all(veth.payload_bytes >= sent + FAREWELL for veth in seen.veths)


# -- ends that are not pods of this node ------------------------------------------------------


@pytest.fixture
def strangers() -> Iterator[Node]:
    """One pod on a node, and a machine elsewhere."""
    with mesh.node(1) as node:
        yield node


@pytest.mark.parametrize("who", ["host", "outside"])
@pytest.mark.parametrize("direction", ["to the pod", "from the pod"])
def test_who_is_no_pod_stays_on_the_kernel_path(
    place: Place, strangers: Node, who: str, direction: str
) -> None:
    """The node itself (hostNetwork) and other machines: one socket of the pod, left alone."""
    lane = load(place)
    (pod,) = strangers.pods
    lane.register(pod)
    other: Stack = getattr(strangers, who)
    client, server = (other, pod) if direction == "to the pod" else (pod, other)
    with lane.observe(strangers.pods, strangers.host) as seen:
        assert talk(client, server, server.ips[IPV4]).intact
    assert seen.counts == [{"peer_elsewhere": 1}]
    assert seen.veths[0].payload_bytes >= 2 * MESSAGES * SIZE + FAREWELL
    assert not lane.counts(other)


@RULES
def test_a_node_port_from_outside(place: Place, strangers: Node, rules: str) -> None:
    """Translated twice on the node, but from elsewhere: kernel path."""
    lane = load(place)
    (pod,) = strangers.pods
    lane.register(pod)
    vip = service(strangers, rules, [pod], masquerade_all=True)
    strangers.outside.run("ip", "route", "add", f"{vip}/32", "via", mesh.NODE_IP)
    with lane.observe(strangers.pods, strangers.host) as seen:
        answered = talk(strangers.outside, pod, vip, SERVICE_PORT)
    assert answered.intact
    assert answered.peer == mesh.GATEWAY
    assert seen.counts == [{"peer_elsewhere": 1}]


def _opt_out_client(node: Node) -> Stack:
    return node.pods[0]


def _opt_out_server(node: Node) -> Stack:
    return node.pods[1]


@pytest.mark.parametrize("chosen", [_opt_out_client, _opt_out_server], ids=["client", "server"])
def test_one_pod_opted_out(place: Place, chosen: Callable[[Node], Stack]) -> None:
    """By ClusterIP, one of the two without the lane: the other's socket is left alone."""
    with mesh.node(2) as node:
        lane = load(place)
        client, server = node.pods
        lane.register(*node.pods)
        lane.register(chosen(node), enabled=False)
        vip = service(node, "iptables", [server])
        with lane.observe(node.pods, node.host) as seen:
            assert talk(client, server, vip, SERVICE_PORT).intact
        expected = [{} if pod is chosen(node) else {"peer_elsewhere": 1} for pod in node.pods]
        assert seen.counts == expected
        assert all(veth.payload_bytes == 2 * MESSAGES * SIZE + FAREWELL for veth in seen.veths)
