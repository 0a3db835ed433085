"""The part of ADD, DEL and GC that concerns virtual machines' pods (KubeVirt).

When a virt-launcher pod is added there is neither tap nor bridge: virt-handler makes them
seconds later. So ADD only records what the pod is to have and makes sure that the node's
watcher runs; the watcher does the rest (node/watcher.py). DEL undoes it, watcher or not.
"""

from __future__ import annotations

import os

from nearpath import state
from nearpath.cni import netconf
from nearpath.cni.identity import is_vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nearpath.cni.context import Context


def note(context: Context, record: dict[str, Any], *, own_netns: bool) -> None:
    """Put into the record what a virtual machine's pod is to have; others are left alone.

    Args:
        own_netns: the namespace is the host's: its devices are none of a pod.
    """
    if own_netns or not is_vm(context.request.config, record["pod"]):
        return
    lane = netconf.tap_lane(context.conf, record["pod"])
    record["lanes"]["tap"] = lane
    said = lane["reason"] or lane["mode"]
    context.log.info(f"tap lane {lane['state']} {said}, checksum {lane['checksum']}")


def watch(context: Context, record: dict[str, Any]) -> None:
    """Make sure that a watcher runs, if this node has virtual machines; ADD after its record.

    The watcher's file is there as long as one has work to do: also the ADD of a plain pod
    replaces one that was killed.
    """
    if not state.is_vm(record) and not os.path.exists(context.place.watcher_file):
        return

    def start() -> None:
        if context.doors.watch(context.place):
            context.log.info("watcher started")

    context.attempt("watcher", start)


def retire(context: Context, record: dict[str, Any] | None, forget: Callable[[], bool]) -> bool:
    """Undo what was done for a virtual machine's pod, and forget its record.

    Under one lock, or the watcher could do it all again in between.

    Args:
        record: of the attachment; None if there is none.
        forget: removes the record; False if it could not.
    """
    cookie = state.cookie_of(record)
    if record is None or not cookie or not state.is_vm(record):
        return forget()
    from nearpath.lanes import vm_state  # not for plain pods

    place, request = context.place, context.request
    with vm_state.lock(place):
        key = record["container_id"], record["ifname"]
        left = [
            other
            for other in vm_state.by_cookie(place).get(cookie, [])
            if (other["container_id"], other["ifname"]) != key
        ]
        if not left:
            path = request.netns or str(record.get("netns", ""))
            context.attempt("tap lane", lambda: context.doors.withdraw(place, cookie, path))
        return forget()


def sweep(context: Context) -> bool:
    """Undo what is left of virtual machines' pods without a record; False if that failed."""
    from nearpath.lanes import vm_state

    if vm_state.known(context.place) <= set(vm_state.by_cookie(context.place)):
        return True
    return context.attempt("tap lane", lambda: context.doors.sweep_taps(context.place))
