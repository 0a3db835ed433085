"""Pause, replace, retire, unload and kill -9 under load: streams keep their checksums.

The load are the streams of helpers/streams.c between the two pods: long and short
connections, both ways, half-closed, with slow readers, every byte compared; blocking sockets
without timeouts, so that an errno or a hang that the kernel path does not have is a failure.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import CommandError, run, wait_until
from helpers.strace import steps, traced
from helpers.streams import ALL_KINDS, streams
from nearpath import place as place_module
from nearpath import state
from nearpath.datapath import bundle, libbpf, loader, settings, tables, unloader
from nearpath.datapath.maps import Descriptor, Map
from nearpath.lanes import socket as lane
from nearpath.place import LAYOUT, Place

from .conftest import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from helpers.strace import Step
    from helpers.streams import Streams

# Of each operation, at steps drawn by NEARPATH_SEED; all of them with NEARPATH_ALL_STEPS=1.
MOST_KILLS = 1 << 30 if os.environ.get("NEARPATH_ALL_STEPS") else 2
SERVER = "10.77.0.2"


@contextmanager
def under_load(lab: Lab, directory: Path, kinds: Sequence[str] = ALL_KINDS) -> Iterator[Streams]:
    """Records for both pods, and these kinds of traffic between them to its checked end."""
    for pod in (lab.left, lab.right):
        socket_lane = {"state": "on", "reason": "", "unguarded": True}
        state.save(
            lab.place,
            {
                "container_id": pod.name,
                "ifname": "eth0",
                "netns_cookie": pod.cookie,
                "lanes": {"socket": socket_lane},
            },
        )
    try:
        with streams(directory, lab.left.netns, lab.right.netns, SERVER, kinds) as running:
            running.advance()
            yield running
            running.advance()
            running.finish()
    finally:
        for pod in (lab.left, lab.right):
            state.remove(lab.place, pod.name, "eth0")


def assert_empty(directory: str) -> None:
    """Nothing of any connection is left in the maps."""

    def empty(name: str) -> bool:
        with Map.pinned_unknown(f"{directory}/{name}") as table:
            return not list(table.keys())

    for name in ("sockets", "connections"):
        wait_until(functools.partial(empty, name), f"map {name} to be empty")


def programs(lab: Lab) -> list[object]:
    """IDs of the sock_ops programs on our cgroup."""
    return [program["id"] for program in libbpf.cgroup_programs(lab.place.cgroup, effective=False)]


def wait_for_programs(lab: Lab, count: int) -> None:
    """The kernel detaches a link whose last pin is gone a moment later."""
    wait_until(lambda: len(programs(lab)) == count, f"{count} programs on the cgroup")


def wait_for_joins(lab: Lab) -> None:
    """New connections find each other."""
    before = lab.reason("joined")
    wait_until(lambda: lab.reason("joined") > before, "new connections to join")


def draining(place: Place) -> list[str]:
    """Directories of retired datapaths."""
    return [name for name in os.listdir(place.pin_dir) if name.startswith("draining-")]


class Retired(Place):
    """A place whose layout directory is that of a retired datapath."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place.run_dir, place.pin_dir, place.cgroup)
        self._name = name

    @property
    def layout_dir(self) -> str:
        """Where its pins are."""
        return f"{self.pin_dir}/{self._name}"


def redirected(place: Place) -> int:
    """Messages that a datapath, retired or not, has redirected."""
    return sum(counts["redirected_messages"] for counts in tables.counts(place).values())


# -- the streams themselves ------------------------------------------------------------------


def test_the_streams_on_the_kernel_path(lab: Lab, tmp_path: Path) -> None:
    """The control: none of what they insist on is the lane's doing."""
    lab.register(enabled=False)
    with under_load(lab, tmp_path) as running:
        running.advance(100)
    assert (lab.redirected, lab.kernel) == (0, 0)


def test_the_streams_notice_bytes_that_change_places(lab: Lab, tmp_path: Path) -> None:
    """The other control: without the rule that keeps the order they find it broken."""
    with streams(tmp_path, lab.left.netns, lab.right.netns, SERVER, ["late", "bulk"]) as running:
        settings.write(lab.place, drained=0)

        def found_broken() -> bool:
            switch(lab, "paused", 1, 0)
            return any("wrong byte" in worker.failure for worker in running.workers())

        wait_until(found_broken, "a byte in the wrong place")
        with pytest.raises(CommandError, match="wrong byte"):
            running.check()


