"""The page that bench_tap.py writes: what was measured, what it shows, where the lane loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.report import MISSED, size_text
from bench.tap_plan import (
    BRIDGE,
    FROM_VM,
    LATENCY,
    MIRROR,
    PEER,
    REDIRECT,
    SUPER_FROM_VM,
    SUPER_TO_VM,
    TO_VM,
    Arm,
)
from bench.tap_report import summary, tables
from nearpath.lanes.checksum import KEEP, SKIP, SOFTWARE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.tap_report import TapSeries

_PREFACE = """\
Written by `tests/bench/bench_tap.py --markdown`; run it on your node, for these numbers depend on
kernel, CPU and path.
"""

_LAYOUT = """\
A pod on the same node talks UDP to a virtual machine. The launcher pod is laid out as KubeVirt's
bridge binding does it, offloads and all; from arm to arm nearpath changes the rules and offloads
of one and the same VM, round by round, as its watcher does. In the guest's place is a process on
the tap that behaves like qemu with virtio-net: it leaves the checksums of what it sends open,
verifies those of what it gets without, fragments and puts together.

```
pod client ── eth0 ══ veth ─ bridge ─ veth ══ eth0-nic ─ k6t-eth0 ─ tap0 ── guest
                                                 └─── tap lane ───────┘
```

- **bridge** with checksums **keep** is a node without nearpath: the baseline of all ratios. Its
  packets go through netfilter's hooks in the launcher's namespace, without a rule there, for that
  is how a namespace begins on every node that has br_netfilter, which kube-proxy asks for. The
  last table is without. The node's own bridge has none in any arm.
- **mirror** (u32 and mirred), **redirect** (bpf_redirect) and **peer** (bpf_redirect_peer from
  the tap to the node's end of the veth) are the tap lane's modes.
- Checksums: **keep** leaves offloads as they are, **skip** makes sure that they are on. They were
  on here, as they are unless somebody has switched them off, so the two differ by noise alone and
  show how much of it there is. **software** switches them off at tap, pod NIC, host veth and
  bridge, and with them segmentation. peer goes around the device that would compute, so with
  software nearpath takes redirect instead.

*ratio*: to the baseline, median of the rounds; *worst*: the worst round. A question mark: the
target lies within the 95 % confidence interval of the ratio, so that the run does not tell.
"""

_LIMITS = """\
- A ratio says how much of the *whole* way between two sockets the lane saves, system calls, both
  stacks, the other three devices and (round trips) two switches between processes included. On a
  slower or busier machine those weigh more, and the ratios come closer to 1.
- UDP streams have a window (at most 64 messages, 400 frames), for on one CPU the sender would
  fill the tap's queue, and most would be lost. So they tell the CPU time of a message on its
  whole way, not what two CPUs would move.
- Messages above the MTU are fragmented, and each fragment pays the way: 12 of them for 16 KiB.
  Super packets (UDP_SEGMENT, as QUIC uses it; a guest's TCP is alike) cross it in one piece, and
  then copying costs more than the way: the lane has little to save there. With checksums by
  software the kernel cuts them first, which costs most of their throughput.
- There is no vhost thread, no exit from the guest and no guest's kernel. They come on top in
  every arm.
- Measured is the lane inside the launcher pod alone. A node whose own path is expensive (OVS,
  conntrack, a thousand services) has a smaller share to save here.
"""

_WHY = """\
Why not more: the lane takes the bridge inside the launcher out of the way, most of whose cost is
netfilter's hooks; two rules and a redirect remain. peer also spares one of the four ways through a
veth of a round trip, from the VM only. To the VM there is no such shortcut inside the pod:
bpf_redirect_peer works at ingress alone, and frames come to the pod's NIC from the node's egress.
It would take a program on the *other* pod's veth that sends them straight to this pod's NIC, past
the node's bridge.
"""


def markdown(series: Sequence[TapSeries], conditions: Mapping[str, str], picture: str) -> str:
    """The page.

    Args:
        picture: file name of the picture beside it; empty: none.
    """
    facts = "\n".join(f"- **{key}**: {value}" for key, value in conditions.items())
    shown = [f"![Ratios to the unmodified bridge]({picture})\n"] if picture else []
    loses = losses(series) or ["Nowhere beyond the noise."]
    parts = [
        "# Tap lane: bench\n",
        _PREFACE,
        *shown,
        "## What is compared\n",
        _LAYOUT,
        facts + "\n",
        "## What it shows\n",
        "Over all message sizes:\n",
        _list(findings(series)),
        summary(series).markdown(),
        "## Where it loses, or gains nothing\n",
        _list(loses),
        _WHY,
        "## What it does not show\n",
        _LIMITS,
        "## All figures\n",
        *(table.markdown() for table in tables(series)),
    ]
    return "\n".join(parts)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _span(group: Sequence[TapSeries], arm: Arm) -> str:
    """``0.88 to 0.91``, over the sizes of a test."""
    ratios = sorted(each.ratio(arm.name) for each in group)
    low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def findings(series: Sequence[TapSeries]) -> list[str]:
    """A sentence per test on what each mode reaches, and what checksums cost."""
    found = []
    for test, verb in (
        (LATENCY, "A round trip takes"),
        (TO_VM, "A stream to the VM moves"),
        (FROM_VM, "A stream from the VM moves"),
        (SUPER_TO_VM, "A stream of super packets to the VM moves"),
        (SUPER_FROM_VM, "A stream of super packets from the VM moves"),
    ):
        group = [each for each in series if each.point.test == test and each.point.netfilter]
        if not group:
            continue
        modes = ", ".join(
            f"{mode} {_span(group, Arm(mode, SKIP))}" for mode in (MIRROR, REDIRECT, PEER)
        )
        software = ", ".join(
            f"{mode} {_span(group, Arm(mode, SOFTWARE))}" for mode in (BRIDGE, MIRROR, REDIRECT)
        )
        unit = "times the bridge's time" if test == LATENCY else "times what the bridge moves"
        found.append(f"{verb} {modes} {unit}; with checksums by software: {software}.")
    plain = [each for each in series if not each.point.netfilter and each.point.test == LATENCY]
    if plain:
        modes = ", ".join(f"{m} {_span(plain, Arm(m, SKIP))}" for m in (MIRROR, REDIRECT, PEER))
        found.append(f"Where the launcher's bridge has no netfilter, a round trip takes {modes}.")
    return found


def losses(series: Sequence[TapSeries]) -> list[str]:
    """Targets that were missed, and where an arm of ours is slower than the unmodified bridge."""
    missed: dict[str, list[str]] = {}
    slower: dict[str, list[str]] = {}
    for each in series:
        plain = "" if each.point.netfilter else " without netfilter"
        for arm in each.point.arms:
            if arm.mode == BRIDGE or arm.checksum == KEEP or arm.name not in each.values:
                continue
            what = f"{each.point.test}{plain}, {arm.name}"
            figure = f"{each.ratio(arm.name):.2f} at {size_text(each.point.size)}"
            if each.verdict(arm.name).startswith(MISSED):
                unsure = " (within noise)" if each.verdict(arm.name).endswith("?") else ""
                asked = f"Target {each.target_text(arm.name)} missed: {what}"
                missed.setdefault(asked, []).append(figure + unsure)
            _, better = each.interval(arm.name)
            if not each.reaches(better, 1.0):
                slower.setdefault(f"Slower than the unmodified bridge: {what}", []).append(figure)
    return [
        f"{what}: {', '.join(figures)}." for what, figures in (*missed.items(), *slower.items())
    ]
