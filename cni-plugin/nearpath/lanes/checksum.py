"""Checksums of a VM's packets: who computes them, and who does not.

A guest that has negotiated it leaves the checksum to the host: the packet carries the sum of
its pseudo-header and the place where the rest belongs (CHECKSUM_PARTIAL). It keeps that way
through tap, bridge, veths and into the other guest or socket, and nobody ever computes it; the
first device that cannot send such a packet (no TX checksum offload) makes the kernel compute
(skb_checksum_help), and a network card that can computes it itself.

    skip       TX checksum offload stays, or is switched, on at tap, pod NIC and host veth, so
               inside the node nobody computes.
    software   TX and RX checksum offload off at tap, pod NIC, host veth and bridge: every packet
               that leaves one of them carries a checksum. Segmentation offload goes with it.
    keep       nothing is touched.

``skip`` leaves alone what somebody else has switched off unless it was asked for by name: these
devices come with offload on, so off was somebody's decision, and we cannot know why (a network
card that computes wrong sums, a DHCP client that reads raw frames). And asked for by name it
still does not touch devices whose host veth a program reads by a packet socket: a switch in
user space (OVS with the netdev datapath) sees the frame, not that its checksum is missing.
It never touches the bridge, whose offload concerns only what the bridge itself sends: KubeVirt
before 1.8 switches it off, so that the answers of its DHCP server carry a checksum.

What changes is what somebody *wants* of a device; consequences come and go by the kernel's own
rules (nearpath.kernel.offload).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import Any

    from nearpath.kernel.offload import Door, Features

SKIP, SOFTWARE, KEEP = "skip", "software", "keep"
MODES = (SKIP, SOFTWARE, KEEP)
POD, HOST = "pod", "host"
TAP, NIC, VETH, BRIDGE = "tap", "nic", "veth", "bridge"

# Why the mode in force is another than the wanted one; stable words.
USERSPACE_SWITCH = "userspace-switch"  # a packet socket reads what the host veth receives
SWITCHED_OFF = "switched-off"  # somebody else has, and skip was not asked for by name
# Or that it is in force and the guest does not make use of it.
NOT_NEGOTIATED = "not-negotiated"  # the guest has not (yet) asked for packets without checksum

_GENERIC = "tx-checksum-ip-generic"
_BY_FAMILY = frozenset({"tx-checksum-ipv4", "tx-checksum-ipv6"})
_INTERNET = _BY_FAMILY | {_GENERIC}
_TRANSMIT = _INTERNET | {"tx-checksum-sctp"}
_RECEIVE = frozenset({"rx-checksum"})
_SKIPPING = frozenset({TAP, NIC, VETH})


class Device(NamedTuple):
    """A device on the way of a VM's packets.

    Attributes:
        where: POD or HOST, the network namespace that it is in.
        ifindex: in that namespace.
        name: for people; nothing is looked up by it.
        role: TAP, NIC (the pod's veth end), VETH (its host end), BRIDGE, or empty: none now.
    """

    where: str
    ifindex: int
    name: str
    role: str


class Change(NamedTuple):
    """One offload that we switch; what is on disk before we do.

    Attributes:
        feature: as ``ethtool -k`` names it.
        before: whether it was wanted, by the last who switched it and was not us.
        after: what we make of it.
    """

    where: str
    ifindex: int
    name: str
    feature: str
    before: bool
    after: bool


class Verdict(NamedTuple):
    """The mode in force, and why it is not the wanted one (or what it lacks); else empty."""

    mode: str
    reason: str


class Plan(NamedTuple):
    """What to do.

    Attributes:
        steps: offloads to switch now.
        record: what restore() needs, to be on disk before the steps are taken: our changes
            that are in force or will be. One that is being undone stays until the next plan
            sees that it is, so that nothing is lost if we are killed in between.
    """

    steps: list[Change]
    record: list[Change]


class Work(NamedTuple):
    """The plan of a whole pod, and the verdict on each of its interfaces."""

    verdicts: list[Verdict]
    plan: Plan


# -- observed and wanted state, and the difference --------------------------------------------


def judge(
    wanted: str,
    seen: Mapping[Device, Features | None],
    *,
    insist: bool,
    readers: Collection[int] = (),
    ours: Collection[Change] = (),
) -> Verdict:
    """Which mode to put in force for one interface of a VM.

    Args:
        wanted: one of MODES.
        seen: its devices and their offloads; None: gone.
        insist: the mode was asked for by name, not by default.
        readers: ifindexes of the host's namespace with packet sockets
            (offload.packet_socket_indexes). A capture by tcpdump looks the same as a switch;
            while it lasts, skip gives way to keep.
        ours: recorded changes.
    """
    if wanted != SKIP:
        return Verdict(wanted, "")
    is_read = any(device.role == VETH and device.ifindex in readers for device in seen)
    has_ours = any(
        change.after and (change.where, change.ifindex) == (device.where, device.ifindex)
        for change in ours
        for device in seen
    )
    # What we have switched off ourselves (software, before) comes back with this plan.
    off_by_us = {(c.where, c.ifindex, c.feature) for c in ours if c.before and not c.after}
    is_off = any(
        (device.where, device.ifindex, feature) not in off_by_us
        for device, now in seen.items()
        if device.role in {NIC, VETH}
        for feature in _missing(now)
    )
    # Where nobody has switched it off and we have not switched it on, whoever reads is none
    # of our business.
    if is_read and (is_off or has_ours):
        return Verdict(KEEP, USERSPACE_SWITCH)
    if is_off and not insist:
        return Verdict(KEEP, SWITCHED_OFF)
    # Of a tap that we have switched off nothing can be told yet.
    taps = [
        now
        for device, now in seen.items()
        if now
        and device.role == TAP
        and not any(
            (device.where, device.ifindex, name) in off_by_us for name in _INTERNET - now.wanted
        )
    ]
    if any(not now.active & _INTERNET for now in taps):
        return Verdict(SKIP, NOT_NEGOTIATED)
    return Verdict(SKIP, "")


def plan(
    mode: str,
    device: Device,
    now: Features | None,
    ours: Iterable[Change] = (),
    *,
    insist: bool = False,
) -> Plan:
    """The way from what is to what a mode wants, on one device.

    What we changed and this mode does not want is undone, unless somebody else has switched
    it since; so another mode needs nothing but another plan.

    Args:
        mode: the one in force (Verdict.mode).
        now: the device's offloads; None: gone.
        ours: recorded changes.
        insist: as for judge().
    """
    result = Plan([], [])
    if now is None:
        return result
    own = {
        change.feature: change
        for change in ours
        if (change.where, change.ifindex) == (device.where, device.ifindex)
    }
    for feature in sorted((_TRANSMIT | _RECEIVE) & now.changeable):
        current = feature in now.wanted
        mine = own.get(feature)
        if mine and mine.after != current:
            mine = None  # not done (we were killed), undone, or switched by somebody since
        origin = mine.before if mine else current
        target = origin
        if mode == SOFTWARE:
            target = False
        elif mode == SKIP and insist and device.role in _SKIPPING:
            target = origin or feature in _needed(now)
        change = Change(device.where, device.ifindex, device.name, feature, origin, target)
        if target != current:
            result.steps.append(change)
        if target != origin:
            result.record.append(change)
        elif mine:
            result.record.append(mine)
    return result


def _needed(now: Features) -> frozenset[str]:
    """What a device needs so that packets pass it without checksum.

    The generic offload, or where there is none those of IPv4 and IPv6: the kernel does not
    allow both. And that of SCTP.
    """
    offered = _TRANSMIT & now.changeable
    return offered - _BY_FAMILY if _GENERIC in offered else offered


def _missing(now: Features | None) -> frozenset[str]:
    return _needed(now) - now.wanted if now else frozenset()


def may_bypass(nic: Features | None) -> bool:
    """True if a VM's packets may reach the host veth around the pod NIC's transmit path.

    There the kernel computes their checksums if the NIC's offload is off; what goes around it
    (bpf_redirect_peer) would arrive without.
    """
    return nic is not None and bool(nic.active & _INTERNET)


# -- through the doors ------------------------------------------------------------------------


def work_out(
    doors: Mapping[str, Door],
    wanted: str,
    interfaces: Sequence[Sequence[Device]],
    ours: Sequence[Change] = (),
    *,
    insist: bool = False,
) -> Work:
    """Look at a pod's devices and plan what its mode wants. Nothing is changed.

    To be repeated whenever something may have changed: a guest that boots switches its tap's
    offloads, and a packet socket on the host veth comes and goes without an event. Changes on
    devices of none of the interfaces are undone.

    Args:
        doors: POD and HOST, each opened in its namespace. The thread is in the host's.
        wanted: one of MODES.
        interfaces: of each interface of the VM the devices that its packets pass.
        ours: what the last plan recorded.
        insist: the mode was asked for by name (annotation, configuration), not by default.

    Raises:
        OffloadError: a device's offloads cannot be read.
    """
    readers = _readers() if wanted == SKIP else set()
    work = Work([], Plan([], []))
    left = {(c.where, c.ifindex): Device(c.where, c.ifindex, c.name, "") for c in ours}
    for devices in interfaces:
        seen = {device: doors[device.where].features(device.ifindex) for device in devices}
        verdict = judge(wanted, seen, insist=insist, readers=readers, ours=ours)
        work.verdicts.append(verdict)
        for device, now in seen.items():
            left.pop((device.where, device.ifindex), None)
            _add(work.plan, plan(verdict.mode, device, now, ours, insist=insist))
    for device in left.values():
        _add(work.plan, plan(KEEP, device, doors[device.where].features(device.ifindex), ours))
    return work


def _add(total: Plan, more: Plan) -> None:
    total.steps.extend(more.steps)
    total.record.extend(more.record)


def _readers() -> set[int]:
    from nearpath.kernel import offload  # not at the top: who wants our words needs no door

    return offload.packet_socket_indexes()


def execute(doors: Mapping[str, Door], steps: Iterable[Change]) -> list[Change]:
    """Take the planned steps; those that did not take.

    A tap does not take what its guest has not negotiated, and that is right. A device that
    is gone is no error.

    Raises:
        OffloadError: the kernel refuses.
    """
    refused = []
    for (where, index), changes in _by_device(steps).items():
        door = doors[where]
        if door.want(index, {change.feature: change.after for change in changes}):
            now = door.features(index)
            refused += [c for c in changes if now and (c.feature in now.active) != c.after]
    return refused


def restore(doors: Mapping[str, Door], ours: Iterable[Change]) -> None:
    """Put back what we changed, from the record alone.

    Doing it twice is harmless. A device that is gone, and an offload that somebody else has
    switched since, are left alone; but one that was switched to and fro looks like our own.

    Args:
        doors: POD and HOST, or only one; what was changed elsewhere is passed over.

    Raises:
        OffloadError: the kernel refuses.
    """
    for (where, index), changes in _by_device(ours).items():
        if where in doors:
            device = Device(where, index, changes[0].name, "")
            execute(doors, plan(KEEP, device, doors[where].features(index), changes).steps)


def _by_device(changes: Iterable[Change]) -> dict[tuple[str, int], list[Change]]:
    devices: dict[tuple[str, int], list[Change]] = {}
    for change in changes:
        devices.setdefault((change.where, change.ifindex), []).append(change)
    return devices


# -- on disk ----------------------------------------------------------------------------------


def from_json(value: Any) -> Change | None:
    """One change out of a record (``Change._asdict()``); None if that is damaged."""
    if not isinstance(value, dict):
        return None
    where, index, name, feature = (value.get(k) for k in ("where", "ifindex", "name", "feature"))
    before, after = value.get("before"), value.get("after")
    if (
        isinstance(where, str)
        and where in {POD, HOST}
        and isinstance(index, int)
        and not isinstance(index, bool)
        and 0 < index < 1 << 31
        and isinstance(name, str)
        and isinstance(feature, str)
        and feature in _TRANSMIT | _RECEIVE
        and isinstance(before, bool)
        and isinstance(after, bool)
    ):
        return Change(where, index, name, feature, before, after)
    return None
