"""The tap lane beside other people's rules, and through the life of a virtual machine."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections import Counter
from contextlib import closing
from errno import EBUSY
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from helpers import tap_frames, virt_handler
from helpers.commands import CommandError, run
from helpers.netns import inside, veth
from helpers.tap import Frame, Outside, Stream, Tap
from helpers.tap_lab import GUEST_MAC, HOST, MODES, TapLab, tap_lab
from nearpath.datapath import libbpf, tap_programs
from nearpath.kernel import netns
from nearpath.kernel.rtnl import Rtnl, RtnlError
from nearpath.lanes import tap, topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.tap_frames import Case


@pytest.fixture
def lab() -> Iterator[TapLab]:
    with tap_lab() as made:
        yield made


def udp(target: str = tap_frames.OTHER_MAC) -> Case:
    """A frame of the machine that takes the lane if there is one."""
    return next(c for c in tap_frames.from_guest(GUEST_MAC, target) if c.name == "udp4")


def back() -> Case:
    """The same the other way."""
    return next(c for c in tap_frames.to_guest(GUEST_MAC) if c.name == "udp4")


def passes(lab: TapLab, machine: Tap, outside: Outside) -> tuple[int, int]:
    """A frame each way arrives; how many of the two took the lane: from the machine, to it."""
    before = lab.counts()
    there, here = udp(), back()
    machine.send(there.frame)
    outside.receive(there.token)
    outside.send(here.frame)
    machine.receive(here.token)
    after = lab.counts()
    return after[0] - before[0], after[1] - before[1]


# -- other people's rules --------------------------------------------------------------------

_FOREIGN = {
    "nothing": (),
    "ingress": (
        "qdisc add dev {} ingress",
        (
            "filter add dev {} parent ffff: protocol all prio 7 u32 match u32 7 0xff "
            "at 20 flowid 1:1"
        ),
    ),
    "clsact": (
        "qdisc add dev {} clsact",
        "filter add dev {} ingress protocol ip prio 7 u32 match ip dport 7 0xffff flowid 1:1",
        "filter add dev {} ingress protocol ip prio 60000 u32 match ip dport 9 0xffff flowid 1:1",
        ("filter add dev {} egress protocol all prio 8 u32 match u32 7 0xff at 20 flowid 1:1"),
    ),
    "empty clsact": ("qdisc add dev {} clsact",),
}


@pytest.mark.parametrize(
    ("foreign", "mode"),
    [
        pytest.param("ingress", "mirror", marks=pytest.mark.smoke),
        *(("nothing", mode) for mode in MODES),
        ("clsact", "peer"),
        ("empty clsact", "redirect"),
    ],
)
def test_what_was_there_works_and_is_there_afterwards(lab: TapLab, mode: str, foreign: str) -> None:
    machine, outside = lab.plug(), lab.outside()
    for name in (lab.bound.names.tap, lab.bound.names.nic):
        for command in _FOREIGN[foreign]:
            lab.tc(*command.format(name).split())
    before = _sorted(lab.shown())
    assert passes(lab, machine, outside) == (0, 0)
    plan = lab.look(mode)
    assert plan.outcomes[0].mode == mode
    assert passes(lab, machine, outside) == (1, 1)
    assert not lab.look(mode).steps
    assert before <= _sorted(lab.shown())
    lab.look("off")
    assert passes(lab, machine, outside) == (0, 0)
    lab.look("off", withdraw=True)
    assert _sorted(lab.shown()) == before
    assert passes(lab, machine, outside) == (0, 0)
    assert not lab.look("off", withdraw=True).steps


def _sorted(shown: str) -> Counter[str]:
    """Lines of tc(8), which names the parent of some filters and not of others."""
    return Counter(shown.replace("parent ffff: ", "").splitlines())


@pytest.mark.parametrize("mode", MODES)
def test_other_peoples_rules_come_first(lab: TapLab, mode: str) -> None:
    """Also those that get their priority from the kernel, as most do."""
    machine, outside, watcher = lab.plug(), lab.outside(), lab.watcher()
    lab.look(mode)
    lab.tc(
        *["filter", "add", "dev", "tap0", "ingress", "protocol", "ip"],
        *["u32", "match", "ip", "dport", "2222", "0xffff", "flowid", "1:1"],
    )
    case = udp()
    machine.send(case.frame)
    outside.receive(case.token)
    assert watcher.saw(case.token) == 1
    assert lab.counts() == (0, 0)
    # It keeps the qdisc, which was made for our rules.
    lab.look("off", withdraw=True)
    assert "ingress" in lab.tc("qdisc", "show", "dev", "tap0")
    assert "dport" in lab.tc("-pretty", "filter", "show", "dev", "tap0", "ingress")
    assert "ingress" not in lab.tc("qdisc", "show", "dev", "eth0-nic")


def test_somebody_makes_the_qdisc_meanwhile(lab: TapLab) -> None:
    """A clsact, when an ingress was to be made."""
    machine, outside = lab.plug(), lab.outside()
    with netns.entered(lab.pod), Rtnl() as pod:
        plan = tap.plan(tap.observe(pod), "mirror", set(), {})
        lab.tc("qdisc", "add", "dev", "tap0", "clsact")
        tap.execute(pod, plan)
    lab.made = plan.made
    assert passes(lab, machine, outside) == (1, 1)
    lab.look("off", withdraw=True)
    assert "clsact" in lab.tc("qdisc", "show", "dev", "tap0")


@pytest.mark.parametrize("wanted", ["off", "redirect"])
@pytest.mark.parametrize("lost", ["qdisc del dev tap0 ingress", "filter del dev tap0 ingress", ""])
def test_what_is_gone_meanwhile_is_no_error(lab: TapLab, wanted: str, lost: str) -> None:
    """Rules, the qdisc, or the tap itself, between the look and the change."""
    lab.look("mirror")
    with netns.entered(lab.pod), Rtnl() as pod:
        withdraw = wanted == "off"
        plan = tap.plan(tap.observe(pod), wanted, lab.made, {}, withdraw=withdraw)
        if lost:
            lab.tc(*lost.split())
        else:
            virt_handler.unplug_tap(lab.bound)
        if lost.startswith("qdisc") and wanted != "off":
            with pytest.raises(RtnlError):  # there is nothing to put the new rules on
                tap.execute(pod, plan)
        else:
            tap.execute(pod, plan)
    lab.made = plan.made
    lab.look(wanted, withdraw=withdraw)
    assert not lab.look(wanted, withdraw=withdraw).steps


def test_busy_is_tried_again(lab: TapLab) -> None:
    machine, outside = lab.plug(), lab.outside()
    real, failures = Rtnl.add_ingress, [EBUSY] * 3

    def busy(self: Rtnl, index: int) -> None:
        if failures:
            raise RtnlError("make an ingress qdisc", failures.pop())
        real(self, index)

    with mock.patch.object(Rtnl, "add_ingress", busy):
        lab.look("mirror")
    assert passes(lab, machine, outside) == (1, 1)


def test_busy_for_ever_is_an_error(lab: TapLab) -> None:
    with (
        mock.patch.object(Rtnl, "add_ingress", side_effect=RtnlError("make it", EBUSY)) as tried,
        pytest.raises(RtnlError, match="busy"),
    ):
        lab.look("mirror")
    assert 1 < tried.call_count < 10


@pytest.mark.parametrize("lost", ["800::4e1", "800::4ef"])
def test_rules_that_are_not_whole_are_replaced(lab: TapLab, lost: str) -> None:
    """Somebody was killed while adding them, or took one away."""
    machine, outside = lab.plug(), lab.outside()
    adds = [step for step in lab.look("mirror").steps if isinstance(step, tap.Add)]
    (prio,) = (str(step.priority) for step in adds if step.index == lab.bound.tap_index)
    words = ["filter", "del", "dev", "tap0", "ingress", "prio", prio, "protocol", "all"]
    lab.tc(*words, "handle", lost, "u32")
    lab.look("mirror")
    assert passes(lab, machine, outside) == (1, 1)
    assert not lab.look("mirror").steps


# -- the host's end --------------------------------------------------------------------------


def _outcome(lab: TapLab) -> tuple[str, str]:
    (outcome,) = lab.look("peer").outcomes
    return outcome.mode, outcome.reason


def test_peer_steps_back_from_programs_on_the_host_veth(lab: TapLab) -> None:
    machine, outside = lab.plug(), lab.outside()
    assert _outcome(lab) == ("peer", "")
    in_host = [*inside(lab.host), "tc"]
    run([*in_host, "qdisc", "add", "dev", HOST, "clsact"])
    passing = tap_programs.Program(1, ())
    with netns.entered(lab.host), Rtnl() as host, tap_programs.Loaded(passing) as program:
        from nearpath.kernel import u32

        (index,) = (link["ifindex"] for link in [virt_handler.links(lab.host)[HOST]])
        host.add_filter(index, 5, 1, "bpf", u32.pack_bpf(program.number, "somebody's"))
    assert _outcome(lab) == ("redirect", "peer-unavailable")
    run([*in_host, "qdisc", "del", "dev", HOST, "clsact"])
    assert _outcome(lab) == ("peer", "")
    assert passes(lab, machine, outside) == (1, 1)


@pytest.mark.needs_kernel("6.6", "tcx programs")
def test_peer_steps_back_from_tcx(lab: TapLab) -> None:
    index = virt_handler.links(lab.host)[HOST]["ifindex"]
    with tap_programs.Loaded(tap_programs.Program(1, ())) as program, netns.entered(lab.host):
        attach = libbpf._lib.bpf_prog_attach
        assert attach(program.number, index, libbpf._ATTACH_TCX_INGRESS, 0) == 0
    assert _outcome(lab) == ("redirect", "peer-unavailable")


def test_peer_steps_back_from_xdp(lab: TapLab) -> None:
    """Which runs where the veth receives, and redirect_peer goes around that."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    # r0 = XDP_PASS; exit
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
    kind = 6  # BPF_PROG_TYPE_XDP
    program = library.bpf_prog_load(kind, b"np_pass", b"GPL", code, ctypes.c_size_t(2), None)
    assert program >= 0
    index = virt_handler.links(lab.host)[HOST]["ifindex"]
    with netns.entered(lab.host):
        assert library.bpf_xdp_attach(index, program, 0, None) == 0
        os.close(program)
    assert _outcome(lab) == ("redirect", "peer-unavailable")


