"""DEL's, CHECK's and STATUS's rules, and what is true of every command.

The kernel is a fake here (helpers/fake_doors.py); records, locks, log and counts are real
files.
"""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.fake_doors import OWN_NETNS
from helpers.plugin import Plugin
from nearpath import state
from nearpath.cni import commands
from nearpath.errors import BpfError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A node of the test's own."""
    return Plugin(tmp_path)


def _sleep() -> None:
    time.sleep(30)


# -- DEL -------------------------------------------------------------------------------------


def test_del(plugin: Plugin) -> None:
    """DEL unregisters, removes the record, and prints nothing."""
    plugin.ok("ADD")
    assert plugin.ok("DEL") is None
    assert plugin.doors.pods == set()
    assert plugin.leftovers() == []


def test_del_needs_only_the_record(plugin: Plugin) -> None:
    """DEL works without CNI_NETNS, without prevResult and with the namespace gone."""
    plugin.ok("ADD")
    plugin.doors.namespaces.clear()
    config = {"cniVersion": "0.3.1", "name": "net", "type": "nearpath"}
    assert plugin.call("DEL", config, CNI_NETNS="", CNI_ARGS=None) == (0, None)
    assert plugin.doors.pods == set()
    assert plugin.leftovers() == []


def test_del_twice_and_without_add(plugin: Plugin) -> None:
    """DEL of what is not there succeeds, as often as it is called."""
    assert plugin.ok("DEL") is None
    plugin.ok("ADD")
    for netns in ("/run/netns/a", "", "/run/netns/gone"):
        assert plugin.call("DEL", CNI_NETNS=netns) == (0, None)
    assert plugin.failures() == {}


def test_record_goes_last(plugin: Plugin) -> None:
    """While DEL unregisters, the record is still there for a DEL after a crash."""
    plugin.ok("ADD")
    seen: list[bool] = []
    plugin.doors.before = lambda method: (
        seen.append(plugin.record() is not None) if method == "unregister" else None
    )
    plugin.ok("DEL")
    assert seen == [True]


def test_del_of_one_of_two_attachments(plugin: Plugin) -> None:
    """The namespace stays registered until its last attachment goes."""
    plugin.ok("ADD")
    plugin.call("ADD", CNI_IFNAME="net1")
    plugin.ok("DEL")
    assert plugin.doors.pods == {1001}
    plugin.call("DEL", CNI_IFNAME="net1")
    assert plugin.doors.pods == set()


@pytest.mark.parametrize("damage", [None, b"", b"{}", b'{"container_id":"c1","ifname":"eth0"}'])
def test_del_without_a_usable_record(plugin: Plugin, damage: bytes | None) -> None:
    """If the record is lost or damaged, the namespace itself says what to unregister."""
    plugin.ok("ADD")
    path = Path(plugin.place.attachments_dir) / state.record_name("c1", "eth0")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert plugin.ok("DEL") is None
    assert plugin.doors.pods == set()
    assert plugin.leftovers() == []


def test_del_in_the_plugins_own_namespace(plugin: Plugin) -> None:
    """CNI_NETNS of the plugin itself does not make DEL fail, and is left alone."""
    plugin.doors.pods.add(1)
    assert plugin.call("DEL", CNI_NETNS=OWN_NETNS) == (0, None)
    assert plugin.doors.pods == {1}


@pytest.mark.parametrize(
    "keys",
    [
        {"required": "yes"},
        {"timeoutSeconds": "x", "logLevel": 1, "socketLane": None},
        {"prevResult": "nonsense"},
        {"runtimeConfig": []},
        {"required": True},
    ],
)
def test_del_with_a_bad_configuration(plugin: Plugin, keys: dict[str, object]) -> None:
    """Keys of ours with wrong types, and a malformed prevResult, do not stop DEL."""
    plugin.ok("ADD")
    assert plugin.ok("DEL", **keys) is None
    assert plugin.doors.pods == set()
    assert plugin.leftovers() == []


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    "error", [BpfError("no", errno.EPERM), RuntimeError("bug"), Unavailable("x", "x")]
)
def test_del_never_fails(plugin: Plugin, error: Exception, required: bool) -> None:
    """If unregistering fails, DEL succeeds and the record stays for the next DEL or GC."""
    plugin.ok("ADD")
    plugin.doors.break_with("unregister", error)
    assert plugin.ok("DEL", required=required) is None
    assert plugin.record() is not None
    assert sum(plugin.failures().values()) == 1
    plugin.doors.broken.clear()
    plugin.ok("DEL")
    assert plugin.leftovers() == []
    assert plugin.doors.pods == set()


