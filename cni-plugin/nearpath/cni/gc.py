"""GC: remove what is left of attachments that the runtime no longer knows."""

from __future__ import annotations

from nearpath import state
from nearpath.cni import vm
from nearpath.cni.context import CODE_STATE, Context
from nearpath.cni.protocol import INVALID_CONFIG, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KEY = "cni.dev/valid-attachments"
_LEGACY_KEY = "cni.dev/attachments"  # what libcni sent first, and still sends beside it


def valid_attachments(config: dict[str, Any]) -> set[tuple[str, str]] | None:
    """The (containerID, ifname) pairs that are still valid; None if the runtime gave none.

    A null is no list: it could mean "none is valid" or "not known", and deleting is the
    mistake that cannot be taken back.

    Raises:
        CniError: INVALID_CONFIG; nothing may be deleted then.
    """
    key = _KEY if _KEY in config else _LEGACY_KEY
    given = config.get(key)
    if given is None:
        return None
    if not isinstance(given, list):
        raise CniError(INVALID_CONFIG, f"{key} is not a list")
    valid = set()
    for number, entry in enumerate(given):
        container = entry.get("containerID") if isinstance(entry, dict) else None
        ifname = entry.get("ifname") if isinstance(entry, dict) else None
        if not isinstance(container, str) or not isinstance(ifname, str):
            raise CniError(INVALID_CONFIG, f"{key}[{number}] lacks a containerID or an ifname")
        valid.add((container, ifname))
    return valid


def collect(context: Context) -> bytes:
    """Remove this network's stale attachments, and registrations that no record explains.

    Other networks on the node may use nearpath too: their records stay. Goes on after an
    error and reports at the end.
    """
    context.log_problems()
    place, doors = context.place, context.doors
    valid = valid_attachments(context.request.config)
    state.sweep(place)
    if valid is None:
        context.log.info("no list of valid attachments, nothing removed")
        return b""
    # Before the records are read: ADD writes its record first and registers then, so what
    # is registered now and has no record afterwards really has none.
    registered: list[int] = []
    complete = context.attempt(
        "registrations",
        lambda: registered.extend(doors.registered(place) if doors.is_loaded(place) else ()),
    )
    stale: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for record in state.records(place):
        ours = record.get("network") == context.request.network
        gone = ours and (record["container_id"], record["ifname"]) not in valid
        (stale if gone else kept).append(record)
    in_use = {state.cookie_of(record) for record in kept}
    wanted = {state.cookie_of(record) for record in kept if state.wants_lane(record)}

    def forget(cookie: int) -> bool:
        return context.attempt("unregister", lambda: doors.unregister(place, cookie))

    def remove(record: dict[str, Any]) -> bool:
        key = record["container_id"], record["ifname"]
        return vm.retire(
            context, record, lambda: context.attempt("record", lambda: state.remove(place, *key))
        )

    for record in stale:
        cookie = state.cookie_of(record)
        # The record goes last, and stays if the registration could not be removed.
        complete &= (not cookie or cookie in wanted or forget(cookie)) and remove(record)
    explained = in_use | {state.cookie_of(record) for record in stale}
    for cookie in registered:
        complete &= cookie in explained or forget(cookie)
    complete &= vm.sweep(context)
    complete &= context.attempt("retired maps", lambda: doors.sweep(place))
    context.log.info(f"{len(stale)} stale attachment(s), {len(kept)} kept")
    if not complete:
        raise CniError(CODE_STATE, "nearpath: not everything stale could be removed", "see the log")
    return b""
