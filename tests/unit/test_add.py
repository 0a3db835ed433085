"""ADD's rules: order of steps, who is on, failing open, required.

The kernel is a fake here (helpers/fake_doors.py); records, locks, log and counts are real
files.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from helpers.fake_doors import OWN_NETNS
from helpers.plugin import RESULT, Plugin
from nearpath import state
from nearpath.errors import BpfError, DeadlineExceeded, StateError, Unavailable

FAILURES = [
    ("inspect", OSError(errno.EPERM, "Operation not permitted"), "internal", 999),
    ("inspect", RuntimeError("secret=hunter2"), "internal", 999),
    ("prepare", Unavailable("no-btf", "this kernel has no BTF", "use another"), "no-btf", 100),
    ("prepare", BpfError("cannot load program", errno.EINVAL), "bpf", 101),
    ("prepare", DeadlineExceeded("the command's deadline of 5 s passed"), "deadline", 11),
    ("register", BpfError("cannot update map pods", errno.ENOSPC), "bpf", 101),
    ("register", StateError("cannot lock"), "state", 102),
    ("register", MemoryError(), "internal", 999),
]


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A node of the test's own."""
    return Plugin(tmp_path)


# -- ADD -------------------------------------------------------------------------------------


def test_add(plugin: Plugin) -> None:
    """ADD prints prevResult, records the attachment and registers its namespace."""
    before = time.time()
    assert plugin.ok("ADD") == RESULT
    assert plugin.doors.pods == {1001}
    record = plugin.record()
    assert record is not None
    assert before <= record.pop("created") <= time.time()
    assert record == {
        "version": 1,
        "container_id": "c1",
        "ifname": "eth0",
        "netns": "/run/netns/a",
        "netns_cookie": 1001,
        "pod": {"namespace": "shop", "name": "cart", "uid": "u1"},
        "network": "net",
        "ips": ["10.1.2.3/24"],
        "host_ifindex": 7,
        "host_ifname": "veth7",
        "lanes": {"socket": {"state": "on", "reason": "", "unguarded": False}},
    }
    assert plugin.failures() == {}
    assert "ADD c1/eth0 shop/cart: socket lane on" in plugin.log()


def test_record_is_written_before_the_kernel_changes(plugin: Plugin) -> None:
    """When the datapath is loaded or a namespace registered, the record is on disk already."""
    plugin.doors.loaded = False
    states = {}

    def watch(method: str) -> None:
        record = plugin.record()
        states[method] = record and record["lanes"]["socket"]["state"]

    plugin.doors.before = watch
    plugin.ok("ADD")
    assert states["inspect"] is None
    assert states["prepare"] == states["register"] == "on"
    assert "datapath loaded" in plugin.log()


def test_add_writes_one_record_once(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain ADD syncs a single file: fsync is what it would wait for."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    plugin.ok("ADD")
    assert len(synced) == 1


def test_add_again(plugin: Plugin) -> None:
    """A repeated ADD of the same attachment succeeds and leaves the same."""
    plugin.ok("ADD")
    assert plugin.ok("ADD") == RESULT
    assert plugin.doors.pods == {1001}
    assert len(plugin.leftovers()) == 1


def test_add_again_in_another_namespace(plugin: Plugin) -> None:
    """If the attachment's namespace changed, the old one is unregistered."""
    plugin.doors.namespaces["/run/netns/b"] = 2002
    plugin.ok("ADD")
    code, _ = plugin.call("ADD", CNI_NETNS="/run/netns/b")
    assert code == 0
    assert plugin.doors.pods == {2002}


def test_add_again_that_fails(plugin: Plugin) -> None:
    """If a repeated ADD fails early, what the first one registered is not forgotten."""
    plugin.ok("ADD")
    code, _ = plugin.call("ADD", CNI_NETNS="/run/netns/gone")
    assert code == 0
    assert plugin.doors.pods == set()
    assert plugin.lane() == ("off", "netns")


def test_old_registration_goes_before_its_record(plugin: Plugin) -> None:
    """The old namespace is unregistered while the record on disk still names it."""
    plugin.doors.namespaces["/run/netns/b"] = 2002
    plugin.ok("ADD")
    seen: list[int] = []

    def watch(method: str) -> None:
        if method == "unregister":
            record = plugin.record()
            assert record is not None
            seen.append(record["netns_cookie"])

    plugin.doors.before = watch
    plugin.call("ADD", CNI_NETNS="/run/netns/b")
    assert seen == [1001]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"socketLane": "off"}, "config"),
        ({"excludeNamespaces": ["shop"]}, "excluded-namespace"),
        (
            {
                "runtimeConfig": {
                    "io.kubernetes.cri.pod-annotations": {"nearpath.io/socket-lane": "off"}
                }
            },
            "annotation",
        ),
    ],
)
def test_pods_that_are_off(plugin: Plugin, keys: dict[str, object], reason: str) -> None:
    """A pod switched off is recorded with the reason; nothing is loaded or registered."""
    plugin.doors.loaded = False
    assert plugin.ok("ADD", **keys) == RESULT
    assert plugin.lane() == ("off", reason)
    assert not plugin.doors.loaded
    assert plugin.doors.pods == set()
    assert plugin.failures() == {}
    # Required or not: it is a choice, not a failure.
    assert plugin.ok("ADD", required=True, **keys) == RESULT


