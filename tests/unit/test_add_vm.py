"""ADD, DEL and GC of virtual machines' pods: what is recorded, who is told, what is undone.

The kernel is a fake here (helpers/fake_doors.py); records and locks are real files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_doors import OWN_NETNS
from helpers.plugin import RESULT, Plugin
from nearpath.errors import NearpathError, Unavailable
from nearpath.lanes import vm_state

NAME = "virt-launcher-db-x7k2p"
ARGS = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={NAME}"
DOMAIN = {"kubevirt.io/domain": "db"}
DEFAULT = {"state": "on", "reason": "", "mode": "mirror", "checksum": "skip", "insist": False}


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A node of the test's own."""
    return Plugin(tmp_path)


def add(
    plugin: Plugin,
    annotations: dict[str, object] | None = None,
    arguments: str = ARGS,
    **keys: object,
) -> dict[str, Any] | None:
    """ADD with these annotations and keys; the tap lane in the record."""
    runtime = {"io.kubernetes.cri.pod-annotations": annotations}
    config = plugin.config(**({"runtimeConfig": runtime} if annotations else {}), **keys)
    code, answer = plugin.call("ADD", config, CNI_ARGS=arguments)
    assert (code, answer) == (0, RESULT)
    record = plugin.record()
    assert record is not None
    lane: dict[str, Any] | None = record["lanes"].get("tap")
    return lane


