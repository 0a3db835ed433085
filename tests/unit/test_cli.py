"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nearpath import VERSION, state
from nearpath.cli import main as command_line
from nearpath.cli import output, show
from nearpath.cli.main import main
from nearpath.datapath import calibration, settings
from nearpath.errors import NearpathError
from nearpath.node import status
from nearpath.node.interrupt import Interrupted
from nearpath.place import LAYOUT, Place

COMMANDS = (
    "version",
    "status",
    "pods",
    "connections",
    "doctor",
    "load",
    "unload",
    "settings",
    "pause",
    "resume",
    "calibrate",
    "demo",
)
COUNTERS = {
    "connections": 1,
    "redirected_messages": 10,
    "redirected_bytes": 2048,
    "kernel_messages": 1,
    "kernel_bytes": 64,
    "reasons": {"joined": 2},
}


MAPS = {"half_open": 4096, "sockets": 8192, "connections": 4096}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place with a loaded datapath that knows the namespace 7; we are root."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    monkeypatch.setenv("NEARPATH_RUN_DIR", place.run_dir)
    monkeypatch.setenv("NEARPATH_PIN_DIR", place.pin_dir)
    monkeypatch.delenv("NEARPATH_DEBUG", raising=False)
    monkeypatch.setattr(output, "geteuid", lambda: 0)
    datapath(monkeypatch, place)
    return place


def datapath(monkeypatch: pytest.MonkeyPatch, place: Place, **changes: object) -> None:
    """Make the datapath look like this."""
    shown: dict[str, Any] = {
        "loaded": True,
        "layout": LAYOUT,
        "cgroup": "/sys/fs/cgroup",
        "pins": place.layout_dir,
        "paused": False,
        "guards": True,
        "no_guards_because": "",
        "draining": 0,
        **changes,
    }
    monkeypatch.setattr(
        "nearpath.datapath.loader.describe",
        lambda _: {**shown, "unloaded": Path(place.unloaded_file).exists()},
    )
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: shown["loaded"])
    monkeypatch.setattr("nearpath.lanes.socket.totals", lambda _: COUNTERS)
    monkeypatch.setattr("nearpath.lanes.socket.by_pod", lambda _: {7: COUNTERS})
    monkeypatch.setattr("nearpath.lanes.socket.registered", lambda _: {7})
    monkeypatch.setattr("nearpath.datapath.loader.is_guarded", lambda _: shown["guards"])
    monkeypatch.setattr("nearpath.datapath.sizes.of_pinned", lambda _: dict(MAPS))
    monkeypatch.setattr("nearpath.datapath.settings.read", lambda _: dict(settings.DEFAULTS))


def record(container: str, cookie: object, **changes: object) -> dict[str, Any]:
    """A record as ADD writes it."""
    return {
        "version": 1,
        "container_id": container,
        "ifname": "eth0",
        "netns_cookie": cookie,
        "pod": {"namespace": "shop", "name": f"pod-{container}", "uid": "u"},
        "network": "net",
        "ips": ["10.0.0.5/24", "fd00::5/64"],
        "lanes": {"socket": {"state": "on", "reason": ""}},
        **changes,
    }


def off(reason: str) -> dict[str, Any]:
    """The lanes of a record whose socket lane is off."""
    return {"socket": {"state": "off", "reason": reason}}


