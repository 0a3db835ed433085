"""What we read and write by netlink, as pyroute2 sees it: a library that shares no code with us.

In a namespace of its own, with a veth and a bridge.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from helpers.commands import run
from helpers.leaks import nothing_left
from helpers.netns import namespace
from nearpath.kernel import netns, offload, rtnl
from nearpath.lanes import tap_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = b"\x02\x00\x00\x00\x00\x07"


@pytest.fixture
def inside() -> Iterator[None]:
    """The test's thread is in a namespace with a veth np0 ═ np1 and a bridge k6t-np over np0."""
    with nothing_left(), namespace() as path, netns.entered(path):
        for words in (
            "link add np0 type veth peer name np1",
            "link add k6t-np type bridge",
            "link set np0 master k6t-np mtu 1400 up",
        ):
            run(["ip", *words.split()])
        yield


def library() -> Any:
    """pyroute2, which has no types and takes its time."""
    import pyroute2  # type: ignore[import-untyped]

    return pyroute2


@pytest.mark.parametrize("device", ["np0", "np1", "k6t-np", "lo"])
def test_offloads(inside: None, device: str) -> None:
    """Active offloads, before and after we have switched one."""
    index = socket.if_nametoindex(device)

    def theirs() -> set[str]:
        features = library().Ethtool().get_features(device).features
        # Nameless ones share one entry there.
        return {name for name, feature in features.items() if feature.enable and name}

    with offload.Door() as door:
        seen = door.features(index)
        assert seen is not None
        assert seen.active == theirs()
        changeable = sorted({"tx-generic-segmentation", "tx-checksum-sctp"} & seen.changeable)
        for name in changeable:
            for on in (False, True):
                assert door.want(index, {name: on})
                now = door.features(index)
                assert now is not None
                assert now.active == theirs()
                assert (name in now.active) == on


def test_links(inside: None) -> None:
    """Kinds, masters, MTUs, addresses and what a bridge is set to."""
    with rtnl.Rtnl() as door, library().IPRoute() as other:
        for name in ("np0", "np1", "k6t-np", "lo"):
            (theirs,) = other.get_links(socket.if_nametoindex(name))
            ours = door.link(theirs["index"])
            assert ours is not None
            assert ours.name == theirs.get_attr("IFLA_IFNAME") == name
            assert ours.mtu == theirs.get_attr("IFLA_MTU")
            assert ours.address.hex(":") == theirs.get_attr("IFLA_ADDRESS")
            assert ours.master == (theirs.get_attr("IFLA_MASTER") or 0)
            assert ours.up == bool(theirs["flags"] & 1)
            info = theirs.get_attr("IFLA_LINKINFO")
            kind = info.get_attr("IFLA_INFO_KIND") if info else ""
            assert ours.kind == kind
            if kind == "veth":
                assert ours.peer == theirs.get_attr("IFLA_LINK")
            if kind == "bridge":
                data = info.get_attr("IFLA_INFO_DATA")
                assert ours.stp == bool(data.get_attr("IFLA_BR_STP_STATE"))
                assert ours.vlan_filtering == bool(data.get_attr("IFLA_BR_VLAN_FILTERING"))


def test_rules(inside: None) -> None:
    """A set of ours, filter by filter: keys, masks, offsets, and where mirred leads.

    By tc(8), for pyroute2 0.9 reads u32 keys four bytes too early.
    """
    source, target = socket.if_nametoindex("np0"), socket.if_nametoindex("np1")
    with rtnl.Rtnl() as door:
        door.add_ingress(source)
        mirror = tap_rules.Mirror(target, (ADDRESS,))
        tap_rules.add(door, source, tap_rules.PRIORITIES[0], mirror)
        shown = run(["tc", "filter", "show", "dev", "np0", "ingress"]).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    wanted = [
        "match 02000000/ffffffff at -14",
        "match 00070000/ffff0000 at -10",
        "match 00000000/01000000 at -14",
        "action order 1: mirred (Egress Redirect to device np1) stolen",
    ]
    assert [line for line in lines if line.startswith(("match", "action"))] == wanted
    assert all("protocol all pref 50400 u32" in line for line in lines if "filter" in line)