@pytest.mark.parametrize(
    ("annotations", "arguments"),
    [
        (DOMAIN, ARGS),
        (DOMAIN, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=renamed"),
        (None, ARGS),  # Multus' delegates get no annotations
    ],
)
def test_vm_is_recorded_and_watched(
    plugin: Plugin, annotations: dict[str, object] | None, arguments: str
) -> None:
    """By its annotation or its name; the watcher is asked for once the record is there."""
    seen: list[object] = []

    def look(method: str) -> None:
        if method == "watch":
            seen.append(plugin.record())

    plugin.doors.before = look
    assert add(plugin, annotations, arguments) == DEFAULT
    assert plugin.doors.watchers == 1
    assert seen == [plugin.record()]


@pytest.mark.parametrize("annotations", [None, {"kubevirt.io/domain": 7}, {"kubevirt.io": "db"}])
def test_plain_pods_are_left_alone(plugin: Plugin, annotations: dict[str, object] | None) -> None:
    """No tap lane in the record and no watcher."""
    assert add(plugin, annotations, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart") is None
    assert plugin.doors.watchers == 0


def test_any_add_replaces_a_killed_watcher(plugin: Plugin) -> None:
    """While a watcher's file is there, also the ADD of a plain pod asks for one."""
    add(plugin)
    Path(plugin.place.watcher_file).touch()
    plugin.call("ADD", CNI_CONTAINERID="c2")
    assert plugin.doors.watchers == 2


@pytest.mark.parametrize(
    ("keys", "annotations", "expected"),
    [
        ({"tapLane": "peer"}, {}, {"mode": "peer"}),
        ({"tapLane": "peer"}, {"nearpath.io/tap-lane": "redirect"}, {"mode": "redirect"}),
        ({"tapLane": "off"}, {}, {"mode": "off", "state": "off", "reason": "config"}),
        (
            {},
            {"nearpath.io/tap-lane": "off"},
            {"mode": "off", "state": "off", "reason": "annotation"},
        ),
        ({"tapLane": "off"}, {"nearpath.io/tap-lane": "mirror"}, {}),
        ({"checksum": "software"}, {}, {"checksum": "software", "insist": True}),
        ({"checksum": "keep"}, {"nearpath.io/checksum": "skip"}, {"insist": True}),
        (
            {"excludeNamespaces": ["shop"], "checksum": "software"},
            {"nearpath.io/tap-lane": "peer", "nearpath.io/checksum": "skip"},
            {"mode": "off", "state": "off", "reason": "excluded-namespace", "checksum": "keep"},
        ),
    ],
)
def test_modes(
    plugin: Plugin, keys: dict[str, Any], annotations: dict[str, str], expected: dict[str, Any]
) -> None:
    """The annotation overrides the key; nothing overrides an excluded namespace."""
    lane = add(plugin, {**DOMAIN, **annotations}, **keys)
    assert lane is not None
    if "insist" not in expected:
        lane.pop("insist")
    assert lane == {**{key: DEFAULT[key] for key in lane}, **expected}


@pytest.mark.parametrize("key", ["tapLane", "checksum"])
@pytest.mark.parametrize("value", ["on", "", 1, None, ["mirror"]])
def test_bad_keys(plugin: Plugin, key: str, value: object) -> None:
    """Refused with the name of the key and what it may be; nothing is recorded."""
    error = plugin.error("ADD", **{key: value})
    assert error["code"] == 7
    assert f"{key} must be one of " in error["msg"]
    assert plugin.record() is None


@pytest.mark.parametrize("name", ["tap-lane", "checksum"])
def test_bad_annotations(plugin: Plugin, name: str) -> None:
    """A pod cannot break its own start: a warning, and the default."""
    assert add(plugin, {**DOMAIN, f"nearpath.io/{name}": "maybe\n"}) == DEFAULT
    assert f"annotation nearpath.io/{name} is none of" in plugin.log()


def test_own_namespace_is_no_vm(plugin: Plugin) -> None:
    """The host's bridges are not a pod's, whatever the pod is called."""
    plugin.call("ADD", CNI_ARGS=ARGS, CNI_NETNS=OWN_NETNS, CNI_NETNS_OVERRIDE="1")
    record = plugin.record()
    assert record is not None
    assert "tap" not in record["lanes"]
    assert plugin.doors.watchers == 0


def test_a_watcher_that_cannot_start(plugin: Plugin) -> None:
    """The pod starts, is in the socket lane, and the failure is counted."""
    plugin.doors.break_with("watch", NearpathError("cannot start the watcher: no"))
    assert add(plugin) == DEFAULT
    assert plugin.lane() == ("on", "")
    assert sum(plugin.failures().values()) == 1


def test_tap_lane_needs_no_datapath(plugin: Plugin) -> None:
    """On a kernel without BTF a virtual machine has its tap lane all the same."""
    plugin.doors.break_with("prepare", Unavailable("no-btf", "this kernel has no BTF"))
    assert add(plugin) == DEFAULT
    assert plugin.lane() == ("off", "no-btf")
    assert plugin.doors.watchers == 1


def test_check_replaces_a_killed_watcher(plugin: Plugin) -> None:
    add(plugin)
    plugin.ok("CHECK")
    assert plugin.doors.watchers == 2


# -- DEL, GC ---------------------------------------------------------------------------------


def test_del_withdraws(plugin: Plugin) -> None:
    """What was done in the namespace is undone before the record goes, whatever CNI_NETNS says."""
    add(plugin)
    seen: list[object] = []

    def look(method: str) -> None:
        if method == "withdraw":
            seen.append(plugin.record())

    plugin.doors.before = look
    code, _ = plugin.call("DEL", CNI_NETNS="")
    assert code == 0
    assert plugin.doors.withdrawn == [1001]
    assert seen[0] is not None
    assert plugin.record() is None


def test_del_of_a_plain_pod_withdraws_nothing(plugin: Plugin) -> None:
    plugin.ok("ADD")
    plugin.ok("DEL")
    assert plugin.doors.withdrawn == []


def test_del_of_a_secondary_network(plugin: Plugin) -> None:
    """All interfaces are served until the last attachment in the namespace goes."""
    add(plugin)
    plugin.call("ADD", CNI_ARGS=ARGS, CNI_IFNAME="net1")
    plugin.call("DEL", CNI_IFNAME="net1")
    assert plugin.doors.withdrawn == []
    plugin.call("DEL")
    assert plugin.doors.withdrawn == [1001]


def test_del_succeeds_whatever_fails(plugin: Plugin) -> None:
    """The record goes, and the failure is counted."""
    add(plugin)
    plugin.doors.break_with("withdraw", NearpathError("cannot list links"))
    code, _ = plugin.call("DEL")
    assert code == 0
    assert plugin.record() is None
    assert plugin.failures() == {"internal": 1}


def test_gc_withdraws(plugin: Plugin) -> None:
    add(plugin)
    plugin.ok("GC", **{"cni.dev/valid-attachments": []})
    assert plugin.doors.withdrawn == [1001]
    assert plugin.record() is None


def test_gc_sweeps_what_a_del_could_not_undo(plugin: Plugin) -> None:
    """What is known of a pod outlives its record until it is undone."""
    add(plugin)
    vm_state.write(plugin.place, {"cookie": 1001, "netns": "/run/netns/a"})
    plugin.ok("GC", **{"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]})
    assert "sweep_taps" not in plugin.doors.calls
    plugin.doors.break_with("withdraw", NearpathError("cannot list links"))
    plugin.ok("DEL")
    plugin.ok("GC", **{"cni.dev/valid-attachments": []})
    assert "sweep_taps" in plugin.doors.calls
    plugin.doors.break_with("sweep_taps", NearpathError("still not"))
    assert plugin.error("GC", **{"cni.dev/valid-attachments": []})["code"] == 102


# -- what is wanted --------------------------------------------------------------------------


def wanted(plugin: Plugin) -> tuple[str, str, str]:
    """Mode, reason and checksum mode of the one virtual machine."""
    ((cookie, records),) = vm_state.by_cookie(plugin.place).items()
    found = vm_state.wanted(plugin.place, cookie, records)
    return found.mode, found.reason, found.checksum


def test_operator_wins_over_the_pod(plugin: Plugin) -> None:
    """Live choices win over annotations, until they are taken back."""
    add(plugin, {**DOMAIN, "nearpath.io/tap-lane": "off"})
    assert wanted(plugin) == ("off", "annotation", "skip")
    vm_state.choose(plugin.place, 1001, {"mode": "peer", "checksum": "software"})
    assert wanted(plugin) == ("peer", "", "software")
    vm_state.choose(plugin.place, 1001, {"mode": "off"})
    assert wanted(plugin) == ("off", "operator", "skip")
    vm_state.choose(plugin.place, 1001, {})
    assert wanted(plugin) == ("off", "annotation", "skip")


def test_nobody_wins_over_an_excluded_namespace(plugin: Plugin) -> None:
    add(plugin, excludeNamespaces=["shop"])
    vm_state.choose(plugin.place, 1001, {"mode": "peer"})
    assert wanted(plugin) == ("off", "excluded-namespace", "keep")


def test_paused_and_unloaded(plugin: Plugin) -> None:
    """What an operator does to the whole node comes first."""
    add(plugin)
    Path(plugin.place.taps_paused_file).touch()
    assert wanted(plugin) == ("off", "paused", "skip")
    Path(plugin.place.unloaded_file).touch()
    assert wanted(plugin) == ("off", "unloaded-by-operator", "keep")


def test_off_wins_among_attachments(plugin: Plugin) -> None:
    """A pod's interfaces are served alike."""
    add(plugin, tapLane="peer")
    runtime = {
        "io.kubernetes.cri.pod-annotations": {**DOMAIN, "nearpath.io/tap-lane": "off"},
    }
    config = plugin.config(runtimeConfig=runtime)
    plugin.call("ADD", config, CNI_ARGS=ARGS, CNI_IFNAME="net1")
    assert wanted(plugin) == ("off", "annotation", "skip")


# -- state files -----------------------------------------------------------------------------


def test_state_survives_what_is_in_the_file(plugin: Plugin) -> None:
    """A damaged or hostile file counts as nothing done; it is never trusted for its types."""
    add(plugin)
    good = {
        "cookie": 1001,
        "netns": "/run/netns/a",
        "error": "",
        "made": [3],
        "changes": [{"index": 3}],
        "wires": [{"bridge": "k6t-eth0"}],
    }
    vm_state.write(plugin.place, good)
    assert vm_state.read(plugin.place, 1001) == good
    empty = {**good, "netns": "", "made": [], "changes": [], "wires": []}
    path = Path(plugin.place.vms_dir, "1001.json")
    for content in ("", "[1]", "{", '{"made": {"a": 1}, "netns": 7, "wires": [[]], "changes": 1}'):
        path.write_text(content)
        assert vm_state.read(plugin.place, 1001) == empty
    vm_state.forget(plugin.place, 1001)
    vm_state.forget(plugin.place, 1001)
    assert vm_state.known(plugin.place) == set()


def test_known_takes_only_cookies(plugin: Plugin) -> None:
    vm_state.choose(plugin.place, 7, {"mode": "off"})
    for name in ("x.json", "-1.json", ".tmp-1-2.json", "9" * 30 + ".json"):
        Path(plugin.place.vms_dir, name).touch()
    assert vm_state.known(plugin.place) == {7}
