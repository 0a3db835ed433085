"""Watches the namespaces of virtual machines' pods and gives each tap its lane when it comes.

virt-handler makes bridge and tap some time after the pod's ADD, and again when interfaces are
plugged in or a machine arrives by migration; an MTU may change, somebody may take our rules
away. One process per node looks after all that. An ADD starts it (lanes/watch.py), it ends by
itself with the last virtual machine's pod, and whatever it missed while there was none it finds
by looking. A function, so that a node agent can host it as well.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.errors import NearpathError
from nearpath.kernel.inotify import Directories
from nearpath.kernel.link_events import LinkEvents
from nearpath.lanes import vm, vm_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from nearpath.log import Log
    from nearpath.place import Place

# Seconds. Events wake us; this is for what has none (the host's end of a veth).
_REGULARLY = 5.0
# After an event wait so long for its companions: virt-handler makes some twenty changes in a
# row. Longer after so many looks within _CALM, for a pod must not keep us busy.
_SETTLE, _BUSY_SETTLE = 0.02, 1.0
_MOST_LOOKS, _CALM = 20, 2.0
# A look that failed is repeated after that, doubled each time.
_RETRY, _MOST_RETRY = 0.5, 30.0
# How long wait() may last, so that a stop is noticed.
_MOST_WAIT = 1.0


class _Pod:
    """One namespace that is watched.

    Attributes:
        due: time (monotonic) of the next look.
        noticed: something has happened since the last one.
        wish: what it was to have when somebody last asked; to tell whether that has changed.
    """

    def __init__(self, place: Place, log: Log, cookie: int, now: float) -> None:
        self._place = place
        self._log = log
        self.cookie = cookie
        self.events: LinkEvents | None = None
        self.due = now
        self.noticed = True
        self.wish: object = None
        self._looks: deque[float] = deque(maxlen=_MOST_LOOKS)
        self._retry = _RETRY
        self._said = ""

    def notice(self, now: float) -> None:
        """Something has happened: look soon."""
        busy = len(self._looks) == _MOST_LOOKS and now - self._looks[0] < _CALM
        self.due = min(self.due, now + (_BUSY_SETTLE if busy else _SETTLE))
        self.noticed = True

    def look(self, now: float) -> None:
        """Bring the pod to what is wanted."""
        self._looks.append(now)
        self.due = now + _REGULARLY
        self.noticed = False
        try:
            with vm_state.lock(self._place):
                # Under the lock, for a DEL may have been here since.
                records = vm_state.by_cookie(self._place).get(self.cookie)
                if not records:
                    return
                shown = self._attend(records)
        except Exception as error:
            # Also what is a bug: the other machines' pods are looked after all the same.
            self._failed(error, now)
            return
        self._retry = _RETRY
        self._tell(_summary(shown))

    def _attend(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        path = str(records[0].get("netns", ""))
        if self.events is None:  # before looking, so that nothing falls between
            self.events = LinkEvents(path, self.cookie)
        self.events.drain()
        wanted = vm_state.wanted(self._place, self.cookie, records)
        return vm.attend(self._place, self.cookie, path, wanted)

    def _failed(self, error: Exception, now: float) -> None:
        self.due = now + self._retry
        self._retry = min(self._retry * 2, _MOST_RETRY)
        text = str(error) if isinstance(error, NearpathError) else f"internal error ({error!r})"
        self._tell(text, failed=True)
        if isinstance(error, vm.Gone):
            self.close()  # or we would keep the namespace alive
            return
        try:
            with vm_state.lock(self._place):
                if vm_state.by_cookie(self._place).get(self.cookie):
                    known = vm_state.read(self._place, self.cookie)
                    if known["error"] != text:
                        vm_state.write(self._place, {**known, "error": text})
        except NearpathError:
            pass  # the next look will say it again

    def _tell(self, text: str, *, failed: bool = False) -> None:
        """Log what is new."""
        if text == self._said:
            return
        self._said = text
        if failed:
            self._log.warning(f"namespace {self.cookie}: {text}")
        elif text:
            self._log.info(f"namespace {self.cookie}: {text}")

    def close(self) -> None:
        """Let go of the namespace."""
        if self.events is not None:
            self.events.close()
            self.events = None


def _summary(shown: dict[str, Any]) -> str:
    """What was done for a pod, in one line of the log."""
    return "; ".join(
        f"{wire['bridge']} {wire['tap'] or '-'} {wire['mode']} {wire['reason']}".rstrip()
        + f", checksum {wire['checksum']} {wire['checksum_reason']}".rstrip()
        for wire in shown["wires"]
    )


def watch(
    place: Place, log: Log, stopped: Callable[[], bool] = lambda: False, *, forever: bool = False
) -> bool:
    """Be the watcher of this node until the last virtual machine's pod is gone.

    Args:
        stopped: asked once a second; True ends the watch and leaves all as it is.
        forever: also while there are none, for a process that does more than this.

    Returns:
        False: there is a watcher already, so nothing was done.
    """
    while True:
        try:
            with state.Lock(place, place.watcher_file, wait=False) as lock:
                lock.note(f"{os.getpid()}\n")
                if _serve(place, log, stopped, forever=forever):
                    # Its absence spares each ADD the question. Removed before the lock goes.
                    os.unlink(place.watcher_file)
        except state.LockedError:
            return False
        # An ADD that came just now has found us there and started none.
        if stopped() or not vm_state.by_cookie(place):
            return True


def _serve(place: Place, log: Log, stopped: Callable[[], bool], *, forever: bool) -> bool:
    """Watch until there is nothing to watch (True) or we are stopped; we are the only one."""
    state.secure_dir(place.run_dir)
    state.secure_dir(place.attachments_dir)
    state.secure_dir(place.vms_dir)
    pods: dict[int, _Pod] = {}
    # Records come and go, operators choose, and pause or unload.
    files = Directories(place.attachments_dir, place.vms_dir, place.run_dir)
    try:
        changed = True
        while not stopped():
            now = time.monotonic()
            if changed:
                files.drain()
                _match(place, log, pods, now)
                if not pods and not forever:
                    return True
            for pod in list(pods.values()):
                if pod.due <= now:
                    pod.look(now)
            changed = _wait(files, pods)
        return not pods
    finally:
        files.close()
        for pod in pods.values():
            pod.close()


def _match(place: Place, log: Log, pods: dict[int, _Pod], now: float) -> None:
    """Begin and end watching, as records come and go; look where something else is wanted."""
    recorded = vm_state.by_cookie(place)
    for cookie in set(pods) - set(recorded):
        pods.pop(cookie).close()
    for cookie, records in recorded.items():
        pod = pods.get(cookie)
        if pod is None:
            pod = pods[cookie] = _Pod(place, log, cookie, now)
        wanted = vm_state.wanted(place, cookie, records)
        wish = (wanted.mode, wanted.reason, wanted.checksum, wanted.insist)
        if pod.wish != wish:
            pod.wish = wish
            pod.notice(now)
    for error in vm.sweep(place):
        log.warning(str(error))


def _wait(files: Directories, pods: dict[int, _Pod]) -> bool:
    """Wait for an event or until a look is due; True if files have changed."""
    poll = select.poll()
    poll.register(files, select.POLLIN)
    owners: dict[int, _Pod] = {}
    for pod in pods.values():
        # Once something has happened we need not hear of more, or a busy pod would keep us so.
        if pod.events is not None and not pod.noticed:
            owners[pod.events.fileno()] = pod
            poll.register(pod.events, select.POLLIN)
    now = time.monotonic()
    due = min((pod.due for pod in pods.values()), default=now + _MOST_WAIT)
    ready = poll.poll(max(0.0, min(due - now, _MOST_WAIT)) * 1000)
    now = time.monotonic()
    changed = False
    for descriptor, _ in ready:
        if descriptor in owners:
            owners[descriptor].notice(now)
        else:
            changed = True
    return changed
