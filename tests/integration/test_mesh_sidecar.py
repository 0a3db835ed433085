"""Through sidecars: Istio's rules, a real proxy, and a lane on every hop of a request.

     pod a                                          pod b
    application ──1──▶ proxy ═══════════2═════════▶ proxy ──3──▶ application
          REDIRECT 15001      DNAT on the node      REDIRECT 15006    from 127.0.0.6
         (OUTPUT of pod a)   (ClusterIP of pod b) (PREROUTING of pod b)

Hop 1 is a connection inside pod a, hop 3 one inside pod b, hop 2 the one between them.
"""

from __future__ import annotations

import hashlib
import random
import select
import socket
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

from helpers import mesh
from helpers.mesh_lane import FAREWELL, MESSAGES, SIZE, load
from helpers.mesh_proxy import sidecar
from helpers.mesh_rules import (
    APP_PORT,
    INBOUND,
    OUTBOUND,
    PASSTHROUGH,
    PASSTHROUGH6,
    SERVICE_PORT,
    VIP,
    VIP6,
    kube_proxy,
    restore,
)
from helpers.traffic import converse, pour
from nearpath.datapath import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from helpers.mesh import Node, Stack
    from helpers.mesh_lane import Lane
    from helpers.traffic import Conversation
    from nearpath.place import Place

A, B = 0, 1
ROUTED = pytest.mark.parametrize("routed", [False, True], ids=["bridged", "routed"])
CONNECTIONS = 30
UPLOADS = 200
SMALL = 20
TOTAL = 20_000_000
WRITE = 16_384


def talk(
    client: Stack, server: Stack, address: str = VIP, port: int = SERVICE_PORT
) -> Conversation:
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


@pytest.fixture
def node() -> Iterator[Node]:
    """Two pods, and a service whose endpoint is the second."""
    with mesh.node(2) as made:
        restore(made.host, kube_proxy([made.pods[B].ips[0]]))
        yield made


@pytest.fixture
def chain(place: Place, node: Node) -> Iterator[Lane]:
    """Both pods have a sidecar and are on the lane."""
    lane = load(place)
    lane.register(*node.pods)
    with sidecar(node.pods[A]), sidecar(node.pods[B]):
        yield lane


def connect(node: Node) -> tuple[socket.socket, socket.socket]:
    """One connection of the applications: (in pod a, in pod b)."""
    with node.pods[B].listen(APP_PORT) as listener:
        client = node.pods[A].connect(VIP, SERVICE_PORT)
        return client, mesh.accept(listener)


# -- each case --------------------------------------------------------------------------------


@ROUTED
@pytest.mark.parametrize("by", ["pod IP", "cluster IP"])
def test_outbound(place: Place, by: str, *, routed: bool) -> None:
    """Only the client has a sidecar: hops 1 and 2."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        restore(node.host, kube_proxy([server.ips[0]]))
        address, port = (server.ips[0], APP_PORT) if by == "pod IP" else (VIP, SERVICE_PORT)
        with sidecar(client):
            seen = load(place).compare(
                node, [(A, A), (A, B)], lambda: talk(client, server, address, port)
            )
        assert seen.peer == client.ips[0]


@ROUTED
@pytest.mark.parametrize("by", ["pod IP", "cluster IP"])
def test_inbound(place: Place, by: str, *, routed: bool) -> None:
    """Only the server has a sidecar: hops 2 and 3; its application sees 127.0.0.6."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        restore(node.host, kube_proxy([server.ips[0]]))
        address, port = (server.ips[0], APP_PORT) if by == "pod IP" else (VIP, SERVICE_PORT)
        with sidecar(server):
            seen = load(place).compare(
                node, [(A, B), (B, B)], lambda: talk(client, server, address, port)
            )
        assert seen.peer == PASSTHROUGH


