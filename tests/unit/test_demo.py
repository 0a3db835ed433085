"""The demo's parts that need no kernel: reading qperf, judging runs, addresses, the picture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from nearpath import state
from nearpath.cli import demo as command
from nearpath.errors import NearpathError
from nearpath.node import demo, demo_picture, demo_pods, demo_qperf
from nearpath.node.demo import BANDWIDTH, KERNEL, LATENCY, NEARPATH, Counts, Outcome, Plan, Series
from nearpath.node.interrupt import Interrupted, Interrupts
from nearpath.place import Place

LATENCY_OUTPUT = """\
tcp_lat:
    latency          =     8550.88 ns
    msg_rate         =      116947 /sec
    time             =  1000000000 ns
    loc_send_bytes   =     3742272 bytes
    loc_send_msgs    =       58473 
    rem_send_msgs    =       58474 
"""  # noqa: W291 - as qperf prints it
BANDWIDTH_OUTPUT = """\
tcp_bw:
    bw          =  1.5e+09 bytes/sec
    send_bytes  =  878,501 bytes
    send_msgs   =  878,501
    recv_msgs   =  874801
"""


def series(test: str, size: int, kernel: list[float], nearpath: list[float]) -> Series:
    """A series of runs, all of whose messages were redirected."""
    return Series(test, size, {KERNEL: kernel, NEARPATH: nearpath}, [1.0 for _ in nearpath])


def outcome() -> Outcome:
    """What a run of the default sizes gives, with a loss and a tie in it."""
    made = [series(LATENCY, size, [8.0, 9.0, 10.0], [4.0, 5.0, 4.5]) for size in demo.SIZES]
    made += [series(BANDWIDTH, size, [size * 0.6], [size * 0.3]) for size in demo.SIZES[:4]]
    made += [series(BANDWIDTH, size, [size * 0.1], [size * 0.101]) for size in demo.SIZES[4:]]
    return Outcome(Plan(), "both ends on CPU 1", made)


# -- qperf -----------------------------------------------------------------------------------


def test_parse() -> None:
    """Values in µs and MB/s; messages of both ends, or of the one that sends."""
    assert demo_qperf.parse(LATENCY, LATENCY_OUTPUT) == demo_qperf.Reading(8.5509, 116947)
    assert demo_qperf.parse(BANDWIDTH, BANDWIDTH_OUTPUT) == demo_qperf.Reading(1500.0, 878501)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp_lat:\n    latency = 0 ns\n    loc_send_msgs = 5",
        "tcp_lat:\n    latency = 5 ns\n",
        "tcp_lat:\n    latency = 5 parsecs\n    loc_send_msgs = 5",
        "failed to connect",
    ],
)
def test_parse_nothing(text: str) -> None:
    """What is not a measurement is an error, never a number."""
    with pytest.raises(NearpathError, match="qperf tcp_lat"):
        demo_qperf.parse(LATENCY, text)


def test_qperf_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is a command."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NearpathError, match="apt-get install qperf"):
        demo_qperf.executable()


# -- judging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "path", "did", "share"),
    [
        ("tcp_lat of 1 B", NEARPATH, Counts(4, 1000, 3), 1.0),
        ("tcp_lat of 1 B", NEARPATH, Counts(4, 950, 3), 0.95),
        ("tcp_bw of 1 B", NEARPATH, Counts(4, 200, 800), 0.2),
        ("tcp_lat of 1 B", KERNEL, Counts(0, 0, 0), 0.0),
    ],
)
def test_runs_that_count(run: str, path: str, did: Counts, share: float) -> None:
    """A run on the lane, also one whose stream mostly left it; one beside it."""
    assert demo.verify(run, path, 1000, did) == share


@pytest.mark.parametrize(
    ("run", "path", "did"),
    [
        ("tcp_lat of 1 B", NEARPATH, Counts(0, 0, 0)),
        ("tcp_lat of 1 B", NEARPATH, Counts(2, 1000, 0)),
        ("tcp_lat of 1 B", NEARPATH, Counts(4, 500, 500)),
        ("tcp_bw of 1 B", NEARPATH, Counts(4, 0, 1000)),
        ("tcp_lat of 1 B", KERNEL, Counts(4, 0, 0)),
        ("tcp_bw of 1 B", KERNEL, Counts(0, 1, 0)),
    ],
)
def test_runs_on_the_wrong_path(run: str, path: str, did: Counts) -> None:
    """Fails loudly, naming test and path."""
    with pytest.raises(NearpathError, match=f"{run} on the {path} path"):
        demo.verify(run, path, 1000, did)


@pytest.mark.parametrize(
    ("test", "kernel", "nearpath", "winner"),
    [
        (LATENCY, [8.0, 100.0, 9.0], [4.0], NEARPATH),
        (LATENCY, [4.0], [8.0], KERNEL),
        (LATENCY, [4.0], [4.1], "tie"),
        (BANDWIDTH, [1.0], [2.0], NEARPATH),
        (BANDWIDTH, [2.0], [1.0], KERNEL),
        (BANDWIDTH, [1.0], [0.98], "tie"),
    ],
)
def test_winner(test: str, kernel: list[float], nearpath: list[float], winner: str) -> None:
    """Low latency wins, high bandwidth wins, medians count, small differences do not."""
    assert series(test, 1, kernel, nearpath).winner == winner


def test_counts_of_the_demo_s_pods_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pods of the node may be busy meanwhile."""
    pod = {"reasons": {"joined": 2}, "redirected_messages": 5, "kernel_messages": 1}
    monkeypatch.setattr(
        "nearpath.lanes.socket.by_pod", lambda _: {1: pod, 2: {**pod, "reasons": {}}, 9: pod}
    )
    pods = [demo_pods.Pod("/proc/1/fd/1", cookie, "198.18.0.2") for cookie in (1, 2, 3)]
    assert demo.counts(Place(), pods) == Counts(2, 10, 2)
    assert Counts(2, 10, 2) - Counts(1, 4, 2) == Counts(1, 6, 0)


