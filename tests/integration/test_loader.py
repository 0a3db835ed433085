"""The datapath is loaded once, replaced and taken away without losing a byte."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.commands import wait_until
from helpers.leaks import snapshot
from nearpath import place as place_module
from nearpath import state
from nearpath.cni.doors import Doors
from nearpath.datapath import changes, libbpf, loader, maps, settings, tables, unloader
from nearpath.datapath.maps import Descriptor
from nearpath.errors import BpfError, Unavailable
from nearpath.kernel import cgroup, features, mounts
from nearpath.lanes import socket as lane
from nearpath.place import LAYOUT

if TYPE_CHECKING:
    from nearpath.place import Place

    from .conftest import Lab

_ENSURE = """
import sys
from nearpath.datapath import loader
from nearpath.place import Place
print(loader.ensure(Place(*sys.argv[1:])))
"""


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_parallel_callers_load_once(place: Place) -> None:
    """Twelve processes at once: one loads, the others find it loaded."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ENSURE, place.run_dir, place.pin_dir, place.cgroup],
            stdout=subprocess.PIPE,
            text=True,
            env=_environ(),
        )
        for _ in range(12)
    ]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(answers) == ["False"] * 11 + ["True"]
    programs = libbpf.cgroup_programs(place.cgroup, effective=False)
    # The kernel keeps 15 characters of a program's name.
    assert [program["name"] for program in programs] == ["nearpath_sockop"]


def test_leftovers_of_a_killed_loader_do_not_matter(place: Place) -> None:
    """Killed before the rename, and between the rename and the attachment."""
    loader.ensure(place)
    os.unlink(f"{place.layout_dir}/link_sockops")
    assert not loader.is_loaded(place)
    assert loader.ensure(place)
    unloader.retire(place)
    os.makedirs(f"{place.pin_dir}/loading")
    assert loader.ensure(place)
    assert sorted(os.listdir(place.pin_dir)) == [f"v{LAYOUT}"]


def _record(
    container_id: str, cookie: int, lane: str, reason: str, *, unguarded: bool = True
) -> dict[str, object]:
    return {
        "container_id": container_id,
        "ifname": "eth0",
        "netns_cookie": cookie,
        "lanes": {"socket": {"state": lane, "reason": reason, "unguarded": unguarded}},
    }


def test_recorded_pods_are_known_after_a_reload(place: Place) -> None:
    """Those that were in the lane, and those that came while there was none; not others."""
    loader.ensure(place)
    state.save(place, _record("c1", 4711, "on", ""))
    lane.register(place, 4711)
    assert unloader.unload(place, lambda _: None, 5) == {"drained": True, "remaining": 0}
    assert not lane.is_registered(place, 4711)
    state.save(place, _record("c2", 4712, "off", "unloaded-by-operator"))
    state.save(place, _record("c3", 4713, "off", "annotation"))
    state.save(place, _record("c4", 0, "off", "netns"))
    assert loader.load(place)
    assert [lane.is_registered(place, cookie) for cookie in (4711, 4712, 4713)] == [
        True,
        True,
        False,
    ]


def test_an_operators_unload_lasts(place: Place) -> None:
    """ADD must not load behind the operator's back; ``load`` takes the mark away."""
    loader.ensure(place)
    unloader.unload(place, lambda _: None, 5)
    with pytest.raises(Unavailable) as refused:
        loader.ensure(place)
    assert refused.value.reason == "unloaded-by-operator"
    assert loader.load(place)
    assert loader.describe(place)["loaded"]