# -- settings --------------------------------------------------------------------------------


def switch(lab: Lab, name: str, *values: int) -> None:
    """Change a setting several times."""
    for value in values:
        settings.write(lab.place, **{name: value})


def test_pause_and_resume_in_quick_succession(lab: Lab, tmp_path: Path) -> None:
    """Ten thousand times, at any moment of any message."""
    with under_load(lab, tmp_path) as running:
        for _ in range(20):
            for _ in range(500):
                switch(lab, "paused", 1, 0)
            running.advance()
        settled = lab.redirected
        running.advance(100)
        assert lab.redirected > settled
    assert lab.reason("paused") > 100
    assert lab.reason("not_drained") > 0
    assert_empty(lab.place.layout_dir)


def test_every_rule_may_be_switched_under_load(lab: Lab, tmp_path: Path) -> None:
    """Any value that is allowed, but for those switches that are for experiments only."""
    seed = os.environ.get("NEARPATH_SEED", str(random.randrange(1 << 32)))
    print(f"NEARPATH_SEED={seed}")
    source = random.Random(seed)
    names = sorted(set(settings.SETTINGS) - settings.UNSAFE)
    with under_load(lab, tmp_path) as running:
        for _ in range(300):
            name = source.choice(names)
            default, (least, most), _ = settings.SETTINGS[name]
            choices = [least, default, min(most, 1), min(most, source.randint(0, 5000))]
            switch(lab, name, source.choice(choices))
            if source.random() < 0.1:
                running.advance(1)
    assert_empty(lab.place.layout_dir)


# -- replacing -------------------------------------------------------------------------------


@pytest.fixture
def other_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """BPF objects that differ from ours by as many bytes at the end as the list says."""
    ours = bundle.object_path
    extra = [0]

    def path(name: str) -> str:
        copy = tmp_path / f"{name}-{extra[0]}.bpf.o"
        copy.write_bytes(Path(ours(name)).read_bytes() + bytes(extra[0]))
        return str(copy)

    monkeypatch.setattr(bundle, "object_path", path)
    return extra


def test_other_programs_take_over(lab: Lab, tmp_path: Path, other_build: list[int]) -> None:
    """Five builds one after the other: maps and pods stay, new connections use the new ones."""
    with under_load(lab, tmp_path) as running:
        for number in range(1, 6):
            before = programs(lab)
            other_build[0] = number
            assert loader.load(lab.place)
            assert not loader.load(lab.place)
            assert len(programs(lab)) == 1
            assert programs(lab) != before
            wait_for_joins(lab)
            running.advance()
        assert lane.is_registered(lab.place, lab.left.cookie)
    assert_empty(lab.place.layout_dir)
    assert os.listdir(lab.place.pin_dir) == [f"v{LAYOUT}"]


def test_a_killed_load_of_another_build_leaves_no_old_programs(
    place: Place, other_build: list[int]
) -> None:
    """Built, killed before it was attached, upgraded, loaded: the upgrade's programs run."""
    other_build[0] = 1
    loader.ensure(place)
    os.unlink(f"{place.layout_dir}/link_sockops")
    other_build[0] = 2
    assert loader.load(place)
    assert not loader.load(place), "those of the killed load"


@pytest.mark.parametrize("layout", [LAYOUT + 1, LAYOUT - 1], ids=["newer", "older"])
def test_another_layout_takes_over(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: int
) -> None:
    """The old one is paused and drains; pods and new connections are the new one's."""
    with under_load(lab, tmp_path) as running:
        monkeypatch.setattr(place_module, "LAYOUT", layout)
        assert loader.load(lab.place)
        (name,) = draining(lab.place)
        assert sorted(os.listdir(lab.place.pin_dir)) == [name, f"v{layout}"]
        old = Retired(lab.place, name)
        assert settings.read(old)["paused"] == 1
        assert tables.all_pods(lab.place) == tables.all_pods(old)
        # What was on its way when it was paused has been counted by then.
        running.advance()
        before = redirected(old)
        wait_until(lambda: lab.redirected > 100, "new connections to be redirected")
        running.advance(50)
        assert redirected(old) == before
        # The long ones are still the old one's, and its program must be there for them.
        assert unloader.sockets_draining(lab.place) >= 4
        assert len(programs(lab)) == 2
        assert not loader.load(lab.place)
        assert draining(lab.place) == [name]
    wait_until(lambda: unloader.sockets_draining(lab.place) == 0, "the last socket to close")
    assert_empty(lab.place.layout_dir)
    loader.load(lab.place)
    assert os.listdir(lab.place.pin_dir) == [f"v{layout}"]
    wait_for_programs(lab, 1)