@ROUTED
def test_proxy_to_proxy(place: Place, *, routed: bool) -> None:
    """Application, proxy, DNAT, proxy, application: three hops, all in the lane."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        restore(node.host, kube_proxy([server.ips[0]]))
        with sidecar(client), sidecar(server):
            seen = load(place).compare(node, [(A, A), (A, B), (B, B)], lambda: talk(client, server))
        assert seen.peer == PASSTHROUGH


@ROUTED
def test_proxy_to_proxy_ipv6(place: Place, *, routed: bool) -> None:
    """The same with IPv6; the inbound source is ::6, and the proxies' upstreams are given."""
    with mesh.node(2, routed=routed) as node:
        client, server = node.pods
        restore(node.host, kube_proxy([server.ips[1]]), ipv6=True)
        upstream, application = f"[{VIP6}]:{SERVICE_PORT}", f"[{server.ips[1]}]:{APP_PORT}"
        with sidecar(client, upstream, application), sidecar(server, upstream, application):
            seen = load(place).compare(
                node, [(A, A), (A, B), (B, B)], lambda: talk(client, server, VIP6)
            )
        assert seen.peer == PASSTHROUGH6


@ROUTED
def test_hairpin_through_the_own_sidecar(place: Place, *, routed: bool) -> None:
    """A pod calls its own service: through its proxy, out to the node, and in through it."""
    with mesh.node(1, routed=routed) as node:
        (pod,) = node.pods
        restore(node.host, kube_proxy([pod.ips[0]]))
        with sidecar(pod):
            seen = load(place).compare(node, [(A, A)] * 3, lambda: talk(pod, pod))
        assert seen.peer == PASSTHROUGH


# -- hop by hop -------------------------------------------------------------------------------


def test_each_hop_of_a_live_request(chain: Lane, node: Node) -> None:
    """The connections map while the request is on: three hops, equal counts on each."""
    a, b = node.pods
    with chain.observe(node.pods, node.host) as seen:
        client, server = connect(node)
        with client, server:
            assert client.getpeername() == (VIP, SERVICE_PORT)
            assert server.getpeername()[0] == PASSTHROUGH
            mesh.talk(client, server, MESSAGES, SIZE)
            hops = chain.hops()
            kernel = sum(sum(hop.kernel) for hop in hops)
            by_pod = [chain.counts(pod) for pod in node.pods]
    assert sorted(hop.pods for hop in hops) == sorted(
        [(a.cookie, a.cookie), (a.cookie, b.cookie), (b.cookie, b.cookie)]
    )
    for hop in hops:
        # The proxy may be faster than the last step of the handshake; the application is not,
        # it sends once the whole chain is connected.
        early = hop.kernel[0]
        assert early <= (hop.pods != (a.cookie, a.cookie))
        assert hop.kernel[1] == 0
        assert hop.bytes == (MESSAGES * SIZE, MESSAGES * SIZE)
        # One more if the proxy's ring buffer wraps inside a message.
        assert 0 <= hop.redirected[0] + early - MESSAGES <= 1
        assert 0 <= hop.redirected[1] - MESSAGES <= 1
    # What was translated on each hop: the two ends do not agree about addresses.
    first, second, third = (
        next(hop for hop in hops if hop.pods == (client.cookie, server.cookie))
        for client, server in ((a, a), (a, b), (b, b))
    )
    assert first.remote[0] == (VIP, SERVICE_PORT)
    assert first.local[1] == ("127.0.0.1", OUTBOUND)
    assert second.remote[0] == (VIP, SERVICE_PORT)
    assert second.local[1] == (b.ips[0], INBOUND)
    assert second.local[0] == second.remote[1]
    assert third.remote[0] == third.local[1] == (b.ips[0], APP_PORT)
    assert third.local[0][0] == third.remote[1][0] == PASSTHROUGH
    # A pod sends on three ends: the application's, and both of its proxy's.
    assert all(counts["redirected_messages"] >= 3 * MESSAGES - kernel for counts in by_pod)
    assert sum(counts["kernel_messages"] for counts in by_pod) == kernel
    assert [counts["joined"] for counts in by_pod] == [3, 3]
    # No farewell here: the interfaces see handshakes and ends, and early messages.
    for view in (*seen.veths, *seen.loopbacks):
        assert view.syn >= 1
        assert view.payload_segments <= 2 * 2 * kernel


