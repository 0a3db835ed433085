"""The tap lane frame by frame: what goes by the bridge, what does not, and how it arrives."""

from __future__ import annotations

import socket
from contextlib import closing
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from helpers import tap_frames
from helpers.commands import CommandError, run, wait_until
from helpers.netns import inside
from helpers.tap import Outside, Watcher
from helpers.tap_lab import GUEST_MAC, HOST, MODES, TapLab, tap_lab
from nearpath.kernel import netns
from nearpath.kernel.rtnl import Rtnl
from nearpath.lanes import tap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.tap import Frame, Tap
    from helpers.tap_frames import Case


@pytest.fixture
def lab() -> Iterator[TapLab]:
    with tap_lab() as made:
        yield made


def crossed(
    sender: Tap | Outside, receiver: Tap | Outside, watcher: Watcher, case: Case
) -> tuple[Frame, int]:
    """Send a frame: as it arrives, and how often the bridge saw it."""
    sender.send(case.frame)
    try:
        arrived = receiver.receive(case.token)
    except CommandError as error:
        raise CommandError(f"{case.name}: {error}") from None
    return arrived, watcher.saw(case.token)


def check(
    subtests: pytest.Subtests,
    lab: TapLab,
    mode: str,
    cases: list[Case],
    ways: tuple[Tap | Outside, Tap | Outside],
    side: int,
) -> None:
    """Every frame arrives by the lane as it does by the bridge; ``side`` of counts() counts it."""
    watcher = lab.watcher()
    by_bridge = {}
    for case in cases:
        arrived, seen = crossed(*ways, watcher, case)
        assert seen == 1, f"control run: {case.name}"
        by_bridge[case.name] = arrived
    (outcome,) = lab.look(mode).outcomes
    assert (outcome.mode, outcome.reason) == (mode, "")
    for case in cases:
        with subtests.test(case.name):
            before = lab.counts()[side]
            arrived, seen = crossed(*ways, watcher, case)
            counted = lab.counts()[side] - before
            assert arrived == by_bridge[case.name]
            assert seen == int(not case.lane)
            # Of segments that a machine sends, u32 and mirred do not count how many they are.
            segments = case.frame.gso_size and mode == "mirror"
            assert counted > 0 or segments if case.lane else counted == 0


@pytest.mark.parametrize("mode", MODES)
def test_frames_of_the_machine(lab: TapLab, mode: str, subtests: pytest.Subtests) -> None:
    ends = lab.plug(), lab.outside()
    check(subtests, lab, mode, tap_frames.from_guest(GUEST_MAC), ends, 0)


@pytest.mark.parametrize("mode", MODES)
def test_frames_to_the_machine(lab: TapLab, mode: str, subtests: pytest.Subtests) -> None:
    ends = lab.outside(), lab.plug()
    check(subtests, lab, mode, tap_frames.to_guest(GUEST_MAC), ends, 1)


@pytest.mark.needs_kernel("6.2", "UDP segmentation on taps")
@pytest.mark.parametrize("mode", MODES)
def test_many_datagrams_in_a_frame(lab: TapLab, mode: str) -> None:
    machine, outside, watcher = lab.plug(), lab.outside(), lab.watcher()
    case = tap_frames.datagrams(GUEST_MAC, tap_frames.OTHER_MAC)
    by_bridge, seen = crossed(machine, outside, watcher, case)
    assert seen == 1
    lab.look(mode)
    assert crossed(machine, outside, watcher, case) == (by_bridge, 0)
    assert by_bridge.gso_size == case.frame.gso_size


