"""What `nearpath calibrate` has found out about this node, kept for the next load.

The file is JSON: ``{"version": 1, "kernel": uname -r, "thresholds": {setting: value}, ...}``;
what else is in it is for people.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.datapath import loader, settings
from nearpath.errors import StateError
from nearpath.kernel import features

if TYPE_CHECKING:
    from nearpath.place import Place

VERSION = 1
THRESHOLDS = ("stream_from", "stream_to")


def read(place: Place) -> dict[str, Any] | None:
    """The stored calibration; None if there is none for this kernel, or it is damaged."""
    try:
        stored = json.loads(state.read_file(place.calibration_file) or b"null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        return None
    return stored if stored.get("kernel") == features.release() else None


def thresholds(place: Place) -> dict[str, int]:
    """Settings to use in the place of their defaults; empty without a calibration."""
    stored = read(place)
    found = stored.get("thresholds") if stored else None
    if not isinstance(found, dict) or set(found) != set(THRESHOLDS):
        return {}
    try:
        for name, value in found.items():
            settings.check(name, value)
    except (ValueError, TypeError):
        return {}
    return {name: int(value) for name, value in found.items()}


def apply(place: Place, found: dict[str, int]) -> bool:
    """Let a loaded datapath use these thresholds from the next message on.

    Returns:
        False if nothing is loaded.
    """
    from nearpath.datapath import changes

    with state.Lock(place):
        if not loader.is_loaded(place):
            return False
        changes.forget(place, THRESHOLDS)
        settings.write(place, **{name: found[name] for name in THRESHOLDS})
        return True


def forget(place: Place) -> bool:
    """Remove what is stored; False if there was nothing."""
    try:
        os.unlink(place.calibration_file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StateError(f"cannot remove {place.calibration_file}: {error.strerror}") from error
    return True


def write(place: Place, found: dict[str, int], details: dict[str, Any]) -> None:
    """Store thresholds and what they were made from."""
    state.secure_dir(os.path.dirname(place.calibration_file))
    content = {
        "version": VERSION,
        "kernel": features.release(),
        "thresholds": {name: found[name] for name in THRESHOLDS},
        **details,
    }
    state.write_file(place.calibration_file, json.dumps(content, indent=1).encode() + b"\n")
