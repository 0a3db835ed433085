"""doctor: every check tells good from bad, and what is bad has its loss and its remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nearpath import state
from nearpath.datapath import tables
from nearpath.errors import BpfError, NearpathError, Unavailable
from nearpath.kernel import features
from nearpath.node import doctor, doctor_kernel, doctor_node, doctor_taps
from nearpath.node.finding import FAIL, OK, WARN, Finding, report, verdict
from nearpath.place import Place

if TYPE_CHECKING:
    from nearpath.kernel.features import Version

ROOT = Path(__file__).resolve().parents[2]


def refuse() -> str:
    raise Unavailable("no-cgroup2", "no cgroup v2 hierarchy is mounted", "mount it")


def deny() -> list[str]:
    raise BpfError("cannot query", 1)


@pytest.mark.parametrize(
    ("finding", "state_"),
    [
        (doctor_kernel.check_version((6, 1, 119), "6.1.0-28-cloud", cookies=True), OK),
        (doctor_kernel.check_version((5, 14, 0), "5.14.0-427.el9", cookies=True), WARN),
        (doctor_kernel.check_version(None, "weird", cookies=True), WARN),
        (doctor_kernel.check_version((5, 10, 0), "5.10.0-30", cookies=False), FAIL),
        (doctor_kernel.check_btf(present=True), OK),
        (doctor_kernel.check_btf(present=False), FAIL),
        (doctor_kernel.check_cgroup(lambda: "/sys/fs/cgroup"), OK),
        (doctor_kernel.check_cgroup(refuse), FAIL),
        (doctor_kernel.check_bpffs(mounted=True, known=True), OK),
        (doctor_kernel.check_bpffs(mounted=False, known=True), OK),
        (doctor_kernel.check_bpffs(mounted=False, known=False), FAIL),
        (doctor_kernel.check_jit("1"), OK),
        (doctor_kernel.check_jit("2"), OK),
        (doctor_kernel.check_jit(""), OK),
        (doctor_kernel.check_jit("0"), WARN),
        (doctor_kernel.check_missing("helpers", [], "all"), OK),
        (doctor_kernel.check_missing("helpers", ["bpf_x in sk_msg"], "all"), FAIL),
        (doctor_kernel.check_programs(""), OK),
        (doctor_kernel.check_programs("cannot load: R1 type=inv expected=ctx"), FAIL),
        (doctor_kernel.check_guards("", attached=None), OK),
        (doctor_kernel.check_guards("", attached=True), OK),
        (doctor_kernel.check_guards("", attached=False), WARN),
        (doctor_kernel.check_guards("not permitted (libbpf: x)", attached=None), WARN),
        (doctor_kernel.check_guards("not permitted", attached=False), WARN),
        (doctor_kernel.check_mptcp((6, 1, 100), "0"), OK),
        (doctor_kernel.check_mptcp((6, 1, 100), ""), OK),
        (doctor_kernel.check_mptcp((6, 1, 159), "1"), OK),
        (doctor_kernel.check_mptcp((6, 1, 158), "1"), WARN),
        (doctor_kernel.check_exclusive(list), OK),
        (doctor_kernel.check_exclusive(lambda: ["their_sockops"]), FAIL),
        (doctor_kernel.check_exclusive(deny), OK),
        (doctor_kernel.check_sock_ops(list), OK),
        (doctor_kernel.check_sock_ops(lambda: ["nearpath_sockop"]), OK),
        (doctor_kernel.check_sock_ops(lambda: ["nearpath_sockop", "mb_sockops"]), WARN),
        (doctor_kernel.check_sock_ops(lambda: [""]), WARN),
        (doctor_kernel.check_sock_ops(deny), OK),
        (doctor_node.check_pins([]), OK),
        (doctor_node.check_pins(["nearpath/v1/sockets"]), OK),
        (doctor_node.check_pins(["tc/globals/cilium_ipcache"]), OK),
        (doctor_node.check_pins(["map_redir", "tc/globals/cilium_ipcache"]), WARN),
        (doctor_node.check_pins(["tc/globals/sock_pair_map"]), WARN),
        (doctor_taps.check_modes({}), OK),
        (doctor_taps.check_modes({"peer": "cannot load: unknown func"}), WARN),
        (doctor_taps.check_modes({"mirror": "cannot add a u32 filter", "peer": "no"}), WARN),
        (doctor_taps.check_modes(NearpathError("cannot make a network namespace")), WARN),
        (doctor_taps.check_watcher(running=False, machines=0, failing=[]), OK),
        (doctor_taps.check_watcher(running=True, machines=2, failing=[]), OK),
        (doctor_taps.check_watcher(running=False, machines=2, failing=[]), WARN),
        (doctor_taps.check_watcher(running=True, machines=2, failing=["busy"]), WARN),
    ],
)
def test_checks(finding: Finding, state_: str) -> None:
    """What is not ok says what is lost and what to do, and nothing else does."""
    assert finding.state == state_
    assert bool(finding.lost) == bool(finding.remedy) == (state_ != OK)
    assert finding.found


@pytest.mark.parametrize(
    ("release", "build", "signature", "expected"),
    [
        ("6.1.0-28-cloud-amd64", "#1 SMP Debian 6.1.119-1 (2024-11-22)", "", (6, 1, 119)),
        ("6.8.0-31-generic", "#31-Ubuntu SMP", "Ubuntu 6.8.0-31.31-generic 6.8.1", (6, 8, 1)),
        ("5.14.0-427.el9.x86_64", "#1 SMP", "", (5, 14, 0)),
        ("6.18.44-custom", "#1 SMP", "", (6, 18, 44)),
        ("7.0", "#1", "", (7, 0, 0)),
        ("unknown", "#1", "", None),
    ],
)
def test_upstream_version(
    release: str, build: str, signature: str, expected: Version | None
) -> None:
    """Distributions hide the point release in different places."""
    assert features.upstream_version(release, build, signature) == expected


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((5, 10, 246), False),
        ((5, 10, 247), True),
        ((6, 12, 10), False),
        ((6, 12, 117), True),
        ((6, 8, 1), False),  # not longterm: whether it was carried over nobody can tell
        ((6, 18, 0), True),
        ((7, 1, 0), True),
        (None, False),
    ],
)
def test_mptcp_fix(version: Version | None, safe: bool) -> None:
    """Known series count from their point release, unknown ones are not trusted."""
    assert features.mptcp_children_are_safe(version) is safe


def test_verdict_is_the_worst() -> None:
    """And it is the exit code: 0 usable, 1 degraded, 2 unusable."""
    ok, warn, fail = (Finding("x", name, "y") for name in (OK, WARN, FAIL))
    assert [verdict(found) for found in ([ok], [ok, warn], [fail, warn])] == [OK, WARN, FAIL]
    shown = [report(found) for found in ([ok], [ok, warn], [fail, warn])]
    assert [each["exit_code"] for each in shown] == [0, 1, 2]
    assert [each["verdict"] for each in shown] == ["usable", "degraded", "unusable"]
    assert shown[0]["checks"][0] == {
        "name": "x",
        "state": "ok",
        "found": "y",
        "lost": "",
        "remedy": "",
    }


def test_every_probe_is_one_that_libbpf_knows() -> None:
    """A helper or type without a number would be a KeyError on some operator's node."""
    from nearpath.datapath import libbpf

    for kind, helpers in doctor_kernel.HELPERS.items():
        assert kind in libbpf._PROG_TYPES
        assert set(helpers) <= set(libbpf._HELPERS)
    assert set(doctor_kernel.PROG_TYPES) <= set(libbpf._PROG_TYPES)
    assert set(doctor_kernel.MAP_TYPES) <= set(libbpf._MAP_TYPES)


