"""Is there a watcher on this node, and if not, start one (node/watcher.py).

The plugin's part: it imports next to nothing, for an ADD asks whenever there are virtual
machines on the node.
"""

from __future__ import annotations

import os

from nearpath import state
from nearpath.errors import NearpathError
from nearpath.kernel import children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nearpath.place import Place

# Of the environment of a container runtime a watcher needs no more.
_KEPT = ("PATH", "LANG", "NEARPATH_RUN_DIR", "NEARPATH_PIN_DIR", "NEARPATH_CGROUP")


def running(place: Place) -> int:
    """Process ID of the watcher; 0 if there is none."""
    if not os.path.exists(place.watcher_file):
        return 0
    try:
        with state.Lock(place, place.watcher_file, wait=False):
            return 0
    except state.LockedError:
        text = (state.read_file(place.watcher_file) or b"").strip()
    return int(text) if text.isdigit() else -1  # it has only just taken the lock


def ensure(place: Place) -> bool:
    """Start a watcher if none is running; True if one was started.

    Two callers at once may start two: the second one finds the lock taken and ends.

    Raises:
        NearpathError: no process can be made.
    """
    if running(place):
        return False
    environ = children.clean_environ()
    environ = {name: environ[name] for name in _KEPT if name in environ}
    # Those of this process's own place, wherever it was read from.
    environ["NEARPATH_RUN_DIR"], environ["NEARPATH_PIN_DIR"] = place.run_dir, place.pin_dir
    try:
        children.spawn_detached([*children.own_command(), "watch", "--detached"], environ)
    except OSError as error:
        raise NearpathError(f"cannot start the watcher: {error.strerror}") from error
    return True
