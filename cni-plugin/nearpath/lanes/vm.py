"""A virtual machine's pod as a whole: tap lane and checksums of all its interfaces.

Look at what is there, work out what is to be, write down what is about to change, change
it. Looking again changes nothing unless something has changed meanwhile, so whoever
wants to may look at any time: the watcher at every event, the command line, DEL. All hold
the virtual machines' lock (vm_state.lock). Whatever is killed in between leaves a state
file from which the next one can undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from nearpath.errors import NearpathError
from nearpath.kernel import netns, offload, rtnl
from nearpath.lanes import checksum, tap, vm_state

if TYPE_CHECKING:
    from nearpath.lanes.vm_state import Wanted
    from nearpath.place import Place


_DoorT = TypeVar("_DoorT", rtnl.Rtnl, offload.Door)


class Gone(NearpathError):
    """The pod's namespace is gone, or its path leads to another one by now."""


def _check(path: str, cookie: int) -> None:
    if netns.current_cookie() != cookie:
        raise Gone(f"{path!r} is another network namespace by now")


class _View:
    """The doors to a pod's namespace and the host's, open at the same time."""

    def __init__(self, path: str, cookie: int) -> None:
        self._open: list[rtnl.Rtnl | offload.Door] = []
        try:
            with netns.entered(path):
                _check(path, cookie)
                # Sockets stay in the namespace in which they are made.
                self.pod = self._keep(rtnl.Rtnl())
                pod_offloads = self._keep(offload.Door())
            self.host = self._keep(rtnl.Rtnl())
            self.offloads = {
                checksum.POD: pod_offloads,
                checksum.HOST: self._keep(offload.Door()),
            }
        except netns.NetnsError as error:
            self.close()
            raise Gone(error.message) from error
        except BaseException:
            self.close()
            raise

    def _keep(self, door: _DoorT) -> _DoorT:
        self._open.append(door)
        return door

    def close(self) -> None:
        """Close all doors."""
        while self._open:
            self._open.pop().close()

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _changes(kept: list[dict[str, Any]]) -> list[checksum.Change]:
    """The offloads that we changed, out of a state file."""
    return [change for entry in kept if (change := checksum.from_json(entry)) is not None]


def _devices(wire: tap.Wire, ends: dict[int, tap.HostEnd]) -> list[checksum.Device]:
    """The devices between a virtual machine and the host's network."""
    roles = ((wire.tap, checksum.TAP), (wire.nic, checksum.NIC), (wire.bridge, checksum.BRIDGE))
    devices = [
        checksum.Device(checksum.POD, link.index, link.name, role) for link, role in roles if link
    ]
    end = ends.get(wire.nic.index) if wire.nic else None
    if end is not None:
        devices.append(checksum.Device(checksum.HOST, end.index, end.name, checksum.VETH))
    return devices


def _host_ends(view: _View, seen: tap.Observed) -> dict[int, tap.HostEnd]:
    """By the pod NIC's ifindex: what is known of the other end of its veth."""
    ends = {}
    for wire in seen.wires:
        if wire.nic is not None and wire.nic.peer:
            end = tap.host_end(view.host, wire.nic.peer)
            if end is not None:
                ends[wire.nic.index] = end
    return ends


def attend(place: Place, cookie: int, path: str, wanted: Wanted) -> dict[str, Any]:
    """Bring the devices of a pod to what is wanted; the lock is held.

    Args:
        cookie: of the pod's namespace.
        path: of the same.

    Returns:
        What is kept about the namespace now; see vm_state.

    Raises:
        Gone: there is no such namespace any more.
        NearpathError: something failed; what was done so far is kept.
    """
    with _View(path, cookie) as view:
        for _ in range(2):
            now, switched = _look(place, cookie, path, wanted, view)
            # Once more after offloads were switched: what is undone need not be kept, and only
            # now it is seen what the guest makes of them.
            if not switched:
                break
    return now