def test_helpers_are_those_of_the_programs() -> None:
    """What the BPF source calls is what doctor asks for."""
    source = (ROOT / "bpf/socket_lane.bpf.c").read_text()
    for kind in doctor_kernel.HELPERS:
        for helper in doctor_kernel.HELPERS[kind]:
            used = f"bpf_{helper}(" in source or (
                helper == "probe_read_kernel" and "BPF_CORE_READ(" in source
            )
            assert used, helper


# -- CNI configuration -----------------------------------------------------------------------


class Node:
    """Directories that a runtime would look into."""

    def __init__(self, directory: Path) -> None:
        self.conf = directory / "net.d"
        self.bin = directory / "bin"
        self.conf.mkdir()
        self.bin.mkdir()

    def conflist(self, name: str, *kinds: str) -> None:
        plugins = [{"type": kind} for kind in kinds]
        content = {"cniVersion": "0.3.1", "name": "n", "plugins": plugins}
        (self.conf / name).write_text(json.dumps(content))

    def check(self) -> list[Finding]:
        return doctor_node.check_cni([str(self.bin)], str(self.conf))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node with the plugin installed by symlink, and no configuration."""
    node = Node(tmp_path)
    (tmp_path / "real").write_text("")
    (tmp_path / "real").chmod(0o755)
    (node.bin / "nearpath").symlink_to(tmp_path / "real")
    return node


def test_chained(node: Node) -> None:
    """The good case: both findings are ok and show what was found."""
    node.conflist("10-calico.conflist", "calico", "portmap", "nearpath")
    configuration, plugin = node.check()
    assert (configuration.state, plugin.state) == (OK, OK)
    assert "calico → portmap → nearpath" in configuration.found
    assert " → " in plugin.found  # link and target


def test_not_chained(node: Node) -> None:
    """The configuration that the runtime uses does not name us."""
    node.conflist("10-calico.conflist", "calico", "portmap")
    assert node.check()[0].state == WARN


def test_chained_in_a_file_that_is_not_used(node: Node) -> None:
    """Runtimes use the first file only: say which."""
    node.conflist("10-calico.conflist", "calico")
    node.conflist("20-mine.conflist", "calico", "nearpath")
    (node.conf / "15-broken.conf").write_text("{")
    finding = node.check()[0]
    assert finding.state == WARN
    assert "20-mine.conflist" in finding.remedy


def test_not_last_of_all(node: Node) -> None:
    """As the first plugin it has no pod network to accelerate."""
    node.conflist("10-x.conflist", "nearpath", "calico")
    assert node.check()[0].state == WARN


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plugins": 3}'])
def test_broken_configuration(node: Node, content: str) -> None:
    """Half-written files are seen on real nodes."""
    (node.conf / "10-x.conflist").write_text(content)
    assert node.check()[0].state == WARN


def test_no_configuration_at_all(node: Node) -> None:
    """No primary CNI yet."""
    assert node.check()[0].state == WARN


def test_plugin_missing_or_broken(node: Node, tmp_path: Path) -> None:
    """No file, and a link whose target is gone."""
    (tmp_path / "real").unlink()
    assert "is no executable" in node.check()[1].found
    (node.bin / "nearpath").unlink()
    finding = node.check()[1]
    assert finding.state == WARN
    assert "not in" in finding.found


# -- our own state ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose datapath is loaded as far as anybody can tell, with no pods."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    state.secure_dir(place.run_dir)
    describe(monkeypatch, place)
    return place


def describe(monkeypatch: pytest.MonkeyPatch, place: Place, **changes: object) -> None:
    """Make the loader say this about the datapath."""
    shown: dict[str, Any] = {"loaded": True, "paused": False, "draining": 0, "pins": place.pin_dir}
    shown.update(guards=True, no_guards_because="")
    shown.update(changes)
    monkeypatch.setattr(
        "nearpath.datapath.loader.describe",
        lambda _: {**shown, "unloaded": Path(place.unloaded_file).exists()},
    )
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: shown["loaded"])
    monkeypatch.setattr("nearpath.lanes.socket.by_pod", lambda _: {})
    monkeypatch.setattr("nearpath.lanes.socket.registered", lambda _: {7})


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def record(container: str, cookie: int, lane: str = "on", reason: str = "") -> dict[str, Any]:
    """A record as ADD writes it."""
    return {
        "container_id": container,
        "ifname": "eth0",
        "netns_cookie": cookie,
        "lanes": {"socket": {"state": lane, "reason": reason}},
    }


def test_all_well(place: Place) -> None:
    """Loaded, registered, no failures: everything ok."""
    state.save(place, record("c1", 7))
    state.save(place, record("c2", 8, "off", "annotation"))
    found = named(doctor_node.check_place(place))
    assert {finding.state for finding in found.values()} == {OK}
    assert found["pods"].found == "1 of 2 on the socket lane"


def test_lost_registration_and_failures(place: Place) -> None:
    """Pods that should be on the lane and are not, and what was counted."""
    state.save(place, record("c1", 9))
    state.count_failure(place, "no-btf")
    found = named(doctor_node.check_place(place))
    assert found["pods"].state == WARN
    assert "not-registered" in found["pods"].found
    assert found["failures"].state == WARN
    assert "no-btf 1" in found["failures"].found


def test_datapath_states(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unloaded by an operator and paused are worth a word, not yet loaded is not."""
    describe(monkeypatch, place, paused=True)
    assert named(doctor_node.check_place(place))["datapath"].state == WARN
    describe(monkeypatch, place, loaded=False, draining=3)
    finding = named(doctor_node.check_place(place))["datapath"]
    assert finding.state == OK
    assert "3 sockets draining" in finding.found
    Path(place.unloaded_file).write_text("")
    assert named(doctor_node.check_place(place))["datapath"].state == WARN


