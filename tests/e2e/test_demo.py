"""`nearpath demo`, frozen, on this kernel: it measures, and leaves everything as it was.

The fixture `node` fails each test that leaves a link, namespace, mount or BPF object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.cni import nearpath_entry
from helpers.commands import kill_group, wait_until
from helpers.netns import namespace, preserved_sysctls, veth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.node import Node

# The shortest demo: one size, one round, both tests on both paths: 4 runs of 1 s.
SHORT = ("--sizes", "64", "--rounds", "1")
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


@pytest.fixture
def calm(node: Node) -> Iterator[Node]:
    """A node whose files, sysctls and processes must be afterwards what they were before."""
    environ = node.directory / "tmp"
    environ.mkdir()
    node.environ["TMPDIR"] = str(environ)
    node.environ["PATH"] = os.environ["PATH"]
    with preserved_sysctls("net/ipv4/tcp_allowed_congestion_control"):
        before = state(node)
        yield node
        wait_until(lambda: state(node) == before, f"as it was: {before} but: {state(node)}", 5)


def state(node: Node) -> dict[str, Any]:
    """What a demo could leave, beyond what the fixture `node` looks at."""
    run_dir = sorted(path.name for path in node.run_dir.rglob("*") if path.suffix == ".json")
    return {
        "records": run_dir,
        "run directory": node.run_dir.exists(),
        "pins": sorted(str(path) for path in node.pin_dir.rglob("*")),
        "temporary files": sorted(os.listdir(node.environ["TMPDIR"])),
        "qperf": qperfs(node),
        "allowed": ALLOWED.read_text(),
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
    }


def qperfs(node: Node) -> list[int]:
    """Living processes of qperf that this node's demos have started."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                command = (directory / "cmdline").read_bytes()  # empty: a zombie
                environ = (directory / "environ").read_bytes()
            except OSError:
                continue
            ours = f"NEARPATH_RUN_DIR={node.run_dir}".encode() in environ.split(b"\0")
            if ours and command.partition(b"\0")[0].endswith(b"qperf"):
                found.append(int(directory.name))
    return sorted(found)


def picture(node: Node) -> str:
    """Where the demo shall put its picture: among what the test keeps."""
    return str(node.directory / "picture.svg")


@contextmanager
def running(node: Node, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A demo in the background."""
    process = subprocess.Popen(
        [node.program, "demo", "--output", picture(node), *words],
        env=node.environ,
        cwd=node.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process)


def started(process: subprocess.Popen[str], what: str) -> None:
    """Read the demo's progress until a line that starts with this."""
    assert process.stderr
    for line in process.stderr:
        if line.startswith(what):
            return
    pytest.fail(f"the demo ended before it said {what!r}")


def test_demo_measures_both_paths(calm: Node) -> None:
    """Latency on the lane is lower; JSON and picture have the numbers; nothing stays."""
    done = calm.cli("demo", *SHORT, "--json", "--output", picture(calm))
    shown = json.loads(done.stdout)
    assert shown["congestion_control"] == "cubic"
    latency, bandwidth = shown["results"]
    assert (latency["test"], bandwidth["test"]) == ("tcp_lat", "tcp_bw")
    assert latency["ratio"] < 0.9
    assert latency["lane_share"] > 0.9
    assert bandwidth["kernel"] > 0 < bandwidth["nearpath"]
    assert shown["picture"] == picture(calm)
    assert "cubic" in Path(picture(calm)).read_text()
    assert not calm.run_dir.exists()
    assert not calm.pin_dir.exists()


def test_demo_for_people(calm: Node) -> None:
    """Tables, bars and conditions, without escape codes in a pipe; progress on stderr."""
    done = calm.cli("demo", *SHORT, "--output", picture(calm))
    assert "TCP latency, one way" in done.stdout
    assert "congestion control   cubic" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "nearpath demo: tcp_bw 64 B" in done.stderr


def test_a_loaded_node_stays_loaded(calm: Node) -> None:
    """A node with a pod: datapath, record, registration and counters live through a demo."""
    with namespace() as netns, veth(netns, "10.9.0.2/24"):
        result = {"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]}
        config = {**nearpath_entry(), "cniVersion": "1.0.0", "name": "n", "prevResult": result}
        assert calm.plugin("ADD", config, container_id="pod", netns=netns).returncode == 0
        before = state(calm)
        programs = calm.programs()
        calm.cli("demo", *SHORT, "--output", picture(calm))
        assert state(calm) == before
        assert calm.programs() == programs
        assert calm.lanes() == {"pod": ("on", "")}
        assert calm.lane()["redirected_messages"] > 0
        calm.plugin("DEL", config, container_id="pod", netns=netns)
    calm.cli("unload")
    (calm.run_dir / "unloaded").unlink()
    # The demo found the run directory there, so it is the test that takes it away.
    calm.forget()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.05, 0.15, 0.25, 0.4, 0.8])