def test_report() -> None:
    """JSON for programs: every number with its conditions."""
    shown = json.loads(json.dumps(outcome().report()))
    assert shown["congestion_control"] == "cubic"
    assert shown["pinning"] == "both ends on CPU 1"
    assert shown["guards"] == "attached"
    assert shown["kernel"] == os.uname().release
    assert len(shown["results"]) == 16
    assert shown["results"][0] == {
        "test": "tcp_lat",
        "size": 1,
        "unit": "µs",
        "kernel": 9.0,
        "nearpath": 4.5,
        "ratio": 0.5,
        "winner": "nearpath",
        "lane_share": 1.0,
        "kernel_runs": [8.0, 9.0, 10.0],
        "nearpath_runs": [4.0, 5.0, 4.5],
    }


def test_a_demo_without_guards_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, among the conditions."""
    for attached in (True, False):
        monkeypatch.setattr("nearpath.datapath.loader.is_guarded", lambda _, now=attached: now)
        shown = outcome()
        command._print(Outcome(shown.plan, shown.pinning, shown.series, demo._guards(Place())))
        printed = capsys.readouterr().out
        lines = [line for line in printed.splitlines() if line.startswith("guards")]
        assert len(lines) == 1
        assert ("not attached" in lines[0]) is not attached


def test_plan() -> None:
    """1 B to 16 KiB by fours, three rounds; the CPUs are those that we may use."""
    plan = Plan()
    assert plan.sizes == (1, 4, 16, 64, 256, 1024, 4096, 16384)
    assert plan.runs == 2 * 8 * 3 * 2
    usable = os.sched_getaffinity(0)
    assert set(plan.cpus()) <= usable
    assert len(set(plan.cpus())) == 1
    os.sched_setaffinity(0, {max(usable)})
    try:
        with pytest.raises(NearpathError, match="only one CPU"):
            Plan(two_cpus=True).cpus()
    finally:
        os.sched_setaffinity(0, usable)


# -- the picture and the bars ----------------------------------------------------------------


def test_picture() -> None:
    """Well-formed, complete, and it names kernel, congestion control, path and pinning."""
    drawn = ET.fromstring(demo_picture.svg(outcome()))  # noqa: S314 - our own
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    texts = " ".join(text.text or "" for text in drawn.iter("{http://www.w3.org/2000/svg}text"))
    for needed in (
        os.uname().release,
        "cubic",
        demo_pods.PATH,
        "both ends on CPU 1",
        "16 KiB",
        "1 B",
        "0.50",
        "medians of 3 runs",
    ):
        assert needed in texts, needed
    width, height = (float(drawn.attrib[side]) for side in ("width", "height"))
    for element in drawn.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(name, 0)) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.attrib.get(name, 0)) <= height


@pytest.mark.parametrize("value", [0.0004, 0.5, 1.0, 9.999, 10.0, 99999.0])
def test_picture_of_any_values(value: float) -> None:
    """One size, equal values, any magnitude."""
    made = [series(test, 1, [value], [value]) for test in (LATENCY, BANDWIDTH)]
    ET.fromstring(demo_picture.svg(Outcome(Plan(), "a < b & c", made)))  # noqa: S314 - our own


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.268, "0.27"), (8.556, "8.56"), (15.93, "15.9"), (2365.4, "2365"), (0, "0")],
)
def test_number(value: float, text: str) -> None:
    """Three digits are more than two noisy medians are worth."""
    assert demo_picture.number(value) == text


def test_table_and_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Both values, the ratio and the winner of every size, losses too; plain text in a pipe."""
    command._print(outcome())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "B", "9.00", "4.50", "0.50", "100%", "nearpath"] in rows
    assert "0.50      100%   kernel" in shown
    assert "tie" in shown
    assert shown.count("█" * 40) == 16 + 4  # ties have two of the longest
    assert "congestion control   cubic" in shown