def test_run_directory(place: Place) -> None:
    """Absent is fine, writable by others is not, and then nothing in it is believed."""
    Path(place.run_dir).chmod(0o777)
    findings = doctor_node.check_place(place)
    assert [(finding.name, finding.state) for finding in findings] == [("run-directory", FAIL)]
    Path(place.run_dir).rmdir()
    assert named(doctor_node.check_place(place))["run-directory"].state == OK
    os.symlink("/var", place.run_dir)
    assert doctor_node.check_place(place)[0].state == FAIL


def test_unreadable_datapath_is_a_finding(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bpf(2) error must not end the whole examination."""

    def fail(_: Place) -> dict[str, Any]:
        raise BpfError("cannot open pinned map settings", 1)

    monkeypatch.setattr("nearpath.datapath.loader.describe", fail)
    assert named(doctor_node.check_place(place))["datapath"].state == WARN


def test_examine_on_a_bare_kernel(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without any of it: unusable, every finding present, no exception."""

    def nothing(*_: object) -> list[str]:
        raise BpfError("cannot open libbpf.so.1", remedy="install libbpf1")

    monkeypatch.setattr(features, "missing_helpers", nothing)
    monkeypatch.setattr(features, "has_btf", lambda: False)
    monkeypatch.setattr(features, "pins", list)
    monkeypatch.setattr("nearpath.kernel.cgroup.v2_root", refuse)
    found = named(doctor.examine(place, ["/nowhere"], "/nowhere"))
    assert verdict(list(found.values())) == FAIL
    assert found["programs"].remedy == "install libbpf1"
    assert found["btf"].state == found["cgroup-v2"].state == FAIL
    assert "other-sock-ops" not in found
    assert {"tap-lane", "virtual-machines"} <= set(found)


def test_what_is_lost_by_mode() -> None:
    """Without the default mode the lane, without another only that one."""
    assert "stay on their bridge" in doctor_taps.check_modes({"mirror": "no"}).lost
    finding = doctor_taps.check_modes({"redirect": "no", "peer": "no"})
    assert finding.lost == "the modes redirect and peer of the tap lane"


def test_counters_have_an_explanation() -> None:
    """Every reason that the programs count is explained by `nearpath status`."""
    from nearpath.cli import show

    assert list(show.REASONS) == list(tables.REASONS)


def test_guards_of_the_loaded_datapath(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the load has found out is the answer; nothing is tried again."""
    monkeypatch.setattr(features, "refused_programs", lambda name: f"{name} tried")
    assert doctor._guards(place).state == OK
    because = "cannot load: Operation not permitted (libbpf: prog 'x': …)"
    describe(monkeypatch, place, guards=False, no_guards_because=because)
    finding = doctor._guards(place)
    assert finding.found == "not attached: cannot load: Operation not permitted"
    assert '"guards": "preferred"' in finding.remedy + finding.lost
    assert "annotation" in finding.lost
    describe(monkeypatch, place, loaded=False, guards=False)
    assert doctor._guards(place).found == "not attached: guards tried"


def test_pods_without_guards_are_no_fault(place: Place) -> None:
    """no-guards is a choice of the configuration; the finding `guards` says what is lost."""
    state.save(place, record("c1", 8, "off", "no-guards"))
    assert named(doctor_node.check_place(place))["pods"].state == OK


def test_mptcp_texts() -> None:
    """With the fixed kernels MPTCP listeners have the lane, with others not."""
    assert "take the lane" in doctor_kernel.check_mptcp((6, 18, 0), "1").found
    assert "leaves alone" in doctor_kernel.check_mptcp((6, 1, 100), "1").lost
