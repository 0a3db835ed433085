"""calibrate: the range that follows from what was measured, and what is done with it.

The measurement itself is tested on the real kernel, in tests/integration and tests/e2e.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from nearpath.cli import output
from nearpath.cli.main import main
from nearpath.datapath import calibration, settings
from nearpath.errors import NearpathError
from nearpath.node import calibrate
from nearpath.node.calibrate import KERNEL, LANE, ONE_CPU, TWO_CPUS, Outcome, Result
from nearpath.place import Place

if TYPE_CHECKING:
    from pathlib import Path

ANY = settings.ANY_SIZE


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        # The usual shape.
        ({1: 0.4, 64: 0.7, 512: 1.0, 4096: 2.0, 65536: 1.5}, (512, ANY)),
        # A long path without TSO in the lane: large writes lose.
        ({1: 0.4, 64: 0.7, 512: 1.1, 4096: 1.2, 65536: 0.8}, (512, 4097)),
        # All or nothing.
        ({1: 1.2, 64: 1.3, 512: 1.1}, (1, ANY)),
        ({1: 1.0, 64: 1.0}, (1, ANY)),
        ({1: 0.9, 64: 0.8, 512: 0.99}, (ANY, ANY)),
        ({64: 1.01}, (64, ANY)),
        ({}, (ANY, ANY)),
        # A hole of noise is bridged, a real one is not: the greater gain wins.
        ({1: 0.5, 64: 1.2, 512: 0.97, 4096: 1.3, 65536: 1.4}, (64, ANY)),
        ({1: 0.5, 64: 1.2, 512: 0.94, 4096: 1.3, 65536: 1.4}, (4096, ANY)),
        ({1: 3.0, 64: 1.2, 512: 0.8, 4096: 1.3, 65536: 1.4}, (1, 65)),
        # Noise at the ends does not stretch the range.
        ({1: 0.97, 64: 0.99, 512: 1.2, 4096: 1.1, 65536: 0.98}, (512, 4097)),
        ({1: 0.97, 64: 0.5, 512: 1.2}, (512, ANY)),
    ],
)
def test_choose(worst: dict[int, float], expected: tuple[int, int]) -> None:
    """One contiguous range of sizes that do not lose."""
    found = calibrate.choose(worst)
    assert (found["stream_from"], found["stream_to"]) == expected
    for name, value in found.items():
        settings.check(name, value)
    assert set(found) == set(calibration.THRESHOLDS)


def result(size: int, one: float, two: float) -> Result:
    rates = {ONE_CPU: {KERNEL: 1e8, LANE: 1e8 * one}, TWO_CPUS: {KERNEL: 2e8, LANE: 2e8 * two}}
    return Result(size, rates, 0.9, [0.1, 0.2])


OUTCOME = Outcome(
    [result(64, 0.5, 1.5), result(1024, 1.2, 1.1), result(65536, 2.0, 3.0)],
    {ONE_CPU: (1, 1), TWO_CPUS: (0, 1)},
)


def test_the_worse_of_one_and_two_cpus_counts() -> None:
    """Nobody knows where the scheduler puts the two ends."""
    assert OUTCOME.thresholds == {"stream_from": 1024, "stream_to": ANY}
    first = OUTCOME.report()["results"][0]
    assert (first["ratio"], first["worst"]) == ({ONE_CPU: 0.5, TWO_CPUS: 1.5}, 0.5)
    json.dumps(OUTCOME.report())


def test_a_busy_node(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of the same kind that differ much are worth a word."""
    assert place
    main(["calibrate", "--dry-run"])
    assert "busy" not in capsys.readouterr().out
    for each in OUTCOME.results:
        each.scatter += [0.9] * 3
    try:
        assert main(["calibrate", "--dry-run"]) == 0
    finally:
        for each in OUTCOME.results:
            del each.scatter[2:]
    assert "this node is busy: runs of the same kind differ by 90%" in capsys.readouterr().out