# -- pods ------------------------------------------------------------------------------------

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def route(destination: str, mask: str) -> str:
    """A line of /proc/net/route (addresses in the CPU's byte order)."""
    words = [bytes(map(int, text.split(".")))[::-1].hex() for text in (destination, mask)]
    return f"eth0\t{words[0]}\t00000000\t0001\t0\t0\t0\t{words[1]}\t0\t0\t0\n"


def test_network_that_nobody_uses() -> None:
    """The default route does not count, a route into the range is stepped over."""
    default = route("0.0.0.0", "0.0.0.0")  # noqa: S104 - a destination
    assert demo_pods.free_network(ROUTES) == "198.18.0.0/28"
    assert demo_pods.free_network(ROUTES + default) == "198.18.0.0/28"
    taken = route("198.18.0.0", "255.255.255.0")
    assert demo_pods.free_network(ROUTES + default + taken) == "198.18.1.0/28"
    with pytest.raises(NearpathError, match=r"198\.18\.0\.0/15"):
        demo_pods.free_network(ROUTES + route("198.0.0.0", "255.0.0.0"))


def test_conflist_touches_nothing_of_the_node() -> None:
    """No gateway, no forwarding, no NAT; IPAM state in the demo's own directory."""
    bridge, ours = demo_pods.conflist("npdemo-1", "198.18.0.0/28", "/x/ipam")["plugins"]
    assert bridge["ipMasq"] is False
    assert bridge["isGateway"] is False
    assert bridge["ipam"]["dataDir"] == "/x/ipam"
    assert ours["type"] == "nearpath"
    assert ours["required"] is True
    assert len(f"{demo_pods.BRIDGE}{2**22}") <= 15  # IFNAMSIZ - 1, with the longest pid


def test_sweep_takes_what_a_killed_demo_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and files of a process that is gone; nothing of one that lives."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("nearpath.kernel.throwaway.delete_bridge", lambda _: None)
    unregistered: list[int] = []
    monkeypatch.setattr(
        "nearpath.lanes.socket.unregister", lambda _, cookie: unregistered.append(cookie)
    )
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    dead, alive = 2**22 + 1, os.getpid()
    for number, pid in enumerate((dead, alive)):
        (tmp_path / f"nearpath-demo-{pid}-abc").mkdir()
        name = f"nearpath-demo-{pid}-0"
        state.save(place, {"container_id": name, "ifname": "eth0", "netns_cookie": number + 5})
    state.save(place, {"container_id": "nearpath-demo-app", "ifname": "eth0", "netns_cookie": 9})
    demo_pods.sweep(place)
    left = [record["container_id"] for record in state.records(place)]
    assert left == [f"nearpath-demo-{alive}-0", "nearpath-demo-app"]
    assert unregistered == [5]
    assert [path.name for path in tmp_path.glob("nearpath-demo-*")] == [
        f"nearpath-demo-{alive}-abc"
    ]


# -- what is missing -------------------------------------------------------------------------


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with qperf and the plugins that the demo needs."""
    for name in ("qperf", "bridge", "host-local"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: False)
    return str(tmp_path)


def test_ready(bin_dir: str) -> None:
    """With everything there, nothing is said."""
    demo.check_ready(Place(f"{bin_dir}/run"), [bin_dir])


@pytest.mark.parametrize("name", ["qperf", "bridge", "host-local"])
def test_missing_tools(bin_dir: str, name: str) -> None:
    """Names it and the package that has it."""
    (Path(bin_dir) / name).unlink()
    with pytest.raises(NearpathError, match=rf"{name} .*apt-get install"):
        demo.check_ready(Place(f"{bin_dir}/run"), [bin_dir])


def test_an_operator_s_unload_is_respected(bin_dir: str) -> None:
    """The demo does not load what somebody has switched off."""
    place = Place(f"{bin_dir}/run")
    state.secure_dir(place.run_dir)
    Path(place.unloaded_file).write_text("")
    with pytest.raises(NearpathError, match="nearpath load"):
        demo.check_ready(place, [bin_dir])


def test_no_place_for_the_picture() -> None:
    """Known before two minutes of measuring."""
    command._check_writable("here.svg")
    for path in ("/nonexistent/x.svg", "/"):
        with pytest.raises(NearpathError, match="cannot write"):
            command._check_writable(path)


# -- interrupts ------------------------------------------------------------------------------


def test_signals_are_noted_not_raised() -> None:
    """The handler raises nowhere; check() does, with the first signal; handlers come back."""
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as raised:
            interrupts.check()
    assert raised.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_waiting_for_a_child() -> None:
    """Until it ends, until the time is up, or until a signal comes."""
    with Interrupts() as interrupts, subprocess.Popen(["sleep", "30"], text=True) as child:
        try:
            assert not interrupts.wait(child, 0.05)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted):
                interrupts.wait(child, 20)
        finally:
            child.kill()
    with Interrupts() as interrupts, subprocess.Popen(["true"], text=True) as child:
        assert interrupts.wait(child, 20)
