"""Pods of a real containerd, started through CRI as kubelet does.

    pod a eth0 ──── veth ──┐               ┌── veth ──── eth0 pod b
                           ├ bridge, or ───┤
    pod c eth0 ──── veth ──┘ routes (ptp)  └── veth ──── eth0 pod d

a and b are accelerated; c and d have the socket lane off and are the control: the same
image, the same network, the same traffic.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from helpers.cni import network
from helpers.containerd import containerd
from helpers.lane import FAREWELL, FIRST_MESSAGES, MESSAGES, watch
from helpers.traffic import pour

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.cni import Network
    from helpers.containerd import Containerd
    from helpers.node import Node

ON = ("on", "")
OFF = {"nearpath.io/socket-lane": "off"}


@contextmanager
def cluster(
    node: Node, version: str, kind: str, *, dual_stack: bool = False, **keys: object
) -> Iterator[tuple[Containerd, Network]]:
    """A containerd on this node whose network has our plugin at its end."""
    with (
        network(version, kind, node.directory, dual_stack=dual_stack) as net,
        containerd(net.chained(**keys), node.program, node.environ) as runtime,
    ):
        yield runtime, net


@pytest.mark.parametrize("version", ["0.3.1", "1.0.0"])
@pytest.mark.parametrize("kind", ["bridge", "ptp"])
def test_two_pods_talk_through_the_lane_and_the_control_does_not(
    node: Node, version: str, kind: str
) -> None:
    """Both ways: counters move by the messages and the capture sees no payload of them."""
    dual_stack = kind == "bridge" and version == "1.0.0"
    with cluster(node, version, kind, dual_stack=dual_stack) as (runtime, _):
        a = runtime.run_sandbox("a", namespace="shop")
        b = runtime.run_sandbox("b", namespace="shop")
        c = runtime.run_sandbox("c", annotations=OFF)
        d = runtime.run_sandbox("d", annotations=OFF)

        pods = node.pods()
        assert set(pods) == {a.id, b.id, c.id, d.id}
        for pod in (a, b, c, d):
            shown = pods[pod.id]
            assert (shown["namespace"], shown["name"]) == (pod.namespace, pod.name)
            assert shown["ifname"] == "eth0"
            assert {ip.partition("/")[0] for ip in shown["ips"]} == set(pod.ips)
            assert len(pod.ips) == 1 + dual_stack
        off = ("off", "annotation")
        assert node.lanes() == {a.id: ON, b.id: ON, c.id: off, d.id: off}

        for family in range(1 + dual_stack):
            watch(node, a, b, b.ips[family]).assert_accelerated()
            watch(node, b, a, a.ips[family]).assert_accelerated()
            watch(node, c, d, d.ips[family]).assert_kernel_path()
        # Counted for the pod that sends; c and d never joined.
        shown = node.pods()
        conversations = 2 * (1 + dual_stack)
        for pod in (a, b):
            sent = shown[pod.id]["lanes"]["socket"]["redirected_messages"]
            assert conversations * (MESSAGES - FIRST_MESSAGES) <= sent
            assert sent <= conversations * (MESSAGES + FAREWELL)
        for pod in (c, d):
            assert not shown[pod.id]["lanes"]["socket"].get("redirected_messages")
        # One accelerated end is not enough.
        watch(node, a, d, d.ips[0]).assert_kernel_path()
        watch(node, c, b, b.ips[0]).assert_kernel_path()

        for sandbox in (a, b, c, d):
            runtime.remove_sandbox(sandbox.id)
        assert node.pods() == {}
        assert node.files() == set()


def test_large_one_way_transfer_is_intact(node: Node) -> None:
    """Megabytes one way, half-close, then an answer: same bytes, same end of stream."""
    with cluster(node, "0.3.1", "bridge") as (runtime, _):
        a = runtime.run_sandbox("a")
        b = runtime.run_sandbox("b")
        for size in (100, 16384):
            total = 20_000 * size if size < 1000 else 64 << 20
            assert pour(a.inside, b.inside, b.ips[0], total=total, size=size).intact
            assert pour(b.inside, a.inside, a.ips[0], total=total, size=size).intact


def test_port_mapping_is_accelerated_through_its_nat(node: Node) -> None:
    """A client that connects to node:port (DNAT by portmap) is paired by the handshake."""
    with cluster(node, "0.3.1", "ptp") as (runtime, net):
        server = runtime.run_sandbox("server", host_port=31234, container_port=8080)
        client = runtime.run_sandbox("client")
        watched = watch(node, client, server, net.gateway, listen=8080, port=31234)
        watched.assert_accelerated()


def test_node_to_pod_takes_the_kernel_path(node: Node) -> None:
    """The node itself is no pod: kubelet's probes are left alone."""
    with cluster(node, "0.3.1", "bridge") as (runtime, _):
        pod = runtime.run_sandbox("a")
        watch(node, None, pod, pod.ips[0]).assert_kernel_path()


