"""settings, pause and resume: what is refused, what reaches the map, what is shown.

The map is a dictionary here; that the programs heed it is for tests/integration.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from nearpath.cli import output
from nearpath.cli import settings as command
from nearpath.cli.main import main
from nearpath.datapath import settings
from nearpath.kernel import features
from nearpath.place import Place

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The settings of a loaded datapath."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    monkeypatch.setenv("NEARPATH_RUN_DIR", place.run_dir)
    monkeypatch.setenv("NEARPATH_PIN_DIR", place.pin_dir)
    monkeypatch.setattr(output, "geteuid", lambda: 0)
    values = dict(settings.DEFAULTS)

    def write(_: Place, **changes: int) -> None:
        values.update(changes)

    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: True)
    monkeypatch.setattr(settings, "read", lambda _: dict(values))
    monkeypatch.setattr(settings, "write", write)
    return values


def test_table(live: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting with value, default and meaning, for people and for programs."""
    live["revalidate_ms"] = 250
    assert main(["settings"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for name, (_, _, meaning) in settings.SETTINGS.items():
        assert name in shown
        assert meaning.split()[0] in shown
    assert main(["settings", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in table] == list(settings.SETTINGS)
    found: dict[str, Any] = {each["name"]: each for each in table}
    assert found["revalidate_ms"] == {
        "name": "revalidate_ms",
        "value": 250,
        "default": 1000,
        "least": 0,
        "most": 3_600_000,
        "meaning": settings.SETTINGS["revalidate_ms"][2],
    }


def test_change(live: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Several at once; what was and what is; JSON shows all."""
    assert main(["settings", "revalidate_ms=250", "stream_to=0x1000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "revalidate_ms: 1000 → 250",
        "stream_to: 4294967295 → 4096",
    ]
    assert (live["revalidate_ms"], live["stream_to"]) == (250, 4096)
    assert main(["settings", "--json", "duplex=0"]) == 0
    table = {each["name"]: each["value"] for each in json.loads(capsys.readouterr().out)}
    assert table == live
    assert live["duplex"] == 0


@pytest.mark.parametrize(
    "change", ["speed=1", "paused=2", "receiver_percent=101", "stream_from=4294967296"]
)
def test_refused(live: dict[str, int], change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown names and values out of range; nothing at all is changed then."""
    assert main(["settings", "revalidate_ms=250", change]) == 1
    assert capsys.readouterr().err.startswith("nearpath: ")
    assert live == settings.DEFAULTS


@pytest.mark.parametrize("name", sorted(settings.UNSAFE | {"probation"}))
def test_unsafe(live: dict[str, int], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Switching off what keeps connections right needs a word."""
    assert main(["settings", f"{name}=0"]) == 1
    assert "--unsafe" in capsys.readouterr().err
    assert live[name] == settings.DEFAULTS[name]
    assert main(["settings", "--unsafe", f"{name}=0"]) == 0
    assert live[name] == 0


def test_mptcp_fallback_may_crash_old_kernels(
    live: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only safe with the fix of December 2025; off it always is."""
    assert live
    monkeypatch.setattr(features, "version", lambda: (6, 1, 100))
    assert "crash" in command.danger("mptcp_fallback", 1)
    assert command.danger("mptcp_fallback", 0) == ""
    monkeypatch.setattr(features, "version", lambda: (6, 18, 0))
    assert command.danger("mptcp_fallback", 1) == ""


def test_pause_and_resume(live: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Each may be said twice."""
    for words, paused, text in (
        (["pause"], 1, "paused: no socket joins, every message takes the kernel path"),
        (["pause"], 1, "paused already"),
        (["resume"], 0, "resumed"),
        (["resume"], 0, "was not paused"),
        (["pause", "--json"], 1, '{\n  "paused": true,\n  "changed": true,\n  "failed": 0\n}'),
        (["resume", "--json"], 0, '{\n  "paused": false,\n  "changed": true,\n  "failed": 0\n}'),
    ):
        assert main(words) == 0
        assert capsys.readouterr().out == f"{text}\n"
        assert live["paused"] == paused


@pytest.mark.parametrize("words", [["settings"], ["settings", "duplex=0"], ["pause"], ["resume"]])
def test_not_loaded(
    live: dict[str, int],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, and no directory made."""
    assert live
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: False)
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.err == "nearpath: the datapath is not loaded; nearpath load\n"
    assert shown.out == ""
    assert not (tmp_path / "run").exists()