ASKS = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"nearpath.io/socket-lane": "on"}}}


def test_guards_are_required(plugin: Plugin) -> None:
    """Without guards a pod that did not ask for the lane stays off; that is no failure."""
    plugin.doors.guarded = False
    for keys in ({}, {"guards": "required"}, {"guards": "required", "required": True}):
        assert plugin.ok("ADD", **keys) == RESULT
        assert plugin.lane() == ("off", "no-guards")
        assert plugin.doors.pods == set()
        assert plugin.failures() == {}
    assert "socket lane off no-guards" in plugin.log()
    # A later load, with guards or without, leaves it so; so does CHECK.
    assert state.lane_cookies(plugin.place, guarded=False) == []
    assert plugin.ok("CHECK", required=True) is None
    assert plugin.doors.pods == set()


@pytest.mark.parametrize(
    "keys", [{"guards": "preferred"}, ASKS, {**ASKS, "guards": "required", "socketLane": "off"}]
)
def test_without_guards_if_wanted(plugin: Plugin, keys: dict[str, object]) -> None:
    """The conflist or the pod's own annotation accepts the lane as it is."""
    plugin.doors.guarded = False
    assert plugin.ok("ADD", **keys) == RESULT
    assert plugin.lane() == ("on", "")
    assert plugin.doors.pods == {1001}
    record = plugin.record()
    assert record is not None
    assert record["lanes"]["socket"]["unguarded"] is True
    assert state.lane_cookies(plugin.place, guarded=False) == [1001]


def test_guards_lost_between_two_adds(plugin: Plugin) -> None:
    """A pod that was on the lane under guard is taken out by an ADD that finds none."""
    plugin.ok("ADD")
    plugin.doors.guarded = False
    plugin.ok("ADD")
    assert plugin.lane() == ("off", "no-guards")
    assert plugin.doors.pods == set()


def test_no_guards_takes_the_whole_pod_out(plugin: Plugin) -> None:
    """One of a pod's networks prefers guards, another requires them: off wins."""
    plugin.doors.guarded = False
    plugin.ok("ADD", guards="preferred")
    assert plugin.call("ADD", plugin.config(name="second"), CNI_IFNAME="net1")[0] == 0
    assert plugin.doors.pods == set()
    assert plugin.lane() == ("off", "other-attachment")
    assert plugin.lane(ifname="net1") == ("off", "no-guards")
    # Also in the other order.
    third = plugin.config(name="third", guards="preferred")
    assert plugin.call("ADD", third, CNI_IFNAME="net2")[0] == 0
    assert plugin.lane(ifname="net2") == ("off", "other-attachment")
    assert plugin.doors.pods == set()


def test_a_load_without_guards_heeds_all_attachments(plugin: Plugin) -> None:
    """Recorded under guard, loaded without: a pod is served if all its attachments accept."""
    plugin.ok("ADD", guards="preferred")
    assert state.lane_cookies(plugin.place, guarded=False) == [1001]
    plugin.call("ADD", plugin.config(name="second"), CNI_IFNAME="net1")
    assert plugin.lane(ifname="net1") == ("on", "")
    assert state.lane_cookies(plugin.place, guarded=True) == [1001]
    assert state.lane_cookies(plugin.place, guarded=False) == []


def test_a_failed_add_keeps_what_was_said_of_guards(plugin: Plugin) -> None:
    """So that the load which mends it may register a pod that does without."""
    error = Unavailable("unloaded-by-operator", "unloaded by an operator", "nearpath load")
    plugin.doors.break_with("prepare", error)
    plugin.ok("ADD", guards="preferred")
    assert plugin.lane() == ("off", "unloaded-by-operator")
    assert state.lane_cookies(plugin.place, guarded=False) == [1001]
    plugin.ok("ADD")
    assert state.lane_cookies(plugin.place, guarded=False) == []
    assert state.lane_cookies(plugin.place, guarded=True) == [1001]


def test_room_for_connections(plugin: Plugin) -> None:
    """maxConnections reaches the load; without it the node's memory decides."""
    plugin.ok("ADD")
    plugin.ok("ADD", maxConnections=4096)
    assert plugin.doors.room == [0, 4096]