def test_annotations_and_excluded_namespaces_decide(node: Node) -> None:
    """The pod's word counts, except in an excluded namespace."""
    on = {"nearpath.io/socket-lane": "on"}
    with cluster(node, "0.3.1", "bridge", socketLane="off", excludeNamespaces=["kube-system"]) as (
        runtime,
        _,
    ):
        asked = runtime.run_sandbox("asked", annotations=on)
        silent = runtime.run_sandbox("silent")
        excluded = runtime.run_sandbox("excluded", namespace="kube-system", annotations=on)
        odd = runtime.run_sandbox("odd", annotations={"nearpath.io/socket-lane": "perhaps"})
        assert node.lanes() == {
            asked.id: ON,
            silent.id: ("off", "config"),
            excluded.id: ("off", "excluded-namespace"),
            odd.id: ("off", "config"),
        }
        # The bad value is ignored, but not silently.
        assert "warning" in node.log()
        assert "nearpath.io/socket-lane is none of" in node.log()


def test_sandbox_stopped_twice(node: Node) -> None:
    """containerd runs DEL on every stop, the later ones with an empty CNI_NETNS."""
    with cluster(node, "0.3.1", "bridge") as (runtime, _):
        pod = runtime.run_sandbox("a")
        assert set(node.pods()) == {pod.id}
        runtime.stop_sandbox(pod.id)
        assert node.pods() == {}
        runtime.stop_sandbox(pod.id)
        runtime.remove_sandbox(pod.id)
        assert node.files() == set()


def test_sandboxes_in_parallel_load_once(node: Node) -> None:
    """Eight pods at once on a node where nothing is loaded: one load, all registered."""
    with cluster(node, "1.0.0", "bridge") as (runtime, _):
        with ThreadPoolExecutor(8) as pool:
            pods = list(pool.map(runtime.run_sandbox, [f"p{number}" for number in range(8)]))
        assert node.lanes() == {pod.id: ON for pod in pods}
        node.assert_loaded_once()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(runtime.remove_sandbox, [pod.id for pod in pods]))
        assert node.pods() == {}


def test_runtime_killed_between_add_and_del(node: Node) -> None:
    """kill -9 of containerd: connections go on, DEL works after its restart."""
    with cluster(node, "0.3.1", "bridge") as (runtime, _):
        a = runtime.run_sandbox("a")
        b = runtime.run_sandbox("b")
        runtime.kill()
        watch(node, a, b, b.ips[0]).assert_accelerated()
        runtime.start()
        assert set(runtime.sandboxes()) == {a.id, b.id}
        c = runtime.run_sandbox("c")
        watch(node, a, c, c.ips[0]).assert_accelerated()
        for sandbox in (a, b, c):
            runtime.remove_sandbox(sandbox.id)
        assert node.pods() == {}
        assert node.files() == set()


def test_gc_after_a_runtime_that_forgot_its_pods(node: Node) -> None:
    """containerd never comes back to them: GC removes what is not in its list, only that."""
    with cluster(node, "1.0.0", "bridge") as (runtime, net):
        a = runtime.run_sandbox("a")
        b = runtime.run_sandbox("b")
        runtime.kill()
        config = {
            **net.chained()["plugins"][-1],
            "cniVersion": "1.1.0",
            "name": net.conflist["name"],
        }
        # Without the list nothing may be taken for garbage.
        done = node.plugin("GC", config)
        assert (done.returncode, done.stdout) == (0, "")
        assert set(node.pods()) == {a.id, b.id}
        valid = [{"containerID": a.id, "ifname": "eth0"}]
        done = node.plugin("GC", {**config, "cni.dev/valid-attachments": valid})
        assert (done.returncode, done.stdout) == (0, "")
        assert set(node.pods()) == {a.id}
        done = node.plugin("GC", {**config, "cni.dev/valid-attachments": []})
        assert (done.returncode, done.stdout) == (0, "")
        assert node.pods() == {}
        assert node.files() == set()
        # The runtime comes back after all: its DELs find nothing and succeed.
        runtime.start()
        for sandbox in (a, b):
            runtime.remove_sandbox(sandbox.id)
