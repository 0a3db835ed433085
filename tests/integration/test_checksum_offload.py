"""The door to a device's offloads, and what the checksum lane does through it, on real devices.

A namespace with a veth pair, a tap as qemu makes it, and a bridge; no packets (those are in
test_checksum_path.py).
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from helpers import cable, virt_handler
from helpers.commands import run
from helpers.leaks import nothing_left
from helpers.netns import inside, namespace
from nearpath.kernel import netns, offload
from nearpath.lanes import checksum
from nearpath.lanes.checksum import Change, Device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nearpath.kernel.offload import Features

GENERIC, SCTP, RX = "tx-checksum-ip-generic", "tx-checksum-sctp", "rx-checksum"
ROLES = {"nic0": "nic", "veth0": "veth", "tap0": "tap", "k6t-x": "bridge"}


@dataclass
class Devices:
    """The namespace; ``doors`` are both to it, so that one of each kind is enough."""

    path: str
    tap: cable.End

    @contextmanager
    def doors(self) -> Iterator[dict[str, offload.Door]]:
        with netns.entered(self.path):
            door = offload.Door()
        with door:
            yield {"pod": door, "host": door}

    def device(self, name: str) -> Device:
        with netns.entered(self.path):
            index = socket.if_nametoindex(name)
        return Device("host" if ROLES[name] == "veth" else "pod", index, name, ROLES[name])

    def all(self) -> list[Device]:
        return [self.device(name) for name in ROLES]

    def features(self, name: str) -> Features:
        with self.doors() as doors:
            found = doors["pod"].features(self.device(name).ifindex)
        assert found is not None
        return found

    def ethtool(self, *words: str) -> str:
        """As somebody who is not us."""
        return run([*inside(self.path), "ethtool", *words]).stdout

    def attend(self, mode: str, ours: list[Change] | None = None) -> checksum.Work:
        with self.doors() as doors:
            work = checksum.work_out(doors, mode, [self.all()], ours or [], insist=True)
            checksum.execute(doors, work.plan.steps)
        return work


@pytest.fixture
def lab() -> Iterator[Devices]:
    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        path = stack.enter_context(namespace())
        virt_handler.batch(
            path,
            [
                "link add nic0 type veth peer name veth0",
                "link add k6t-x type bridge",
                "tuntap add dev tap0 mode tap vnet_hdr",
                *(f"link set {name} up" for name in ROLES),
            ],
        )
        tap = cable.End(path, "tap0")
        stack.callback(tap.unplug)
        tap.plug()
        yield Devices(path, tap)


def test_as_ethtool_shows(lab: Devices) -> None:
    """The door and ethtool(8) agree on all that is on, and on what may be switched."""
    for name in ROLES:
        lines = [line.strip() for line in lab.ethtool("-k", name).splitlines()[1:]]
        # Summaries such as "tx-checksumming: on" have no name of their own in the kernel.
        shown = dict(line.split(": ", 1) for line in lines)
        found = lab.features(name)
        known = {feature for feature in shown if feature in found.changeable | found.active}
        assert len(known) > 10
        for feature in known:
            state, _, note = shown[feature].partition(" ")
            assert (feature in found.active) == (state == "on"), feature
            assert (feature in found.changeable) == ("fixed" not in note), feature


def test_want(lab: Devices) -> None:
    """Offloads are switched as ethtool does, with the same consequences, and come back whole."""
    before = lab.features("nic0")
    with lab.doors() as doors:
        index = lab.device("nic0").ifindex
        assert doors["pod"].want(index, {GENERIC: False, SCTP: False})
        by_us = doors["pod"].features(index)
        lab.ethtool("-K", "nic0", "tx", "on")
        lab.ethtool("-K", "nic0", "tx", "off")
        assert by_us == doors["pod"].features(index)
        assert by_us
        assert {"tx-tcp-segmentation", "tx-tcp6-segmentation"} <= before.active - by_us.active
        assert doors["pod"].want(index, {GENERIC: True, SCTP: True})
    assert lab.features("nic0") == before


def test_by_index_not_by_name(lab: Devices) -> None:
    """Who gives a device's name to another does not make us switch that one."""
    device = lab.device("nic0")
    plan = checksum.plan("software", device, lab.features("nic0"))
    assert plan.steps
    virt_handler.batch(
        lab.path,
        [
            "link set nic0 down",
            "link set nic0 name eth0-nic",
            "link add nic0 type veth peer name other",
        ],
    )
    with lab.doors() as doors:
        assert checksum.execute(doors, plan.steps) == []
        new, renamed = (
            doors["pod"].features(index) for index in (lab.device("nic0").ifindex, device.ifindex)
        )
        assert new
        assert renamed
        assert GENERIC in new.active
        assert GENERIC not in renamed.active
        checksum.restore(doors, plan.record)
        renamed = doors["pod"].features(device.ifindex)
    assert renamed
    assert GENERIC in renamed.active


def test_gone(lab: Devices) -> None:
    """A device that is gone is no error at any step."""
    work = lab.attend("software")
    virt_handler.batch(lab.path, ["link delete nic0"])  # its other end goes too
    with lab.doors() as doors:
        assert doors["pod"].features(work.plan.record[0].ifindex) is None
        assert not doors["pod"].want(work.plan.record[0].ifindex, {GENERIC: True})
        checksum.execute(doors, work.plan.steps)
        again = checksum.work_out(doors, "skip", [], work.plan.record)
        assert {change.name for change in again.plan.record} == {"tap0", "k6t-x"}
        checksum.restore(doors, work.plan.record)
        checksum.restore(doors, work.plan.record)