def test_two_layouts_at_once(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it retired the old one: both pair, none of them twice or wrongly."""
    with under_load(lab, tmp_path) as running:
        with monkeypatch.context() as interrupted:
            interrupted.setattr(place_module, "LAYOUT", LAYOUT + 1)
            interrupted.setattr(unloader, "retire_other_layouts", lambda _: None)
            assert loader.load(lab.place)
            assert len(programs(lab)) == 2
            running.advance(50)
            assert lab.reason("socket_busy") > 0
            # Whoever comes first has the sockets; the other one goes on when it is gone.
            switch(Lab(Retired(lab.place, f"v{LAYOUT}"), lab.left, lab.right), "paused", 1, 0, 1)
            running.advance(50)
            assert lab.redirected > 0
        monkeypatch.setattr(place_module, "LAYOUT", LAYOUT + 1)
        loader.load(lab.place)
        assert len(draining(lab.place)) == 1
        running.advance()


def _create_map(kind: int, key_size: int, value_size: int, entries: int) -> Descriptor:
    theirs = ctypes.CDLL("libbpf.so.1", use_errno=True)
    number = theirs.bpf_map_create(kind, b"old", key_size, value_size, entries, None)
    assert number >= 0, os.strerror(ctypes.get_errno())
    return Descriptor(number, "old")


def test_a_layout_that_we_know_nothing_of(lab: Lab) -> None:
    """All that is asked of an old one: `settings` that begins with `paused`, and `sockets`."""
    old = f"{lab.place.pin_dir}/v1"
    array, sockhash = 2, 18  # enum bpf_map_type
    os.mkdir(old, 0o700)
    client, server = lab.pair()
    lab.register(enabled=False)
    stranger, other = lab.pair()
    with client, server, stranger, other:
        with _create_map(array, 4, 12, 1) as created:
            created.pin(f"{old}/settings")
        with _create_map(sockhash, 20, 4, 8) as created:
            created.pin(f"{old}/sockets")
        with Map.pinned(f"{old}/settings", 4, 12) as table:
            table.update(bytes(4), struct.pack("=III", 0, 17, 4))
        with Map.pinned(f"{old}/sockets", 20, 4) as table:
            table.update(bytes(20), struct.pack("=i", stranger.fileno()))
        assert not loader.load(lab.place)
        (name,) = draining(lab.place)
        with Map.pinned(f"{lab.place.pin_dir}/{name}/settings", 4, 12) as table:
            assert table.lookup(bytes(4)) == struct.pack("=III", 1, 17, 4)
        assert loader.describe(lab.place)["draining"] == 1
        loader.load(lab.place)
        assert draining(lab.place) == [name]
        for sender, reader in ((stranger, other), (other, stranger), (client, server)):
            sender.sendall(b"goes on")
            assert reader.recv(100) == b"goes on"
    wait_until(lambda: loader.describe(lab.place)["draining"] == 0, "the socket to be closed")
    loader.load(lab.place)
    assert draining(lab.place) == []


# -- unloading -------------------------------------------------------------------------------


def test_unload_and_load_again_and_again(lab: Lab, tmp_path: Path) -> None:
    """Every round leaves long connections on the kernel path and new ones in the lane."""
    with under_load(lab, tmp_path) as running:
        for _ in range(3):
            left = unloader.unload(lab.place, lambda _: None, 0)
            assert left["remaining"] >= 4
            assert not loader.is_loaded(lab.place)
            running.advance(5)
            assert loader.load(lab.place)
            wait_until(lambda: lab.redirected > 50, "new connections to be redirected")
            running.advance(5)
    wait_until(lambda: unloader.sockets_draining(lab.place) == 0, "the last socket to close")
    assert_empty(lab.place.layout_dir)
    assert unloader.unload(lab.place, lambda _: None, 5) == {"drained": True, "remaining": 0}
    assert not Path(lab.place.pin_dir).exists()


@pytest.mark.parametrize("both", [False, True], ids=["another", "two"])
def test_unload_while_another_layout_is_loaded(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, both: bool
) -> None:
    """All that are loaded are retired, whatever their layout."""
    with under_load(lab, tmp_path) as running:
        monkeypatch.setattr(place_module, "LAYOUT", LAYOUT + 1)
        if both:
            with monkeypatch.context() as interrupted:
                interrupted.setattr(unloader, "retire_other_layouts", lambda _: None)
                assert loader.load(lab.place)
            running.advance()
        steps_taken: list[str] = []
        left = unloader.unload(lab.place, steps_taken.append, 0)
        assert left["remaining"] >= 4
        # That of the one whose program came second may be empty and gone.
        assert len(draining(lab.place)) == len(os.listdir(lab.place.pin_dir)) >= 1
        assert sum(step.startswith("paused") for step in steps_taken) == 1 + both
        running.advance(10)
        counted = sum(redirected(Retired(lab.place, name)) for name in draining(lab.place))
        running.advance(10)
        assert counted == sum(redirected(Retired(lab.place, name)) for name in draining(lab.place))
    wait_until(lambda: unloader.sockets_draining(lab.place) == 0, "the last socket to close")


# -- kill -9 ---------------------------------------------------------------------------------

_LOAD = """
import sys
from nearpath import place
from nearpath.datapath import loader
place.LAYOUT = int(sys.argv[4])
loader.load(place.Place(*sys.argv[1:4]))
"""


def _load(place: Place, layout: int, *prefix: str) -> int:
    """`nearpath load` by a process of its own; the exit status."""
    words = [sys.executable, "-S", "-c", _LOAD, place.run_dir, place.pin_dir, place.cgroup]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return run([*prefix, *words, str(layout)], check=False, env=environ).returncode


def _matters(place: Place, step: Step) -> bool:
    """Whether a killed loader has changed something before this call."""
    if step.failed:
        return False
    if step.call == "bpf":
        words = ("PIN", "ATTACH", "LINK", "UPDATE", "DELETE")
        return any(word in step.arguments for word in words)
    changes = {"write", "rename", "mkdir", "unlink", "rmdir", "fsync"}
    return step.call in changes and (
        step.call in {"write", "fsync"}
        or place.run_dir in step.arguments
        or place.pin_dir in step.arguments
    )


@pytest.mark.parametrize("what", ["replace", "layout"])
@pytest.mark.timeout(1800 if MOST_KILLS > 1000 else 120)
def test_a_killed_load_is_repaired_by_the_next(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """At any step, under load: no byte is lost, and nothing of it is left."""
    assert shutil.which("strace")
    seed = os.environ.get("NEARPATH_SEED", str(random.randrange(1 << 32)))
    print(f"NEARPATH_SEED={seed}")
    source = random.Random(seed)
    log = tmp_path / "strace.log"
    layout = LAYOUT

    def prepare() -> None:
        nonlocal layout
        if what == "layout":
            layout += 1
        else:
            Path(lab.place.digest_file).write_text("another build")

    # Not those that leave the loader no CPU.
    with under_load(lab, tmp_path, ["ask", "late", "half", "brief"]) as running:
        prepare()
        assert _load(lab.place, layout, *traced(log)) == 0
        found = steps(log, lambda step: _matters(lab.place, step))
        assert len(found) > 8
        chosen = sorted(source.sample(range(len(found)), min(len(found), MOST_KILLS)))
        killed = 0
        for step in (found[number] for number in chosen):
            prepare()
            killed += _load(lab.place, layout, *step.killed_here()) != 0
            running.advance()
            monkeypatch.setattr(place_module, "LAYOUT", layout)
            try:
                loader.load(lab.place)
                assert not loader.load(lab.place)
                names = os.listdir(lab.place.pin_dir)
                assert [name for name in names if not name.startswith("draining-")] == [
                    f"v{layout}"
                ]
                wait_for_programs(lab, len(names))
                assert len(tables.all_pods(lab.place)) == 2
                assert settings.read(lab.place)["paused"] == 0
                wait_for_joins(lab)
                running.advance()
            except AssertionError as error:
                error.add_note(f"after kill -9 at {step}")
                raise
        print(f"killed {killed} times, of {len(found)} steps")
        # libbpf's own calls may differ by one or two between runs.
        assert killed >= len(chosen) - 2
    wait_until(lambda: unloader.sockets_draining(lab.place) == 0, "the last socket to close")
    loader.load(lab.place)
    assert os.listdir(lab.place.pin_dir) == [f"v{layout}"]
    assert_empty(lab.place.layout_dir)
