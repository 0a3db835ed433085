"""From what there is and what is wanted to what is to be done; and the packing of rules."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from nearpath.datapath.tap_programs import Program
from nearpath.kernel import u32
from nearpath.kernel.netlink import attribute, attributes, text
from nearpath.kernel.rtnl import Filter, Link, Qdisc
from nearpath.lanes import tap, tap_rules
from nearpath.lanes.tap import (
    Add,
    DeleteQdisc,
    Device,
    HostEnd,
    MakeQdisc,
    Observed,
    Plan,
    Remove,
)
from nearpath.lanes.tap_rules import PRIORITIES, Mirror, RuleSet
from nearpath.lanes.topology import wire

MAC_1, MAC_2 = b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"
HOST_MAC = b"\x02\0\0\0\0\x99"
BRIDGE = Link(10, "k6t-eth0", "bridge", address=MAC_1)
TAP = Link(11, "tap0", "tap", master=10, address=MAC_2)
NIC = Link(2, "eth0-nic", "veth", master=10, address=MAC_1, peer=7, peer_elsewhere=True)
WIRE = wire(BRIDGE, [TAP, NIC])
HOST = HostEnd(7, "veth7", HOST_MAC, peer=2, switched=True, has_foreign_bpf=False)

TO_NIC, TO_TAP = Mirror(2, (MAC_1, MAC_2)), Mirror(11, (MAC_1, MAC_2))


def rules(does: Mirror | str | None, priority: int = PRIORITIES[0]) -> RuleSet:
    return RuleSet(priority, (), does)


def device(*sets: RuleSet, kind: str = "ingress", foreign: bool = False) -> Device:
    taken = frozenset(found.priority for found in sets)
    return Device(Qdisc(1, kind), sets, taken, foreign)


def seen(tap_device: Device | None = None, nic_device: Device | None = None) -> Observed:
    return Observed([WIRE], {11: tap_device or Device(), 2: nic_device or Device()})


def decide(
    observed: Observed,
    mode: str = "mirror",
    made: set[int] | None = None,
    host: dict[int, HostEnd] | None = None,
    *,
    withdraw: bool = False,
) -> Plan:
    ends = {2: HOST} if host is None else host
    return tap.plan(observed, mode, made or set(), ends, withdraw=withdraw)


def test_a_bare_wire_gets_qdiscs_and_rules() -> None:
    plan = decide(seen())
    first = PRIORITIES[0]
    assert plan.steps == [
        MakeQdisc(2),
        Add(2, first, TO_TAP),
        MakeQdisc(11),
        Add(11, first, TO_NIC),
    ]
    assert plan.made == {2, 11}
    (outcome,) = plan.outcomes
    assert (outcome.wire, outcome.mode, outcome.reason) == (WIRE, "mirror", "")


def test_what_is_right_stays() -> None:
    plan = decide(seen(device(rules(TO_NIC)), device(rules(TO_TAP))), made={2, 11})
    assert not plan.steps
    assert plan.made == {2, 11}


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_other_peoples_qdiscs_are_used_and_kept(kind: str) -> None:
    theirs = device(kind=kind, foreign=True)
    plan = decide(seen(theirs, theirs))
    assert [type(step) for step in plan.steps] == [Add, Add]
    assert plan.made == set()
    off = decide(
        seen(device(rules(TO_NIC), kind=kind), device(rules(TO_TAP), kind=kind)), mode="off"
    )
    assert [type(step) for step in off.steps] == [Remove, Remove]


def test_our_qdisc_goes_with_our_rules() -> None:
    observed = seen(device(rules(TO_NIC)), device(rules(TO_TAP)))
    plan = decide(observed, mode="off", made={2, 11}, withdraw=True)
    assert plan.steps == [
        Remove(2, rules(TO_TAP)),
        DeleteQdisc(2),
        Remove(11, rules(TO_NIC)),
        DeleteQdisc(11),
    ]
    assert plan.made == set()


def test_our_qdisc_stays_while_frames_pass() -> None:
    observed = seen(device(rules(TO_NIC)), device(rules(TO_TAP)))
    plan = decide(observed, mode="off", made={2, 11})
    assert plan.steps == [Remove(2, rules(TO_TAP)), Remove(11, rules(TO_NIC))]
    assert plan.made == {2, 11}
    assert not decide(seen(device(), device()), mode="off", made={2, 11}).steps


def test_our_qdisc_stays_when_others_use_it() -> None:
    observed = seen(device(rules(TO_NIC), foreign=True), device(rules(TO_TAP)))
    plan = decide(observed, mode="off", made={2, 11}, withdraw=True)
    assert DeleteQdisc(11) not in plan.steps
    assert plan.made == {11}


def test_a_vanished_qdisc_is_ours_no_longer() -> None:
    assert decide(seen(), mode="off", made={2, 11, 99}).made == set()


def test_a_new_tap_gets_its_rules_and_the_nic_new_ones() -> None:
    old = Mirror(9, (MAC_1, MAC_2))
    plan = decide(seen(None, device(rules(old))), made={2, 9})
    assert plan.steps == [
        Add(2, PRIORITIES[1], TO_TAP),
        Remove(2, rules(old)),
        MakeQdisc(11),
        Add(11, PRIORITIES[0], TO_NIC),
    ]


def test_a_new_address_of_the_bridge_replaces_the_rules() -> None:
    old = Mirror(2, (MAC_2,))
    plan = decide(seen(device(rules(old)), device(rules(TO_TAP))))
    assert plan.steps == [Add(11, PRIORITIES[1], TO_NIC), Remove(11, rules(old))]


def test_incomplete_rules_are_replaced() -> None:
    plan = decide(seen(device(rules(None)), device(rules(TO_TAP))))
    assert plan.steps == [Add(11, PRIORITIES[1], TO_NIC), Remove(11, rules(None))]


def test_one_of_two_equal_sets_goes() -> None:
    twice = device(rules(TO_NIC), rules(TO_NIC, PRIORITIES[1]))
    plan = decide(seen(twice, device(rules(TO_TAP))))
    assert plan.steps == [Remove(11, rules(TO_NIC, PRIORITIES[1]))]


def test_a_new_mode_comes_before_the_old_one_goes() -> None:
    observed = seen(device(rules(TO_NIC)), device(rules(TO_TAP)))
    plan = decide(observed, mode="redirect")
    program = Program(2, (MAC_1, MAC_2))
    assert plan.steps[2:] == [Add(11, PRIORITIES[1], program), Remove(11, rules(TO_NIC))]


def test_peer_is_for_the_taps_side_alone() -> None:
    plan = decide(seen(), mode="peer")
    assert Add(2, PRIORITIES[0], Program(11, (MAC_1, MAC_2))) in plan.steps
    assert Add(11, PRIORITIES[0], Program(2, (MAC_1, MAC_2), HOST_MAC, True)) in plan.steps
    assert plan.outcomes[0].mode == "peer"


@pytest.mark.parametrize(
    ("nic", "host"),
    [
        (NIC, {}),
        (NIC, {2: replace(HOST, has_foreign_bpf=True)}),
        (NIC, {2: replace(HOST, peer=3)}),
        (replace(NIC, peer_elsewhere=False), {2: HOST}),
    ],
)
def test_without_a_peer_it_is_redirect(nic: Link, host: dict[int, HostEnd]) -> None:
    observed = Observed([wire(BRIDGE, [TAP, nic])], {11: Device(), 2: Device()})
    plan = decide(observed, mode="peer", host=host)
    assert (plan.outcomes[0].mode, plan.outcomes[0].reason) == ("redirect", "peer-unavailable")
    assert Add(11, PRIORITIES[0], Program(2, (MAC_1, MAC_2))) in plan.steps


def test_an_unfit_wire_loses_its_rules() -> None:
    unfit = wire(BRIDGE, [replace(TAP, mtu=1400), NIC])
    observed = Observed([unfit], {11: device(rules(TO_NIC)), 2: device(rules(TO_TAP))})
    plan = decide(observed)
    assert [type(step) for step in plan.steps] == [Remove, Remove]
    assert (plan.outcomes[0].mode, plan.outcomes[0].reason) == ("off", "mtu-differs")


def test_rules_on_devices_that_are_in_no_wire_go() -> None:
    observed = Observed([], {2: device(rules(TO_TAP))})
    plan = decide(observed, made={2})
    assert plan.steps == [Remove(2, rules(TO_TAP)), DeleteQdisc(2)]
    assert not plan.outcomes


def test_shared_blocks_are_left_alone() -> None:
    shared = Device(Qdisc(11, "clsact", shared=True))
    plan = decide(seen(shared))
    assert not plan.steps
    assert plan.outcomes[0].reason == "shared-block"


def test_without_a_free_priority_there_is_no_lane() -> None:
    full = Device(Qdisc(11, "clsact"), (), frozenset(PRIORITIES), foreign=True)
    plan = decide(seen(full))
    assert not plan.steps
    assert plan.outcomes[0].reason == "no-priority"


def test_addresses_that_are_none_are_left_out() -> None:
    odd = wire(replace(BRIDGE, address=b""), [replace(TAP, address=bytes(20)), NIC])
    plan = decide(Observed([odd], {11: Device(), 2: Device()}))
    assert Add(11, PRIORITIES[0], Mirror(2, (MAC_1,))) in plan.steps


# -- packing ---------------------------------------------------------------------------------


def as_shown(mirror: Mirror, priority: int = PRIORITIES[0], table: int = 0x800) -> list[Filter]:
    """The filters as the kernel shows them: with the number of its hash table."""
    return [
        Filter(1, "u32", priority, table << 20 | node, 0, u32.pack(rule))
        for node, rule in mirror.rules()
    ]


@pytest.mark.parametrize("table", [0x800, 0x801, 0xFFF])
@pytest.mark.parametrize("own", [(), (MAC_1,), (MAC_1, MAC_2, HOST_MAC)])
def test_rules_are_recognised(table: int, own: tuple[bytes, ...]) -> None:
    mirror = Mirror(5, own)
    (found,) = tap_rules.recognise(as_shown(mirror, table=table))
    assert found.does == mirror
    assert tap_rules.matches(found, mirror)
    assert not tap_rules.matches(found, replace(mirror, target=6))
    assert not tap_rules.matches(found, Program(5, own))


def test_a_part_of_the_rules_is_not_all_of_them() -> None:
    shown = as_shown(Mirror(5, (MAC_1, MAC_2)))
    # Without the first, without the redirect; without the second it is another, whole set.
    for part in (shown[1:], shown[:-1]):
        (found,) = tap_rules.recognise(part)
        assert found.does is None


def test_a_vanished_target_is_another_one() -> None:
    shown = as_shown(Mirror(0, (MAC_1,)))  # the kernel shows 0 when the device is gone
    (found,) = tap_rules.recognise(shown)
    assert not tap_rules.matches(found, Mirror(5, (MAC_1,)))


def test_programs_are_known_by_name() -> None:
    wanted = Program(5, (MAC_1,), HOST_MAC)
    options = attribute(7, wanted.name().encode() + b"\0")
    shown = Filter(1, "bpf", PRIORITIES[2], 0x4E50, 0, options)
    (found,) = tap_rules.recognise([shown])
    assert tap_rules.matches(found, wanted)
    assert not tap_rules.matches(found, replace(wanted, switched=True))
    assert not tap_rules.matches(found, Mirror(5, (MAC_1,)))
    assert len(wanted.name()) < 200  # CLS_BPF_NAME_LEN is 256


@pytest.mark.parametrize(
    "entry",
    [
        Filter(1, "u32", 100, 0x8004EF, 0, b""),
        Filter(1, "u32", PRIORITIES[0], 0x80000800, 0, b""),
        Filter(1, "u32", PRIORITIES[0], 0x800004EF, 3, b""),
        Filter(1, "bpf", PRIORITIES[0], 1, 0, attribute(7, b"nearpath \0")),
        Filter(1, "bpf", PRIORITIES[0], 0x4E50, 0, attribute(7, b"cil_from_container\0")),
        Filter(1, "matchall", PRIORITIES[0], 0x4EF, 0, b""),
    ],
)
def test_other_peoples_filters_are_not_ours(entry: Filter) -> None:
    assert not tap_rules.is_ours(entry)
    assert tap_rules.recognise([entry]) == []


def test_tables_are_no_rules() -> None:
    assert not tap_rules.is_rule(Filter(1, "u32", 7, 0x80000000, 0, b"\x08\0\4\0\1\0\0\0"))
    assert not tap_rules.is_rule(Filter(1, "bpf", 7, 0, 0, b""))
    assert tap_rules.is_rule(Filter(1, "u32", 7, 0x80000800, 0, b""))


def test_selector_is_as_the_kernel_wants_it() -> None:
    packed = u32.pack(u32.Rule(u32.to_address(b"\1\2\3\4\5\6")))
    selector = attributes(packed)[5]
    assert len(selector) == 16 + 2 * 16
    assert selector[:3] == b"\1\0\2"
    assert selector[16:32] == b"\xff\xff\xff\xff\1\2\3\4" + struct.pack("=ii", -14, 0)
    assert selector[32:48] == b"\xff\xff\0\0\5\6\0\0" + struct.pack("=ii", -10, 0)


@pytest.mark.parametrize(
    "options",
    [
        b"",
        attribute(5, b"\1\0\5"),
        attribute(5, bytes(16)),
        attribute(5, b"\1\0\xff" + bytes(13)),
        b"\xff\xff\5\0",
        b"\2\0\5\0",
    ],
)
def test_odd_options_are_no_rule(options: bytes) -> None:
    assert u32.unpack(options) is None


def test_other_actions_are_no_rule() -> None:
    packed = u32.pack(u32.Rule((), 5, redirects=True)).replace(b"mirred", b"police")
    assert u32.unpack(packed) is None


def test_text_from_the_kernel_may_be_anything() -> None:
    assert text(b"tap\xff\0rest") == "tap\\xff"
    assert text(None) == ""
