"""What an operator has changed is kept by name, and only what is of use comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearpath.datapath import changes, settings
from nearpath.kernel import features
from nearpath.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A run directory and no datapath."""
    return Place(str(tmp_path), f"{tmp_path}/pins")


def _store(place: Place, content: object) -> None:
    Path(place.changes_file).write_text(json.dumps(content), encoding="ascii")


def test_what_was_changed_is_kept_until_it_is_changed_back(place: Place) -> None:
    """Each change adds to the earlier ones; a default is no change."""
    assert changes.read(place) == {}
    changes.note(place, {"paused": 1, "revalidate_ms": 250})
    changes.note(place, {"proven": 3})
    assert changes.read(place) == {"paused": 1, "revalidate_ms": 250, "proven": 3}
    changes.note(place, {"paused": 0, "proven": settings.DEFAULTS["proven"]})
    assert changes.read(place) == {"revalidate_ms": 250}


def test_some_can_be_forgotten(place: Place) -> None:
    """Others stay, and it is no matter if there was nothing."""
    changes.forget(place, ["paused"])
    assert not Path(place.changes_file).exists()
    changes.note(place, {"paused": 1, "stream_from": 64})
    changes.forget(place, ["paused"])
    assert changes.read(place) == {"stream_from": 64}


def test_settings_of_another_version_are_named(place: Place) -> None:
    """They are not used, and they stay in the file: the version may be changed back."""
    values = {"gone": 1, "revalidate_ms": 250, "paused": 7}
    _store(place, {"kernel": features.release(), "settings": values})
    assert changes.read(place) == {"revalidate_ms": 250}
    assert changes.unusable(place) == ["gone", "paused"]
    changes.note(place, {"proven": 3})
    assert changes.unusable(place) == ["gone", "paused"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"settings": {"paused": 1}},
        {"kernel": "another", "settings": {"paused": 1}},
        {"kernel": features.release(), "settings": ["paused"]},
        {"kernel": features.release(), "settings": {"paused": "1", "proven": True, "drained": 0.5}},
    ],
)
def test_a_file_of_no_use(place: Place, content: object) -> None:
    """Damaged, of another kernel, or with values that are no numbers: as if it were not there."""
    _store(place, content)
    assert changes.read(place) == {}
    assert changes.unusable(place) == []


def test_a_damaged_file(place: Place) -> None:
    """Not even JSON."""
    Path(place.changes_file).write_bytes(b'{"kernel": "\xff')
    assert changes.read(place) == {}
    changes.note(place, {"paused": 1})
    assert changes.read(place) == {"paused": 1}
