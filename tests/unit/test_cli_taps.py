"""``nearpath tap-lane`` and what ``pods`` and ``status`` show of virtual machines.

State files are real, the kernel is not asked: what the watcher has found is written by the test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearpath import state
from nearpath.cli import output
from nearpath.cli.main import main
from nearpath.lanes import vm_state
from nearpath.node import taps
from nearpath.place import Place

COUNTED = {"from_vm": {"packets": 7, "bytes": 2048}, "to_vm": {"packets": 9, "bytes": 10}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A node with one virtual machine's pod, whose taps nobody has looked at yet."""
    monkeypatch.setattr(output, "geteuid", lambda: 0)
    monkeypatch.setenv("NEARPATH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NEARPATH_PIN_DIR", str(tmp_path / "pins"))
    monkeypatch.setattr(taps, "_counts", lambda path, cookie: {5: COUNTED})
    # Changes are the kernel's business; tests/integration/test_vm.py has them.
    monkeypatch.setattr(taps, "attend_all", lambda place, cookies=None: {})
    made = Place(str(tmp_path / "run"), str(tmp_path / "pins"))
    add(made, "c1", 7, "db")
    return made


def add(place: Place, container: str, cookie: int, name: str, **lane: object) -> None:
    """Record a virtual machine's pod."""
    tap = {"state": "on", "reason": "", "mode": "mirror", "checksum": "skip", "insist": False}
    state.save(
        place,
        {
            "container_id": container,
            "ifname": "eth0",
            "netns": f"/run/netns/{container}",
            "netns_cookie": cookie,
            "pod": {"namespace": "shop", "name": f"virt-launcher-{name}", "uid": ""},
            "ips": ["10.0.0.1/24"],
            "lanes": {"socket": {"state": "off", "reason": "config"}, "tap": {**tap, **lane}},
        },
    )


def found(place: Place, cookie: int = 7, error: str = "", **wire: object) -> None:
    """What a look at the pod's namespace has found."""
    base = {
        "bridge": "k6t-eth0",
        "tap": "tap0",
        "tap_index": 5,
        "nic": "eth0-nic",
        "mode": "mirror",
        "reason": "",
        "checksum": "skip",
        "checksum_reason": "",
    }
    kept = {"cookie": cookie, "netns": "/run/netns/c1", "error": error, "made": [], "changes": []}
    vm_state.write(place, {**kept, "wires": [{**base, **wire}]})


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command prints as JSON."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_tap_in_the_lane(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Mode, checksum mode and packets, in all three commands."""
    found(place)
    expected = {
        "state": "on",
        "reason": "",
        "mode": "mirror",
        "checksum": "skip",
        "wires": [
            {
                "bridge": "k6t-eth0",
                "tap": "tap0",
                "nic": "eth0-nic",
                "mode": "mirror",
                "reason": "",
                "checksum": "skip",
                "checksum_reason": "",
                **COUNTED,
            }
        ],
        "error": "",
    }
    (pod,) = shown(capsys, "tap-lane")
    assert pod == {"pod": "shop/virt-launcher-db", "container_id": "c1", **expected}
    (pod,) = shown(capsys, "pods")
    assert pod["lanes"]["tap"] == expected
    totals = {"pods": 1, "taps": 1, "taps_on_lane": 1, "watcher": 0, "paused": False}
    assert shown(capsys, "status")["lanes"]["tap"] == totals
    main(["tap-lane"])
    table = capsys.readouterr().out
    assert "shop/virt-launcher-db" in table
    assert "k6t-eth0 tap0" in table
    assert "7 / 2.0 KiB" in table
    main(["status"])
    text = capsys.readouterr().out
    assert "machines     1 pods, 1 of 1 taps on the tap lane\n" in text
    assert "watcher      none: the next ADD starts one, or `nearpath watch`\n" in text


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ({"mode": "off", "tap": "", "reason": "no-tap"}, "no-tap"),
        ({"mode": "off", "reason": "no-nic"}, "no-nic"),
    ],
)
def test_why_not(
    place: Place, capsys: pytest.CaptureFixture[str], wire: dict[str, Any], reason: str
) -> None:
    """The reason of the wire is that of the pod."""
    found(place, **wire)
    (pod,) = shown(capsys, "tap-lane")
    assert (pod["state"], pod["reason"]) == ("off", reason)
    main(["pods"])
    assert reason in capsys.readouterr().out