def test_many_requests_at_once(chain: Lane, node: Node) -> None:
    """Connections side by side, each with its own content: none gets another's."""
    with ExitStack() as stack:
        pairs = [connect(node) for _ in range(CONNECTIONS)]
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end)
        for _ in range(10):
            for client, server in pairs:
                mesh.talk(client, server, 1, 700)
        hops = chain.hops()
        assert len(hops) == 3 * CONNECTIONS
        for hop in hops:
            assert hop.bytes == (7000, 7000)
            assert hop.kernel[0] <= 1
            assert hop.kernel[1] == 0
    chain.wait_forgotten()


def test_a_pod_that_opted_out(chain: Lane, node: Node) -> None:
    """Hop 1 is pod a's own and stays in the lane; 2 and 3 take the kernel path."""
    chain.register(node.pods[B], enabled=False)
    with chain.observe(node.pods, node.host) as seen:
        assert talk(node.pods[A], node.pods[B]).intact
    a, b = seen.counts
    assert (a["joined"], a["peer_elsewhere"]) == (2, 1)
    assert a["redirected_bytes"] + a["peer_not_joined"] * SIZE == 2 * MESSAGES * SIZE
    assert not b
    whole = 2 * MESSAGES * SIZE + FAREWELL
    assert all(veth.payload_bytes >= whole for veth in seen.veths)
    assert seen.loopbacks[A].payload_bytes <= 4 * a["kernel_bytes"]
    assert seen.loopbacks[B].payload_bytes >= 2 * whole


def test_a_request_from_another_machine(chain: Lane, node: Node) -> None:
    """It reaches pod b's proxy by the kernel path, and the application in the lane."""
    b = node.pods[B]
    with chain.observe(node.pods, node.host) as seen:
        answered = talk(node.outside, b, b.ips[0], APP_PORT)
    assert answered.intact
    assert answered.peer == PASSTHROUGH
    counts = seen.counts[B]
    assert not seen.counts[A]
    assert (counts["joined"], counts["peer_elsewhere"]) == (2, 1)
    assert counts["redirected_bytes"] + counts["peer_not_joined"] * SIZE == 2 * MESSAGES * SIZE
    assert seen.veths[B].payload_bytes >= 2 * MESSAGES * SIZE + FAREWELL


# -- with the settings of production ----------------------------------------------------------


def _settings_of_production(lane: Lane, revalidate_ms: int) -> None:
    rules = {name: settings.DEFAULTS[name] for name in ("probation", "careful")}
    settings.write(lane.place, revalidate_ms=revalidate_ms, **rules)


@pytest.fixture(params=[False, True], ids=["select", "epoll"])
def careful(request: pytest.FixtureRequest) -> bool:
    """How the proxies wait: patient readers, or careful ones as HAProxy is by default."""
    return bool(request.param)


@pytest.fixture
def production(place: Place, node: Node, *, careful: bool) -> Iterator[Lane]:
    """Both pods have a sidecar and are on the lane, and every rule is on."""
    lane = load(place)
    _settings_of_production(lane, 200)
    lane.register(*node.pods)
    proxy = "haproxy epoll" if careful else "haproxy select"
    with sidecar(node.pods[A], proxy=proxy), sidecar(node.pods[B], proxy=proxy):
        yield lane


def test_with_every_rule(production: Lane, node: Node, *, careful: bool) -> None:
    """Requests for a second: every message by the kernel path has its reason, and they are few.

    But all to careful proxies go there; what these send to the applications takes the lane.
    """
    a, b = (pod.cookie for pod in node.pods)
    client, server = connect(node)
    with client, server:
        begin = time.monotonic()
        messages = 0
        while time.monotonic() - begin < 1.2:
            mesh.talk(client, server, 10)
            messages += 10
        hops = {hop.pods: hop for hop in production.hops()}
        counts = [production.counts(pod) for pod in node.pods]
    assert len(hops) == 3
    # To the applications, which poll: answers on hop 1, requests on hop 3.
    to_applications = {((a, a), 1), ((b, b), 0)}
    for pods, hop in hops.items():
        assert hop.bytes == (messages * 100, messages * 100)
        for side in (0, 1):
            if careful and (pods, side) not in to_applications:
                assert hop.redirected[side] == 0
            else:
                assert hop.redirected[side] > messages // 2
    for pod in counts:
        # Until the reader has been seen to wait, probation, then one per interval. The second
        # half of a message that the proxy has split may find the first unread.
        reasons = ["peer_not_joined", "reader_unknown", "probation", "revalidate", "careful"]
        reasons.append("not_drained")
        assert pod["kernel_messages"] == sum(pod[reason] for reason in reasons)
        assert pod["not_drained"] < 10
        assert pod["revalidate"] >= 2
        assert (pod["careful"] > messages) == careful


