"""Socket lane: TCP between two pod sockets on this node.

The programs do the work (bpf/socket_lane.bpf.c); a pod takes part once its network
namespace's cookie is in the map pods.
"""

from __future__ import annotations

from errno import ENOENT

from nearpath.datapath import loader, tables
from nearpath.errors import BpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nearpath.place import Place


def register(place: Place, netns_cookie: int, enabled: bool = True) -> None:
    """Let new connections of a pod take the lane, or with ``enabled=False`` not.

    Established connections stay as they are. The datapath must be loaded.
    """
    tables.set_pod(place, netns_cookie, tables.POD_SOCKET_LANE if enabled else 0)


def unregister(place: Place, netns_cookie: int) -> None:
    """Forget a pod; no datapath or no such pod is fine."""
    try:
        tables.delete_pod(place, netns_cookie)
    except BpfError as error:
        if error.errno != ENOENT:
            raise


def is_registered(place: Place, netns_cookie: int) -> bool:
    """True if new connections of this pod may take the lane."""
    if not loader.is_loaded(place):
        return False
    return bool((tables.get_pod(place, netns_cookie) or 0) & tables.POD_SOCKET_LANE)


def registered(place: Place) -> set[int]:
    """Cookies of all pods whose new connections may take the lane."""
    if not loader.is_loaded(place):
        return set()
    return {
        cookie for cookie, flags in tables.all_pods(place).items() if flags & tables.POD_SOCKET_LANE
    }


def _shape(counts: dict[str, int], connections: int) -> dict[str, Any]:
    result: dict[str, Any] = {"connections": connections}
    result.update((name, counts.get(name, 0)) for name in tables.MESSAGES)
    result["reasons"] = {name: counts[name] for name in tables.REASONS if counts.get(name)}
    return result


# Counters of a pod that the programs have not counted anything for.
NOTHING = _shape({}, 0)


def by_pod(place: Place) -> dict[int, dict[str, Any]]:
    """Counters of each pod by netns cookie, shaped like totals()."""
    if not loader.is_loaded(place):
        return {}
    counts, live = tables.counts(place), tables.connections(place)
    known = {*counts, *tables.all_pods(place)} - {tables.GONE}
    return {cookie: _shape(counts.get(cookie, {}), live.get(cookie, 0)) for cookie in known}


def totals(place: Place) -> dict[str, Any]:
    """Counters of the whole node since the datapath was loaded.

    Returns:
        ``{"connections": live paired connections, "redirected_messages",
        "redirected_bytes", "kernel_messages", "kernel_bytes": of sockets in the lane,
        "reasons": {reason: count}}``; zeros when nothing is loaded.
    """
    if not loader.is_loaded(place):
        return _shape({}, 0)
    total: dict[str, int] = {}
    for counts in tables.counts(place).values():
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return _shape(total, tables.connections(place)[tables.GONE])
