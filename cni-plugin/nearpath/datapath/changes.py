"""What an operator has changed in the settings: kept by name, for maps that are made anew.

A new layout of the maps starts with their defaults, and it may be the next pod's ADD that loads
it. A pause must outlast that, and so must any rule that was changed.

The file is JSON: ``{"kernel": uname -r, "settings": {name: value}}``. It lies in the run
directory, so a restart of the node forgets it. Writers hold the node lock.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nearpath import state
from nearpath.datapath import settings
from nearpath.kernel import features

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nearpath.place import Place


def _stored(place: Place) -> dict[str, int]:
    """All that is in the file, known to this version or not; empty if it is of no use."""
    try:
        stored = json.loads(state.read_file(place.changes_file) or b"null")
    except (ValueError, RecursionError):
        return {}
    # What is safe on one kernel need not be on another.
    if not isinstance(stored, dict) or stored.get("kernel") != features.release():
        return {}
    found = stored.get("settings")
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if type(value) is int}


def _is_valid(name: str, value: int) -> bool:
    try:
        settings.check(name, value)
    except ValueError:
        return False
    return True


def read(place: Place) -> dict[str, int]:
    """Settings to use in the place of their defaults."""
    return {name: value for name, value in _stored(place).items() if _is_valid(name, value)}


def unusable(place: Place) -> list[str]:
    """Names of changes that this version has no such setting for, or no such value."""
    return [name for name, value in _stored(place).items() if not _is_valid(name, value)]


def note(place: Place, changes: Mapping[str, int]) -> None:
    """Keep what was changed; what is back at its default is a change no more."""
    kept = {**_stored(place), **changes}
    _write(place, {name: kept[name] for name in kept if kept[name] != settings.DEFAULTS.get(name)})


def forget(place: Place, names: Iterable[str]) -> None:
    """Let these have their defaults at the next load."""
    stored = _stored(place)
    kept = {name: value for name, value in stored.items() if name not in set(names)}
    if kept != stored:
        _write(place, kept)


def _write(place: Place, kept: dict[str, int]) -> None:
    content = {"kernel": features.release(), "settings": kept}
    state.write_file(place.changes_file, json.dumps(content).encode() + b"\n")
