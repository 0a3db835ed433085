"""What is kept about virtual machines' pods beside the attachment records.

One JSON file per network namespace, ``vms/<cookie>.json``: what was done there, so that
whoever comes next (watcher, DEL, GC, command line) can undo it:

    {"cookie", "netns": path,
     "made": [ifindex of devices whose ingress qdisc is ours],
     "changes": [offloads that we changed; see lanes/checksum.py],
     "wires": [{"bridge", "tap", "nic", "mode", "reason", "checksum", "checksum_reason"}],
     "error": why the last look failed, or ""}

and ``vms/<cookie>.choice``, what an operator chose live: {"mode", "checksum"}, each may lack.
Written under the virtual machines' lock, before the kernel changes. A namespace may belong to
several attachments (secondary networks); all interfaces in it are served alike.
"""

from __future__ import annotations

import os

from nearpath import quickjson, state
from nearpath.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nearpath.place import Place

_STATE, _CHOICE = ".json", ".choice"


def lock(place: Place) -> state.Lock:
    """Held while anything changes in the namespaces of virtual machines' pods."""
    return state.Lock(place, place.vms_lock_file)


def _path(place: Place, cookie: int, suffix: str) -> str:
    return f"{place.vms_dir}/{cookie:d}{suffix}"


def _read(path: str) -> dict[str, Any]:
    try:
        found = quickjson.loads(state.read_file(path) or b"{}")
    except (ValueError, RecursionError, StateError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(place: Place, path: str, content: dict[str, Any]) -> None:
    state.secure_dir(place.run_dir)
    state.secure_dir(place.vms_dir)
    state.write_file(path, quickjson.dumps(content).encode() + b"\n")


def read(place: Place, cookie: int) -> dict[str, Any]:
    """What was done in a namespace; a damaged file counts as nothing done."""
    found = _read(_path(place, cookie, _STATE))
    kept: dict[str, Any] = {"cookie": cookie}
    for name in ("netns", "error"):
        kept[name] = found[name] if isinstance(found.get(name), str) else ""
    for name, kind in (("made", int), ("changes", dict), ("wires", dict)):
        items = found.get(name)
        items = items if isinstance(items, list) else []
        kept[name] = [item for item in items if type(item) is kind]
    return kept


def write(place: Place, content: dict[str, Any]) -> None:
    """Keep what was done, or is about to be."""
    _write(place, _path(place, content["cookie"], _STATE), content)


def choice(place: Place, cookie: int) -> dict[str, str]:
    """What an operator chose for a namespace live: ``mode`` and ``checksum``, each may lack."""
    found = _read(_path(place, cookie, _CHOICE))
    return {name: found[name] for name in ("mode", "checksum") if isinstance(found.get(name), str)}


def choose(place: Place, cookie: int, chosen: dict[str, str]) -> None:
    """Keep an operator's choice; an empty one takes an earlier one back."""
    if chosen:
        _write(place, _path(place, cookie, _CHOICE), chosen)
    else:
        state.remove_file(_path(place, cookie, _CHOICE))


def forget(place: Place, cookie: int) -> None:
    """Remove all that is kept about a namespace."""
    state.remove_file(_path(place, cookie, _STATE))
    state.remove_file(_path(place, cookie, _CHOICE))


def known(place: Place) -> set[int]:
    """Cookies of the namespaces that anything is kept about."""
    try:
        names = os.listdir(place.vms_dir)
    except OSError:
        return set()
    heads = (name.partition(".")[0] for name in names)
    return {int(head) for head in heads if head.isdecimal() and len(head) <= 20}


def by_cookie(place: Place) -> dict[int, list[dict[str, Any]]]:
    """Records of virtual machines' pods, by namespace."""
    found: dict[int, list[dict[str, Any]]] = {}
    for record in state.records(place):
        cookie = state.cookie_of(record)
        if cookie and state.is_vm(record):
            found.setdefault(cookie, []).append(record)
    return found


class Wanted:
    """What the devices of one pod are to have.

    Attributes:
        mode, checksum: see netconf.TAP_MODES and CHECKSUM_MODES.
        reason: why the mode is "off", else empty.
        insist: the checksum mode was asked for by name, it is not just the default.
    """

    __slots__ = ("checksum", "insist", "mode", "reason")

    def __init__(self, mode: str, reason: str, checksum: str, *, insist: bool) -> None:
        self.mode = mode
        self.reason = reason
        self.checksum = checksum
        self.insist = insist


def wanted(place: Place, cookie: int, records: list[dict[str, Any]]) -> Wanted:
    """What a pod is to have: node-wide switches, then the operator, then the ADDs.

    Of several attachments off wins, and the first one's mode otherwise.
    """
    taps = [record["lanes"]["tap"] for record in records]
    off = next((tap for tap in taps if tap.get("state") != "on"), None)
    given = off or taps[0]
    chosen = choice(place, cookie)
    mode = "off" if off else str(given.get("mode", "mirror"))
    reason = str(given.get("reason", "")) if off else ""
    if "mode" in chosen and reason != "excluded-namespace":
        mode = chosen["mode"]
        reason = "operator" if mode == "off" else ""
    checksum = chosen.get("checksum", str(given.get("checksum", "keep")))
    insist = "checksum" in chosen or given.get("insist") is True
    if os.path.exists(place.unloaded_file):
        mode, reason, checksum = "off", "unloaded-by-operator", "keep"
    elif os.path.exists(place.taps_paused_file):
        mode, reason = "off", "paused"
    return Wanted(mode, reason, checksum, insist=insist)