def test_uploads_that_end_with_a_half_close(production: Lane, node: Node) -> None:
    """Bursts of up to 300 KB, then the end of the stream: the proxies cut none of them short.

    A proxy that took a short read for the end lost the tail of 2 to 6 in 100 of these when
    redirected bytes were followed by bytes of the kernel path. Small requests come first: what
    is learnt from how they are read must not be taken for how uploads are.
    """
    for _ in range(SMALL):
        client, server = connect(node)
        with client, server:
            mesh.talk(client, server, 30)
    content = random.Random(1)
    for _ in range(UPLOADS):
        parts = mesh.bursts(content)
        client, server = connect(node)
        with client, server:
            assert mesh.read_to_the_end(client, server, parts) == b"".join(parts)
            server.sendall(b"thanks")
            server.shutdown(socket.SHUT_WR)
            assert mesh.read(client, 10) == b"thanks"
    assert production.counts(node.pods[B])["redirected_messages"] > 0


def test_downloads_that_end_with_the_connection(production: Lane, node: Node) -> None:
    """Answers of up to 300 KB, then the end of the stream, as a server without keep-alive.

    HAProxy reads small answers until EAGAIN, and a large one whose end has come only once.
    """
    client, server = connect(node)
    with client, server:
        mesh.talk(client, server, 4 * SMALL)
    content = random.Random(2)
    for _ in range(UPLOADS):
        parts = mesh.bursts(content)
        client, server = connect(node)
        with client, server:
            mesh.talk(client, server, 1)
            assert mesh.read_to_the_end(server, client, parts) == b"".join(parts)
    assert production.counts(node.pods[A])["redirected_messages"] > 0


# -- bulk, back-pressure, ends ----------------------------------------------------------------


