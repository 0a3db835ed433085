"""Who computes the checksums of a VM's packets: captures along their way, checked by scapy.

The node is that of helpers/vm_net.py. The control of each test is the same node as somebody else
has set it up, before we touch it or after we have put it back.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from helpers import cable, sums, vm_net
from helpers.commands import wait_until
from helpers.leaks import nothing_left
from helpers.vm_net import PORT, Node
from nearpath.lanes import checksum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.cable import Frame
    from helpers.sums import Packet

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
SIZES = (1, 100, 1400)  # of datagrams
STREAM = 60_000  # bytes each way
FRAME = 1514  # of the longest frame that is no super-packet


@pytest.fixture
def lab() -> Iterator[Node]:
    """The node as Kubernetes and KubeVirt 1.8 leave it."""
    with nothing_left(), vm_net.node() as built:
        yield built


@contextmanager
def everywhere(lab: Node) -> Iterator[dict[str, list[Packet]]]:
    """Watch the packets of the conversations at the two host veths."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(sums.watching(lab.node, name, PORT))
            for name in ("vm", "plain")
        }


def talk(lab: Node, client: str, server: str, version: int) -> None:
    """UDP and TCP both ways; everything must arrive exactly."""
    lab.nic.forget()
    lab.uplink.forget()
    assert vm_net.udp(lab, client, server, version, SIZES) == len(SIZES)
    assert vm_net.tcp(lab, client, server, version, STREAM)


def ours(frames: list[Frame]) -> list[Frame]:
    """Those of the conversations."""
    return [frame for frame in frames if sums.port_of(frame.data, PORT)]


def kinds(packets: list[Packet] | list[Frame]) -> Counter[str]:
    """How many packets come without checksum ("open") and with one ("right", "wrong")."""
    return Counter(
        "open" if packet.is_partial else "right" if sums.is_right(packet.data) else "wrong"
        for packet in packets
    )


def longest(packets: list[Packet] | list[Frame]) -> int:
    return max(len(packet.data) for packet in packets)


def assert_no_errors(lab: Node) -> None:
    """No stack has dropped a packet for its checksum."""
    for path in lab.talkers.values():
        assert sums.checksum_errors(path) == {"tcp": 0, "udp4": 0, "udp6": 0}


@VERSIONS
def test_skip_asked_for_by_name(lab: Node, version: int) -> None:
    """Where somebody has switched offload off, skip by name switches it on, and back on DEL."""
    lab.switch_off()
    for mode in ("", "skip", ""):
        if mode:
            work = lab.attend("skip")
            assert work.verdicts == [("skip", "")]
        with everywhere(lab) as seen:
            talk(lab, "guest", "pod", version)
        to_guest = ours(lab.nic.near.out)
        if mode:
            # Nobody has computed anything, on the whole way, in both directions.
            assert set(kinds(seen["vm"])) == set(kinds(seen["plain"])) == {"open"}
            assert set(kinds(to_guest)) == {"open"}
            assert not any(sums.is_right(packet.data) for packet in seen["vm"])
            # Both directions have super-packets, each with one open sum for all its segments.
            for outgoing in (True, False):
                assert longest([p for p in seen["vm"] if p.is_outgoing == outgoing]) > FRAME
            lab.restore(work.plan.record)
        else:
            # The control: what the guest left open is computed as it leaves the pod NIC, what
            # the pod left open as it leaves the host veth; nothing longer than a frame passes.
            assert set(kinds(seen["vm"])) == {"right"}
            assert set(kinds(to_guest)) == {"right"}
            assert longest(seen["vm"]) <= FRAME
        assert set(kinds(ours(lab.nic.far.out))) == {"open"}  # as the guest sent it
    assert_no_errors(lab)


