"""The log: one line per event, forged by nobody, and never in the way."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from nearpath import log as log_module
from nearpath.log import Log
from nearpath.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place of the test's own."""
    return Place(str(tmp_path / "run"))


def lines(place: Place) -> list[str]:
    """What was written."""
    return Path(place.log_file).read_text(encoding="utf-8").splitlines()


def test_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A line has time, level, pid, context and text; warnings and errors reach stderr too."""
    log = Log(place, "ADD c1/eth0")
    log.info("one")
    log.warning("two")
    log.error("three")
    stamps, levels, pids = zip(*(line.split(" ")[:3] for line in lines(place)), strict=True)
    assert levels == ("info", "warning", "error")
    assert set(pids) == {f"[{os.getpid()}]"}
    assert all(len(stamp) == 20 and stamp.endswith("Z") for stamp in stamps)
    assert [line.split(" ", 3)[3] for line in lines(place)] == [
        "ADD c1/eth0: one",
        "ADD c1/eth0: two",
        "ADD c1/eth0: three",
    ]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("nearpath: warning: ADD c1/eth0: two\nnearpath: error: ADD c1/eth0: three\n")
    assert stat.S_IMODE(os.stat(place.log_file).st_mode) == 0o600


@pytest.mark.parametrize(
    ("level", "expected"),
    [("info", ["i", "w", "e"]), ("warning", ["w", "e"]), ("error", ["e"])],
)
def test_level(
    place: Place, level: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines less severe than the level go nowhere."""
    log = Log(place, level=level)
    log.error("first")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert [line.rsplit(" ", 1)[1] for line in lines(place)][1:] == expected
    assert ("warning" in capsys.readouterr().err) is ("w" in expected)


def test_quiet(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A quiet log writes to the file alone."""
    Log(place, quiet=True).error("x")
    assert capsys.readouterr().err == ""
    assert len(lines(place)) == 1


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\r\n2026-01-01T00:00:00Z error [1] forged", "\x1b[2J", "\x9b31m", "\0", "\x7f"],
)
def test_no_forged_lines(place: Place, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in foreign text neither make lines nor drive a terminal."""
    Log(place, text).error(text)
    written = Path(place.log_file).read_bytes()
    assert written.count(b"\n") == 1
    both = written.decode() + capsys.readouterr().err
    assert not set("\r\x1b\x9b\0\x7f") & set(both)


def test_odd_text(place: Place) -> None:
    """Surrogates of invalid UTF-8 and very long texts are written, escaped and cut."""
    Log(place).error("\udcff" + "x" * 100_000)
    (line,) = lines(place)
    assert "\\udcff" in line
    assert len(line) < 5000


def test_size_is_capped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is rotated at the limit and one old file is kept."""
    monkeypatch.setattr(log_module, "LIMIT", 2000)
    log = Log(place, quiet=True)
    for number in range(200):
        log.info(f"{number} " + "x" * 50)
    names = sorted(os.listdir(place.run_dir))
    assert names == ["nearpath.log", "nearpath.log.1"]
    assert all(os.stat(Path(place.run_dir, name)).st_size < 2200 for name in names)
    assert "199 xxx" in Path(place.log_file).read_text() + Path(place.log_file + ".1").read_text()


@pytest.mark.parametrize("kind", ["symlink", "directory", "elsewhere"])
def test_never_raises(place: Place, kind: str, tmp_path: Path) -> None:
    """A log that cannot be written stops nothing, and is never written through a symlink."""
    if kind == "elsewhere":
        place = Place("/proc/nearpath")
    else:
        os.mkdir(place.run_dir, 0o700)
        if kind == "symlink":
            os.symlink(tmp_path / "target", place.log_file)
        else:
            os.mkdir(place.log_file)
    Log(place).error("x")
    assert not (tmp_path / "target").exists()


def test_without_stderr(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing, closed or failing stderr stops nothing: the file still gets the line."""
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, open("/dev/full", "w", encoding="ascii")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        Log(place).error("x")
        monkeypatch.undo()
    assert len(lines(place)) == 3
