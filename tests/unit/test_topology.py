"""Which bridges are wires, and why others are not."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from nearpath.kernel.rtnl import Link, Rtnl
from nearpath.lanes import topology

BRIDGE = Link(10, "k6t-eth0", "bridge", address=b"\x02\0\0\0\0\1")
TAP = Link(11, "tap0", "tap", master=10)
NIC = Link(2, "eth0-nic", "veth", master=10)


def test_a_tap_and_one_other_port_are_a_wire() -> None:
    assert topology.wire(BRIDGE, [NIC, TAP]) == topology.Wire(BRIDGE, TAP, NIC, "")


def test_names_and_kinds_of_the_other_port_do_not_matter() -> None:
    vlan = replace(NIC, name="whatever", kind="macvlan")
    assert topology.wire(BRIDGE, [TAP, vlan]).reason == ""


@pytest.mark.parametrize(
    ("ports", "reason"),
    [
        ([], "no-tap"),
        ([NIC], "no-tap"),
        ([TAP], "no-nic"),
        ([TAP, replace(TAP, index=12)], "several-taps"),
        ([TAP, replace(TAP, index=12), NIC], "several-taps"),
        ([TAP, NIC, replace(NIC, index=3)], "several-nics"),
        ([NIC, replace(TAP, kind="tun")], "no-tap"),
        ([replace(TAP, up=False), NIC], "down"),
        ([TAP, replace(NIC, up=False)], "down"),
        ([replace(TAP, mtu=1400), NIC], "mtu-differs"),
        ([replace(TAP, port_policy=True), NIC], "port-policy"),
    ],
)
def test_other_ports_are_none(ports: list[Link], reason: str) -> None:
    assert topology.wire(BRIDGE, ports).reason == reason


@pytest.mark.parametrize(
    ("bridge", "reason"),
    [
        (replace(BRIDGE, up=False), "down"),
        (replace(BRIDGE, vlan_filtering=True), "vlan-filtering"),
        (replace(BRIDGE, stp=True), "stp"),
    ],
)
def test_a_bridge_that_does_more_than_forward_is_none(bridge: Link, reason: str) -> None:
    assert topology.wire(bridge, [TAP, NIC]).reason == reason


class FakePod:
    """The bridges of a namespace, and the ports of each."""

    def __init__(self, bridges: list[Link]) -> None:
        self._bridges = bridges
        self.asked: list[int] = []

    def bridges(self, most: int) -> list[Link]:
        return self._bridges[:most]

    def ports(self, bridge: int, most: int) -> list[Link]:
        self.asked.append(bridge)
        return [replace(TAP, master=bridge), replace(NIC, master=bridge)][:most]


def wires(pod: FakePod) -> list[topology.Wire]:
    return topology.wires(cast("Rtnl", pod))


def test_other_bridges_are_not_looked_at() -> None:
    others = [replace(BRIDGE, name=name, index=20) for name in ("br0", "k6t", "xk6t-eth0", "")]
    pod = FakePod([*others, BRIDGE])
    assert [wire.bridge.index for wire in wires(pod)] == [10]
    assert pod.asked == [10]


def test_a_pod_without_such_a_bridge_has_no_wire() -> None:
    assert wires(FakePod([])) == []


def test_wires_are_in_order_and_bounded() -> None:
    pod = FakePod([replace(BRIDGE, index=number) for number in range(5000, 100, -1)])
    found = [wire.bridge.index for wire in wires(pod)]
    assert len(found) == topology.MOST_WIRES
    assert found == sorted(found)
    assert len(pod.asked) == topology.MOST_WIRES