def test_interrupted_while_it_starts(calm: Node, number: signal.Signals, delay: float) -> None:
    """Ctrl-C or SIGTERM between any two steps of the set-up."""
    with running(calm, *SHORT) as process:
        started(process, "nearpath demo: 4 runs")
        time.sleep(delay)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number, stderr
    assert stderr.splitlines()[-1] == f"nearpath: interrupted by {number.name}"
    assert "Traceback" not in stderr


def test_interrupted_while_it_measures(calm: Node) -> None:
    """At once, not at the end of a long run; a second Ctrl-C does not stop the clean-up."""
    with running(calm, *SHORT, "--seconds", "60") as process:
        started(process, "nearpath demo: tcp_lat 64 B")
        time.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert (process.returncode, stderr) == (130, "nearpath: interrupted by SIGINT\n")


def test_ctrl_c_on_a_terminal_reaches_only_the_demo(calm: Node) -> None:
    """The terminal signals the whole group: plugins and qperf are not in it."""
    with running(calm, *SHORT, "--seconds", "60") as process:
        started(process, "nearpath demo: tcp_lat 64 B")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130


def test_qperf_fails_half_way(calm: Node) -> None:
    """One line that names the run and qperf's own words; nothing stays."""
    real = next(
        f"{directory}/qperf"
        for directory in os.environ["PATH"].split(":")
        if os.access(f"{directory}/qperf", os.X_OK)
    )
    fakes = calm.directory / "fakes"
    fakes.mkdir()
    fake = fakes / "qperf"
    # The server (no arguments) is real; clients of tcp_bw fail.
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *tcp_bw) echo "no luck" >&2; exit 3;; esac\nexec {real} "$@"\n'
    )
    fake.chmod(0o755)
    calm.environ["PATH"] = f"{fakes}:{os.environ['PATH']}"
    done = calm.cli("demo", *SHORT, "--output", picture(calm), check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "nearpath: qperf tcp_bw 64 B failed: no luck"
    assert not Path(picture(calm)).exists()


def test_primary_plugin_fails(calm: Node) -> None:
    """A chain that cannot make the second pod: its own words, and the first pod goes too."""
    fakes = calm.directory / "bin"
    fakes.mkdir()
    (fakes / "host-local").symlink_to("/usr/lib/cni/host-local")
    bridge = fakes / "bridge"
    bridge.write_text(
        "#!/bin/sh\n"
        'case "$CNI_COMMAND-$CNI_CONTAINERID" in ADD-*-1)\n'
        '  echo \'{"code": 11, "msg": "no more ports"}\'; exit 1;;\n'
        "esac\nexec /usr/lib/cni/bridge\n"
    )
    bridge.chmod(0o755)
    words = ("demo", *SHORT, "--output", picture(calm), "--bin-dir", str(fakes))
    done = calm.cli(*words, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "nearpath: CNI plugin bridge: ADD failed: no more ports"
    )


def test_killed_demo_is_cleaned_up_by_the_next(calm: Node) -> None:
    """kill -9: namespaces and qperf go with it, the rest when a demo runs again."""
    with running(calm, *SHORT, "--seconds", "60") as process:
        started(process, "nearpath demo: tcp_lat 64 B")
        time.sleep(0.5)
        process.kill()
        process.wait(timeout=10)
        wait_until(lambda: not qperfs(calm), "the server ends with the demo")
    bridge = Path(f"/sys/class/net/npdemo-{process.pid}")
    assert bridge.exists()
    assert len(calm.pods()) == 2
    assert calm.cli("demo", *SHORT, "--output", picture(calm)).returncode == 0
    assert not bridge.exists()
    assert calm.pods() == {}
    # The datapath was loaded when the second demo came, so it stays; it is the test's to undo.
    calm.cli("unload")
    calm.forget()


def test_what_is_missing_is_said_first(calm: Node) -> None:
    """One line with the remedy, and nothing was made."""
    calm.environ["PATH"] = "/nonexistent"
    done = calm.cli("demo", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nearpath: qperf is not installed; apt-get install qperf\n"
    calm.environ["PATH"] = os.environ["PATH"]
    done = calm.cli("demo", "--bin-dir", "/nonexistent", check=False)
    assert done.returncode == 1
    assert "CNI plugin bridge is not in /nonexistent; apt-get install" in done.stderr