def test_before_virt_handler(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody watches, which is the reason; with a watcher the bridge is what is missing."""
    assert shown(capsys, "tap-lane")[0]["reason"] == "no-watcher"
    with state.Lock(place, place.watcher_file) as lock:
        lock.note("4711\n")
        assert shown(capsys, "tap-lane")[0]["reason"] == "no-bridge"
        assert shown(capsys, "status")["lanes"]["tap"]["watcher"] == 4711


def test_a_failed_look(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The error itself is shown."""
    found(place, error="cannot make a clsact qdisc", mode="off")
    (pod,) = shown(capsys, "tap-lane")
    assert (pod["reason"], pod["error"]) == ("failed", "cannot make a clsact qdisc")
    main(["tap-lane"])
    assert "cannot make a clsact qdisc" in capsys.readouterr().out


def test_no_virtual_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "geteuid", lambda: 0)
    monkeypatch.setenv("NEARPATH_RUN_DIR", str(tmp_path))
    assert main(["tap-lane"]) == 0
    assert "no virtual machines" in capsys.readouterr().out
    assert shown(capsys, "tap-lane") == []
    assert main(["status"]) == 0
    assert "machines" not in capsys.readouterr().out


def test_changes_are_kept(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """By pod or container, for one or all, until they are taken back."""
    add(place, "c2", 8, "web")

    def choices() -> list[dict[str, str]]:
        capsys.readouterr()
        return [vm_state.choice(place, cookie) for cookie in (7, 8)]

    assert main(["tap-lane", "peer", "--pod", "shop/virt-launcher-db"]) == 0
    assert choices() == [{"mode": "peer"}, {}]
    assert main(["tap-lane", "off", "--checksum", "software", "--pod", "c2"]) == 0
    assert choices() == [{"mode": "peer"}, {"mode": "off", "checksum": "software"}]
    assert main(["tap-lane", "--checksum", "keep"]) == 0
    assert choices() == [
        {"mode": "peer", "checksum": "keep"},
        {"mode": "off", "checksum": "keep"},
    ]
    assert main(["tap-lane", "default", "--checksum", "default"]) == 0
    assert choices() == [{}, {}]
    assert vm_state.known(place) == set()


def test_unknown_pod(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing is changed."""
    words = ["tap-lane", "off", "--pod", "shop/virt-launcher-\x1b[31m"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.err == (
        "nearpath: no virtual machine's pod shop/virt-launcher-\\x1b[31m on this node; "
        "nearpath tap-lane\n"
    )
    assert vm_state.choice(place, 7) == {}


def test_a_change_that_failed(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice stays, for the watcher goes on trying; the exit status says so."""
    monkeypatch.setattr(taps, "attend_all", lambda *_: {7: "cannot add a u32 filter"})
    assert main(["tap-lane", "redirect"]) == 1
    assert "1 of 1 not changed yet: cannot add a u32 filter" in capsys.readouterr().err
    assert vm_state.choice(place, 7) == {"mode": "redirect"}


def test_hostile_names(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A pod names its devices: control characters reach no terminal."""
    found(place, tap="\x1b[2J", bridge="k6t-\n")
    main(["tap-lane"])
    main(["pods"])
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "\\x1b[2J" in out


def test_pause_without_a_datapath(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Virtual machines can be paused on a node whose kernel has no use for the socket lane."""
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: False)
    assert shown(capsys, "pause") == {"paused": True, "changed": True, "failed": 0}
    assert Path(place.taps_paused_file).exists()
    assert shown(capsys, "tap-lane")[0]["reason"] == "paused"
    assert shown(capsys, "pause")["changed"] is False
    assert shown(capsys, "resume") == {"paused": False, "changed": True, "failed": 0}
    assert not Path(place.taps_paused_file).exists()