def _look(
    place: Place, cookie: int, path: str, wanted: Wanted, view: _View
) -> tuple[dict[str, Any], bool]:
    """See attend(); also whether offloads were switched."""
    known = vm_state.read(place, cookie)
    seen = tap.observe(view.pod)
    ends = _host_ends(view, seen)
    fit = [wire for wire in seen.wires if not wire.reason]
    sums = checksum.work_out(
        view.offloads,
        wanted.checksum,
        [_devices(wire, ends) for wire in fit],
        _changes(known["changes"]),
        insist=wanted.insist,
    )
    changes = [change._asdict() for change in sums.plan.record]
    # Offload goes on before frames may need it (mode "peer"), and off after they do not.
    raised = [step for step in sums.plan.steps if step.after]
    lowered = [step for step in sums.plan.steps if not step.after]
    if raised:
        vm_state.write(place, {**known, "netns": path, "changes": changes})
        checksum.execute(view.offloads, raised)
    plan = tap.plan(seen, wanted.mode, set(known["made"]), _bypasses(view, ends, wanted))
    verdicts = dict(zip((wire.bridge.index for wire in fit), sums.verdicts, strict=True))
    now = {
        "cookie": cookie,
        "netns": path,
        "error": "",
        "made": sorted(plan.made),
        "changes": changes,
        "wires": [_wire(outcome, wanted, verdicts) for outcome in plan.outcomes],
    }
    if raised or now != known:
        vm_state.write(place, now)
    tap.execute(view.pod, plan)
    checksum.execute(view.offloads, lowered)
    return now, bool(sums.plan.steps)


def _bypasses(view: _View, ends: dict[int, tap.HostEnd], wanted: Wanted) -> dict[int, tap.HostEnd]:
    """Those host ends that frames may reach around the pod NIC, as mode "peer" does.

    The NIC's transmit path is where checksums are computed if its offload is off.
    """
    if wanted.mode != "peer" or wanted.checksum == checksum.SOFTWARE:
        return {}
    nics = {index: view.offloads[checksum.POD].features(index) for index in ends}
    return {index: end for index, end in ends.items() if checksum.may_bypass(nics[index])}


def _wire(
    outcome: tap.Outcome, wanted: Wanted, verdicts: dict[int, checksum.Verdict]
) -> dict[str, Any]:
    """One wire as the command line shows it."""
    wire, reason = outcome.wire, outcome.reason
    if not wire.reason and wanted.mode == "off":
        reason = wanted.reason
    verdict = verdicts.get(wire.bridge.index, checksum.Verdict(checksum.KEEP, ""))
    return {
        "bridge": wire.bridge.name,
        "tap": wire.tap.name if wire.tap else "",
        "tap_index": wire.tap.index if wire.tap else 0,
        "nic": wire.nic.name if wire.nic else "",
        "mode": outcome.mode,
        "reason": reason,
        "checksum": verdict.mode,
        "checksum_reason": verdict.reason,
    }


def withdraw(place: Place, cookie: int, path: str) -> None:
    """Undo all that was done in a namespace, and forget it; the lock is held.

    A namespace that is gone has taken all with it but the host's end of a veth that somebody
    moved, which no DEL leaves behind.

    Raises:
        NearpathError: something failed. What is known is kept, for another try.
    """
    known = vm_state.read(place, cookie)
    try:
        if known["wires"] or known["made"] or known["changes"]:
            with _View(path, cookie) as view:
                seen = tap.observe(view.pod)
                plan = tap.plan(seen, "off", set(known["made"]), {}, withdraw=True)
                tap.execute(view.pod, plan)
                checksum.restore(view.offloads, _changes(known["changes"]))
    except Gone:
        pass
    vm_state.forget(place, cookie)


def sweep(place: Place) -> list[NearpathError]:
    """Undo what is left of pods that have no record: a DEL was killed, or could not finish.

    Returns:
        What went wrong; it is left to the next one.
    """
    failed = []
    for cookie in vm_state.known(place) - set(vm_state.by_cookie(place)):
        try:
            with vm_state.lock(place):
                if cookie not in vm_state.by_cookie(place):  # an ADD may have come
                    withdraw(place, cookie, vm_state.read(place, cookie)["netns"])
        except NearpathError as error:
            failed.append(error)
    return failed