def test_peer_needs_another_namespace(lab: TapLab) -> None:
    """bpf_redirect_peer drops what would stay in the namespace."""
    run(["ip", "-n", lab.host.rpartition("/")[2], "link", "set", HOST, "netns", _name(lab.pod)])
    run(["ip", "-n", _name(lab.pod), "link", "set", HOST, "up"])
    with netns.entered(lab.pod), Rtnl() as pod:
        seen = tap.observe(pod)
        (wire,) = seen.wires
        assert wire.nic is not None
        end = tap.host_end(pod, wire.nic.peer)
        assert end is not None
        plan = tap.plan(seen, "peer", set(), {wire.nic.index: end})
    assert (plan.outcomes[0].mode, plan.outcomes[0].reason) == ("redirect", "peer-unavailable")


def _name(path: str) -> str:
    return path.rpartition("/")[2]


# -- the life of a virtual machine -----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_no_frame_is_lost_when_modes_change(lab: TapLab, mode: str) -> None:
    """Traffic both ways while modes come and go; every frame arrives, and once."""
    machine, outside = lab.plug(), lab.outside()
    there, here = udp(lab.address(HOST)), back()
    lab.look("off")
    lab.look(mode)
    with (
        Stream(machine, outside, _unsummed(there.frame), there.token) as out,
        Stream(outside, machine, _unsummed(here.frame), here.token) as back_in,
    ):
        for _ in range(8):
            for wanted in (mode, "off", mode, "mirror", mode):
                lab.look(wanted)
                time.sleep(0.01)
    for stream in (out, back_in):
        assert stream.sent > 100
        assert stream.lost() == []
        assert len(stream.arrived) == stream.sent