def test_switched_off_between_two_adds(plugin: Plugin) -> None:
    """An ADD that finds the pod registered and switches it off unregisters it."""
    plugin.ok("ADD")
    plugin.ok("ADD", socketLane="off")
    assert plugin.doors.pods == set()
    assert plugin.lane() == ("off", "config")


def test_off_wins_over_the_pods_other_attachments(plugin: Plugin) -> None:
    """A socket belongs to the pod: an attachment that is off takes the whole pod out."""
    plugin.ok("ADD")
    code, _ = plugin.call("ADD", plugin.config(name="second", socketLane="off"), CNI_IFNAME="net1")
    assert code == 0
    assert plugin.doors.pods == set()
    assert plugin.lane() == ("off", "other-attachment")
    assert plugin.lane(ifname="net1") == ("off", "config")
    # Also in the other order.
    assert plugin.call("ADD", CNI_IFNAME="net2")[0] == 0
    assert plugin.lane(ifname="net2") == ("off", "other-attachment")
    assert plugin.doors.pods == set()


def test_add_without_a_host_veth(plugin: Plugin) -> None:
    """A link that is no veth, as of SR-IOV, only leaves the host end open."""
    code, _ = plugin.call("ADD", CNI_IFNAME="net1")
    assert code == 0
    record = plugin.record(ifname="net1")
    assert record is not None
    assert (record["host_ifindex"], record["host_ifname"]) == (None, None)
    assert plugin.lane(ifname="net1") == ("on", "")


def test_plugins_own_namespace(plugin: Plugin) -> None:
    """CNI_NETNS of the plugin itself is error 8, and nothing is touched."""
    code, answer = plugin.call("ADD", CNI_NETNS=OWN_NETNS)
    assert code == 1
    assert answer is not None
    assert answer["code"] == 8
    assert answer["msg"] == "plugin's netns and netns from CNI_NETNS should not be the same"
    assert plugin.doors.calls == ["is_own_netns"]
    assert plugin.leftovers() == []


def test_plugins_own_namespace_overridden(plugin: Plugin) -> None:
    """With CNI_NETNS_OVERRIDE it is allowed, but the host is never registered."""
    code, answer = plugin.call("ADD", CNI_NETNS=OWN_NETNS, CNI_NETNS_OVERRIDE="1")
    assert (code, answer) == (0, RESULT)
    assert plugin.lane() == ("off", "own-netns")
    assert plugin.doors.pods == set()


def test_malformed_requests_touch_nothing(plugin: Plugin) -> None:
    """Wrong keys, no prevResult or a malformed one: error 7 before anything is done."""
    for keys in (
        {"required": "yes"},
        {"prevResult": None},
        {"prevResult": {"ips": 1}},
        {"timeoutSeconds": -1, "required": False},
        {"guards": "optional"},
        {"maxConnections": 1023},
    ):
        assert plugin.error("ADD", **keys)["code"] == 7
    assert plugin.doors.calls == []
    assert plugin.leftovers() == []


def test_odd_configuration_is_logged(plugin: Plugin) -> None:
    """Unknown keys, bad annotations and malformed CNI_ARGS are warnings in the log."""
    annotations = {"nearpath.io/socket-lane": "maybe"}
    config = plugin.config(
        requird=True, runtimeConfig={"io.kubernetes.cri.pod-annotations": annotations}
    )
    code, _ = plugin.call("ADD", config, CNI_ARGS="nonsense")
    assert code == 0
    for text in (
        "key ignored: 'requird'",
        "annotation nearpath.io/socket-lane",
        "CNI_ARGS: 1 part",
    ):
        assert text in plugin.log()
    assert plugin.lane() == ("on", "")


def test_result_of_another_version(plugin: Plugin) -> None:
    """A prevResult of another version than the configuration is passed on, with a warning."""
    previous = {"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.1.2.3/24"}]}
    assert plugin.ok("ADD", prevResult=previous) == previous
    assert "another cniVersion" in plugin.log()


def test_only_add_warns(plugin: Plugin) -> None:
    """What is odd in a configuration is said once per pod, not by every STATUS."""
    for command in ("DEL", "CHECK", "STATUS", "GC"):
        plugin.ok(command, unknown=1)
    assert "unknown configuration key" not in plugin.log()


def test_log_level(plugin: Plugin) -> None:
    """logLevel keeps lesser lines out of the log."""
    plugin.ok("ADD", logLevel="error", unknown=1)
    assert plugin.log() == ""
    plugin.ok("ADD", logLevel="warning", unknown=1)
    assert "unknown" in plugin.log()
    assert "socket lane on" not in plugin.log()


