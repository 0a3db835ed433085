"""All hops of the mesh in the lane, with every rule on, for proxies that read to the end.

     pod a                                          pod b
    application ──1──▶ proxy ═══════════2═════════▶ proxy ──3──▶ application

HAProxy with select(2) is a patient reader; the stand-in for Envoy is a careful one that reads on
until EAGAIN, which only the guards can see. test_mesh_sidecar.py has the other proxies and cases.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from helpers import mesh
from helpers.commands import PATIENCE
from helpers.mesh_lane import FAREWELL, MESSAGES, SIZE, Lane
from helpers.mesh_proxy import sidecar
from helpers.mesh_rules import APP_PORT, SERVICE_PORT, VIP, kube_proxy, restore
from helpers.traffic import converse
from nearpath.datapath import loader, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.mesh import Node
    from helpers.traffic import Conversation
    from nearpath.place import Place

A, B = 0, 1
UPLOADS = 300 // int(PATIENCE)
HAPROXY = pytest.param("haproxy select", id="haproxy")
EDGE = pytest.param("edge", id="edge", marks=pytest.mark.needs_fentry)
BOTH = pytest.mark.parametrize("proxy", [HAPROXY, EDGE])
CASES = pytest.mark.parametrize("case", ["outbound", "inbound", "proxy to proxy"])
# Of each case: the pods with a sidecar, the hops, who the server's application sees.
SIDECARS = {"outbound": (A,), "inbound": (B,), "proxy to proxy": (A, B)}
HOPS = {
    "outbound": ((A, A), (A, B)),
    "inbound": ((A, B), (B, B)),
    "proxy to proxy": ((A, A), (A, B), (B, B)),
}


def _talk(node: Node, messages: int = MESSAGES) -> Conversation:
    client, server = node.pods
    return converse(
        client.inside,
        server.inside,
        VIP,
        messages=messages,
        size=SIZE,
        listen=APP_PORT,
        port=SERVICE_PORT,
    )


@contextmanager
def _node() -> Iterator[Node]:
    """Two pods, and a service whose endpoint is the second."""
    with mesh.node(2) as made:
        restore(made.host, kube_proxy([made.pods[B].ips[0]]))
        yield made


@contextmanager
def _sidecars(node: Node, proxy: str, case: str) -> Iterator[None]:
    with ExitStack() as stack:
        for pod in SIDECARS[case]:
            stack.enter_context(sidecar(node.pods[pod], proxy=proxy))
        yield


def _load(place: Place, node: Node) -> Lane:
    """With every rule as a node has it."""
    loader.ensure(place)
    lane = Lane(place)
    lane.register(*node.pods)
    return lane


def connect(node: Node) -> tuple[socket.socket, socket.socket]:
    """One connection of the applications: (in pod a, in pod b)."""
    with node.pods[B].listen(APP_PORT) as listener:
        client = node.pods[A].connect(VIP, SERVICE_PORT)
        return client, mesh.accept(listener)


@BOTH
@CASES
def test_every_hop_with_every_rule(place: Place, proxy: str, case: str) -> None:
    """Probation, revalidation and careful readers as on a node; requests for some seconds.

    First the control. Then some conversations by which the readers become known, and one that
    is counted: all its messages but those that the rules send by the kernel path, on every hop.
    """
    with _node() as node, _sidecars(node, proxy, case):
        lane = _load(place, node)
        # Only so that the captures can tell a message that was revalidated from a leak.
        settings.write(place, revalidate_ms=0)
        lane.register(*node.pods, enabled=False)
        with lane.observe(node.pods, node.host) as control:
            assert _talk(node).intact
        control.assert_kernel_path(HOPS[case])
        lane.register(*node.pods)
        for _ in range(settings.DEFAULTS["proven"] + 2):
            assert _talk(node, 40).intact
        lane.wait_forgotten()
        with lane.observe(node.pods, node.host) as seen:
            client, server = connect(node)
            with client, server:
                mesh.talk(client, server, MESSAGES, SIZE)
                hops = lane.hops()
    assert len(hops) == len(HOPS[case])
    for hop in hops:
        assert hop.bytes == (MESSAGES * SIZE, MESSAGES * SIZE)
        assert min(hop.redirected) >= MESSAGES - 2, hop
    # A message by the kernel path crosses the loopback twice, and may be repeated.
    kernel = sum(sum(hop.kernel) for hop in hops)
    for view in (*seen.veths, *seen.loopbacks):
        assert view.payload_segments <= 4 * kernel
    assert all(counts["peer_elsewhere"] == 0 for counts in seen.counts)
    assert control.veths[B].payload_bytes >= 2 * MESSAGES * SIZE + FAREWELL


@BOTH
def test_uploads_that_end_with_a_half_close(place: Place, proxy: str) -> None:
    """Bursts of up to 300 KB, then the end of the stream: the proxies cut none of them short.

    This is what HAProxy with epoll got wrong in 2 to 6 of 100 before careful readers were left
    alone (test_mesh_sidecar.py). Small requests first, so that these readers are known.
    """
    content = random.Random(1)
    with _node() as node, _sidecars(node, proxy, "proxy to proxy"):
        lane = _load(place, node)
        for _ in range(settings.DEFAULTS["proven"] + 2):
            client, server = connect(node)
            with client, server:
                mesh.talk(client, server, 30)
        before = sum(lane.counts(pod)["redirected_bytes"] for pod in node.pods)
        for _ in range(UPLOADS):
            parts = mesh.bursts(content)
            client, server = connect(node)
            with client, server:
                assert mesh.read_to_the_end(client, server, parts) == b"".join(parts)
                server.sendall(b"thanks")
                server.shutdown(socket.SHUT_WR)
                assert mesh.read(client, 10) == b"thanks"
        after = sum(lane.counts(pod)["redirected_bytes"] for pod in node.pods)
        assert after - before > UPLOADS * 1000