def test_del_that_hangs(plugin: Plugin) -> None:
    """DEL too has a deadline, after which it reports success."""
    plugin.ok("ADD")
    plugin.doors.broken["unregister"] = _sleep
    start = time.monotonic()
    assert plugin.ok("DEL", timeoutSeconds=0.5) is None
    assert time.monotonic() - start < 2
    assert plugin.failures() == {"deadline": 1}


# -- CHECK -----------------------------------------------------------------------------------


def test_check_after_add(plugin: Plugin) -> None:
    """CHECK right after ADD succeeds with nothing on stdout, required or not."""
    plugin.ok("ADD")
    assert plugin.ok("CHECK") is None
    assert plugin.ok("CHECK", required=True) is None
    assert plugin.failures() == {}


def test_check_repairs(plugin: Plugin) -> None:
    """A lost registration, or datapath, is made again."""
    plugin.ok("ADD")
    for required in (False, True):
        plugin.doors.pods.clear()
        plugin.doors.loaded = False
        assert plugin.ok("CHECK", required=required) is None
        assert plugin.doors.pods == {1001}
        assert plugin.doors.loaded
    assert "has been made again" in plugin.log()


def _no_record(plugin: Plugin) -> None:
    state.remove(plugin.place, "c1", "eth0")


def _other_namespace(plugin: Plugin) -> None:
    plugin.doors.namespaces["/run/netns/a"] = 5


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_no_record, "no record"),
        (_other_namespace, "not the one that ADD saw"),
    ],
)
def test_check_finds(plugin: Plugin, spoil: Callable[[Plugin], None], text: str) -> None:
    """What cannot be repaired is logged, and is error 110 only with required."""
    plugin.ok("ADD")
    spoil(plugin)
    assert plugin.ok("CHECK") is None
    assert text in plugin.log()
    answer = plugin.error("CHECK", required=True)
    assert answer["code"] == 110
    assert text in answer["msg"]


def test_del_of_one_interface_keeps_what_a_load_has_mended(plugin: Plugin) -> None:
    """The first interface's ADD failed open, and a later load has taken the pod in."""
    plugin.doors.break_with("register", BpfError("no", errno.EPERM))
    plugin.ok("ADD")
    plugin.doors.broken.clear()
    code, _ = plugin.call("ADD", plugin.config(), CNI_IFNAME="net1")
    assert code == 0
    code, _ = plugin.call("DEL", plugin.config(), CNI_IFNAME="net1")
    assert code == 0
    assert plugin.doors.pods
    plugin.ok("DEL")
    assert not plugin.doors.pods


def test_check_mends_a_failed_add(plugin: Plugin) -> None:
    """A pod whose ADD failed open is taken in as soon as that is possible."""
    plugin.doors.break_with("register", BpfError("no", errno.EPERM))
    plugin.ok("ADD")
    assert plugin.error("CHECK", required=True)["code"] == 101
    plugin.doors.broken.clear()
    assert plugin.ok("CHECK", required=True) is None
    assert plugin.doors.pods


def test_check_does_not_register_without_guards(plugin: Plugin) -> None:
    """A pod that requires guards and lost its registration to a load without them stays off."""
    plugin.ok("ADD")
    plugin.doors.pods.clear()
    plugin.doors.guarded = False
    assert plugin.ok("CHECK") is None
    assert plugin.doors.pods == set()
    assert "guards" in plugin.log()
    assert plugin.error("CHECK", required=True)["code"] == 110


def test_check_of_a_pod_that_is_off(plugin: Plugin) -> None:
    """A pod that is off by choice passes."""
    plugin.ok("ADD", socketLane="off")
    assert plugin.ok("CHECK", required=True) is None
    assert plugin.doors.pods == set()


@pytest.mark.parametrize("method", ["inspect", "is_registered", "prepare"])
def test_check_that_fails_inside(plugin: Plugin, method: str) -> None:
    """An internal failure of CHECK kills no pod, unless required."""
    plugin.ok("ADD")
    plugin.doors.pods.clear()
    plugin.doors.break_with(method, BpfError("no", errno.EPERM))
    assert plugin.ok("CHECK") is None
    assert plugin.error("CHECK", required=True)["code"] == 101
    assert plugin.failures() == {"bpf": 2}
    plugin.doors.broken[method] = _sleep
    assert plugin.ok("CHECK", timeoutSeconds=0.5) is None


# -- STATUS, VERSION -------------------------------------------------------------------------


def test_status(plugin: Plugin) -> None:
    """STATUS is ready without asking the kernel: it is called every few seconds."""
    plugin.doors.loaded = False
    plugin.doors.break_with("prepare", Unavailable("no-btf", "this kernel has no BTF"))
    assert plugin.ok("STATUS") is None
    assert plugin.ok("STATUS", required="yes", logLevel=1) is None
    assert plugin.doors.calls == []