@pytest.mark.smoke
def test_unload_loses_nothing_of_live_connections(lab: Lab) -> None:
    """Unread redirected bytes are still read; the maps go with the last socket."""
    client, server = lab.pair()
    with client, server:
        client.sendall(b"redirected, ")
        assert lab.redirected == 1
        lines: list[str] = []
        result = unloader.unload(lab.place, lines.append, 0.5)
        assert result == {"drained": False, "remaining": 2}
        assert not loader.is_loaded(lab.place)
        assert loader.describe(lab.place)["draining"] == 2
        client.sendall(b"by TCP")
        assert server.recv(100) == b"redirected, "
        assert server.recv(100) == b"by TCP"
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"
        # A new datapath beside the old one does not touch the old connection.
        assert loader.load(lab.place)
        client.sendall(b"still here")
        assert server.recv(100) == b"still here"
        assert lane.totals(lab.place)["redirected_messages"] == 0
    wait_until(lambda: loader.describe(lab.place)["draining"] == 0, "the sockets to be gone")
    assert unloader.unload(lab.place, lambda _: None, 5)["drained"]
    assert not Path(lab.place.pin_dir).exists()


def test_unload_wakes_no_reader(lab: Lab) -> None:
    """A reader that is blocked during the unload gets the next bytes, not an error."""
    client, server = lab.pair()
    server.setblocking(True)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(server.recv(100)))
    with client, server:
        reader.start()
        unloader.unload(lab.place, lambda _: None, 0.3)
        client.sendall(b"after")
        reader.join(10)
    assert got == [b"after"]


def test_replacing_the_programs_keeps_connections(lab: Lab) -> None:
    """Another build of the same layout: maps stay, live connections go on in the lane."""
    client, server = lab.pair()
    with client, server:
        assert not loader.load(lab.place)
        before = libbpf.cgroup_programs(lab.place.cgroup, effective=False)
        Path(lab.place.digest_file).write_text("another build")
        assert loader.load(lab.place)
        after = libbpf.cgroup_programs(lab.place.cgroup, effective=False)
        assert before != after
        assert len(after) == 1
        client.sendall(b"still")
        assert server.recv(100) == b"still"
    client, server = lab.pair()
    with client, server:
        client.sendall(b"new")
        assert server.recv(100) == b"new"
    assert lab.redirected == 2


def test_a_socket_of_another_sockmap_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    """A second sockmap user (here: a second nearpath) gets EBUSY, and says so."""
    other = type(lab.place)(f"{tmp_path}/other", f"{lab.place.pin_dir}-other", lab.place.cgroup)
    loader.ensure(other)
    try:
        for pod in (lab.left, lab.right):
            lane.register(other, pod.cookie)
        client, server = lab.pair()
        with client, server:
            client.sendall(b"once")
            assert server.recv(100) == b"once"
        both = [lane.totals(place) for place in (lab.place, other)]
        assert sorted(total["reasons"].get("socket_busy", 0) for total in both)[1] >= 1
        assert sum(total["redirected_messages"] for total in both) == 1
    finally:
        unloader.retire(other)


def test_an_exclusive_attachment_is_named(place: Place) -> None:
    """Somebody else's program without BPF_F_ALLOW_MULTI: doctor and load both say so."""
    loader.ensure(place)
    Path(place.layout_dir, "link_sockops").unlink()
    programs = functools.partial(libbpf.cgroup_programs, place.cgroup, effective=False)
    wait_until(lambda: not programs(), "our own link to be gone")
    theirs = ctypes.CDLL("libbpf.so.1")
    cgroup_fd = os.open(place.cgroup, os.O_RDONLY)
    with Descriptor.open_pinned(f"{place.layout_dir}/prog_nearpath_sockops") as program:
        which = (program.number, cgroup_fd, libbpf.ATTACH_SOCK_OPS)
        assert theirs.bpf_prog_attach(*which, 0) == 0
        try:
            assert features.exclusive_programs(place.cgroup) == ["nearpath_sockop"]
            with pytest.raises(BpfError, match="exclusively"):
                loader.ensure(place)
        finally:
            assert theirs.bpf_prog_detach2(*which) == 0
            os.close(cgroup_fd)
    assert features.exclusive_programs(place.cgroup) == []
    assert loader.ensure(place)


