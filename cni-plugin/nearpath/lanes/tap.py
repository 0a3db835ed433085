"""Tap lane: frames go between a virtual machine's tap and its pod's NIC without the bridge.

observe() what is there, plan() what is to change, execute() it. Looking again changes nothing
unless something has changed meanwhile: a tap that was plugged anew has another ifindex, a
bridge another MAC address. The rules themselves are in tap_rules.py.

Modes: "mirror" (u32 and mirred), "redirect" (bpf_redirect) and "peer": frames of the virtual
machine enter the host's namespace at once, by bpf_redirect_peer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from errno import EBUSY, EEXIST, ENODEV
from typing import TYPE_CHECKING

from nearpath.datapath import libbpf
from nearpath.datapath.tap_programs import Program
from nearpath.errors import BpfError
from nearpath.kernel.rtnl import EGRESS, INGRESS, RtnlError
from nearpath.lanes import tap_rules, topology
from nearpath.lanes.tap_rules import MOST_RULES, PRIORITIES, Mirror, RuleSet
from nearpath.lanes.topology import Wire

if TYPE_CHECKING:
    from nearpath.kernel.rtnl import Qdisc, Rtnl

__all__ = ["Device", "HostEnd", "Observed", "Outcome", "Plan", "Wire"]

OFF, MIRROR, REDIRECT, PEER = "off", "mirror", "redirect", "peer"
# A pod may make as many qdiscs as it likes: of those on devices that are in no wire (any more)
# so many are looked at.
_MOST_QDISCS, _MOST_DEVICES = 4096, 64
# A qdisc may be busy for a moment while others work on the same device.
_TRIES, _PAUSE = 5, 0.01  # seconds, longer with each try


class _Ours(Enum):
    """What is to become of a qdisc that has no rules any more."""

    NO = 0  # it is not ours
    KEEP = 1
    DELETE = 2


@dataclass(frozen=True)
class HostEnd:
    """What is known of the other end of a pod's veth.

    Attributes:
        peer: ifindex of its own other end, in the pod.
        switched: it is the port of a bridge, OVS or the like.
        has_foreign_bpf: programs at its ingress, which frames of mode "peer" would meet in a
            way that they may not expect (or, XDP, would not meet at all).
    """

    index: int
    name: str
    address: bytes
    peer: int
    switched: bool
    has_foreign_bpf: bool


@dataclass(frozen=True)
class Device:
    """What is at the ingress of one device.

    Attributes:
        qdisc: its ``ingress`` or ``clsact`` qdisc, or None.
        sets: our rules.
        taken: priorities among ours at which there is anything.
        foreign: other people have filters there, at ingress or egress.
    """

    qdisc: Qdisc | None = None
    sets: tuple[RuleSet, ...] = ()
    taken: frozenset[int] = frozenset()
    foreign: bool = False


@dataclass(frozen=True)
class Observed:
    """What there is in a pod's namespace; devices by ifindex."""

    wires: list[Wire]
    devices: dict[int, Device]


@dataclass(frozen=True)
class Outcome:
    """What becomes of a wire.

    Attributes:
        mode: in force, or "off".
        reason: why it is not the mode that was asked for, a stable word; else empty.
    """

    wire: Wire
    mode: str
    reason: str


@dataclass(frozen=True)
class MakeQdisc:
    """Make an ingress qdisc on a device."""

    index: int


@dataclass(frozen=True)
class DeleteQdisc:
    """Delete the qdisc of a device if there is nothing on it."""

    index: int


@dataclass(frozen=True)
class Add:
    """Put rules on a device."""

    index: int
    priority: int
    what: Mirror | Program