# -- ADD fails open --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "error", "reason", "code"), FAILURES)
def test_fails_open(plugin: Plugin, method: str, error: Exception, reason: str, code: int) -> None:
    """Whatever breaks inside, the pod starts with prevResult, and the reason is told."""
    plugin.doors.break_with(method, error)
    assert plugin.ok("ADD") == RESULT
    assert plugin.lane() == ("off", reason)
    assert plugin.doors.pods == set()
    assert plugin.failures() == {reason: 1}
    assert f"[{reason}]" in plugin.log()
    assert "Traceback" not in plugin.log()
    assert "hunter2" not in plugin.log()
    assert code


@pytest.mark.parametrize(("method", "error", "reason", "code"), FAILURES)
def test_required_fails_closed(
    plugin: Plugin, method: str, error: Exception, reason: str, code: int
) -> None:
    """With required the same is a CNI error, and nothing is left behind."""
    plugin.doors.break_with(method, error)
    answer = plugin.error("ADD", required=True)
    assert answer["code"] == code
    assert answer["details"] == reason
    assert answer["msg"].startswith("nearpath: ")
    assert "hunter2" not in json.dumps(answer)
    assert "Traceback" not in json.dumps(answer)
    assert plugin.leftovers() == []
    assert plugin.doors.pods == set()
    assert plugin.failures() == {reason: 1}


def test_namespace_that_does_not_exist(plugin: Plugin) -> None:
    """A namespace that is gone is the runtime's to find out; with required it is error 8."""
    code, answer = plugin.call("ADD", CNI_NETNS="/run/netns/gone")
    assert (code, answer) == (0, RESULT)
    assert plugin.lane() == ("off", "netns")
    code, answer = plugin.call("ADD", plugin.config(required=True), CNI_NETNS="/run/netns/gone")
    assert code == 1
    assert answer is not None
    assert answer["code"] == 8
    assert plugin.leftovers() == []
    assert plugin.failures() == {"netns": 2}


def test_half_done_registration_is_undone(plugin: Plugin) -> None:
    """If registering fails after it took effect, it is taken back: off means off."""

    def half() -> None:
        plugin.doors.pods.add(1001)
        raise BpfError("cannot update map pods", errno.EINTR)

    plugin.doors.broken["register"] = half
    plugin.ok("ADD")
    assert plugin.doors.pods == set()
    assert plugin.lane() == ("off", "bpf")


def test_failure_spares_the_pods_other_attachment(plugin: Plugin) -> None:
    """A failed second attachment does not take the first one's lane away."""
    plugin.ok("ADD")
    plugin.doors.break_with("register", BpfError("no", errno.ENOSPC))
    code, _ = plugin.call("ADD", CNI_IFNAME="net1")
    assert code == 0
    assert plugin.doors.pods == {1001}
    assert plugin.lane() == ("on", "")
    assert plugin.lane(ifname="net1") == ("off", "bpf")


def test_undo_that_fails_too(plugin: Plugin) -> None:
    """A failing undo changes neither the answer nor the record; both are counted."""
    plugin.doors.break_with("register", BpfError("first", errno.EPERM))
    plugin.doors.break_with("unregister", Unavailable("second", "second"))
    assert plugin.ok("ADD") == RESULT
    assert plugin.lane() == ("off", "bpf")
    assert plugin.failures() == {"bpf": 1, "second": 1}
    assert plugin.error("ADD", required=True)["code"] == 101
    assert plugin.leftovers() == []


@pytest.mark.parametrize("spoil", ["file", "symlink", "writable"])
def test_untrusted_run_directory(plugin: Plugin, spoil: str, tmp_path: Path) -> None:
    """A run directory that others could write to is not used; the pod starts all the same."""
    run = Path(plugin.place.run_dir)
    if spoil == "file":
        run.write_text("")
    elif spoil == "symlink":
        (tmp_path / "elsewhere").mkdir()
        run.symlink_to(tmp_path / "elsewhere")
    else:
        run.mkdir()
        run.chmod(0o777)
    assert plugin.ok("ADD") == RESULT
    assert plugin.doors.pods == set()
    assert plugin.error("ADD", required=True)["code"] == 102
    assert plugin.ok("DEL") is None
    assert not list((tmp_path / "elsewhere").iterdir()) if spoil == "symlink" else True


def test_damaged_old_record(plugin: Plugin) -> None:
    """A damaged record of the same attachment is replaced."""
    plugin.ok("ADD")
    path = Path(plugin.place.attachments_dir) / state.record_name("c1", "eth0")
    for damage in (b"", b"{", b"[]", b"\xff", b'{"container_id": 1}', b"[" * 100_000):
        path.write_bytes(damage)
        assert plugin.ok("ADD") == RESULT
        assert plugin.lane() == ("on", "")