def test_a_wrong_cgroup_is_named(place: Place) -> None:
    """A directory that is no cgroup: an error with the noun."""
    wrong = type(place)(place.run_dir, place.pin_dir, "/proc/self")
    with pytest.raises(BpfError, match="cgroup /proc/self"):
        loader.ensure(wrong)
    assert not loader.is_loaded(place)
    assert loader.ensure(place)


def test_bpffs_and_cgroup_are_found() -> None:
    """From mountinfo, not from fixed paths."""
    assert mounts.bpffs_mounted("/sys/fs/bpf/deeper/down")
    assert not mounts.bpffs_mounted("/run")
    assert Path(cgroup.v2_root(), "cgroup.procs").exists()


def test_nothing_is_left_after_load_and_unload(place: Place) -> None:
    """Programs, maps, link and pins are all gone, and the pin directory too."""
    before = snapshot()
    loader.ensure(place)
    assert snapshot() - before
    unloader.retire(place)
    wait_until(lambda: not snapshot() - before, "the kernel to free what was loaded")


def test_tables_refuse_wrong_sizes(place: Place) -> None:
    """A value of another layout's size never reaches the kernel."""
    loader.ensure(place)
    with (
        maps.Map.pinned(f"{place.layout_dir}/pods", 8, 4) as pods,
        pytest.raises(ValueError, match="bytes long"),
    ):
        pods.update(b"short", bytes(4))
    assert tables.all_pods(place) == {}


def test_lookup_of_a_missing_pin_is_enoent(place: Place) -> None:
    """The errno survives the wrapping; callers decide by it."""
    with pytest.raises(BpfError) as missing:
        tables.set_pod(place, 1, 1)
    assert missing.value.errno == 2
    lane.unregister(place, 1)


# -- what an operator wants outlasts an upgrade -------------------------------------------------


def _change(place: Place, **values: int) -> None:
    """As `nearpath settings` and `pause` do."""
    with state.Lock(place):
        settings.write(place, **values)
        changes.note(place, values)


def test_a_new_layout_keeps_what_was_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next ADD loads it, with the pause and the rules that the operator has set."""
    loader.ensure(place)
    usual = settings.read(place)
    _change(place, paused=1, revalidate_ms=250)
    _change(place, proven=3)
    monkeypatch.setattr(place_module, "LAYOUT", LAYOUT + 1)
    assert loader.ensure(place), "a layout that was not there"
    assert settings.read(place) == {**usual, "paused": 1, "revalidate_ms": 250, "proven": 3}
    _change(place, paused=0)
    monkeypatch.setattr(place_module, "LAYOUT", LAYOUT + 2)
    assert loader.load(place)
    assert settings.read(place) == {**usual, "revalidate_ms": 250, "proven": 3}


def test_a_pause_outlasts_a_load_but_not_an_unload(place: Place) -> None:
    """Nor is a killed unload's own pause taken for an operator's."""
    loader.ensure(place)
    _change(place, paused=1, revalidate_ms=250)
    assert not loader.load(place)
    assert settings.read(place)["paused"] == 1
    unloader.unload(place, lambda _: None, 5)
    assert loader.load(place)
    assert settings.read(place)["paused"] == 0
    assert settings.read(place)["revalidate_ms"] == 250
    settings.write(place, paused=1)
    loader.load(place)
    assert settings.read(place)["paused"] == 0


def test_del_and_gc_sweep_what_is_drained(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retired maps go once their last socket is closed, and not before."""
    doors = Doors()
    client, server = lab.pair()
    with client, server:
        monkeypatch.setattr(place_module, "LAYOUT", LAYOUT + 1)
        loader.ensure(lab.place)
        assert loader.has_retired(lab.place)
        doors.sweep(lab.place)
        assert loader.has_retired(lab.place), "two sockets are in it"
    wait_until(lambda: unloader.sockets_draining(lab.place) == 0, "the sockets to close")
    doors.sweep(lab.place)
    assert not loader.has_retired(lab.place)
    assert os.listdir(lab.place.pin_dir) == [f"v{LAYOUT + 1}"]