@dataclass(frozen=True)
class Remove:
    """Take rules of ours away."""

    index: int
    what: RuleSet


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order.

    Attributes:
        outcomes: one for each observed wire.
        made: ifindexes of devices whose qdisc is ours once the plan is carried out. To be on
            disk before that.
    """

    steps: list[MakeQdisc | DeleteQdisc | Add | Remove] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    made: set[int] = field(default_factory=set)


def observe(pod: Rtnl) -> Observed:
    """Look at wires, and at rules of ours wherever they are.

    Raises:
        NearpathError: the kernel does not answer.
    """
    wires = topology.wires(pod)
    qdiscs = pod.qdiscs(_MOST_QDISCS)
    wired = [link.index for wire in wires for link in (wire.tap, wire.nic) if link]
    others = sorted(set(qdiscs) - set(wired))[:_MOST_DEVICES]
    return Observed(
        wires, {index: _device(pod, index, qdiscs.get(index)) for index in (*wired, *others)}
    )


def _device(pod: Rtnl, index: int, qdisc: Qdisc | None) -> Device:
    if qdisc is None:
        return Device()
    entries = pod.filters(index, INGRESS, MOST_RULES)
    if len(entries) == MOST_RULES:  # ours are the last, behind all that there may be
        for priority in PRIORITIES:
            entries += pod.filters(index, INGRESS, MOST_RULES, priority)
    rules = [entry for entry in entries if tap_rules.is_rule(entry)]
    foreign = [entry for entry in rules if not tap_rules.is_ours(entry)]
    if qdisc.kind == "clsact":
        foreign += filter(tap_rules.is_rule, pod.filters(index, EGRESS, MOST_RULES))
    return Device(
        qdisc,
        tuple(tap_rules.recognise(rules)),
        frozenset(entry.priority for entry in entries) & frozenset(PRIORITIES),
        bool(foreign),
    )


def plan(
    seen: Observed,
    mode: str,
    made: set[int],
    host: dict[int, HostEnd],
    *,
    withdraw: bool = False,
) -> Plan:
    """Work out what is to change.

    Args:
        mode: that is wanted for all wires.
        made: ifindexes of devices whose qdisc is ours.
        host: by ifindex of the pod's NIC; those that mode "peer" may lead to.
        withdraw: with mode "off": also delete our qdiscs on wires that carry frames. What a
            device is to send meanwhile, for some milliseconds, is lost, as when they are made
            (qdisc_graft() in net/sched/sch_api.c deactivates it).
    """
    result, wanted = Plan(), dict[int, Mirror | Program]()
    for wire in seen.wires:
        outcome = _outcome(seen, wire, mode, host)
        result.outcomes.append(outcome)
        if outcome.mode != OFF and wire.tap and wire.nic:
            end = host[wire.nic.index] if outcome.mode == PEER else None
            wanted[wire.tap.index] = _rules(wire, wire.nic.index, outcome.mode, end)
            wanted[wire.nic.index] = _rules(wire, wire.tap.index, outcome.mode, None)
    whole = [wire for wire in seen.wires if wire.tap and wire.nic and not withdraw]
    live = {link.index for wire in whole for link in (wire.tap, wire.nic) if link}
    for index in sorted(seen.devices):
        ours = _Ours.NO if index not in made else _Ours.KEEP if index in live else _Ours.DELETE
        _plan_device(result, index, seen.devices[index], wanted.get(index), ours)
    return result


def _outcome(seen: Observed, wire: Wire, mode: str, host: dict[int, HostEnd]) -> Outcome:
    if mode == OFF or wire.reason or wire.tap is None or wire.nic is None:
        return Outcome(wire, OFF, wire.reason)
    for index in (wire.tap.index, wire.nic.index):
        device = seen.devices[index]
        if device.qdisc and device.qdisc.shared:
            return Outcome(wire, OFF, "shared-block")  # filters there are not this device's alone
        if not device.sets and device.taken == frozenset(PRIORITIES):
            return Outcome(wire, OFF, "no-priority")
    if mode == PEER:
        end = host.get(wire.nic.index)
        # The peer may be in a third namespace, where its ifindex is another's here; and what
        # would stay in the same namespace bpf_redirect_peer() drops.
        known = end is not None and end.peer == wire.nic.index and wire.nic.peer_elsewhere
        if end is None or not known or end.has_foreign_bpf:
            return Outcome(wire, REDIRECT, "peer-unavailable")
    return Outcome(wire, mode, "")


def _rules(wire: Wire, target: int, mode: str, end: HostEnd | None) -> Mirror | Program:
    links = (wire.bridge, wire.tap, wire.nic)
    # The bridge has the address of one of its ports, unless somebody chose another.
    own = tuple(dict.fromkeys(link.address for link in links if link and len(link.address) == 6))
    if mode == MIRROR:
        return Mirror(target, own)
    if end is None:
        return Program(target, own)
    return Program(target, own, end.address, end.switched)


def _plan_device(
    result: Plan, index: int, device: Device, wanted: Mirror | Program | None, ours: _Ours
) -> None:
    stale = list(device.sets)
    if wanted is not None:
        fit = next((found for found in stale if tap_rules.matches(found, wanted)), None)
        if fit is not None:
            stale.remove(fit)
        else:
            if device.qdisc is None:
                result.steps.append(MakeQdisc(index))
                result.made.add(index)
            # The new rules before the old ones go, so that no frame meets neither.
            free = [priority for priority in PRIORITIES if priority not in device.taken]
            result.steps.append(Add(index, free[0] if free else PRIORITIES[0], wanted))
    result.steps.extend(Remove(index, found) for found in stale)
    if device.qdisc is None or ours is _Ours.NO:
        return
    idle = wanted is None and not device.foreign
    if ours is _Ours.DELETE and idle and device.qdisc.kind == "ingress":
        result.steps.append(DeleteQdisc(index))
    else:
        result.made.add(index)


def execute(pod: Rtnl, plan: Plan) -> None:
    """Carry out a plan; devices that are gone meanwhile are left to the next look.

    Raises:
        RtnlError: the kernel refused, also after some more tries if something was busy.
        BpfError: it refused a program.
    """
    for step in plan.steps:
        for attempt in range(1, _TRIES + 1):
            try:
                _carry_out(pod, step)
            except RtnlError as error:
                if error.errno == ENODEV:
                    break
                if isinstance(step, MakeQdisc) and error.errno == EEXIST:
                    break  # somebody else was faster
                if error.errno not in {EBUSY, EEXIST} or attempt == _TRIES:
                    raise
                time.sleep(_PAUSE * attempt)
            else:
                break


def _carry_out(pod: Rtnl, step: MakeQdisc | DeleteQdisc | Add | Remove) -> None:
    match step:
        case MakeQdisc():
            # Not clsact: all that the device sends would pass its empty egress (2 % of a stream).
            pod.add_ingress(step.index)
        case DeleteQdisc():
            qdisc = pod.qdiscs(_MOST_QDISCS).get(step.index)
            device = _device(pod, step.index, qdisc)  # once more: somebody may have come
            if qdisc and qdisc.kind == "ingress" and not device.foreign and not device.sets:
                pod.delete_ingress(step.index)
        case Add():
            tap_rules.add(pod, step.index, step.priority, step.what)
        case Remove():
            tap_rules.remove(pod, step.index, step.what)


def counts(pod: Rtnl, seen: Observed) -> dict[int, dict[str, dict[str, int]]]:
    """What took the lane since the rules are there, by ifindex of the tap.

    Packets are segments, but for frames of more than one segment from a virtual machine in
    mode "mirror": the kernel does not count those, for it does not know how many they are.
    Bytes are without Ethernet headers.

    Returns:
        ``{"from_vm": {"packets", "bytes"}, "to_vm": {"packets", "bytes"}}`` for each.
    """
    del pod  # what the kernel counted came with the rules
    return {
        wire.tap.index: {"from_vm": _sum(seen, wire.tap.index), "to_vm": _sum(seen, wire.nic.index)}
        for wire in seen.wires
        if wire.tap and wire.nic
    }


def _sum(seen: Observed, index: int) -> dict[str, int]:
    sets = seen.devices[index].sets
    return {
        "packets": sum(found.packets for found in sets),
        "bytes": sum(found.bytes for found in sets),
    }


def host_end(host: Rtnl, index: int) -> HostEnd | None:
    """Look at the host's end of a veth; None: it is not there.

    Args:
        host: opened in the host's namespace, where the thread is, too.
    """
    link = host.link(index)
    if link is None:
        return None
    filters = host.filters(index, INGRESS, MOST_RULES)
    foreign = link.xdp or any(entry.kind == "bpf" for entry in filters)
    if not foreign:
        try:
            foreign = libbpf.has_tcx(index)
        except BpfError:  # no libbpf to ask: nothing is known
            foreign = True
    switched = link.master != 0
    return HostEnd(index, link.name, link.address, link.peer, switched, foreign)
