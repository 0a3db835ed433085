"""Containers of a real podman with libcni: bridge + nearpath.

Unlike containerd's, podman's containers have processes of their own here: both ends of
every conversation run inside the containers, in their cgroups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.cni import network
from helpers.lane import watch
from helpers.podman import podman

if TYPE_CHECKING:
    from helpers.node import Node


def test_two_containers_talk_through_the_lane(node: Node) -> None:
    """Both ways, beside a network without our plugin as the control; nothing is left."""
    with (
        network("0.4.0", "bridge", node.directory) as net,
        podman(net.chained(), node.program, node.environ) as runtime,
    ):
        a = runtime.run_container("a")
        b = runtime.run_container("b")
        pods = node.pods()
        assert node.lanes() == {a.id: ("on", ""), b.id: ("on", "")}
        for container in (a, b):
            shown = pods[container.id]
            assert [ip.partition("/")[0] for ip in shown["ips"]] == list(container.ips)
            # podman gives a name but no namespace.
            assert (shown["namespace"], shown["name"]) == ("", container.name)
        watch(node, a, b, b.ips[0]).assert_accelerated()
        watch(node, b, a, a.ips[0]).assert_accelerated()
        for container in (a, b):
            runtime.remove(container.name)
        assert node.pods() == {}
        assert node.files() == set()


def test_network_without_our_plugin_is_left_alone(node: Node) -> None:
    """The control: the same containers and traffic, the plugin not chained."""
    with (
        network("0.4.0", "bridge", node.directory) as net,
        podman(net.conflist, node.program, node.environ) as runtime,
    ):
        a = runtime.run_container("a")
        b = runtime.run_container("b")
        watch(node, a, b, b.ips[0]).assert_kernel_path()
        assert not node.status()["loaded"]