@pytest.mark.smoke
def test_peer_frames_reach_the_hosts_stack(lab: TapLab) -> None:
    """In mode "peer" a frame to the host's own address is for the host; others are not."""
    machine = lab.plug()
    name = ["ip", "-n", lab.host.rpartition("/")[2]]
    run([*name, "address", "add", "10.7.0.1/24", "dev", HOST])
    run([*name, "neigh", "add", "10.7.0.2", "lladdr", GUEST_MAC, "dev", HOST])
    lab.look("peer")
    (mine, others) = (
        next(case for case in tap_frames.from_guest(GUEST_MAC, target) if case.name == "udp4")
        for target in (lab.address(HOST), tap_frames.OTHER_MAC)
    )
    with netns.entered(lab.host):
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(listener):
        listener.settimeout(5)
        listener.bind(("10.7.0.1", 2222))
        machine.send(others.frame)
        machine.send(mine.frame)
        assert mine.token in listener.recv(2000)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(2000)
    assert lab.counts()[0] == 2


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_only_peer_skips_the_nics_transmission(lab: TapLab, mode: str, switched: bool) -> None:
    """And for frames to others than the host only if the host's end is a bridge's port."""
    machine, name = lab.plug(), lab.host.rpartition("/")[2]
    if switched:
        run(["ip", "-n", name, "link", "add", "br0", "type", "bridge"])
        run(["ip", "-n", name, "link", "set", "br0", "up"])
        run(["ip", "-n", name, "link", "set", HOST, "master", "br0"])
    lab.look(mode)
    nic = Outside(lab.pod, lab.bound.names.nic)
    with nic, Watcher(lab.host, "br0" if switched else HOST) as beyond:
        for target in (lab.address(HOST), tap_frames.OTHER_MAC):
            case = next(c for c in tap_frames.from_guest(GUEST_MAC, target) if c.name == "udp4")
            machine.send(case.frame)
            wait_until(lambda mark=case.token: beyond.saw(mark), "it arrives")  # type: ignore[misc]
            sent = [frame for frame in nic.drain() if case.token in frame.data]
            peer = mode == "peer" and (switched or target != tap_frames.OTHER_MAC)
            assert len(sent) == (0 if peer else 1)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_counted_without_ethernet_headers(lab: TapLab, mode: str) -> None:
    machine, outside = lab.plug(), lab.outside()
    lab.look(mode)
    case = next(c for c in tap_frames.from_guest(GUEST_MAC) if c.name == "1000 B")
    for _ in range(3):
        machine.send(case.frame)
        outside.receive(case.token)
    with netns.entered(lab.pod), Rtnl() as pod:
        counted = tap.counts(pod, tap.observe(pod))[lab.bound.tap_index]
    assert counted == {
        "from_vm": {"packets": 3, "bytes": 3000},
        "to_vm": {"packets": 0, "bytes": 0},
    }


