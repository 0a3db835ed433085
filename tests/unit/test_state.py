"""Records, lock and counts on a real file system."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from nearpath import state
from nearpath.errors import StateError
from nearpath.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place of the test's own."""
    return Place(str(tmp_path / "run" / "nearpath"), str(tmp_path / "pins"))


def record(container_id: str = "c1", ifname: str = "eth0", **more: object) -> dict[str, object]:
    """A small record."""
    return {"container_id": container_id, "ifname": ifname, **more}


def test_save_load_remove(place: Place) -> None:
    """What is saved is loaded again, until it is removed; removing twice is fine."""
    assert state.load(place, "c1", "eth0") is None
    state.save(place, record(x="é\udcff", n=2**64 - 1))
    assert state.load(place, "c1", "eth0") == record(x="é\udcff", n=2**64 - 1)
    assert state.load(place, "c1", "net1") is None
    state.save(place, record(x=2))
    assert state.load(place, "c1", "eth0") == record(x=2)
    state.remove(place, "c1", "eth0")
    state.remove(place, "c1", "eth0")
    assert state.load(place, "c1", "eth0") is None
    assert os.listdir(place.attachments_dir) == []


def test_files_are_private(place: Place) -> None:
    """Directories are 0700 and files 0600, whatever the umask."""
    old = os.umask(0)
    try:
        state.save(place, record())
        state.count_failure(place, "x")
    finally:
        os.umask(old)
    for path in Path(place.run_dir, ".").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE(os.stat(place.run_dir).st_mode) == 0o700


@pytest.mark.parametrize(
    ("container_id", "ifname", "expected"),
    [
        ("c1", "eth0", "c1@eth0.json"),
        ("a_b-c.d", "eth0.100", "a_b-c.d@eth0.100.json"),
        ("../../x", "..", "..%2f..%2fx@...json"),
        ("a@b", "c@d", "a%40b@c%40d.json"),
        ("a%40b", "x", "a%2540b@x.json"),
        ("é", "\udcff", "%c3%a9@%ff.json"),
        ("\0", "\n", "%00@%0a.json"),
    ],
)
def test_record_names(container_id: str, ifname: str, expected: str) -> None:
    """Names are plain file names that differ whenever the attachments do."""
    assert state.record_name(container_id, ifname) == expected


def test_long_names_fit() -> None:
    """Any containerID gives a name that fits a file system, and different ones differ."""
    names = {state.record_name("a" * n, "é" * 7) for n in range(170, 400)}
    names.add(state.record_name("a" * 399 + "b", "é" * 7))
    assert len(names) == 231
    assert all(len(name) <= 255 - len(".tmp-4194304-") for name in names)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"container_id": "c1"}', b"\xff", b"[" * 10**5]
)
def test_damaged_record(place: Place, content: bytes) -> None:
    """A damaged record is an error when asked for, and passed over in the list of all."""
    state.save(place, record("c0"))
    state.save(place, record("c1"))
    path = Path(place.attachments_dir) / state.record_name("c1", "eth0")
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"c1@eth0\.json"):
        state.load(place, "c1", "eth0")
    assert [found["container_id"] for found in state.records(place)] == ["c0"]
    state.remove(place, "c1", "eth0")


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "huge"])
def test_record_that_is_no_plain_file(place: Place, kind: str, tmp_path: Path) -> None:
    """A record is never read through a symlink, nor from a FIFO, nor without bounds."""
    state.save(place, record())
    path = Path(place.attachments_dir) / state.record_name("c1", "eth0")
    path.unlink()
    if kind == "symlink":
        (tmp_path / "target").write_text(json.dumps(record()))
        path.symlink_to(tmp_path / "target")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(StateError):
        state.load(place, "c1", "eth0")
    assert list(state.records(place)) == []


@pytest.mark.parametrize("kind", ["file", "symlink", "mode", "owner"])
def test_untrusted_directory(place: Place, kind: str, tmp_path: Path) -> None:
    """A run directory that somebody else could fill is refused, with the remedy."""
    run = Path(place.run_dir)
    run.parent.mkdir()
    if kind == "file":
        run.write_text("")
    elif kind == "symlink":
        (tmp_path / "other").mkdir(mode=0o700)
        run.symlink_to(tmp_path / "other")
    else:
        run.mkdir(mode=0o700)
        if kind == "mode":
            run.chmod(0o722)
        elif os.geteuid() == 0:
            os.chown(run, 1234, 1234)
        else:
            pytest.skip("only root can give a directory away")
    for act in (lambda: state.save(place, record()), lambda: state.Lock(place).__enter__()):
        with pytest.raises(StateError):
            act()
    if kind == "symlink":
        assert list((tmp_path / "other").iterdir()) == []