@VERSIONS
def test_skip_by_default(lab: Node, version: int) -> None:
    """By default nobody computes either, and nothing is touched, not what somebody switched off."""
    work = lab.attend("skip", insist=False)
    assert work == ([("skip", "")], ([], []))
    with everywhere(lab) as seen:
        talk(lab, "guest", "pod", version)
    assert set(kinds(seen["vm"])) == {"open"}
    assert longest(seen["vm"]) > FRAME
    lab.switch_off()
    work = lab.attend("skip", insist=False)
    assert work == ([("keep", "switched-off")], ([], []))
    with everywhere(lab) as seen:
        talk(lab, "guest", "pod", version)
    assert set(kinds(seen["vm"])) == {"right"}
    assert_no_errors(lab)


@VERSIONS
def test_between_pods(lab: Node, version: int) -> None:
    """Pods without a VM compute nothing among themselves, with us and without."""
    for mode in ("keep", "skip"):
        lab.attend(mode)
        with everywhere(lab) as seen:
            talk(lab, "other", "pod", version)
        assert set(kinds(seen["plain"])) == {"open"}
        assert longest(seen["plain"]) > FRAME
    assert_no_errors(lab)


@VERSIONS
@pytest.mark.parametrize("card", [True, False], ids=["card-computes", "card-does-not"])
def test_leaving_the_node(lab: Node, version: int, card: bool) -> None:
    """What leaves the node has a right checksum: by the card, or by the kernel before it.

    The card is a process on a tap that does what it is told by a virtio_net_hdr, as hardware does
    by its descriptor. What it is handed shows that the kernel has left the work to it.
    """
    lab.switch_off()
    lab.uplink.near.offer(cable.SEGMENTS if card else 0)
    for mode, who in (("keep", "pod"), ("keep", "guest"), ("skip", "guest")):
        lab.attend(mode)
        with everywhere(lab) as seen:
            talk(lab, who, "outside", version)
        handed, wire = ours(lab.uplink.near.out), ours(lab.uplink.through)
        assert set(kinds(wire)) == {"right"}
        assert longest(wire) <= FRAME
        sent = [p for p in seen["vm" if who == "guest" else "plain"] if not p.is_outgoing]
        if (mode, who) == ("keep", "guest"):
            assert set(kinds(sent)) == set(kinds(handed)) == {"right"}
            assert longest(sent) <= FRAME
        else:
            assert set(kinds(sent)) == {"open"}
            assert longest(sent) > FRAME
            assert set(kinds(handed)) == {"open" if card else "right"}
            assert (longest(handed) > FRAME) == card
    assert_no_errors(lab)


@VERSIONS
@pytest.mark.parametrize("card", [True, False], ids=["card-computes", "card-does-not"])
def test_leaving_in_a_tunnel(lab: Node, version: int, card: bool) -> None:
    """In VXLAN, as overlays send it, the inner and the outer checksum are right on the wire."""
    lab.uplink.near.offer(cable.SEGMENTS if card else 0)
    lab.switch_off()
    lab.attend("skip")
    with vm_net.vxlan(lab), everywhere(lab) as seen:
        talk(lab, "guest", "outside", version)
    assert set(kinds([packet for packet in seen["vm"] if not packet.is_outgoing])) == {"open"}
    wire = [frame for frame in lab.uplink.through if sums.port_of(frame.data, vm_net.VXLAN_PORT)]
    assert all(sums.is_right(frame.data) for frame in wire)
    inner = [frame.data[vm_net.VXLAN_HEADERS :] for frame in wire]
    inner = [frame for frame in inner if sums.port_of(frame, PORT)]
    assert sum(map(len, inner)) > STREAM
    assert all(sums.is_right(frame) for frame in inner)
    assert_no_errors(lab)