# -- help and usage --------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has an example, and says it on stdout with status 0."""
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"nearpath {command}" in shown.out
    assert re.search(r"^examples?:$", shown.out, re.MULTILINE)
    assert "--json" in shown.out
    assert shown.err == ""


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, exit status and environment in one place."""
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {command}" in shown for command in COMMANDS)
    assert "exit status:" in shown
    assert "NEARPATH_RUN_DIR" in shown


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["status", "--fast"],
        ["unload", "--timeout", "soon"],
        ["unload", "--timeout", "-1"],
        ["unload", "--timeout", "nan"],
        ["load", "--max-connections", "1023"],
        ["load", "--max-connections", "many"],
        ["settings", "paused"],
        ["settings", "paused=on"],
        ["settings", "paused=-1"],
        ["settings", "=1"],
        ["connections", "--pod", "cart"],
        ["connections", "--pod", "shop/"],
        ["connections", "--limit", "0"],
        ["calibrate", "--dry-run", "--reset"],
        ["demo", "--rounds", "0"],
        ["demo", "--seconds", "0.5"],
        ["demo", "--sizes", "1,,2"],
        ["demo", "--sizes", ",".join(map(str, range(1, 20)))],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, on stderr, without a traceback."""
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "usage: nearpath" in shown.err
    assert "Traceback" not in shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """For people and for programs; needs no root."""
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"nearpath {VERSION} (map layout {LAYOUT})\n"
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": VERSION, "layout": LAYOUT}


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "version"])
def test_needs_root(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says so and what to do."""
    monkeypatch.setattr(output, "geteuid", lambda: 1000)
    assert main([command]) == 1
    shown = capsys.readouterr()
    assert shown.err == "nearpath: needs root (BPF maps, network namespaces); use sudo\n"
    assert shown.out == ""


def test_errors_are_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The noun that failed and the remedy, on stderr."""
    assert place
    raised: list[BaseException] = []

    def fail(_: Place) -> None:
        raise raised[-1]

    monkeypatch.setattr(status, "node_status", fail)
    for error, code, text in (
        (NearpathError("cannot do it", "do that"), 1, "cannot do it; do that"),
        (NearpathError("two\nlines"), 1, "two lines"),
        (OSError(2, "No such file", "/x"), 1, "/x: No such file"),
        (OSError("strange"), 1, "strange"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15), 143, "interrupted by SIGTERM"),
    ):
        raised.append(error)
        assert main(["status"]) == code
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", f"nearpath: {text}\n")