def _unsummed(frame: Frame) -> bytes:
    """A frame with UDP over IPv4 without a checksum."""
    return frame.data[:40] + b"\0\0" + frame.data[42:]


@pytest.mark.parametrize("mode", MODES)
def test_a_tap_that_is_plugged_anew(lab: TapLab, mode: str) -> None:
    outside = lab.outside()
    with lab.plug() as machine:
        lab.look(mode)
        assert passes(lab, machine, outside) == (1, 1)
        lab.stack.pop_all()
        virt_handler.unplug_tap(lab.bound)
    with outside:
        assert lab.look(mode).outcomes[0].reason == "no-tap"
        assert not lab.look(mode).steps
        assert "ingress" not in lab.shown_of("eth0-nic")
        old = lab.bound.tap_index
        lab.bound = virt_handler.plug_tap(lab.bound)
        assert lab.bound.tap_index != old
        machine = lab.plug()
        assert passes(lab, machine, outside) == (0, 0)
        assert lab.look(mode).outcomes[0].mode == mode
        assert passes(lab, machine, outside) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_tap_that_is_plugged_anew_before_anybody_looks(lab: TapLab, mode: str) -> None:
    """The NIC's rule leads nowhere. A program notices; mirred drops until the next look."""
    outside = lab.outside()
    with lab.plug():
        lab.look(mode)
        lab.stack.pop_all()
        virt_handler.unplug_tap(lab.bound)
    with outside:
        lab.bound = virt_handler.plug_tap(lab.bound)
        machine, there, here = lab.plug(), udp(), back()
        machine.send(there.frame)
        outside.receive(there.token)
        outside.send(here.frame)
        if mode == "mirror":
            with pytest.raises(CommandError):
                machine.receive(here.token, 0.2)
        else:
            machine.receive(here.token)
        lab.look(mode)
        assert passes(lab, machine, outside) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_gone_after_an_unplug(lab: TapLab, mode: str) -> None:
    lab.look(mode)
    virt_handler.unplug(lab.bound)
    plan = lab.look(mode)
    assert not plan.outcomes
    assert lab.made == set()
    assert "ingress" not in lab.shown_of("eth0-nic")


