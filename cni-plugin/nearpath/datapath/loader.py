"""Load the programs once per node, keep them pinned, and take them away gently.

Pins, under Place.pin_dir in bpffs:

    loading/             being built; anything there is left over from a killed loader
    v<LAYOUT>/           maps by name, programs as prog_<name>, and link_sockops:
                         the datapath is loaded if and only if link_sockops exists
    draining-<ns>/       retired: paused, and gone once the last socket in it is closed

Every step can be the last (kill -9): the directory is built aside and renamed into place,
the cgroup link is attached after that, so a sockhash that may hold sockets is always pinned.
Writers hold the node lock.
"""

from __future__ import annotations

import os
import time
from errno import EPERM

from nearpath import state
from nearpath.errors import BpfError, NearpathError, StateError, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nearpath.place import Place

_OBJECT = "socket_lane"
_SOCKOPS = "nearpath_sockops"
_MESSAGE = "nearpath_message"
_LINK = "link_sockops"
_DRAINING = "draining-"
# Policy that is tightened binds an accelerated connection after this time at the latest, and
# conntrack hears of it; one message a second costs nothing measurable.
_REVALIDATE_MS = 1000


def is_loaded(place: Place) -> bool:
    """True if the datapath is loaded; one stat(2)."""
    return os.path.exists(f"{place.layout_dir}/{_LINK}")


def ensure(place: Place) -> bool:
    """Load the datapath if it is not; N callers at once load it exactly once.

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
        _load(place)
        return True


def load(place: Place) -> bool:
    """Load the datapath, or replace the programs of a loaded one if ours are different.

    Live connections keep the program that they have; maps and their content stay.

    Returns:
        True if this call loaded or replaced anything.
    """
    with state.Lock(place):
        _remove_pin(place.unloaded_file)
        if is_loaded(place):
            from nearpath.datapath import tables

            tables.set_paused(place, False)  # a killed unload may have left it so
            return _replace(place)
        _load(place)
        return True


def _load(place: Place) -> None:
    """Bring the datapath from whatever state it is in to loaded; the lock is held."""
    from nearpath.datapath import libbpf, tables
    from nearpath.datapath.maps import Descriptor

    cgroup = _prepare(place)
    state.sweep(place)
    _sweep(place)
    if not os.path.isdir(place.layout_dir):
        _build(place)
    tables.set_paused(place, False)
    tables.set_revalidate(place, _REVALIDATE_MS)
    _register_recorded(place)
    with Descriptor.open_pinned(f"{place.layout_dir}/prog_{_SOCKOPS}") as program:
        try:
            link = libbpf.attach_to_cgroup(program, cgroup)
        except BpfError as error:
            if error.errno == EPERM:
                error.remedy = (
                    "another program is attached to this cgroup exclusively (without "
                    "BPF_F_ALLOW_MULTI): see bpftool cgroup tree"
                )
            raise
        with link:
            link.pin(f"{place.layout_dir}/{_LINK}")


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


def _build(place: Place) -> None:
    """Create maps and programs under loading/ and rename it to the layout's directory."""
    from nearpath.datapath import bundle, libbpf

    staging = f"{place.pin_dir}/loading"
    _remove_pins(staging)
    os.mkdir(staging, 0o700)
    with libbpf.Object(bundle.object_path(_OBJECT)) as built:
        built.pin_maps_under(staging)
        built.load()
        programs, maps = built.programs(), built.maps()
        # Before any socket can join: a socket keeps the program that its map had then.
        libbpf.attach_to_map(programs[_MESSAGE], maps["sockets"])
        for name, program in programs.items():
            program.pin(f"{staging}/prog_{name}")
    _note_digest(place)
    os.rename(staging, place.layout_dir)


def _replace(place: Place) -> bool:
    """Put our programs in the place of others of the same layout; the lock is held."""
    from nearpath.datapath import bundle, libbpf
    from nearpath.datapath.maps import Descriptor

    if _noted_digest(place) == _digest():
        return False
    with libbpf.Object(bundle.object_path(_OBJECT)) as built:
        built.pin_maps_under(place.layout_dir)
        built.load()
        programs, maps = built.programs(), built.maps()
        libbpf.attach_to_map(programs[_MESSAGE], maps["sockets"])
        with Descriptor.open_pinned(f"{place.layout_dir}/{_LINK}") as link:
            libbpf.update_link(link, programs[_SOCKOPS])
        for name, program in programs.items():
            # No dot in the name: bpffs keeps those for itself (bpf_lookup, kernel/bpf/inode.c).
            fresh = f"{place.layout_dir}/new_{name}"
            _remove_pin(fresh)
            program.pin(fresh)
            os.rename(fresh, f"{place.layout_dir}/prog_{name}")
    _note_digest(place)
    return True