@VERSIONS
def test_damaged_packets_from_outside(lab: Node, version: int) -> None:
    """A packet that was damaged on the wire is dropped by the stack that it is for."""
    bad: list[bytes] = []

    def damage(frame: bytes) -> bytes:
        if len(frame) < 150 or len(bad) >= 3:
            return frame
        bad.append(frame[:-1] + bytes([frame[-1] ^ 0x10]))
        return bad[-1]

    def dropped(who: str) -> dict[str, int]:
        return {name: n for name, n in sums.checksum_errors(lab.talkers[who]).items() if n}

    lab.switch_off()
    lab.uplink.damage = damage
    for mode, who, times in (("keep", "pod", 1), ("keep", "guest", 1), ("skip", "guest", 2)):
        lab.attend(mode)
        lab.nic.forget()
        # Three datagrams do not arrive, the fourth does.
        bad.clear()
        assert vm_net.udp(lab, "outside", who, version, [200, 300, 400], 0.3) == 0
        assert vm_net.udp(lab, "outside", who, version, [500]) == 1
        if who == "guest":
            # The host has told the guest neither to trust the sum nor to ignore it.
            arrived = [frame for frame in lab.nic.near.out if frame.data in bad]
            assert len(arrived) == 3
            assert not any(f.flags & (cable.NEEDS_CSUM | cable.DATA_VALID) for f in arrived)
        # A stream's are sent again.
        bad.clear()
        assert vm_net.tcp(lab, "outside", who, version, STREAM)
        assert dropped(who) == {f"udp{version}": 3 * times, "tcp": 3 * times}


@VERSIONS
def test_software(lab: Node, version: int) -> None:
    """With software every packet carries a right checksum, wherever it passes; DEL undoes it."""
    with lab.doors() as doors:
        before = {d: doors[d.where].features(d.ifindex) for d in lab.devices()}
    work = lab.attend("software")
    assert work.verdicts == [("software", "")]
    with everywhere(lab) as seen:
        talk(lab, "guest", "pod", version)
    to_guest = ours(lab.nic.near.out)
    assert set(kinds(to_guest)) == set(kinds(seen["vm"])) == {"right"}
    assert longest(to_guest) <= FRAME
    assert longest(seen["vm"]) <= FRAME
    assert_no_errors(lab)
    lab.restore(work.plan.record)
    with lab.doors() as doors:
        # All of them are back, those that went as a consequence too.
        assert before == {d: doors[d.where].features(d.ifindex) for d in lab.devices()}
    with everywhere(lab) as seen:
        talk(lab, "guest", "pod", version)
    assert set(kinds(seen["vm"])) == set(kinds(ours(lab.nic.near.out))) == {"open"}


@VERSIONS
@pytest.mark.parametrize("mode", ["mirror", "redirect", "peer"])
def test_with_the_tap_lane(lab: Node, version: int, mode: str) -> None:
    """Whichever way frames take inside the launcher, open sums stay open, and software computes.

    But for "peer" with software: what goes around the NIC's transmit path is not computed there,
    so may_bypass() says no.
    """
    nic = next(device for device in lab.devices() if device.role == "nic")
    for wanted in ("skip", "software"):
        ours_now = lab.attend(wanted).plan.record
        with lab.doors() as doors:
            assert checksum.may_bypass(doors["pod"].features(nic.ifindex)) == (wanted == "skip")
        with lab.tap_lane(mode) as took, everywhere(lab) as seen:
            for server in ("pod", "outside"):
                talk(lab, "guest", server, version)
            assert all(took_bytes > 2 * STREAM for took_bytes in took().values()), took()
        from_guest = [packet for packet in seen["vm"] if not packet.is_outgoing]
        to_guest = ours(lab.nic.near.out)
        is_open = wanted == "skip" or mode == "peer"
        assert set(kinds(from_guest)) == {"open" if is_open else "right"}
        assert (longest(from_guest) > FRAME) == is_open
        assert set(kinds(ours(lab.uplink.through))) == {"right"}
        if wanted == "software":
            assert set(kinds(to_guest)) == {"right"}
        lab.restore(ours_now)
    assert_no_errors(lab)


