"""Take a datapath away gently: pause it, move its pins aside, wait for its sockets.

The maps of a paused datapath stay pinned until the last socket in them is closed, for
removing a socket with unread data would lose it. Its cgroup link stays as long: until then
the sockets in the map need it to half-close as on the kernel path (state_changed(),
socket_lane.bpf.c).
"""

from __future__ import annotations

import os
import struct
import time
from errno import ENOENT
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.datapath import changes
from nearpath.datapath.maps import Map
from nearpath.errors import BpfError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nearpath.place import Place

_DRAINING = "draining-"


def unload(place: Place, report: Callable[[str], None], timeout: float = 30.0) -> dict[str, Any]:
    """Unload at an operator's wish; ADD does not load again until ``load``.

    No live connection loses a byte: every message takes the kernel path from now on, no
    socket joins any more, and the maps stay pinned until the last socket in them is closed.

    Args:
        report: called with one line per step.
        timeout: seconds to wait for the sockets; what is left then is swept by the next
            load or unload.

    Returns:
        ``{"drained": bool, "remaining": sockets still open}``.
    """
    state.secure_dir(place.run_dir)
    with state.Lock(place):
        state.write_file(place.unloaded_file, b"")
        changes.forget(place, ["paused"])  # to load is to switch it on
        _retire(place, _layouts(place), report)
    return _drain(place, report, timeout)


def retire(place: Place, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Undo an ensure(): like unload, but the next ADD may load again.

    Not if a pod is recorded, for one may have come meanwhile that needs the datapath.
    """
    with state.Lock(place):
        if any(True for _ in state.records(place)):
            return {"drained": False, "remaining": 0}
        _retire(place, _layouts(place), report)
    return _drain(place, report, 5.0)


def retire_other_layouts(place: Place) -> None:
    """Retire what nearpaths with other layouts have loaded; the lock is held.

    Ours is attached already: between the two no connection goes unpaired, and one that both
    see joins neither twice nor the wrong one, for the old one is paused first.
    """
    own = os.path.basename(place.layout_dir)
    _retire(place, [name for name in _layouts(place) if name != own], lambda _: None)


def _layouts(place: Place) -> list[str]:
    """Names of the directories of all layouts that are pinned (``v1``, ...)."""
    try:
        names = os.listdir(place.pin_dir)
    except OSError:
        return []
    return sorted(name for name in names if name[:1] == "v" and name[1:].isdecimal())


def _retire(place: Place, layouts: list[str], report: Callable[[str], None]) -> None:
    """Pause layouts, and move their pins aside; the lock is held."""
    for name in layouts:
        directory = f"{place.pin_dir}/{name}"
        try:
            _pause(directory)
            report("paused: no socket joins, every message takes the kernel path")
        except BpfError as error:
            report(f"cannot pause: {error}")
        os.rename(directory, f"{place.pin_dir}/{_DRAINING}{time.monotonic_ns()}")


def _pause(directory: str) -> None:
    """Pause the datapath pinned under ``directory``, of whatever layout.

    ``paused`` is the first word of the settings of every layout (bpf/nearpath.h).
    """
    with Map.pinned_unknown(f"{directory}/settings") as settings:
        value = settings.lookup(bytes(settings.key_size)) or bytes(settings.value_size)
        one = struct.pack("=I", 1)
        settings.update(bytes(settings.key_size), one + value[4:])


def _drain(place: Place, report: Callable[[str], None], timeout: float) -> dict[str, Any]:
    """Remove drained pins; wait for the sockets in the others."""
    end = time.monotonic() + timeout
    said = -1
    while True:
        with state.Lock(place):
            remaining = sweep(place)
        if not remaining or time.monotonic() >= end:
            break
        if remaining != said:
            report(f"draining: {remaining} sockets are still open")
            said = remaining
        time.sleep(0.2)
    if not remaining:
        try:
            os.rmdir(place.pin_dir)
        except OSError:
            pass  # it is loaded again, or gone
        report("drained: nothing of the datapath is left")
    return {"drained": not remaining, "remaining": remaining}


def _draining(place: Place) -> list[str]:
    """Directories of retired pins."""
    try:
        names = os.listdir(place.pin_dir)
    except OSError:
        return []
    return [f"{place.pin_dir}/{name}" for name in names if name.startswith(_DRAINING)]


def sweep(place: Place) -> int:
    """Remove retired pins without sockets and a killed loader's; the lock is held.

    Returns:
        Sockets still open in the others.
    """
    remaining = 0
    for directory in _draining(place):
        left = sockets_left(directory)
        remaining += left
        if not left:
            remove_pins(directory)
    remove_pins(f"{place.pin_dir}/loading")
    return remaining


def sweep_empty(place: Place) -> None:
    """Like sweep(), without counting what is left; takes the lock."""
    with state.Lock(place):
        for directory in _draining(place):
            if not _has_sockets(directory):
                remove_pins(directory)
        remove_pins(f"{place.pin_dir}/loading")


def sockets_draining(place: Place) -> int:
    """Number of sockets in retired maps."""
    return sum(sockets_left(directory) for directory in _draining(place))


def sockets_left(directory: str) -> int:
    """Number of sockets in the sockhash pinned under ``directory``; 0 if there is none."""
    try:
        with Map.pinned_unknown(f"{directory}/sockets") as sockets:
            return sum(1 for _ in sockets.keys())  # noqa: SIM118 - no dictionary
    except BpfError as error:
        if error.errno == ENOENT:
            return 0
        raise


def _has_sockets(directory: str) -> bool:
    try:
        with Map.pinned_unknown(f"{directory}/sockets") as sockets:
            return any(True for _ in sockets.keys())  # noqa: SIM118 - no dictionary
    except BpfError as error:
        if error.errno == ENOENT:
            return False
        raise


def remove_pins(directory: str) -> None:
    """Remove a directory of pins; none there is fine."""
    try:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StateError(f"cannot remove pins {directory}: {error.strerror}") from error