def test_a_bug_is_one_line_and_debug_shows_more(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, unless somebody asks."""
    assert place
    monkeypatch.setattr(status, "node_status", lambda _: COUNTERS["missing"])
    assert main(["status"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("nearpath: KeyError: 'missing'; this is a bug")
    assert shown.count("\n") == 1
    monkeypatch.setenv("NEARPATH_DEBUG", "1")
    assert main(["status"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_bad_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative run directory is refused, not used."""
    assert place
    monkeypatch.setenv("NEARPATH_RUN_DIR", "run")
    assert main(["status"]) == 1
    assert "NEARPATH_RUN_DIR" in capsys.readouterr().err


def test_reader_that_has_seen_enough() -> None:
    """`nearpath --help | head -0`: no error, no traceback."""
    root = Path(__file__).resolve().parents[2]
    code = "import sys; sys.path.insert(0, 'cni-plugin'); from nearpath.cli.main import main; "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.stdin.read(); sys.exit(main(['version']))"],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_only_listed_modules_are_imported_for_help() -> None:
    """`nearpath --help` and `version` must not pay for rich or libbpf."""
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys; sys.path.insert(0, 'cni-plugin'); from nearpath.cli.main import main; "
        "main(['version']); "
        "print([m for m in ('rich', 'ctypes', 'subprocess') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# -- status and pods -------------------------------------------------------------------------


def test_status_json(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented shape, failures included."""
    state.save(place, record("c1", 7))
    state.save(place, record("c2", 8))
    state.count_failure(place, "no-btf")
    assert main(["status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "version": VERSION,
        "loaded": True,
        "layout": LAYOUT,
        "cgroup": "/sys/fs/cgroup",
        "pins": place.layout_dir,
        "paused": False,
        "draining": 0,
        "unloaded_by_operator": False,
        "pods": 2,
        "pods_on_lane": 1,
        "lanes": {
            "socket": COUNTERS,
            "tap": {"pods": 0, "taps": 0, "taps_on_lane": 0, "watcher": 0, "paused": False},
        },
        "failures": {"no-btf": 1},
        "guards": {"attached": True, "because": ""},
        "maps": MAPS,
        "streams": {"from": 1024, "to": 0xFFFFFFFF, "source": "default"},
        "calibration": None,
    }


def test_status_for_people(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts with their meaning, failures with their reason."""
    state.save(place, record("c1", 7))
    state.count_failure(place, "deadline")
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "datapath     loaded" in shown
    assert "10 messages, 2.0 KiB" in shown
    assert "joined             sockets joined the lane" in shown
    assert "deadline" in shown
    assert "guards       attached\n" in shown
    assert "connections  1 in the socket lane now, of at most 4,096" in shown
    assert "of messages from 1024 B stay in the lane (defaults" in shown
    because = "cannot load: Operation not permitted (libbpf: prog 'x')"
    datapath(monkeypatch, place, paused=True, guards=False, no_guards_because=because)
    main(["status"])
    shown = capsys.readouterr().out
    assert "paused" in shown
    assert "guards       not attached: cannot load: Operation not permitted; see" in shown
    datapath(monkeypatch, place, loaded=False, draining=2)
    main(["status"])
    shown = capsys.readouterr().out
    assert "not loaded" in shown
    assert "draining     2 sockets" in shown
    Path(place.unloaded_file).write_text("")
    main(["status"])
    assert "unloaded by an operator" in capsys.readouterr().out


def test_streams_of_a_calibrated_node(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the limits come from: calibration, an operator's hand, or neither."""
    limits = {"stream_from": 1024, "stream_to": 8193}
    calibration.write(place, limits, {"measured_at": "2026-01-02T03:04:05Z"})
    main(["status"])
    assert "512 B stay in the lane (set by `nearpath settings`)" not in capsys.readouterr().out
    live = {**settings.DEFAULTS, **limits}
    monkeypatch.setattr("nearpath.datapath.settings.read", lambda _: live)
    main(["status"])
    expected = "messages from 1024 to 8192 B stay in the lane (calibrated 2026-01-02T03:04:05Z)"
    assert expected in capsys.readouterr().out
    live["stream_to"] = 9000
    main(["status"])
    assert "to 8999 B stay in the lane (set by `nearpath settings`)" in capsys.readouterr().out
    live["stream_from"] = live["stream_to"] = settings.ANY_SIZE
    main(["status"])
    assert "streams      of any message size leave the lane" in capsys.readouterr().out


def test_pods_json(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented shape, with the pod's counters beside its state."""
    state.save(place, record("c1", 7))
    assert main(["pods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "namespace": "shop",
            "name": "pod-c1",
            "container_id": "c1",
            "ifname": "eth0",
            "ips": ["10.0.0.5/24", "fd00::5/64"],
            "netns_cookie": 7,
            "network": "net",
            "lanes": {"socket": {"state": "on", "reason": "", **COUNTERS}},
        }
    ]


@pytest.mark.parametrize(
    ("changes", "obstacle", "registered", "expected"),
    [
        ({}, "", True, ("on", "")),
        ({}, "", False, ("off", "not-registered")),
        ({}, "not-loaded", False, ("off", "not-loaded")),
        ({}, "unloaded-by-operator", True, ("off", "unloaded-by-operator")),
        ({}, "paused", True, ("off", "paused")),
        ({"lanes": off("annotation")}, "not-loaded", False, ("off", "annotation")),
        ({"lanes": off("annotation")}, "", True, ("off", "annotation")),
        ({"lanes": off("unloaded-by-operator")}, "", True, ("on", "")),
        ({"lanes": off("deadline")}, "", False, ("off", "deadline")),
        ({"lanes": off("")}, "", False, ("off", "unknown")),
        ({"lanes": None}, "", True, ("off", "damaged-record")),
        ({"lanes": {"socket": "on"}}, "", True, ("off", "damaged-record")),
    ],
)
def test_state_combines_record_and_datapath(
    changes: dict[str, Any], obstacle: str, registered: bool, expected: tuple[str, str]
) -> None:
    """What a pod chose wins, then what holds for the node, then its registration."""
    assert status.lane_state(record("c", 7, **changes), obstacle, registered) == expected


@pytest.mark.parametrize(
    ("unguarded", "registered", "guarded", "expected"),
    [
        (False, False, True, ("off", "not-registered")),
        (False, False, False, ("off", "no-guards")),
        (True, False, False, ("off", "not-registered")),
        (True, True, False, ("on", "")),
    ],
)
def test_a_load_without_guards_shows(
    unguarded: bool, registered: bool, guarded: bool, expected: tuple[str, str]
) -> None:
    """Of a pod that ADD had put on the lane under guard."""
    lanes = {"socket": {"state": "on", "reason": "", "unguarded": unguarded}}
    found = status.lane_state(record("c", 7, lanes=lanes), "", registered, guarded)
    assert found == expected


def test_pods_of_an_unloaded_node(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recorded "on" is not on when nothing is loaded."""
    state.save(place, record("c1", 7))
    datapath(monkeypatch, place, loaded=False)
    for reason in ("not-loaded", "unloaded-by-operator"):
        main(["pods", "--json"])
        lane = json.loads(capsys.readouterr().out)[0]["lanes"]["socket"]
        assert (lane["state"], lane["reason"]) == ("off", reason)
        Path(place.unloaded_file).write_text("")


def test_pods_for_people(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A table without escape codes in a pipe; hostile names cannot drive the terminal."""
    hostile = {"namespace": "shop", "name": "\x1b]0;owned\x07[red]x", "uid": ""}
    state.save(place, record("c1", 7, pod=hostile))
    state.save(place, record("c2", 9, pod={}, ips=None))
    state.save(place, record("c3", "seven", pod="nobody"))
    assert main(["pods"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b]0;owned\\x07[red]x" in shown
    assert "not-registered" in shown
    assert "2.0 KiB" in shown


def test_no_pods(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Says so, instead of an empty table."""
    assert place
    assert main(["pods"]) == 0
    assert "no pods" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    """Bytes for people."""
    assert show.size(count) == text


# -- load and unload -------------------------------------------------------------------------


def test_load_registers_what_is_recorded(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pods that want the lane and that the programs do not know; no others."""
    state.save(place, record("known", 7))
    state.save(place, record("lost", 9))
    state.save(place, record("off", 10, lanes=off("config")))
    state.save(place, record("late", 11, lanes=off("unloaded-by-operator")))
    state.save(place, record("damaged", "x"))
    seen: list[int] = []
    monkeypatch.setattr("nearpath.datapath.loader.load", lambda *_: False)
    monkeypatch.setattr("nearpath.lanes.socket.register", lambda _, cookie: seen.append(cookie))
    assert main(["load"]) == 0
    assert sorted(seen) == [9, 11]
    assert capsys.readouterr().out.splitlines() == [
        f"already loaded at {place.layout_dir}",
        "registered 2 recorded pods that the programs did not know",
    ]
    assert main(["load", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["registered"] == 2


def test_load_without_guards_registers_who_accepts_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stay off."""
    datapath(monkeypatch, place, guards=False)
    for number, unguarded in enumerate((True, False, None), start=20):
        lane = {"state": "on", "reason": ""} | (
            {} if unguarded is None else {"unguarded": unguarded}
        )
        state.save(place, record(f"c{number}", number, lanes={"socket": lane}))
    seen: list[int] = []
    monkeypatch.setattr("nearpath.datapath.loader.load", lambda *_: False)
    monkeypatch.setattr("nearpath.lanes.socket.register", lambda _, cookie: seen.append(cookie))
    assert main(["load"]) == 0
    assert seen == [20]


def test_load_with_room(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number reaches the loader; that a loaded datapath keeps its maps is said."""
    asked: list[int] = []

    def load(_: Place, most_connections: int) -> bool:
        asked.append(most_connections)
        return False

    assert place
    monkeypatch.setattr("nearpath.datapath.loader.load", load)
    assert main(["load", "--max-connections", "8000"]) == 0
    assert "room for 4096 connections, as when it was loaded" in capsys.readouterr().out
    assert main(["load", "--max-connections", "4096"]) == 0
    assert main(["load", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "as when it was loaded" not in shown
    assert json.loads(shown[shown.index("{") :])["maps"] == MAPS
    assert asked == [8000, 4096, 0]


def test_unload_says_what_it_does(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps on stdout, or on stderr beside JSON; sockets left over are no failure."""
    asked: list[float] = []

    def unload(_: Place, report: Any, timeout: float) -> dict[str, Any]:
        asked.append(timeout)
        report("paused")
        return {"drained": False, "remaining": 2}

    datapath(monkeypatch, place, loaded=False)
    monkeypatch.setattr("nearpath.datapath.unloader.unload", unload)
    assert main(["unload", "--timeout", "1.5"]) == 0
    assert "2 sockets are still open" in capsys.readouterr().out
    assert main(["unload", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"drained": False, "remaining": 2}
    assert shown.err == "paused\n"
    assert asked == [1.5, 30.0]


def test_doctor_exit_status(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdict is the exit status; loss and remedy are shown; the directories are passed."""
    from nearpath.node import doctor
    from nearpath.node.finding import Finding

    assert place
    asked: list[Any] = []

    def examine(_: Place, bin_dirs: Any, conf_dir: str) -> list[Finding]:
        asked.append((bin_dirs, conf_dir))
        return [Finding("btf", "fail", "none", "everything", "another kernel")]

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor", "--bin-dir", "/b", "--conf-dir", "/c"]) == 2
    shown = capsys.readouterr().out
    assert "fail btf" in shown
    assert "lost without it: everything" in shown
    assert "remedy: another kernel" in shown
    assert "this node is unusable" in shown
    assert "\x1b" not in shown
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["verdict"] == "unusable"
    assert asked == [
        (("/b",), "/c"),
        (("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"), "/etc/cni/net.d"),
    ]


def test_every_group_is_there() -> None:
    """A module of commands that nobody adds would be dead."""
    modules = {path.stem for path in Path(command_line.__file__).parent.glob("*.py")}
    assert modules == {"__init__", "main", "output"} | {
        *("show", "connections", "doctor", "switch", "settings", "calibrate", "demo", "taps")
    }