def test_failed_write_leaves_the_old_record(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing fails half-way the old record is still whole and no temporary file is left."""
    state.save(place, record(x=1))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left"):
        state.save(place, record(x=2))
    monkeypatch.undo()
    assert state.load(place, "c1", "eth0") == record(x=1)
    assert len(os.listdir(place.attachments_dir)) == 1


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [(1, 1), (2**64 - 1, 2**64 - 1), (0, 0), (-1, 0), (2**64, 0), (True, 0), ("1", 0), (1.0, 0)],
)
def test_cookie_of(cookie: object, expected: int) -> None:
    """A cookie is a positive 64-bit number; whatever else a record holds there is none."""
    assert state.cookie_of(record(netns_cookie=cookie)) == expected
    assert state.cookie_of(record()) == state.cookie_of(None) == 0


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        ({"socket": {"state": "on", "reason": ""}}, ("on", "")),
        ({"socket": {"state": "off", "reason": "config"}}, ("off", "config")),
        ({"socket": {"state": "ON"}}, ("off", "")),
        ({"socket": None}, ("off", "")),
        ({"socket": {"reason": 7}}, ("off", "7")),
        ({}, ("off", "")),
        ([], ("off", "")),
        (None, ("off", "")),
    ],
)
def test_lane_of(lanes: object, expected: tuple[str, str]) -> None:
    """A lane is on only if the record says so in so many words."""
    assert state.lane_of(record(lanes=lanes)) == expected
    assert state.lane_of(record()) == ("off", "")


def test_temporary_files_are_no_records(place: Place) -> None:
    """A killed writer's file is not a record; sweep removes it once the writer is gone."""
    state.save(place, record())
    directory = Path(place.attachments_dir)
    mine = directory / f".tmp-{os.getpid()}-c2@eth0.json"
    dead = directory / ".tmp-999999999-c3@eth0.json"
    elsewhere = [
        Path(state.secure_dir(place.vms_dir), ".tmp-999999999-7.json"),
        Path(place.run_dir, ".tmp-999999999-failures.json"),
    ]
    for path in (mine, dead, *elsewhere):
        path.write_text(json.dumps(record("c9")))
    assert [found["container_id"] for found in state.records(place)] == ["c1"]
    assert state.sweep(place) == 3
    assert sorted(os.listdir(directory)) == [mine.name, "c1@eth0.json"]


def test_nothing_there(place: Place) -> None:
    """Reading never makes directories, and nothing there is nothing, not an error."""
    assert list(state.records(place)) == []
    assert state.failures(place) == {}
    assert state.sweep(place) == 0
    state.remove(place, "c1", "eth0")
    assert not Path(place.run_dir).exists()


def test_lock_without_waiting(place: Place) -> None:
    """Who does not want to wait is told, and may read what the holder has noted."""
    path = f"{place.run_dir}/watcher"
    with state.Lock(place, path, wait=False) as lock:
        lock.note("a longer note\n")
        lock.note("4711\n")
        with pytest.raises(state.LockedError), state.Lock(place, path, wait=False):
            pass
        assert state.read_file(path) == b"4711\n"
        with state.Lock(place):  # another lock
            pass
    with state.Lock(place, path, wait=False):
        pass


def _hold(place: Place, seconds: float) -> None:
    with state.Lock(place):
        Path(place.run_dir, "held").touch()
        time.sleep(seconds)


def test_lock_excludes_and_dies_with_its_holder(place: Place) -> None:
    """The lock waits for its holder, and a killed holder lets go of it."""
    state.secure_dir(place.run_dir)
    context = multiprocessing.get_context("fork")
    for seconds, kill in ((0.4, False), (60, True)):
        held = Path(place.run_dir, "held")
        held.unlink(missing_ok=True)
        holder = context.Process(target=_hold, args=(place, seconds))
        holder.start()
        while not held.exists():
            time.sleep(0.01)
        start = time.monotonic()
        if kill:
            holder.kill()
        with state.Lock(place):
            waited = time.monotonic() - start
        holder.join(5)
        assert waited < 5
        if not kill:
            assert waited > 0.2


def _count(place: Place, times: int) -> None:
    for _ in range(times):
        state.count_failure(place, "bpf")


def test_parallel_counts_are_exact(place: Place) -> None:
    """Failures counted by many processes at once are all counted."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count, args=(place, 20)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    state.count_failure(place, "state")
    assert state.failures(place) == {"bpf": 80, "state": 1}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": "b"}', b"\xff", b'{"a": null}', b"[" * 10**5]
)
def test_damaged_counts(place: Place, content: bytes) -> None:
    """Damaged counts start again; counting never raises."""
    state.count_failure(place, "x")
    Path(place.failures_file).write_bytes(content)
    assert state.failures(place) == {}
    state.count_failure(place, "x")
    assert state.failures(place) == {"x": 1}


def test_counting_in_an_impossible_place() -> None:
    """Counting never raises, not even if nothing can be written."""
    state.count_failure(Place("/proc/nearpath"), "x")