def test_status_required(plugin: Plugin) -> None:
    """With required STATUS is error 50 while the datapath cannot be had."""
    assert plugin.ok("STATUS", required=True) is None
    plugin.doors.break_with("prepare", Unavailable("no-btf", "this kernel has no BTF"))
    answer = plugin.error("STATUS", required=True)
    assert (answer["code"], answer["details"]) == (50, "no-btf")
    plugin.doors.broken["prepare"] = _sleep
    assert plugin.error("STATUS", required=True, timeoutSeconds=0.5)["code"] == 50
    assert plugin.error("STATUS", required=True, logLevel=1)["code"] == 7


def test_version_leaves_no_trace(plugin: Plugin) -> None:
    """VERSION makes no directory and asks nothing."""
    code, answer = plugin.call("VERSION", b"")
    assert code == 0
    assert answer is not None
    assert answer["supportedVersions"][-1] == "1.1.0"
    assert not Path(plugin.place.run_dir).exists()
    assert plugin.doors.calls == []


# -- the process -----------------------------------------------------------------------------


def test_bad_place_in_the_environment(plugin: Plugin) -> None:
    """A relative NEARPATH_RUN_DIR is error 4: nothing may be written to a guessed place."""
    for command in ("ADD", "DEL"):
        code, answer = plugin.call(command, NEARPATH_RUN_DIR="run/../x")
        assert code == 1
        assert answer is not None
        assert answer["code"] == 4


@pytest.mark.parametrize("ifname", ["é", "\udcff\udcfe", "%2e", "a%b", "@@", "\\..\\x"])
@pytest.mark.parametrize("container_id", ["c1", "a" * 500, "x.json", "c1@eth0"[:2]])
def test_names_stay_in_their_directory(plugin: Plugin, container_id: str, ifname: str) -> None:
    """Whatever names a request has, its record is one file in the attachments directory."""
    names: dict[str, Any] = {"CNI_CONTAINERID": container_id, "CNI_IFNAME": ifname}
    assert plugin.call("ADD", **names)[0] == 0
    run = Path(plugin.place.run_dir)
    inside = {path.parent.relative_to(run.parent).as_posix() for path in run.rglob("*")}
    assert inside <= {"run", "run/attachments"}
    assert len(plugin.leftovers()) == 1
    assert plugin.lane(container_id, ifname) == ("on", "")
    assert plugin.call("DEL", **names) == (0, None)
    assert plugin.leftovers() == []


def test_every_step_can_be_the_last(plugin: Plugin) -> None:
    """Killed before any step of ADD, the next ADD works and the next DEL clears up."""

    class Killed(BaseException):
        """Nothing catches it: as near to kill -9 as one process gets."""

    plugin.doors.loaded = False
    plugin.ok("ADD")
    steps = len(plugin.doors.calls)
    plugin.ok("DEL")
    for step in range(steps):
        for then in (("ADD", "DEL"), ("DEL",)):
            plugin.doors.calls.clear()

            def kill(_method: str, step: int = step) -> None:
                if len(plugin.doors.calls) > step:
                    raise Killed

            plugin.doors.before = kill
            code, _ = plugin.call("ADD")
            assert code == 1
            plugin.doors.before = lambda _: None
            for command in then:
                plugin.ok(command)
            assert plugin.leftovers() == []
            assert plugin.doors.pods == set()


def test_stdout_carries_the_answer_alone(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    """Answers are returned to main, which writes them: nothing else prints to stdout."""
    plugin.doors.break_with("register", RuntimeError("bug"))
    plugin.ok("ADD", unknown=1)
    plugin.ok("DEL")
    out, err = capfd.readouterr()
    assert out == ""
    assert "nearpath: error: ADD c1/eth0 shop/cart: pod stays on the kernel path" in err
    assert "Traceback" not in err


def test_answer_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only a part is followed by the rest."""
    written = bytearray()

    def some(_descriptor: int, data: bytes) -> int:
        written.extend(data[:3])
        return len(data[:3])

    monkeypatch.setattr(os, "write", some)
    assert commands._write_all(1, b"0123456789")
    assert written == b"0123456789"


def test_run_without_doors_is_the_real_kernel(tmp_path: Path) -> None:
    """Without a stand-in the commands ask the real kernel; VERSION needs none of it."""
    environ = {"CNI_COMMAND": "VERSION", "NEARPATH_RUN_DIR": str(tmp_path / "run")}
    assert commands.run(environ, io.BytesIO(b"").read)[0] == 0
