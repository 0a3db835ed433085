"""What nearpath does on this node right now: recorded state and live datapath together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearpath import VERSION, state
from nearpath.datapath import calibration, loader, settings, sizes
from nearpath.lanes import socket, vm_state
from nearpath.node import taps

if TYPE_CHECKING:
    from nearpath.place import Place


def node_status(place: Place) -> dict[str, Any]:
    """The whole node.

    Returns:
        ``{"version", "loaded", "layout", "cgroup", "pins", "paused", "draining",
        "unloaded_by_operator", "pods": number of attachments, "pods_on_lane",
        "lanes": {"socket": counters, "tap": see taps.totals}, "failures": {reason: count},
        "guards": {"attached", "because": why not}, "maps": {map: entries at most},
        "streams": {"from", "to", "source": "default", "calibrated" or "set"},
        "calibration": as stored, or None}``; maps and streams are empty if nothing is loaded.
    """
    shown = loader.describe(place)
    pods = pod_list(place, shown)
    stored = calibration.read(place)
    return {
        "version": VERSION,
        "loaded": shown["loaded"],
        "layout": shown["layout"],
        "cgroup": shown["cgroup"],
        "pins": shown["pins"],
        "paused": shown["paused"],
        "draining": shown["draining"],
        "unloaded_by_operator": shown["unloaded"],
        "pods": len(pods),
        "pods_on_lane": sum(pod["lanes"]["socket"]["state"] == "on" for pod in pods),
        "lanes": {"socket": socket.totals(place), "tap": taps.totals(place)},
        "failures": state.failures(place),
        "guards": {"attached": shown["guards"], "because": shown["no_guards_because"]},
        "maps": sizes.of_pinned(place) if shown["loaded"] else {},
        "streams": _streams(place) if shown["loaded"] else {},
        "calibration": stored,
    }


def _streams(place: Place) -> dict[str, Any]:
    """Message sizes of streams that stay in the lane, and where the limits come from."""
    live = settings.read(place)
    limits = {name: live[name] for name in calibration.THRESHOLDS}
    source = "set"
    if limits == calibration.thresholds(place):
        source = "calibrated"
    elif all(settings.DEFAULTS[name] == value for name, value in limits.items()):
        source = "default"
    return {"from": live["stream_from"], "to": live["stream_to"], "source": source}


def _obstacle(shown: dict[str, Any]) -> str:
    """Why no pod at all can be on the lane now; empty if there is no such reason."""
    if not shown["loaded"]:
        return "unloaded-by-operator" if shown["unloaded"] else "not-loaded"
    return "paused" if shown["paused"] else ""


def lane_state(
    record: dict[str, Any], obstacle: str, registered: bool, guarded: bool = True
) -> tuple[str, str]:
    """State ("on", "off") and reason of the socket lane of one attachment.

    Args:
        record: as written by ADD; may be damaged.
        obstacle: reason that holds for the whole node, or empty.
        registered: the programs know the attachment's namespace.
        guarded: the guards are attached.
    """
    lanes = record.get("lanes")
    if not isinstance(lanes, dict) or not isinstance(lanes.get("socket"), dict):
        return "off", "damaged-record"
    lane, reason = state.lane_of(record)
    if not state.wants_lane(record):
        return "off", reason
    if registered and not obstacle:  # also by a load after an ADD that had failed
        return "on", ""
    if lane == "off":
        return "off", reason or "unknown"
    if not obstacle and not guarded and not state.may_go_unguarded(record):
        return "off", "no-guards"  # a load without guards came after the ADD
    return "off", obstacle or "not-registered"


def pod_list(place: Place, shown: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One entry per attachment, sorted by namespace and name.

    Args:
        shown: what loader.describe says, if the caller has asked already.

    Returns:
        ``{"namespace", "name", "container_id", "ifname", "ips", "netns_cookie", "network",
        "lanes": {"socket": {"state", "reason", **counters}}}`` each; a virtual machine's also
        has ``lanes["tap"]``, see taps.describe.
    """
    shown = shown or loader.describe(place)
    obstacle = _obstacle(shown)
    counters = socket.by_pod(place)
    known = set() if obstacle else socket.registered(place)
    machines = vm_state.by_cookie(place)
    pods = []
    for record in state.records(place):
        cookie = state.cookie_of(record)
        lane, reason = lane_state(record, obstacle, cookie in known, shown["guards"])
        identity = record.get("pod")
        identity = identity if isinstance(identity, dict) else {}
        ips = record.get("ips")
        lanes: dict[str, Any] = {
            "socket": {"state": lane, "reason": reason, **counters.get(cookie, socket.NOTHING)}
        }
        if cookie in machines and state.is_vm(record):
            lanes["tap"] = taps.describe(place, machines[cookie])
        pods.append(
            {
                "namespace": str(identity.get("namespace", "")),
                "name": str(identity.get("name", "")),
                "container_id": record["container_id"],
                "ifname": record["ifname"],
                "ips": [str(ip) for ip in ips] if isinstance(ips, list) else [],
                "netns_cookie": cookie,
                "network": str(record.get("network", "")),
                "lanes": lanes,
            }
        )
    return sorted(pods, key=lambda pod: (pod["namespace"], pod["name"], pod["container_id"]))
