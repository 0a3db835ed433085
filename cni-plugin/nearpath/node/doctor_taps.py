"""doctor's questions about virtual machines: can this kernel do it, and is it being done?"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nearpath.datapath.tap_programs import Program
from nearpath.errors import NearpathError
from nearpath.kernel import netns, rtnl, throwaway
from nearpath.lanes import tap, tap_rules, vm_state, watch
from nearpath.lanes.tap_rules import Mirror
from nearpath.node import taps
from nearpath.node.finding import OK, WARN, Finding

if TYPE_CHECKING:
    from nearpath.place import Place

_LOOPBACK = 1  # ifindex, in every namespace
_ADDRESS = b"\x02\0\0\0\0\x01"


def refused_modes() -> dict[str, str]:
    """Modes of the tap lane that this kernel refuses, and its words; tried on a throwaway veth.

    Raises:
        NearpathError: they cannot be tried.
    """
    refused = {}
    with ExitStack() as stack:
        here, there = (throwaway.new_netns() for _ in range(2))
        stack.callback(os.close, here)
        stack.callback(os.close, there)
        stack.enter_context(netns.entered(f"/proc/self/fd/{here}"))
        throwaway.add_veth("np0", "np1", there)
        door = stack.enter_context(rtnl.Rtnl())
        index = socket.if_nametoindex("np0")
        try:
            door.add_ingress(index)
        except NearpathError as error:
            return dict.fromkeys((tap.MIRROR, tap.REDIRECT, tap.PEER), str(error))
        rules: dict[str, Mirror | Program] = {
            tap.MIRROR: Mirror(_LOOPBACK, (_ADDRESS,)),
            tap.REDIRECT: Program(_LOOPBACK, (_ADDRESS,)),
            tap.PEER: Program(index, (_ADDRESS,), _ADDRESS),
        }
        for priority, (mode, wanted) in zip(tap_rules.PRIORITIES, rules.items(), strict=False):
            try:
                tap_rules.add(door, index, priority, wanted)
            except NearpathError as error:
                refused[mode] = str(error)
    return refused


def check_modes(refused: dict[str, str] | NearpathError) -> Finding:
    """What the kernel can do for virtual machines."""
    name = "tap-lane"
    if isinstance(refused, NearpathError):
        return Finding(
            name,
            WARN,
            f"cannot be tried: {refused}",
            "virtual machines stay on their bridge, most likely",
            refused.remedy or "see the kernel's log",
        )
    if not refused:
        return Finding(name, OK, "mirror, redirect and peer work")
    text = "; ".join(f"{mode}: {said}" for mode, said in refused.items())
    if tap.MIRROR in refused:
        return Finding(
            name,
            WARN,
            text,
            "the tap lane's default: virtual machines stay on their bridge",
            "modprobe cls_u32 act_mirred sch_ingress (CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED)",
        )
    return Finding(
        name,
        WARN,
        text,
        f"the modes {' and '.join(refused)} of the tap lane",
        'keep "tapLane": "mirror"',
    )


def check_watcher(running: bool, machines: int, failing: list[str]) -> Finding:
    """Is somebody looking after the virtual machines?

    Args:
        running: there is a watcher.
        machines: recorded pods of virtual machines.
        failing: what went wrong when they were last looked at.
    """
    name = "virtual-machines"
    if not machines:
        return Finding(name, OK, "none on this node")
    if not running:
        return Finding(
            name,
            WARN,
            f"{machines} pods and no watcher",
            "taps that come from now on stay on their bridge",
            "`nearpath watch`, or wait for the next pod's ADD",
        )
    if failing:
        return Finding(
            name,
            WARN,
            f"{len(failing)} of {machines} pods failed: {failing[0]}",
            "these virtual machines stay on their bridge",
            "see the log; `nearpath tap-lane` shows which",
        )
    return Finding(name, OK, f"{machines} pods, watched")


def examine(place: Place) -> list[Finding]:
    """Ask both questions on this node."""
    try:
        modes = check_modes(refused_modes())
    except NearpathError as error:
        modes = check_modes(error)
    shown = [
        taps.describe(place, records, counted=False)
        for records in vm_state.by_cookie(place).values()
    ]
    failing = [pod["error"] for pod in shown if pod["error"]]
    return [modes, check_watcher(bool(watch.running(place)), len(shown), failing)]
