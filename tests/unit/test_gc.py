"""GC: removes what the runtime no longer knows, of this network, and nothing else.

The kernel is a fake here (helpers/fake_doors.py).
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from helpers.plugin import Plugin
from nearpath import state
from nearpath.errors import BpfError

KEY = "cni.dev/valid-attachments"


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A node with four pods: c1, c2 and c3 in network net, o1 in network other."""
    plugin = Plugin(tmp_path)
    plugin.doors.namespaces = {f"/run/netns/{n}": number for number, n in enumerate("abcd", 1001)}
    for container, letter, network in (
        ("c1", "a", "net"),
        ("c2", "b", "net"),
        ("c3", "c", "net"),
        ("o1", "d", "other"),
    ):
        code, _ = plugin.call(
            "ADD",
            plugin.config(name=network),
            CNI_CONTAINERID=container,
            CNI_NETNS=f"/run/netns/{letter}",
        )
        assert code == 0
    return plugin


def valid(*containers: str) -> list[dict[str, str]]:
    """What a runtime sends for these containers."""
    return [{"containerID": container, "ifname": "eth0"} for container in containers]


def left(plugin: Plugin) -> list[str]:
    """Containers with a record."""
    return [record["container_id"] for record in state.records(plugin.place)]


def collect(plugin: Plugin, **keys: object) -> tuple[int, dict[str, object] | None]:
    """Call GC as a runtime does: no attachment, no prevResult."""
    config = {"cniVersion": "1.1.0", "name": "net", "type": "nearpath", **keys}
    unset: dict[str, Any] = dict.fromkeys(
        ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS")
    )
    return plugin.call("GC", config, **unset)


def test_removes_what_is_stale(plugin: Plugin) -> None:
    """Only attachments of this network that are not in the list go."""
    assert collect(plugin, **{KEY: valid("c2")}) == (0, None)
    assert left(plugin) == ["c2", "o1"]
    assert plugin.doors.pods == {1002, 1004}
    # Again: nothing more to do.
    assert collect(plugin, **{KEY: valid("c2")}) == (0, None)
    assert left(plugin) == ["c2", "o1"]


def test_empty_list(plugin: Plugin) -> None:
    """An empty list means that no attachment of this network is valid."""
    assert collect(plugin, **{KEY: []}) == (0, None)
    assert left(plugin) == ["o1"]
    assert plugin.doors.pods == {1004}


def test_legacy_key(plugin: Plugin) -> None:
    """The key that libcni used first is understood, and the newer one wins."""
    collect(plugin, **{"cni.dev/attachments": valid("c1", "c2")})
    assert left(plugin) == ["c1", "c2", "o1"]
    collect(plugin, **{"cni.dev/attachments": [], KEY: valid("c1")})
    assert left(plugin) == ["c1", "o1"]


@pytest.mark.parametrize("keys", [{}, {KEY: None}, {"cni.dev/attachments": None}])
def test_no_list(plugin: Plugin, keys: dict[str, object]) -> None:
    """Without a list, or with null, nothing is deleted."""
    plugin.doors.pods.add(4711)
    assert collect(plugin, **keys) == (0, None)
    assert left(plugin) == ["c1", "c2", "c3", "o1"]
    assert plugin.doors.pods == {1001, 1002, 1003, 1004, 4711}


@pytest.mark.parametrize(
    "given",
    [
        {},
        "x",
        0,
        False,
        [None],
        ["c1"],
        [{}],
        [{"containerID": "c1"}],
        [{"containerID": 1, "ifname": "eth0"}],
        [*valid("c1"), {"containerID": "c2", "ifname": None}],
    ],
)
def test_malformed_list(plugin: Plugin, given: object) -> None:
    """A malformed list is error 7, and nothing is deleted for the part that is not."""
    code, answer = collect(plugin, **{KEY: given})
    assert code == 1
    assert answer is not None
    assert answer["code"] == 7
    assert left(plugin) == ["c1", "c2", "c3", "o1"]
    assert len(plugin.doors.pods) == 4


def test_needs_ifname_too(plugin: Plugin) -> None:
    """An attachment is containerID and ifname: another interface does not keep it."""
    collect(plugin, **{KEY: [{"containerID": "c1", "ifname": "net1"}]})
    assert left(plugin) == ["o1"]


def test_unexplained_registrations_go(plugin: Plugin) -> None:
    """A registered namespace that no record of any network explains is unregistered."""
    plugin.doors.pods.add(4711)
    collect(plugin, **{KEY: valid("c1", "c2", "c3")})
    assert plugin.doors.pods == {1001, 1002, 1003, 1004}


def test_namespace_shared_with_a_valid_attachment(plugin: Plugin) -> None:
    """A stale second interface does not take the pod's registration with it."""
    second = plugin.config(name="net")
    code, _ = plugin.call("ADD", second, CNI_CONTAINERID="c1", CNI_IFNAME="net1")
    assert code == 0
    collect(plugin, **{KEY: valid("c1", "c2", "c3")})
    assert plugin.record("c1", "net1") is None
    assert 1001 in plugin.doors.pods


def test_goes_on_after_an_error(plugin: Plugin) -> None:
    """If one cannot be removed the others are, and the error comes at the end."""

    def fail_once() -> None:
        if plugin.doors.calls.count("unregister") == 1:
            raise BpfError("no", errno.EPERM)

    plugin.doors.broken["unregister"] = fail_once
    code, answer = collect(plugin, **{KEY: []})
    assert code == 1
    assert answer is not None
    assert answer["code"] == 102
    assert left(plugin) == ["c1", "o1"]  # its record stays for the next time
    assert plugin.doors.pods == {1001, 1004}
    assert plugin.failures() == {"bpf": 1}
    assert collect(plugin, **{KEY: []}) == (0, None)
    assert left(plugin) == ["o1"]


def test_without_the_datapath(plugin: Plugin) -> None:
    """Records are collected although nothing is loaded."""
    plugin.doors.loaded = False
    plugin.doors.break_with("registered", AssertionError())
    assert collect(plugin, **{KEY: []}) == (0, None)
    assert left(plugin) == ["o1"]


def test_sweeps_temporary_files(plugin: Plugin) -> None:
    """What killed writers left goes; records that cannot be read stay for DEL."""
    directory = Path(plugin.place.attachments_dir)
    (directory / ".tmp-999999999-x@eth0.json").write_text("half")
    (directory / "damaged@eth0.json").write_text("{")
    assert collect(plugin, **{KEY: valid("c1", "c2", "c3")}) == (0, None)
    assert sorted(path.name for path in directory.iterdir()) == [
        "c1@eth0.json",
        "c2@eth0.json",
        "c3@eth0.json",
        "damaged@eth0.json",
        "o1@eth0.json",
    ]
    code, _ = plugin.call("DEL", CNI_CONTAINERID="damaged", CNI_NETNS="")
    assert code == 0
    assert not (directory / "damaged@eth0.json").exists()


def test_bad_keys_do_not_stop_it(plugin: Plugin) -> None:
    """Keys of ours with wrong types are logged; GC goes on."""
    assert collect(plugin, required=1, **{KEY: []}) == (0, None)
    assert left(plugin) == ["o1"]
    assert "required must be" in plugin.log()