def _digest() -> str:
    """Digest of our BPF object, to tell other programs of the same layout from ours."""
    from _blake2 import blake2b

    from nearpath.datapath import bundle

    with open(bundle.object_path(_OBJECT), "rb") as content:
        return blake2b(content.read()).hexdigest()[:32]


def _note_digest(place: Place) -> None:
    state.write_file(place.digest_file, _digest().encode())


def _noted_digest(place: Place) -> str:
    return (state.read_file(place.digest_file) or b"").decode("ascii", "replace")


def _register_recorded(place: Place) -> None:
    """Make recorded pods known to freshly built maps.

    Also those that an ADD without a datapath has left on the kernel path. The records stay
    as they are: ADD and DEL are their only writers. Should a DEL run at this moment, a
    cookie is registered that no namespace has any more, which GC takes away.
    """
    from nearpath.datapath import tables

    for record in state.records(place):
        cookie = state.cookie_of(record)
        if cookie and state.wants_lane(record):
            tables.set_pod(place, cookie, tables.POD_SOCKET_LANE)


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
        _retire_loaded(place, report)
    return _drain(place, report, timeout)


def retire(place: Place, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Undo an ensure(): like unload, but the next ADD may load again.

    Not if a pod is recorded, for one may have come meanwhile that needs the datapath.
    """
    with state.Lock(place):
        if any(True for _ in state.records(place)):
            return {"drained": False, "remaining": 0}
        _retire_loaded(place, report)
    return _drain(place, report, 5.0)


def _retire_loaded(place: Place, report: Callable[[str], None]) -> None:
    """Pause, and move the pins aside; the lock is held."""
    from nearpath.datapath import tables

    if not os.path.isdir(place.layout_dir):
        return
    try:
        tables.set_paused(place, True)
        report("paused: no socket joins, every message takes the kernel path")
    except BpfError as error:
        report(f"cannot pause: {error}")
    # link_sockops goes with the other pins when they are drained: until then the sockets in
    # the map need it to half-close as on the kernel path (state_changed, socket_lane.bpf.c).
    os.rename(place.layout_dir, f"{place.pin_dir}/{_DRAINING}{time.monotonic_ns()}")


def _drain(place: Place, report: Callable[[str], None], timeout: float) -> dict[str, Any]:
    """Remove drained pins; wait for the sockets in the others."""
    end = time.monotonic() + timeout
    said = -1
    while True:
        with state.Lock(place):
            remaining = _sweep(place)
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
            pass  # other layouts live there, or it is gone
        report("drained: nothing of the datapath is left")
    return {"drained": not remaining, "remaining": remaining}


def _sweep(place: Place) -> int:
    """Remove retired pins without sockets and a killed loader's; sockets still open."""
    from nearpath.datapath import tables

    remaining = 0
    try:
        names = os.listdir(place.pin_dir)
    except OSError:
        return 0
    for name in names:
        directory = f"{place.pin_dir}/{name}"
        if name.startswith(_DRAINING):
            left = tables.sockets_left(directory)
            remaining += left
            if not left:
                _remove_pins(directory)
        elif name == "loading":
            _remove_pins(directory)
    return remaining


def _remove_pins(directory: str) -> None:
    """Remove a directory of pins; none there is fine."""
    try:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StateError(f"cannot remove pins {directory}: {error.strerror}") from error


def _remove_pin(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def describe(place: Place) -> dict[str, Any]:
    """State of the datapath, for people.

    Returns:
        ``{"loaded", "layout", "cgroup", "pins", "paused", "draining", "unloaded"}``;
        ``draining`` counts sockets in retired maps.
    """
    from nearpath.datapath import tables
    from nearpath.kernel import cgroup
    from nearpath.place import LAYOUT

    loaded = is_loaded(place)
    try:
        directory = place.cgroup or cgroup.v2_root()
    except NearpathError:
        directory = ""
    draining = 0
    try:
        for name in os.listdir(place.pin_dir):
            if name.startswith(_DRAINING):
                draining += tables.sockets_left(f"{place.pin_dir}/{name}")
    except OSError:
        pass
    return {
        "loaded": loaded,
        "layout": LAYOUT,
        "cgroup": directory,
        "pins": place.layout_dir,
        "paused": loaded and tables.is_paused(place),
        "draining": draining,
        "unloaded": os.path.exists(place.unloaded_file),
    }