def test_mtu_changes(lab: TapLab) -> None:
    """The bridge enforces the smaller of two MTUs, so it gets the frames back."""
    machine, outside = lab.plug(), lab.outside()
    assert lab.look("mirror").outcomes[0].reason == ""
    run(["ip", "-n", _name(lab.pod), "link", "set", "tap0", "mtu", "1400"])
    assert lab.look("mirror").outcomes[0].reason == "mtu-differs"
    assert passes(lab, machine, outside) == (0, 0)
    run(["ip", "-n", _name(lab.pod), "link", "set", "eth0-nic", "mtu", "1400"])
    assert lab.look("mirror").outcomes[0].reason == ""
    assert passes(lab, machine, outside) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_address_of_the_bridge(lab: TapLab, mode: str) -> None:
    """What is for the bridge still comes to it."""
    machine, watcher = lab.plug(), lab.watcher()
    lab.look(mode)
    mac = "02:00:00:00:aa:bb"
    run(["ip", "-n", _name(lab.pod), "link", "set", "k6t-eth0", "address", mac])
    assert lab.look(mode).steps
    case = udp(mac)
    machine.send(case.frame)
    deadline = time.monotonic() + 5
    while not watcher.saw(case.token):
        assert time.monotonic() < deadline
    assert not lab.look(mode).steps


@pytest.mark.parametrize("mode", MODES)
def test_several_queues(mode: str) -> None:
    with tap_lab(queues=4) as lab:
        machine, outside = lab.plug(), lab.outside()
        assert lab.look(mode).outcomes[0].mode == mode
        assert passes(lab, machine, outside) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_two_interfaces(lab: TapLab, mode: str) -> None:
    """Each has its own wire, and frames stay in theirs."""
    name = virt_handler.secondary("storage")
    with veth(lab.pod, "10.8.0.2/24", name) as host:
        second = virt_handler.bridge_binding(lab.pod, name, number=1)
        machine, outside = lab.plug(), lab.outside()
        plan = lab.look(mode)
        assert (
            [outcome.mode for outcome in plan.outcomes] == [mode, "redirect"]
            if (mode == "peer")
            else [mode, mode]
        )
        with Tap(lab.pod, second.names.tap) as other, Outside("/proc/self/ns/net", host) as beyond:
            assert passes(lab, machine, outside) == (1, 1)
            case = udp()
            other.send(case.frame)
            beyond.receive(case.token)
            assert not [frame for frame in outside.drain() if case.token in frame.data]
            with netns.entered(lab.pod), Rtnl() as pod:
                counted = tap.counts(pod, tap.observe(pod))
            assert counted[second.tap_index]["from_vm"]["packets"] == 1
        lab.look("off")


def test_masquerade_is_left_alone() -> None:
    with tap_lab(binding=virt_handler.masquerade_binding) as lab:
        before = lab.shown()
        (outcome,) = lab.look("mirror").outcomes
        assert (outcome.mode, outcome.reason) == ("off", "no-nic")
        assert lab.shown() == before


def test_a_pod_without_a_machine_has_nothing_to_do(lab: TapLab) -> None:
    """A pod may say that it is a virtual machine's; what it has decides."""
    virt_handler.tear_down(lab.bound)
    plan = lab.look("mirror")
    assert not plan.steps
    assert not plan.outcomes


def test_a_pod_full_of_bridges(lab: TapLab) -> None:
    """What it costs us has an end, and the machine's own wire, made first, is served."""
    batch = "\n".join(f"link add k6t-{number} type bridge" for number in range(400))
    run([*inside(lab.pod), "ip", "-batch", "-"], text=batch, timeout=60)
    plan = lab.look("mirror")
    assert len(plan.outcomes) == topology.MOST_WIRES
    assert plan.outcomes[0].mode == "mirror"
    assert {outcome.reason for outcome in plan.outcomes[1:]} == {"no-tap"}


def test_names_of_links_are_only_text(lab: TapLab) -> None:
    run(["ip", "-n", _name(lab.pod), "link", "add", "k6t-$(id);\x1b[1m", "type", "bridge"])
    plan = lab.look("mirror")
    assert [outcome.mode for outcome in plan.outcomes] == ["mirror", "off"]
    with netns.entered(lab.pod), closing(Rtnl()) as pod:
        assert pod.link(2**31 - 1) is None