def test_bulk(chain: Lane, node: Node) -> None:
    """20 MB through both proxies with its checksum; bytes are conserved on every hop."""
    a, b = node.pods
    for enabled in (False, True):
        chain.register(*node.pods, enabled=enabled)
        with chain.observe(node.pods, node.host) as seen:
            poured = pour(
                *(a.inside, b.inside, VIP),
                total=TOTAL,
                size=WRITE,
                listen=APP_PORT,
                port=SERVICE_PORT,
            )
        assert poured.intact
        sent = TOTAL + -(-TOTAL // WRITE) * 16  # each write has a header of 16 bytes
        counted = [counts["redirected_bytes"] + counts["kernel_bytes"] for counts in seen.counts]
        if enabled:
            # Pod a sends it on hops 1 and 2, and the farewell on hop 1; pod b the rest.
            assert counted == [2 * sent + FAREWELL, sent + 2 * FAREWELL]
            assert all(counts["redirected_bytes"] > 0 for counts in seen.counts)
        else:
            assert counted == [0, 0]
            assert all(veth.payload_bytes >= sent for veth in seen.veths)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _parts(seed: int) -> list[bytes]:
    """Writes of random sizes and content, 6 MB in all."""
    content = random.Random(seed)
    return [content.randbytes(content.randint(1, 30_000)) for _ in range(400)]


def _drain(sink: socket.socket, size: int, got: list[str]) -> None:
    got.append(hashlib.sha256(mesh.read(sink, size)).hexdigest())


@pytest.mark.parametrize("enabled", [True, False], ids=["lane", "control"])
def test_bulk_both_ways_at_once(chain: Lane, node: Node, *, enabled: bool) -> None:
    """Each application sends 6 MB in writes of random sizes while it reads the other's.

    No end of stream before all has arrived: HAProxy 2.6 cuts off a direction, on the kernel
    path too, if its end of stream comes while the other direction waits to be written.
    """
    chain.register(*node.pods, enabled=enabled)
    ends = connect(node)
    with ends[0], ends[1]:
        # Sockets with a time limit poll and never sleep in recv or send: a sleeping reader
        # beside a writer is a limit of its own.
        parts = [_parts(1), _parts(2)]
        got: list[list[str]] = [[], []]
        threads = [
            *(
                threading.Thread(target=mesh.pump, args=(ends[side], parts[side]))
                for side in (A, B)
            ),
            *(
                threading.Thread(
                    target=_drain, args=(ends[side], sum(map(len, parts[1 - side])), got[side])
                )
                for side in (A, B)
            ),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(mesh.SECONDS)
        assert not any(thread.is_alive() for thread in threads)
    assert got == [[_digest(parts[B])], [_digest(parts[A])]]
    assert (chain.counts(node.pods[A])["redirected_bytes"] > 0) == enabled


def _fill(client: socket.socket) -> tuple[int, str]:
    """Send until nothing more is taken for half a second; bytes and their digest."""
    content, digest, taken = random.Random(1), hashlib.sha256(), 0
    client.setblocking(False)
    while select.select([], [client], [], 0.5)[1]:
        part = content.randbytes(8192)
        count = client.send(part)
        digest.update(part[:count])
        taken += count
        assert taken < 1 << 28, "no end to it"
    client.settimeout(mesh.SECONDS)
    return taken, digest.hexdigest()


def test_a_reader_that_sleeps_stops_the_sender_behind_two_proxies(chain: Lane, node: Node) -> None:
    """Back-pressure goes through the chain as it does on the kernel path; nothing is lost."""
    taken = {}
    for enabled in (False, True):
        chain.register(*node.pods, enabled=enabled)
        client, server = connect(node)
        with client, server:
            taken[enabled], sent = _fill(client)
            client.shutdown(socket.SHUT_WR)
            assert _digest(iter(partial(server.recv, 65_536), b"")) == sent
        chain.wait_forgotten()
    # Three hops hold it, each at most 1.5 times what it holds on the kernel path.
    assert taken[True] <= 1.5 * taken[False]
    assert chain.counts(node.pods[A])["receiver_behind"] > 0


def _ending(connection: socket.socket) -> str:
    """What its reader gets at the end, and then its writer."""
    seen = []
    for act in (lambda: connection.recv(1), lambda: connection.send(b"x")):
        try:
            seen.append(repr(act()))
        except OSError as error:
            seen.append(type(error).__name__)
    return ", ".join(seen)


@pytest.mark.parametrize("killed", [A, B], ids=["proxy a", "proxy b"])
def test_a_killed_proxy_ends_the_request_as_on_the_kernel_path(
    place: Place, node: Node, killed: int
) -> None:
    """Kill -9 in the middle of a conversation: both applications see the same end."""
    lane = load(place)
    endings = []
    for enabled in (False, True):
        lane.register(*node.pods, enabled=enabled)
        with ExitStack() as stack:
            proxies = [stack.enter_context(sidecar(pod)) for pod in node.pods]
            client, server = connect(node)
            with client, server:
                mesh.talk(client, server, 20)
                proxies[killed].kill()
                proxies[killed].wait(mesh.SECONDS)
                endings.append((_ending(client), _ending(server)))
        for pod in node.pods:
            pod.run("iptables", "-t", "nat", "--flush")
            pod.run("iptables", "-t", "nat", "--delete-chain")
        lane.wait_forgotten()
    assert endings[0] == endings[1]
    assert lane.counts(node.pods[A])["redirected_messages"] >= 3 * 20 - 2


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_reset_passes_the_chain_as_on_the_kernel_path(chain: Lane, node: Node, end: str) -> None:
    """SO_LINGER 0 at one application: the other sees the end that the proxies make of it."""
    endings = []
    for enabled in (False, True):
        chain.register(*node.pods, enabled=enabled)
        client, server = connect(node)
        with client, server:
            mesh.talk(client, server, 20)
            first, other = (client, server) if end == "client" else (server, client)
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            first.close()
            endings.append(_ending(other))
        chain.wait_forgotten()
    assert endings[0] == endings[1]
