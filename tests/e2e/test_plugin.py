"""The frozen plugin, called as a runtime calls it, in what runtimes really do to plugins."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from helpers.cni import Chain, nearpath_entry, network
from helpers.netns import addresses, inside, namespace, veth
from helpers.traffic import converse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.node import Node

PODS = 50
ON = ("on", "")


def entry(version: str = "0.3.1", **keys: object) -> dict[str, Any]:
    """Our entry as it reaches the plugin, without prevResult."""
    return {**nearpath_entry(), "cniVersion": version, "name": "e2e-plugin", **keys}


def previous(version: str, address: str = "10.9.0.2/24") -> dict[str, Any]:
    """What a primary plugin of this version would have printed."""
    ip: dict[str, Any] = {"address": address, "interface": 0}
    if version.startswith("0."):
        ip["version"] = "4"
    interfaces = [{"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/pod"}]
    return {
        "cniVersion": version,
        "interfaces": interfaces,
        "ips": [ip],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}],
        "dns": {"nameservers": ["10.96.0.10"]},
    }


@pytest.fixture
def netns() -> Iterator[str]:
    """The namespace of a pod, with the primary plugin's work done."""
    with namespace() as path, veth(path, "10.9.0.2/24"):
        yield path


def add(node: Node, netns: str, version: str = "0.3.1", container_id: str = "pod") -> None:
    """ADD that must succeed and hand prevResult on."""
    result = previous(version)
    config = entry(version, prevResult=result)
    done = node.plugin("ADD", config, container_id=container_id, netns=netns)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == result


def delete(node: Node, netns: str | None, container_id: str = "pod") -> None:
    """DEL that must succeed and say nothing."""
    done = node.plugin("DEL", entry(), container_id=container_id, netns=netns)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_add_hands_on_the_result_of_every_version(node: Node, netns: str, version: str) -> None:
    """prevResult comes out as it went in, and the pod is on the lane."""
    add(node, netns, version)
    assert node.lanes() == {"pod": ON}
    assert node.pods()["pod"]["ips"] == ["10.9.0.2/24"]
    delete(node, netns)
    assert node.pods() == {}


@pytest.mark.parametrize("again", ["same netns", "empty netns", "no netns"])
def test_del_twice(node: Node, netns: str, again: str) -> None:
    """The second DEL finds nothing and succeeds, with whatever CNI_NETNS."""
    add(node, netns)
    delete(node, netns)
    assert node.pods() == {}
    delete(node, {"same netns": netns, "empty netns": "", "no netns": None}[again])
    assert node.files() == set()


@pytest.mark.parametrize("path", ["", None, "/run/netns/gone"])
def test_del_needs_no_namespace(node: Node, netns: str, path: str | None) -> None:
    """The only DEL comes with an empty, missing or stale CNI_NETNS: our record is enough."""
    add(node, netns)
    delete(node, path)
    assert node.pods() == {}
    assert node.registered() == []


def test_del_after_the_namespace_is_gone(node: Node) -> None:
    """The node's reaper was faster than the runtime."""
    with namespace() as path, veth(path, "10.9.0.2/24"):
        add(node, path)
    delete(node, path)
    assert node.pods() == {}
    assert node.registered() == []


def test_del_with_nothing_recorded(node: Node, netns: str) -> None:
    """On a node that never saw an ADD; it must not load anything either."""
    for path in (netns, "", None):
        delete(node, path)
    assert node.files() == set()
    assert not node.pin_dir.exists()


def test_del_after_run_directory_was_wiped(node: Node, netns: str) -> None:
    """/run was cleaned under a live pod: DEL still takes the registration away."""
    add(node, netns)
    for record in (node.run_dir / "attachments").iterdir():
        record.unlink()
    delete(node, netns)
    assert node.registered() == []


def test_add_again_is_the_same_as_once(node: Node, netns: str) -> None:
    """A retried ADD replaces its record; one DEL undoes both."""
    add(node, netns)
    add(node, netns)
    assert len(node.registered()) == 1
    delete(node, netns)
    assert node.registered() == []


def test_gc_removes_what_the_runtime_does_not_know(node: Node) -> None:
    """Records of other attachments and their registrations go, the valid ones stay."""
    with ExitStack() as stack:
        for number in range(3):
            path = stack.enter_context(namespace())
            stack.enter_context(veth(path, f"10.9.{number}.2/24"))
            add(node, path, "1.1.0", container_id=f"pod{number}")
        valid = [{"containerID": "pod1", "ifname": "eth0"}]
        config = entry("1.1.0", **{"cni.dev/valid-attachments": valid})
        done = node.plugin("GC", config, ifname=None)
        assert (done.returncode, done.stdout) == (0, "")
        assert set(node.pods()) == {"pod1"}
        assert len(node.registered()) == 1
        delete(node, "", container_id="pod1")
        assert node.registered() == []


def test_fifty_pods_at_once_load_once(node: Node) -> None:
    """host-local + bridge + nearpath on a node where nothing is loaded: one load, all on."""
    with ExitStack() as stack:
        net = stack.enter_context(network("1.0.0", "bridge", node.directory))
        chain = Chain(net.chained(), node.program, node.environ)
        paths = {f"pod{number}": stack.enter_context(namespace()) for number in range(PODS)}
        with ThreadPoolExecutor(PODS) as pool:
            list(pool.map(chain.add, paths.keys(), paths.values()))
            assert node.lanes() == dict.fromkeys(paths, ON)
            assert len({pod["netns_cookie"] for pod in node.pods().values()}) == PODS
            assert len(node.registered()) == PODS
            node.assert_loaded_once()
            list(pool.map(chain.delete, paths.keys(), paths.values()))
        assert node.pods() == {}
        assert node.registered() == []


def test_unload_and_load_under_a_live_connection(node: Node) -> None:
    """No byte is lost, whatever the operator does meanwhile."""
    with ExitStack() as stack:
        net = stack.enter_context(network("1.0.0", "bridge", node.directory))
        chain = Chain(net.chained(), node.program, node.environ)
        paths = {name: stack.enter_context(namespace()) for name in ("a", "b")}
        for name, path in paths.items():
            chain.add(name, path)
        address = addresses(paths["b"])[0].partition("/")[0]
        results = []

        def talk() -> None:
            results.append(
                converse(inside(paths["a"]), inside(paths["b"]), address, messages=60_000, size=200)
            )

        talking = threading.Thread(target=talk)
        talking.start()
        try:
            node.cli("unload")
            node.cli("load")
        finally:
            talking.join(timeout=60)
        assert [result.intact for result in results] == [True]
        # Pods that were there all the time are on the lane again.
        assert len(node.registered()) == 2
        again = converse(inside(paths["a"]), inside(paths["b"]), address, messages=100)
        assert again.intact
        assert node.lane()["redirected_messages"] > 100
        for name, path in paths.items():
            chain.delete(name, path)