@pytest.mark.parametrize("usable", [{3}, {0, 1}, {2, 5, 7}])
def test_arrangements(usable: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one CPU is measured on that one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    found = calibrate.arrangements()
    assert found[ONE_CPU] == (max(usable), max(usable))
    assert (TWO_CPUS in found) == (len(usable) > 1)
    assert {cpu for pair in found.values() for cpu in pair} <= usable


# -- the command -----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A node on which measuring gives OUTCOME; nothing is loaded."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    monkeypatch.setenv("NEARPATH_RUN_DIR", place.run_dir)
    monkeypatch.setenv("NEARPATH_PIN_DIR", place.pin_dir)
    monkeypatch.setattr(output, "geteuid", lambda: 0)

    def run(_: Place, __: object, progress: Any) -> Outcome:
        progress("64 B, one CPU")
        return OUTCOME

    monkeypatch.setattr(calibrate, "run", run)
    return place


def test_measured_stored_and_used(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By later loads, and at once by a loaded datapath."""
    assert main(["calibrate"]) == 0
    shown = capsys.readouterr()
    assert "from 1024 B stay in the lane: used when the datapath is loaded" in shown.out
    assert "0.50" in shown.out
    assert "64 B, one CPU" in shown.err
    assert calibration.thresholds(place) == OUTCOME.thresholds
    written: list[dict[str, int]] = []
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: True)
    monkeypatch.setattr(settings, "write", lambda _, **changes: written.append(changes))
    assert main(["calibrate", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["stored"], answer["applied"]) == (True, True)
    assert answer["thresholds"] == written[0] == OUTCOME.thresholds
    stored = calibration.read(place)
    assert stored is not None
    assert stored["results"] == answer["results"]


def test_dry_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows and changes nothing."""
    assert main(["calibrate", "--dry-run"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert calibration.read(place) is None
    assert main(["calibrate", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"] is False


def test_reset(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Back to the defaults, also of a loaded datapath, without measuring."""
    written: list[dict[str, int]] = []
    main(["calibrate"])
    monkeypatch.setattr(calibrate, "run", None)
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: True)
    monkeypatch.setattr(settings, "write", lambda _, **changes: written.append(changes))
    assert main(["calibrate", "--reset"]) == 0
    assert calibration.read(place) is None
    defaults = {name: settings.DEFAULTS[name] for name in calibration.THRESHOLDS}
    assert written == [defaults]
    capsys.readouterr()
    assert main(["calibrate", "--reset", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"thresholds": defaults, "reset": False, "applied": True}


def test_a_failure_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was stored before stays."""
    main(["calibrate"])
    before = calibration.read(place)

    def run(*_: object) -> Outcome:
        raise NearpathError("the receiver did not finish in 10 s")

    monkeypatch.setattr(calibrate, "run", run)
    assert main(["calibrate"]) == 1
    assert capsys.readouterr().err.endswith("nearpath: the receiver did not finish in 10 s\n")
    assert calibration.read(place) == before


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed calibration left goes, what a living one uses stays, nothing else is touched.

    Ordinary directories stand in for bpffs and cgroupfs.
    """
    monkeypatch.setattr(tempfile, "gettempdir", lambda: f"{tmp_path}/tmp")
    place = Place(f"{tmp_path}/run", f"{tmp_path}/bpf/nearpath", f"{tmp_path}/cgroup")
    dead, living = 2**22 + 1, os.getpid()  # beyond the greatest PID
    for pid in (dead, living):
        for name in (
            f"bpf/nearpath-calibrate-{pid}/v2",
            f"bpf/nearpath-calibrate-{pid}/draining-1",
            f"cgroup/nearpath-calibrate-{pid}",
            f"tmp/nearpath-calibrate-{pid}-abc/run",
        ):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / f"bpf/nearpath-calibrate-{pid}/v2/sockets").touch()
    (tmp_path / "bpf/nearpath/v2").mkdir(parents=True)
    (tmp_path / "bpf/nearpath-calibrate-old").mkdir()
    calibrate.sweep(place)
    assert sorted(os.listdir(tmp_path / "bpf")) == [
        "nearpath",
        f"nearpath-calibrate-{living}",
        "nearpath-calibrate-old",
    ]
    assert os.listdir(tmp_path / "cgroup") == [f"nearpath-calibrate-{living}"]
    assert os.listdir(tmp_path / "tmp") == [f"nearpath-calibrate-{living}-abc"]
