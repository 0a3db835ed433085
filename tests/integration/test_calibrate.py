"""calibrate on the real kernel: what it measures is what it says, and nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from helpers.leaks import nothing_left
from nearpath.datapath import calibration, settings, tables
from nearpath.errors import NearpathError
from nearpath.kernel import cgroup
from nearpath.node import calibrate, streams
from nearpath.node.calibrate import KERNEL, LANE
from nearpath.node.interrupt import Interrupted, Interrupts

if TYPE_CHECKING:
    from nearpath.place import Place

    from .conftest import Lab

MAIN = Path(__file__).parents[2] / "cni-plugin" / "main.py"
SIZES = (64, 16384)


def traces(place: Place) -> list[str]:
    """What a calibration has made that has a name."""
    directories = (Path(place.pin_dir).parent, Path(cgroup.v2_root()), Path(tempfile.gettempdir()))
    return [
        str(path)
        for directory in (*directories, Path(place.cgroup))
        for path in directory.glob("*-calibrate-*")
    ]


def environ(place: Place) -> dict[str, str]:
    """For a process of its own."""
    mine = {"RUN_DIR": place.run_dir, "PIN_DIR": place.pin_dir, "CGROUP": place.cgroup}
    return {**os.environ, **{f"NEARPATH_{name}": value for name, value in mine.items()}}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that tell nothing about speed, and take no time."""
    monkeypatch.setattr(calibrate, "SECONDS", 0.005)
    monkeypatch.setattr(calibrate, "ROUNDS", 3)


@pytest.mark.usefixtures("short")
def test_measures_both_paths(place: Place) -> None:
    """Rates of all paths, sizes and arrangements; the sender's messages were redirected."""
    seen: list[str] = []
    with Interrupts() as interrupts:
        outcome = calibrate.run(place, interrupts, seen.append, SIZES)
    assert [each.size for each in outcome.results] == list(SIZES)
    assert len(seen) == len(SIZES) * len(calibrate.arrangements())
    for each in outcome.results:
        assert set(each.rates) == set(calibrate.arrangements())
        for rates in each.rates.values():
            assert rates[KERNEL] > 0
            assert rates[LANE] > 0
        assert 0 < each.lane_share <= 1
    json.dumps(outcome.report())
    assert traces(place) == []


@pytest.mark.usefixtures("short")
def test_the_nodes_own_datapath_is_left_alone(lab: Lab) -> None:
    """Its settings, pods, counters and connections are as before; its lane works meanwhile."""
    before = settings.read(lab.place), tables.all_pods(lab.place)
    client, server = lab.pair()
    with client, server, Interrupts() as interrupts:
        counts = tables.counts(lab.place)

        def progress(_: str) -> None:
            client.sendall(b"x")
            assert server.recv(1) == b"x"

        calibrate.run(lab.place, interrupts, progress, SIZES)
        assert (settings.read(lab.place), tables.all_pods(lab.place)) == before
        assert set(tables.counts(lab.place)) == set(counts)
        assert lab.connections == 1
        assert lab.redirected > 0
    assert traces(lab.place) == []


def test_applied_to_a_loaded_datapath(lab: Lab) -> None:
    """At once; and by the load after the next unload (test_loader has the sizes)."""
    found = {"stream_from": 2048, "stream_to": 8193}
    calibration.write(lab.place, found, {})
    assert calibration.apply(lab.place, found) is True
    live = settings.read(lab.place)
    assert {name: live[name] for name in found} == found


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted(place: Place, after: int) -> None:
    """A signal noted at any size ends it, and nothing is left."""
    calls = 0

    def progress(_: str) -> None:
        nonlocal calls
        if calls == after:
            os.kill(os.getpid(), signal.SIGTERM)
        calls += 1

    with Interrupts() as interrupts, pytest.raises(Interrupted):
        calibrate.run(place, interrupts, progress, SIZES)
    assert traces(place) == []


@pytest.mark.usefixtures("short")
def test_a_worker_that_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error that names it, soon, and nothing is left."""

    def send(*_: object, **__: object) -> object:
        raise BrokenPipeError("no")

    monkeypatch.setattr(streams._End, "send", send)
    with Interrupts() as interrupts, pytest.raises(NearpathError, match=r"sender failed.*no"):
        calibrate.run(place, interrupts, lambda _: None, SIZES)
    assert traces(place) == []


def test_killed(place: Place) -> None:
    """kill -9 leaves pins and a cgroup; its workers die with it; the next run sweeps."""
    with nothing_left():
        process = subprocess.Popen(
            [sys.executable, MAIN, "calibrate", "--dry-run"],
            env=environ(place),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stderr
            assert "calibrate: 1/" in process.stderr.readline()
            process.kill()
        left = traces(place)
        assert len(left) == 3
        group = next(path for path in left if path.startswith(place.cgroup))
        wait_until(
            lambda: not Path(group, "cgroup.procs").read_text(), "the workers have died with it"
        )
        calibrate.sweep(place)
        assert traces(place) == []


def test_ctrl_c(place: Place) -> None:
    """The command as a user runs it: status 130, one line, nothing stored, nothing left."""
    process = subprocess.Popen(
        [sys.executable, MAIN, "calibrate"],
        env=environ(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stderr
        assert "calibrate: 1/" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == ""
        assert process.stderr.read().splitlines()[-1] == "nearpath: interrupted by SIGINT"
    assert calibration.read(place) is None
    assert traces(place) == []
