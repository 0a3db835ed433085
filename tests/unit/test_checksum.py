"""Checksum modes: what is judged, planned, recorded and undone, on a kernel that is pretended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearpath.kernel.offload import Features
from nearpath.lanes import checksum
from nearpath.lanes.checksum import Change, Device, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nearpath.kernel.offload import Door

GENERIC, SCTP, RX = "tx-checksum-ip-generic", "tx-checksum-sctp", "rx-checksum"
TAP = Device("pod", 4, "tap0", "tap")
NIC = Device("pod", 2, "eth0-nic", "nic")
BRIDGE = Device("pod", 3, "k6t-eth0", "bridge")
VETH = Device("host", 7, "veth1234", "veth")
ALL = (TAP, NIC, BRIDGE, VETH)
OFFERED = {
    "tap": frozenset({GENERIC, "tx-tcp-segmentation"}),
    "nic": frozenset({GENERIC, SCTP, RX, "tx-tcp-segmentation"}),
    "bridge": frozenset({GENERIC, "tx-tcp-segmentation"}),
    "veth": frozenset({GENERIC, SCTP, RX, "tx-tcp-segmentation"}),
}


@dataclass
class Kernel:
    """Devices of both namespaces, with offloads that are wanted; and a door to each."""

    wanted: dict[tuple[str, int], set[str]] = field(
        default_factory=lambda: {(d.where, d.ifindex): set(OFFERED[d.role]) for d in ALL}
    )
    # What the tap's guest has negotiated.
    guest: frozenset[str] = OFFERED["tap"]
    sets: int = 0

    def doors(self) -> Mapping[str, Door]:
        return {where: cast("Door", _Door(self, where)) for where in ("pod", "host")}

    def features(self, device: Device) -> Features | None:
        return _Door(self, device.where).features(device.ifindex)

    def switch(self, device: Device, feature: str, on: bool) -> None:
        _Door(self, device.where).want(device.ifindex, {feature: on})


@dataclass
class _Door:
    kernel: Kernel
    where: str

    def features(self, index: int) -> Features | None:
        wanted = self.kernel.wanted.get((self.where, index))
        if wanted is None:
            return None
        (role,) = (d.role for d in ALL if (d.where, d.ifindex) == (self.where, index))
        active = set(wanted) & self.kernel.guest if role == "tap" else set(wanted)
        if GENERIC not in active:
            active -= {"tx-tcp-segmentation"}
        return Features(OFFERED[role], frozenset(wanted), frozenset(active))

    def want(self, index: int, wanted: Mapping[str, bool]) -> bool:
        now = self.kernel.wanted.get((self.where, index))
        if now is None:
            return False
        assert wanted
        self.kernel.sets += 1
        for feature, on in wanted.items():
            (now.add if on else now.discard)(feature)
        return True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(checksum, "_readers", set[int])
    return Kernel()


def attend(
    kernel: Kernel, mode: str, ours: list[Change] | None = None, *, insist: bool = True
) -> checksum.Work:
    work = checksum.work_out(kernel.doors(), mode, [ALL], ours or [], insist=insist)
    checksum.execute(kernel.doors(), work.plan.steps)
    return work


# -- judge ------------------------------------------------------------------------------------


def test_what_we_switched_off_is_no_reason(kernel: Kernel) -> None:
    """From software back to skip at the first look, also where skip is only the default."""
    ours = attend(kernel, "software").plan.record
    assert ours
    work = attend(kernel, "skip", ours, insist=False)
    assert work.verdicts == [Verdict("skip", "")]
    assert kernel.wanted == Kernel().wanted


def judged(
    kernel: Kernel, *, insist: bool, readers: set[int] | None = None, **more: Any
) -> Verdict:
    seen = {device: kernel.features(device) for device in ALL}
    return checksum.judge("skip", seen, insist=insist, readers=readers or set(), **more)


@pytest.mark.parametrize("mode", ["software", "keep"])
def test_other_modes_are_in_force_as_asked(mode: str) -> None:
    assert checksum.judge(mode, {}, insist=False, readers={VETH.ifindex}) == (mode, "")


def test_skip_finds_all_on(kernel: Kernel) -> None:
    """Then it is in force whoever reads, for there is nothing to switch."""
    for insist, readers in product((True, False), (set[int](), {VETH.ifindex})):
        assert judged(kernel, insist=insist, readers=readers) == ("skip", "")


@pytest.mark.parametrize("device", [NIC, VETH])
@pytest.mark.parametrize("feature", [GENERIC, SCTP])
def test_skip_finds_something_off(kernel: Kernel, device: Device, feature: str) -> None:
    kernel.switch(device, feature, on=False)
    assert judged(kernel, insist=False) == ("keep", "switched-off")
    assert judged(kernel, insist=True) == ("skip", "")
    for insist in (True, False):
        verdict = judged(kernel, insist=insist, readers={VETH.ifindex})
        assert verdict == ("keep", "userspace-switch")
    # The same number in the pod's namespace is another device.
    assert judged(kernel, insist=True, readers={NIC.ifindex, TAP.ifindex}) == ("skip", "")


def test_bridge_and_segmentation_are_no_matter(kernel: Kernel) -> None:
    kernel.switch(BRIDGE, GENERIC, on=False)
    kernel.switch(NIC, "tx-tcp-segmentation", on=False)
    kernel.switch(NIC, RX, on=False)
    assert judged(kernel, insist=False) == ("skip", "")


def test_guest_that_takes_nothing(kernel: Kernel) -> None:
    kernel.guest = frozenset()
    assert judged(kernel, insist=False) == ("skip", "not-negotiated")
    assert judged(kernel, insist=True) == ("skip", "not-negotiated")
    kernel.switch(NIC, GENERIC, on=False)
    assert judged(kernel, insist=False) == ("keep", "switched-off")


def test_reader_comes_after_us(kernel: Kernel) -> None:
    """What we have switched on is what a switch in user space would suffer from."""
    ours = [Change("pod", NIC.ifindex, "eth0-nic", GENERIC, before=False, after=True)]
    elsewhere = [Change("pod", 99, "net1-nic", GENERIC, before=False, after=True)]
    busy = {VETH.ifindex}
    assert judged(kernel, insist=True, readers=busy, ours=ours) == ("keep", "userspace-switch")
    assert judged(kernel, insist=True, readers=busy, ours=elsewhere) == ("skip", "")
    assert judged(kernel, insist=True, ours=ours) == ("skip", "")


def test_interfaces_are_judged_alone(kernel: Kernel) -> None:
    """One interface of a VM does not change the mode of another."""
    other = Device("host", 9, "gone", "veth")
    kernel.switch(NIC, GENERIC, on=False)
    work = checksum.work_out(kernel.doors(), "skip", [ALL, [other]], insist=False)
    assert work.verdicts == [("keep", "switched-off"), ("skip", "")]


# -- plan -------------------------------------------------------------------------------------


def test_keep_does_nothing(kernel: Kernel) -> None:
    for device in ALL:
        kernel.switch(device, GENERIC, on=False)
    assert attend(kernel, "keep") == ([("keep", "")], ([], []))


def test_skip_by_default_does_nothing(kernel: Kernel) -> None:
    for device in ALL:
        kernel.switch(device, GENERIC, on=False)
    assert attend(kernel, "skip", insist=False).plan == ([], [])


def test_skip_by_name(kernel: Kernel) -> None:
    """On at tap, NIC and host veth; not at the bridge, and RX is not its business."""
    for device in ALL:
        for feature in (GENERIC, SCTP, RX):
            kernel.switch(device, feature, on=False)
    work = attend(kernel, "skip")
    assert {(change.name, change.feature) for change in work.plan.steps} == {
        ("tap0", GENERIC),
        ("eth0-nic", GENERIC),
        ("eth0-nic", SCTP),
        ("veth1234", GENERIC),
        ("veth1234", SCTP),
    }
    assert work.plan.record == work.plan.steps
    assert attend(kernel, "skip", work.plan.record).plan == ([], work.plan.record)


def test_device_with_offloads_by_family() -> None:
    """Some have no generic offload but one for IPv4 and one for IPv6; never all three."""
    by_family = frozenset({"tx-checksum-ipv4", "tx-checksum-ipv6"})
    now = Features(by_family, frozenset(), frozenset())
    plan = checksum.plan("skip", NIC, now, insist=True)
    assert [change.feature for change in plan.steps] == sorted(by_family)
    both = Features(by_family | {GENERIC}, frozenset(), frozenset())
    plan = checksum.plan("skip", NIC, both, insist=True)
    assert [change.feature for change in plan.steps] == [GENERIC]


def test_only_changeable_ones(kernel: Kernel) -> None:
    fixed = Features(frozenset(), frozenset({GENERIC, RX}), frozenset({GENERIC, RX}))
    assert checksum.plan("software", NIC, fixed) == ([], [])
    assert checksum.plan("software", NIC, None) == ([], [])


def test_one_request_per_device(kernel: Kernel) -> None:
    attend(kernel, "software")
    assert kernel.sets == len(ALL)


def test_first_before_wins(kernel: Kernel) -> None:
    """From mode to mode, the record holds what was there before the first."""
    kernel.switch(NIC, SCTP, on=False)
    before = {device: kernel.features(device) for device in ALL}
    ours: list[Change] = []
    for mode in ("software", "skip", "software", "software", "skip", "keep", "skip"):
        ours = attend(kernel, mode, ours).plan.record
    checksum.restore(kernel.doors(), ours)
    assert before == {device: kernel.features(device) for device in ALL}


def test_devices_that_left_the_wire(kernel: Kernel) -> None:
    """What we changed on a device that is part of no interface any more is undone."""
    work = attend(kernel, "software")
    work = checksum.work_out(kernel.doors(), "software", [[TAP, BRIDGE]], work.plan.record)
    checksum.execute(kernel.doors(), work.plan.steps)
    assert {change.name for change in work.plan.steps} == {"eth0-nic", "veth1234"}
    assert kernel.features(NIC) == Kernel().features(NIC)
    work = checksum.work_out(kernel.doors(), "software", [[TAP, BRIDGE]], work.plan.record)
    assert {change.name for change in work.plan.record} == {"tap0", "k6t-eth0"}


def test_devices_that_are_gone(kernel: Kernel) -> None:
    work = attend(kernel, "software")
    kernel.wanted.clear()
    assert checksum.execute(kernel.doors(), work.plan.steps) == []
    assert attend(kernel, "software", work.plan.record).plan == ([], [])
    checksum.restore(kernel.doors(), work.plan.record)


def test_restore_in_one_namespace(kernel: Kernel) -> None:
    """With a door to one namespace only, what was changed in the other is left alone."""
    work = attend(kernel, "software")
    checksum.restore({"host": kernel.doors()["host"]}, work.plan.record)
    assert kernel.features(VETH) == Kernel().features(VETH)
    assert kernel.features(NIC) != Kernel().features(NIC)


def test_what_does_not_take(kernel: Kernel) -> None:
    kernel.guest = frozenset()
    kernel.switch(TAP, GENERIC, on=False)
    work = checksum.work_out(kernel.doors(), "skip", [ALL], insist=True)
    assert checksum.execute(kernel.doors(), work.plan.steps) == work.plan.steps
    assert attend(kernel, "skip", work.plan.record).plan.steps == []


def test_may_bypass(kernel: Kernel) -> None:
    assert checksum.may_bypass(kernel.features(NIC))
    kernel.switch(NIC, GENERIC, on=False)
    assert not checksum.may_bypass(kernel.features(NIC))
    assert not checksum.may_bypass(None)


# What may happen to a node: a look with a mode, by somebody who is killed after so many of its
# steps and looks again later; or somebody else switches an offload.
LOOKS = st.tuples(st.sampled_from(checksum.MODES), st.booleans(), st.integers(0, 12))
SWITCHES = st.tuples(st.sampled_from(ALL), st.sampled_from([GENERIC, SCTP, RX]), st.booleans())


@given(st.lists(LOOKS | SWITCHES, max_size=12), LOOKS)
def test_whatever_happens_is_undone(
    events: list[tuple[Any, ...]], last: tuple[str, bool, int]
) -> None:
    """DEL leaves each offload as the last who was not us has left it.

    But for what somebody switches to what we intended before we have looked again (after a kill,
    or to and fro): that cannot be told from our own doing. A switch is an event to look at.
    """
    kernel, ours = Kernel(), list[Change]()
    theirs = {key: set(wanted) for key, wanted in kernel.wanted.items()}

    def look(mode: str, insist: bool, lived: int) -> bool:
        work = checksum.work_out(kernel.doors(), mode, [ALL], ours, insist=insist)
        ours[:] = [cast("Change", checksum.from_json(c._asdict())) for c in work.plan.record]
        checksum.execute(kernel.doors(), work.plan.steps[:lived])
        return bool(work.plan.steps)

    mode, insist = "keep", False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "_readers", set[int])
        for event in events:
            if isinstance(event[0], Device):
                device, feature, on = event
                key = (device.where, device.ifindex)
                if feature in OFFERED[device.role] and (feature in kernel.wanted[key]) != on:
                    kernel.switch(device, feature, on=on)
                    (theirs[key].add if on else theirs[key].discard)(feature)
            else:
                mode, insist, lived = event
                look(mode, insist, lived)
            for _ in range(4):  # what we switch is an event too
                if not look(mode, insist, 99):
                    break
            else:
                pytest.fail("there is always something to do")
        look(*last)
        checksum.restore(kernel.doors(), ours)
    assert kernel.wanted == theirs


# -- on disk ----------------------------------------------------------------------------------

GOOD = Change("pod", 2, "eth0-nic", GENERIC, before=True, after=False)


def test_json() -> None:
    assert checksum.from_json(GOOD._asdict()) == GOOD


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "pod",
        {},
        {"where": "moon"},
        {"where": ["pod"]},
        {"ifindex": 0},
        {"ifindex": -1},
        {"ifindex": 1 << 31},
        {"ifindex": True},
        {"ifindex": "2"},
        {"name": None},
        {"feature": "loopback"},
        {"feature": {}},
        {"before": 1},
        {"after": None},
    ],
)
def test_damaged_json(bad: Any) -> None:
    """Nothing is undone by what is no change of ours, and nothing raises."""
    value = {**GOOD._asdict(), **bad} if isinstance(bad, dict) and bad else bad
    assert checksum.from_json(value) is None


def test_words_cost_nothing() -> None:
    """The words for modes are there without the door, for who only wants the words."""
    sources = Path(__file__).parents[2] / "cni-plugin"
    code = (
        "import sys; from nearpath.lanes import checksum; "
        "print('nearpath.kernel.offload' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={"PYTHONPATH": str(sources)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "False\n"
