"""The stored calibration: used if it is for this kernel and whole, else ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearpath.datapath import calibration, settings
from nearpath.kernel import features
from nearpath.place import Place

FOUND = {"stream_from": 256, "stream_to": 16385}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place with a calibration."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    calibration.write(place, FOUND, {"measured_at": "then"})
    return place


def test_kept(place: Place) -> None:
    """Thresholds, kernel, and what else there was to say."""
    stored = calibration.read(place)
    assert stored is not None
    assert stored["kernel"] == features.release()
    assert stored["measured_at"] == "then"
    assert calibration.thresholds(place) == FOUND
    assert set(calibration.THRESHOLDS) <= set(settings.SETTINGS)


def test_of_another_kernel(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored: the stack has changed."""
    monkeypatch.setattr(features, "release", lambda: "7.0.0-other")
    assert calibration.read(place) is None
    assert calibration.thresholds(place) == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "thresholds": 5}',
        '{"version": 1, "thresholds": {"stream_from": 1}}',
        '{"version": 1, "thresholds": {"stream_from": -1, "stream_to": 5}}',
        '{"version": 1, "thresholds": {"stream_from": "1", "stream_to": 5}}',
        '{"version": 1, "thresholds": {"paused": 1, "stream_to": 5}}',
        "[" * 100_000,
    ],
)
def test_damaged(place: Place, content: str) -> None:
    """A load must not fail over it, nor take in other settings."""
    if content.startswith('{"version": 1'):
        content = json.dumps({**json.loads(content), "kernel": features.release()})
    Path(place.calibration_file).write_text(content)
    assert calibration.thresholds(place) == {}


def test_none(tmp_path: Path) -> None:
    """Most nodes have none."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    assert calibration.read(place) is None
    assert calibration.forget(place) is False
    assert calibration.apply(place, FOUND) is False


def test_forget(place: Place) -> None:
    """Once."""
    assert calibration.forget(place) is True
    assert calibration.forget(place) is False
    assert calibration.thresholds(place) == {}


def test_apply(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a loaded datapath, and nothing but the thresholds."""
    written: list[dict[str, int]] = []
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: True)
    monkeypatch.setattr(settings, "write", lambda _, **changes: written.append(changes))
    assert calibration.apply(place, {**FOUND, "other": 1}) is True
    assert written == [FOUND]
