"""Load the datapath once per node and keep it pinned.

Pins, under Place.pin_dir in bpffs:

    loading/             being built; anything there is left over from a killed loader
    v<LAYOUT>/           maps by name, programs as prog_<name>, links as link_<name>:
                         the datapath is loaded if and only if link_sockops exists
    draining-<ns>/       retired: paused, and gone once the last socket in it is closed

Every step can be the last (kill -9): the directory is built aside and renamed into place,
the cgroup link is attached after that, so a sockhash that may hold sockets is always pinned.
Writers hold the node lock. programs.py builds and replaces, unloader.py takes away.
"""

from __future__ import annotations

import os

from nearpath import state
from nearpath.errors import NearpathError, StateError, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nearpath.place import Place

LINK = "link_sockops"
GUARD_LINK = "link_guards"  # there when all guards are attached


def is_loaded(place: Place) -> bool:
    """True if the datapath is loaded; one stat(2)."""
    return os.path.exists(f"{place.layout_dir}/{LINK}")


def has_retired(place: Place) -> bool:
    """True if maps are pinned that are in use no more, or half made; one directory is listed."""
    try:
        names = os.listdir(place.pin_dir)
    except OSError:
        return False
    return any(not name.startswith("v") for name in names)


def is_guarded(place: Place) -> bool:
    """True if the guards are attached (bpf/guards.bpf.c); one stat(2)."""
    return os.path.exists(f"{place.layout_dir}/{GUARD_LINK}")


def ensure(place: Place, most_connections: int = 0) -> bool:
    """Load the datapath if it is not; N callers at once load it exactly once.

    Args:
        most_connections: that the maps are to hold; 0: by the node's memory.

    Returns:
        True if this call loaded it.

    Raises:
        Unavailable: the node lacks something, or an operator unloaded it
            (``unloaded-by-operator``).
        BpfError: the kernel refused.
    """
    with state.Lock(place):
        if is_loaded(place):
            return False
        if os.path.exists(place.unloaded_file):
            raise Unavailable(
                "unloaded-by-operator",
                "the datapath was unloaded by an operator",
                "nearpath load",
            )
        _load(place, most_connections)
        return True


def load(place: Place, most_connections: int = 0) -> bool:
    """Load the datapath, or replace the programs of a loaded one if ours are different.

    Live connections keep the program that they have; maps and their content stay. A datapath
    of another layout is retired: its connections go on, on the kernel path.

    Args:
        most_connections: see ensure(); a loaded datapath keeps its maps.

    Returns:
        True if this call loaded or replaced anything.
    """
    from nearpath.datapath import changes, programs, settings, unloader

    with state.Lock(place):
        try:
            os.unlink(place.unloaded_file)
        except FileNotFoundError:
            pass
        if is_loaded(place):
            # A killed unload may have left it paused, and an operator.
            settings.write(place, paused=changes.read(place).get("paused", 0))
            unloader.retire_other_layouts(place)  # a killed load may have left them
            unloader.sweep(place)
            return programs.replace(place)
        _load(place, most_connections)
        return True


def _load(place: Place, most_connections: int) -> None:
    """Bring the datapath from whatever state it is in to loaded; the lock is held."""
    from nearpath.datapath import programs, unloader

    cgroup = _prepare(place)
    state.sweep(place)
    unloader.sweep(place)
    if not os.path.isdir(place.layout_dir):
        programs.build(place, most_connections)
    # Before the first socket can join, so that no reader goes unwatched.
    guarded = programs.attach_guards(place)
    programs.set_defaults(place, guarded)
    _register_recorded(place, guarded)
    programs.attach(place, cgroup)
    programs.replace(place)  # a killed load of another build may have left its own
    unloader.retire_other_layouts(place)


def _prepare(place: Place) -> str:
    """Check what loading needs; the cgroup to attach to."""
    from nearpath.kernel import cgroup, mounts

    if not os.path.exists("/sys/kernel/btf/vmlinux"):
        raise Unavailable(
            "no-btf",
            "this kernel has no BTF (/sys/kernel/btf/vmlinux)",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        )
    directory = place.cgroup or cgroup.v2_root()
    mounts.ensure_bpffs(place.pin_dir)
    try:
        os.makedirs(place.pin_dir, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot make {place.pin_dir}: {error.strerror}") from error
    return directory


def _register_recorded(place: Place, guarded: bool) -> None:
    """Make recorded pods known to freshly built maps.

    Also those that an ADD without a datapath has left on the kernel path. The records stay
    as they are: ADD and DEL are their only writers. Should a DEL run at this moment, a
    cookie is registered that no namespace has any more, which GC takes away.
    """
    from nearpath.datapath import tables

    for cookie in state.lane_cookies(place, guarded):
        tables.set_pod(place, cookie, tables.POD_SOCKET_LANE)


def describe(place: Place) -> dict[str, Any]:
    """State of the datapath, for people.

    Returns:
        ``{"loaded", "layout", "cgroup", "pins", "paused", "guards", "no_guards_because",
        "draining", "unloaded"}``; ``guards`` tells whether they are attached, ``draining``
        counts sockets in retired maps.
    """
    from nearpath.datapath import settings, unloader
    from nearpath.kernel import cgroup
    from nearpath.place import LAYOUT

    loaded = is_loaded(place)
    guarded = loaded and is_guarded(place)
    try:
        directory = place.cgroup or cgroup.v2_root()
    except NearpathError:
        directory = ""
    problem = state.read_file(place.guards_file) if loaded and not guarded else None
    return {
        "loaded": loaded,
        "layout": LAYOUT,
        "cgroup": directory,
        "pins": place.layout_dir,
        "paused": loaded and settings.read(place)["paused"] != 0,
        "guards": guarded,
        "no_guards_because": (problem or b"").decode("utf-8", "replace"),
        "draining": unloader.sockets_draining(place),
        "unloaded": os.path.exists(place.unloaded_file),
    }