@pytest.mark.parametrize("bridge_off", [True, False], ids=["before-1.8", "1.8"])
def test_the_bridge_is_left_alone(bridge_off: bool) -> None:
    """What the bridge itself sends, as KubeVirt's DHCP server does, is what it was before us.

    Its offload is no concern of the frames that it forwards.
    """
    with nothing_left(), vm_net.node(bridge_off=bridge_off) as lab:
        lab.switch_off()
        answers = "right" if bridge_off else "open"
        for mode, insist, forwarded in (
            ("keep", False, "right"),
            ("skip", False, "right"),
            ("skip", True, "open"),
        ):
            lab.attend(mode, insist=insist)
            lab.nic.forget()
            vm_net.answer_from_bridge(lab)
            assert kinds(ours(lab.nic.near.out)) == {answers: 1}
            with everywhere(lab) as seen:
                talk(lab, "guest", "pod", 4)
            assert set(kinds(seen["vm"])) == {forwarded}
        lab.attend("software")
        lab.nic.forget()
        vm_net.answer_from_bridge(lab)
        assert kinds(ours(lab.nic.near.out)) == {"right": 1}


def test_guest_without_offload() -> None:
    """A guest that has not asked for open checksums gets none; that is no error and no change."""
    with nothing_left(), vm_net.node(guest_takes=0) as lab:
        for _ in range(2):
            work = lab.attend("skip")
            assert work.verdicts == [("skip", "not-negotiated")]
            with everywhere(lab) as seen:
                talk(lab, "guest", "pod", 4)
            assert set(kinds(ours(lab.nic.near.out))) == {"right"}
            assert set(kinds(seen["vm"])) == {"open"}
        # Its driver starts, and from then on it does.
        lab.nic.near.offer(cable.SEGMENTS)
        assert lab.attend("skip") == ([("skip", "")], ([], []))
        talk(lab, "guest", "pod", 4)
        assert set(kinds(ours(lab.nic.near.out))) == {"open"}
        # It starts anew while software is in force: another look sets that right.
        work = lab.attend("software")
        lab.nic.near.offer(cable.SEGMENTS)
        again = lab.attend("software", work.plan.record)
        assert [change.name for change in again.plan.steps] == [lab.bound.names.tap]
        assert lab.attend("software", again.plan.record).plan == ([], again.plan.record)


def test_switch_in_user_space(lab: Node) -> None:
    """A switch that reads the host veth by a packet socket sees no open sums: skip gives way.

    Such a switch (OVS with the netdev datapath) passes on the bytes alone, so whoever runs one
    switches TX checksum offload off in the pods, as Kube-OVN does.
    """
    lab.switch_off()
    lab.switch(lab.talkers["pod"], "eth0", "tx", "off")
    with vm_net.userspace_switch(lab, ["vm", "plain"]):
        work = lab.attend("skip")
        assert work == ([("keep", "userspace-switch")], ([], []))
        talk(lab, "guest", "pod", 4)
        # What would have happened: the guest's packets reach the pod as damaged ones.
        lab.switch(lab.launcher, lab.bound.names.nic, "tx", "on")
        assert vm_net.udp(lab, "guest", "pod", 4, SIZES, 1.0) == 0
        # (TCP errors do not tell: on a busy machine the end of that talk may come only now.)
        pod = lab.talkers["pod"]
        wait_until(lambda: sums.checksum_errors(pod)["udp4"] == len(SIZES), "UDP checksum errors")
        lab.switch(lab.launcher, lab.bound.names.nic, "tx", "off")
    # Once it has ended, skip is in force; when it is back, what we switched on goes off again.
    work = lab.attend("skip")
    assert work.verdicts == [("skip", "")]
    assert {change.name for change in work.plan.record} == {"vm", lab.bound.names.nic}
    with vm_net.userspace_switch(lab, ["vm", "plain"]):
        work = lab.attend("skip", work.plan.record)
        assert work.verdicts == [("keep", "userspace-switch")]
        talk(lab, "guest", "pod", 4)
        work = lab.attend("skip", work.plan.record)
        assert work == ([("keep", "userspace-switch")], ([], []))
