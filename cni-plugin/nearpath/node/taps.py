"""Virtual machines' pods of this node: what they have, what they are to have."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.errors import NearpathError
from nearpath.lanes import vm_state, watch

if TYPE_CHECKING:
    from nearpath.lanes.vm_state import Wanted
    from nearpath.place import Place

NOTHING = {"packets": 0, "bytes": 0}
# Seconds that a watcher which is asked to stop may take.
_MOST_STOP = 5.0


def describe(
    place: Place, records: list[dict[str, Any]], *, counted: bool = True
) -> dict[str, Any]:
    """The tap lane of one pod.

    Args:
        records: of the attachments in its namespace, at least one.
        counted: look up the counters too, which takes some milliseconds for each pod.

    Returns:
        ``{"state": "on" if any tap is in the lane, "reason", "mode", "checksum": as wanted,
        "wires": [{"bridge", "tap", "nic", "mode": in force, "reason", "checksum": in force,
        "checksum_reason", "from_vm", "to_vm": {"packets", "bytes"}}], "error"}``; packets
        that took the lane since its rules are there.
    """
    cookie = state.cookie_of(records[0])
    wanted = vm_state.wanted(place, cookie, records)
    known = vm_state.read(place, cookie)
    counters: dict[int, dict[str, Any]] = {}
    if counted and any(wire.get("mode") != "off" for wire in known["wires"]):
        counters = _counts(known["netns"], cookie)
    wires = [_shape(wire, counters) for wire in known["wires"]]
    on = any(wire["mode"] != "off" for wire in wires)
    return {
        "state": "on" if on else "off",
        "reason": "" if on else _reason(place, wanted, wires, known["error"]),
        "mode": wanted.mode,
        "checksum": wanted.checksum,
        "wires": wires,
        "error": known["error"],
    }


def _counts(path: str, cookie: int) -> dict[int, dict[str, Any]]:
    """Packets and bytes that took the tap lane, by the tap's ifindex; see tap.counts."""
    from nearpath.kernel import netns, rtnl
    from nearpath.lanes import tap

    try:
        with netns.entered(path):
            if netns.current_cookie() != cookie:
                return {}
            door = rtnl.Rtnl()
        with door as pod:
            return dict(tap.counts(pod, tap.observe(pod)))
    except NearpathError:  # the pod is going
        return {}


def _shape(wire: dict[str, Any], counters: dict[int, dict[str, Any]]) -> dict[str, Any]:
    counted = counters.get(wire.get("tap_index", 0), {})
    names = ("bridge", "tap", "nic", "mode", "reason", "checksum", "checksum_reason")
    return {
        **{name: str(wire.get(name, "")) for name in names},
        "from_vm": counted.get("from_vm", NOTHING),
        "to_vm": counted.get("to_vm", NOTHING),
    }


def _reason(place: Place, wanted: Wanted, wires: list[dict[str, Any]], error: str) -> str:
    """Why no tap of a pod is in the lane."""
    if wanted.mode == "off":
        return wanted.reason
    if error:
        return "failed"
    if wires:
        return str(wires[0]["reason"]) or "unknown"
    # Before virt-handler has been there; masquerade and the like show up as wires.
    return "no-bridge" if watch.running(place) else "no-watcher"


def totals(place: Place) -> dict[str, Any]:
    """The node's part.

    Returns:
        ``{"pods", "taps", "taps_on_lane", "watcher": process ID or 0, "paused"}``.
    """
    shown = [
        describe(place, records, counted=False) for records in vm_state.by_cookie(place).values()
    ]
    wires = [wire for pod in shown for wire in pod["wires"]]
    return {
        "pods": len(shown),
        "taps": sum(wire["tap"] != "" for wire in wires),
        "taps_on_lane": sum(wire["mode"] != "off" for wire in wires),
        "watcher": watch.running(place),
        "paused": os.path.exists(place.taps_paused_file),
    }


def attend_all(place: Place, cookies: set[int] | None = None) -> dict[int, str]:
    """Bring the pods to what is wanted now, without waiting for the watcher.

    Args:
        cookies: of those to look at; None: all.

    Returns:
        By cookie what went wrong; pods that are gone are no failure.
    """
    if not vm_state.by_cookie(place):
        return {}
    from nearpath.lanes import vm

    failed = {}
    with vm_state.lock(place):
        for cookie, records in vm_state.by_cookie(place).items():
            if cookies is not None and cookie not in cookies:
                continue
            wanted = vm_state.wanted(place, cookie, records)
            try:
                vm.attend(place, cookie, str(records[0].get("netns", "")), wanted)
            except vm.Gone:
                continue
            except NearpathError as error:
                failed[cookie] = str(error)
    return failed


def pause(place: Place, *, paused: bool) -> dict[int, str]:
    """Take all taps out of the lane until further notice, or end that; see attend_all."""
    if paused:
        state.secure_dir(place.run_dir)
        state.write_file(place.taps_paused_file, b"")
    else:
        state.remove_file(place.taps_paused_file)
    return attend_all(place)


def stop_watcher(place: Place) -> None:
    """End the watcher, if there is one; what it has done stays.

    Raises:
        NearpathError: it does not end.
    """
    running = watch.running(place)
    if running > 0:
        os.kill(running, signal.SIGTERM)  # it holds the lock, so the number is its own
    end = time.monotonic() + _MOST_STOP
    while watch.running(place):
        if time.monotonic() > end:
            raise NearpathError(f"the watcher (process {running}) does not end", "kill -9 it")
        time.sleep(0.02)


def renew_watcher(place: Place) -> bool:
    """Put a watcher of this version in the place of the one that runs, or of none.

    Returns:
        True if one was started; without virtual machines there is nothing to watch.
    """
    stop_watcher(place)
    return bool(vm_state.by_cookie(place)) and watch.ensure(place)
