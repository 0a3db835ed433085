"""The rules of the tap lane on one device, and how to tell them from other people's.

On the tap and on the pod's NIC, at ingress:

    u32 to <MAC of bridge, tap, NIC>   pass: frames for the pod itself
    u32 to any single station          mirred redirect to the other device

or, in the modes "redirect" and "peer", one BPF program that does the same (tap_programs.py).
What matches neither, broadcast and multicast, goes by the bridge as ever.

They have a priority of PRIORITIES, behind all that the kernel gives out by itself (from 49152
down), so other people's rules come first; within it, handles of our own. A new set is put at
another priority before the old one goes, so that no frame meets neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nearpath.datapath import tap_programs
from nearpath.kernel import u32
from nearpath.kernel.rtnl import INGRESS, RtnlError

if TYPE_CHECKING:
    from nearpath.datapath.tap_programs import Program
    from nearpath.kernel.rtnl import Filter, Rtnl

PRIORITIES = range(50400, 50408)
# Nodes of u32's hash table, and the handle of a BPF filter.
_PASS = tuple(range(0x4E1, 0x4E1 + tap_programs.ADDRESSES))
_REDIRECT = 0x4EF
_BPF = 0x4E50
_NODE = 0xFFF  # of a u32 filter's handle: its place in a bucket of a hash table
MOST_RULES = 64  # to look at, at one priority or of one device


@dataclass(frozen=True)
class Mirror:
    """What u32 and mirred are to do: as the program of tap_programs.Program."""

    target: int
    own: tuple[bytes, ...]

    def rules(self) -> list[tuple[int, u32.Rule]]:
        """Node and rule, in the order in which they are to be added."""
        rules = [
            (node, u32.Rule(u32.to_address(address)))
            for node, address in zip(_PASS, self.own, strict=False)
        ]
        return [*rules, (_REDIRECT, u32.Rule(u32.to_one(), self.target, redirects=True))]


@dataclass(frozen=True)
class RuleSet:
    """Rules of ours at one priority of a device.

    Attributes:
        entries: as the kernel shows them.
        does: what they do, to be compared with what they should; None: something else.
        alone: nobody else has rules at this priority.
        packets, bytes: that they have redirected.
    """

    priority: int
    entries: tuple[Filter, ...]
    does: Mirror | str | None
    alone: bool = True
    packets: int = 0
    bytes: int = 0


def is_ours(entry: Filter) -> bool:
    """True if this is one of our rules."""
    if entry.priority not in PRIORITIES or entry.chain:
        return False
    if entry.kind == "u32":
        return entry.handle & _NODE in {*_PASS, _REDIRECT}
    if entry.kind == "bpf":
        return entry.handle == _BPF and u32.unpack_bpf(entry.options)[0].startswith("nearpath ")
    return False


def is_rule(entry: Filter) -> bool:
    """True if it is a filter and not just one of u32's tables, or a priority without any."""
    if entry.kind == "u32":
        return bool(entry.handle & _NODE)
    return bool(entry.handle or entry.options)


def recognise(rules: list[Filter]) -> list[RuleSet]:
    """Our rules among those of a device at ingress, by priority."""
    found: dict[int, list[Filter]] = {}
    others = set()
    for entry in rules:
        if is_ours(entry):
            found.setdefault(entry.priority, []).append(entry)
        else:
            others.add(entry.priority)
    return [
        replace(_read(priority, tuple(found[priority])), alone=priority not in others)
        for priority in sorted(found)
    ]


def _read(priority: int, entries: tuple[Filter, ...]) -> RuleSet:
    if any(entry.kind == "bpf" for entry in entries):
        name, number = u32.unpack_bpf(entries[0].options)
        packets, count = tap_programs.counts(number)
        only = name if len(entries) == 1 else None
        return RuleSet(priority, entries, only, packets=packets, bytes=count)
    rules = {entry.handle & _NODE: u32.unpack(entry.options) for entry in entries}
    last = rules.get(_REDIRECT)
    if last is None:
        return RuleSet(priority, entries, None)
    passing = [rule for node in _PASS if (rule := rules.get(node)) is not None]
    does = Mirror(last.target, tuple(u32.address_of(rule.keys) for rule in passing))
    shown = {node: rule and (rule.keys, rule.redirects) for node, rule in rules.items()}
    complete = shown == {node: (rule.keys, rule.redirects) for node, rule in does.rules()}
    return RuleSet(
        priority,
        entries,
        does if complete else None,
        packets=last.packets,
        bytes=last.bytes,
    )


def matches(found: RuleSet, wanted: Mirror | Program) -> bool:
    """True if the rules that are there do what is wanted."""
    if isinstance(wanted, Mirror):
        return found.does == wanted
    return found.does == wanted.name()


def add(pod: Rtnl, index: int, priority: int, wanted: Mirror | Program) -> None:
    """Put rules on a device.

    Raises:
        RtnlError: the kernel refused; nothing is left of them.
        BpfError: the kernel refused the program.
    """
    if not isinstance(wanted, Mirror):
        with tap_programs.Loaded(wanted) as program:
            # tc filter add dev <index> ingress prio <priority> handle 0x4e50 protocol all
            #   bpf direct-action object-file tap_lane.bpf.o section tc
            options = u32.pack_bpf(program.number, wanted.name())
            pod.add_filter(index, priority, _BPF, "bpf", options)
        return
    try:
        # tc filter add dev <index> ingress prio <priority> handle ::4e1 protocol all
        #   u32 match u32 <MAC> at -14 match u16 <MAC> at -10 flowid 1:
        # tc filter add dev <index> ingress prio <priority> handle ::4ef protocol all
        #   u32 match u8 0 1 at -14 action mirred egress redirect dev <target>
        for node, rule in wanted.rules():
            pod.add_filter(index, priority, node, "u32", u32.pack(rule))
    except RtnlError:
        rules = filter(is_rule, pod.filters(index, INGRESS, MOST_RULES, priority))
        for found in recognise([*rules]):
            remove(pod, index, found)
        raise


def remove(pod: Rtnl, index: int, found: RuleSet) -> None:
    """Take rules away."""
    if found.alone:
        # As a whole: beside other u32 filters on the device the kernel keeps the empty table of
        # ours when the last of its rules goes (u32_delete).
        pod.delete_priority(index, found.priority, found.entries[0].kind)
        return
    # The redirect first: what is left lets all pass.
    for entry in sorted(found.entries, key=lambda entry: -(entry.handle & _NODE)):
        pod.delete_filter(entry)