# -- what the bridge itself has to see -------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_the_pods_dhcp_server_is_asked(lab: TapLab, mode: str) -> None:
    """By broadcast, as clients ask first, and at the bridge's own address, as they renew."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    machine, outside, watcher = lab.plug(), lab.outside(), lab.watcher()
    lab.look(mode)
    bridge, nobody = lab.address(lab.bound.names.bridge), str(IPv4Address(0))
    with netns.entered(lab.pod):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(server):
        server.settimeout(5)
        server.setsockopt(
            socket.SOL_SOCKET, socket.SO_BINDTODEVICE, lab.bound.names.bridge.encode()
        )
        server.bind(("", 67))
        run([*inside(lab.pod), "ip", "route", "add", "10.7.0.3", "dev", lab.bound.names.bridge])
        # Not the pod's own address, which the dummy has, too: Linux takes that for a forgery.
        for target, own, address in (
            ("ff:ff:ff:ff:ff:ff", nobody, "255.255.255.255"),
            (bridge, "10.7.0.3", lab.bound.server),
        ):
            mark = tap_frames.token()
            frame = Ether(src=GUEST_MAC, dst=target) / IP(src=own, dst=address)
            frame /= UDP(sport=68, dport=67) / BOOTP(chaddr=mark) / DHCP(options=["end"])
            machine.send(bytes(frame))
            assert mark in server.recv(2000)
            assert watcher.saw(mark) == 1
            if target == bridge:
                assert not [seen for seen in outside.drain() if mark in seen.data]


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_the_bridge_answers_for_its_own_address(lab: TapLab, mode: str) -> None:
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.l2 import ARP, Ether

    machine = lab.plug()
    lab.look(mode)
    bridge = lab.address(lab.bound.names.bridge)
    run([*inside(lab.pod), "ip", "route", "add", "10.7.0.3", "dev", lab.bound.names.bridge])
    for target in ("ff:ff:ff:ff:ff:ff", bridge):
        ask = Ether(src=GUEST_MAC, dst=target)
        ask /= ARP(hwsrc=GUEST_MAC, psrc="10.7.0.3", pdst=lab.bound.server)
        machine.drain()
        machine.send(bytes(ask))
        answer = ARP(
            op="is-at", hwsrc=bridge, psrc=lab.bound.server, hwdst=GUEST_MAC, pdst="10.7.0.3"
        )
        machine.receive(bytes(answer))
    mark = tap_frames.token()
    ping = Ether(src=GUEST_MAC, dst=bridge) / IP(src="10.7.0.3", dst=lab.bound.server)
    machine.send(bytes(ping / ICMP() / mark))
    assert Ether(machine.receive(mark).data)[ICMP].type == 0  # echo reply


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_link_local_frames_are_not_forwarded(lab: TapLab, mode: str) -> None:
    """LACP, LLDP and the like: for the bridge alone."""
    machine, outside = lab.plug(), lab.outside()
    lab.look(mode)
    source = bytes.fromhex(GUEST_MAC.replace(":", ""))
    for sender, receiver in ((machine, outside), (outside, machine)):
        mark = tap_frames.token()
        sender.send(b"\x01\x80\xc2\0\0\x0e" + source + b"\x88\xb5" + mark + bytes(46))
        behind = tap_frames.token()
        sender.send(b"\xff" * 6 + source + b"\x88\xb5" + behind + bytes(46))
        while behind not in (frame := receiver.receive(b"\x88\xb5")).data:
            assert mark not in frame.data


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_frames_larger_than_the_mtu_do_not_pass(lab: TapLab, mode: str) -> None:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    machine, outside = lab.plug(), lab.outside()
    lab.look(mode)
    for target in (lab.address(HOST), tap_frames.OTHER_MAC):
        for size, passes in ((1472, True), (1480, False)):
            mark = tap_frames.token()
            frame = Ether(src=GUEST_MAC, dst=target) / IP(
                src="10.7.0.2", dst="10.7.0.1", flags="DF"
            )
            machine.send(bytes(frame / UDP(dport=9) / (mark + bytes(size - 6))))
            if passes:
                outside.receive(mark)
            else:
                with pytest.raises(CommandError):
                    outside.receive(mark, 0.1)


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_jumbo_frames(mode: str) -> None:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    with tap_lab(mtu=9000) as lab:
        machine, outside = lab.plug(), lab.outside()
        lab.look(mode)
        mark = tap_frames.token()
        frame = bytes(
            Ether(src=GUEST_MAC, dst=tap_frames.OTHER_MAC)
            / IP(src="10.7.0.2", dst="10.7.0.1")
            / UDP(dport=9)
            / (mark + bytes(8966))
        )
        machine.send(frame)
        assert outside.receive(mark).data == frame


@pytest.mark.parametrize("mode", MODES)
def test_a_machine_without_offloads_gets_finished_checksums(lab: TapLab, mode: str) -> None:
    """Such a guest cannot take unfinished ones; the kernel computes them on the way."""
    from scapy.layers.inet import UDP
    from scapy.layers.l2 import Ether

    machine, outside = lab.plug(offloads=False), lab.outside()
    lab.look(mode)
    case = next(
        case for case in tap_frames.to_guest(GUEST_MAC) if case.name == "checksum to be computed"
    )
    outside.send(case.frame)
    arrived = machine.receive(case.token)
    assert arrived.flags == 0
    given = Ether(arrived.data)[UDP].chksum
    again = Ether(arrived.data)
    del again[UDP].chksum
    assert given == Ether(bytes(again))[UDP].chksum