def test_unknown_offload(lab: Devices) -> None:
    """One that the kernel does not know, or that cannot be switched, is an error with a name."""
    with lab.doors() as doors:
        index = lab.device("nic0").ifindex
        with pytest.raises(offload.OffloadError, match=f"set the offloads of device {index}"):
            doors["pod"].want(index, {"tx-checksum-pigeon": True})


@pytest.mark.smoke
def test_software_and_back(lab: Devices) -> None:
    """Every offload of every device is afterwards what it was, those that went along too."""
    before = {name: lab.features(name) for name in ROLES}
    work = lab.attend("software")
    for name in ROLES:
        assert not lab.features(name).active & {GENERIC, SCTP, RX}
        assert "tx-tcp-segmentation" not in lab.features(name).active
    assert {change.name for change in work.plan.steps} == set(ROLES)
    assert lab.attend("software", work.plan.record).plan == ([], work.plan.record)
    with lab.doors() as doors:
        checksum.restore(doors, work.plan.record)
    assert before == {name: lab.features(name) for name in ROLES}


def test_to_another_mode(lab: Devices) -> None:
    """Another mode undoes what it does not want, and keeps the record until that is seen done."""
    lab.ethtool("-K", "nic0", "tx", "off")
    before = {name: lab.features(name) for name in ROLES}
    skip = lab.attend("skip")
    assert {(change.name, change.feature) for change in skip.plan.record} == {
        ("nic0", GENERIC),
        ("nic0", SCTP),
    }
    assert lab.features("nic0").active > {GENERIC, SCTP, "tx-tcp-segmentation"}
    software = lab.attend("software", skip.plan.record)
    assert not lab.features("nic0").active & {GENERIC, SCTP, RX}
    # Of the NIC's: what we had switched on is off again, as it was; only RX is changed.
    again = lab.attend("software", software.plan.record)
    assert again.plan.steps == []
    assert [c.feature for c in again.plan.record if c.name == "nic0"] == [RX]
    keep = lab.attend("keep", again.plan.record)
    assert before == {name: lab.features(name) for name in ROLES}
    assert lab.attend("keep", keep.plan.record).plan == ([], [])


def test_killed_in_between(lab: Devices) -> None:
    """Whenever we are killed, the record on disk is enough to put everything back."""
    before = {name: lab.features(name) for name in ROLES}
    with lab.doors() as doors:
        work = checksum.work_out(doors, "software", [lab.all()])
        # After any number of steps, those of one device being one.
        for count in range(len(work.plan.steps) + 1):
            checksum.execute(doors, work.plan.steps[:count])
            checksum.restore(doors, work.plan.record)
            assert before == {name: lab.features(name) for name in ROLES}
        # Undoing: the plan that undoes is on disk, and nothing of it has happened.
        checksum.execute(doors, work.plan.steps)
        undo = checksum.work_out(doors, "keep", [lab.all()], work.plan.record)
        assert undo.plan.record == work.plan.record
        checksum.execute(doors, undo.plan.steps[:3])
        checksum.restore(doors, undo.plan.record)
        assert before == {name: lab.features(name) for name in ROLES}


def test_somebody_else_switches(lab: Devices) -> None:
    """What somebody has switched after us is theirs: DEL leaves it alone."""
    lab.ethtool("-K", "nic0", "rx", "off")
    work = lab.attend("software")
    lab.ethtool("-K", "nic0", "tx-checksum-sctp", "on")
    lab.ethtool("-K", "veth0", "tx-tcp-segmentation", "off")  # what follows from ours
    lab.ethtool("-K", "k6t-x", "tx-checksum-ip-generic", "on")
    lab.ethtool("-K", "k6t-x", "tx-checksum-ip-generic", "off")
    with lab.doors() as doors:
        checksum.restore(doors, work.plan.record)
    nic = lab.features("nic0")
    assert {GENERIC, SCTP, "tx-tcp-segmentation"} <= nic.active
    assert RX not in nic.active
    assert GENERIC in lab.features("veth0").active
    assert "tx-tcp-segmentation" not in lab.features("veth0").active


def test_tap_of_a_guest_that_takes_nothing(lab: Devices) -> None:
    """What the guest has not negotiated does not take, and says so."""
    lab.tap.offer(0)
    device = lab.device("tap0")
    step = Change(device.where, device.ifindex, device.name, GENERIC, before=False, after=True)
    with lab.doors() as doors:
        assert checksum.execute(doors, [step]) == [step]
        work = checksum.work_out(doors, "skip", [lab.all()], insist=True)
        assert work == ([("skip", "not-negotiated")], ([], []))
        lab.tap.offer(cable.SEGMENTS)
        work = checksum.work_out(doors, "skip", [lab.all()], insist=True)
        assert work == ([("skip", "")], ([], []))


def test_packet_sockets(lab: Devices) -> None:
    """Readers of one device's IP are seen; those of all devices, or of ARP alone, are not."""
    with netns.entered(lab.path):
        assert offload.packet_socket_indexes() == set()
        sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) for _ in range(4)]
        for reader, bound in zip(
            sockets,
            (("veth0", 0x0003), ("nic0", 0x0806), ("k6t-x", 0x86DD), ("tap0", 0)),
            strict=True,
        ):
            reader.bind(bound)
        everywhere = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        assert offload.packet_socket_indexes() == {
            lab.device(name).ifindex for name in ("veth0", "k6t-x")
        }
        for reader in (*sockets, everywhere):
            reader.close()
        assert offload.packet_socket_indexes() == set()


def test_doors_leave_nothing_open(lab: Devices) -> None:
    """A door opened and closed many times keeps no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with lab.doors() as doors:
            assert doors["pod"].features(lab.device("nic0").ifindex)
    assert len(os.listdir("/proc/self/fd")) == before
