"""The plugin as a process of its own: descriptors, pipes, exit codes.

Needs no privileges: the namespaces in these requests do not exist, or are refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parents[2] / "cni-plugin"
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]}
CONFIG = {"cniVersion": "1.0.0", "name": "net", "type": "nearpath", "prevResult": RESULT}


def environ(directory: Path, command: str = "ADD", **changes: str) -> dict[str, str]:
    """The environment of a request, and nothing else."""
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/nonexistent/netns",
        "CNI_IFNAME": "eth0",
        "NEARPATH_RUN_DIR": str(directory / "run"),
        "NEARPATH_PIN_DIR": str(directory / "pins"),
        **changes,
    }


def plugin(
    directory: Path, *arguments: str, stdin: bytes | None = None, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run main.py (or what ``arguments`` say) as a runtime would."""
    more.setdefault("env", environ(directory))
    return subprocess.run(
        [sys.executable, "-Es", *(arguments or (str(SOURCES / "main.py"),))],
        input=json.dumps(CONFIG).encode() if stdin is None else stdin,
        capture_output=True,
        timeout=30,
        check=False,
        **more,
    )


def test_answer_and_exit_code(tmp_path: Path) -> None:
    """ADD prints prevResult and a line end, exits with 0, and tells stderr what failed."""
    done = plugin(tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith(b"}\n")
    assert json.loads(done.stdout) == RESULT
    assert b"cannot open network namespace" in done.stderr
    assert b"Traceback" not in done.stderr


def test_error(tmp_path: Path) -> None:
    """An error is a JSON object on stdout, exit code 1, and nothing on stderr."""
    done = plugin(tmp_path, stdin=b"{")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 6
    assert done.stderr == b""


def test_del_prints_nothing(tmp_path: Path) -> None:
    """DEL of nothing is silent, on both outputs."""
    done = plugin(tmp_path, env=environ(tmp_path, "DEL"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_own_namespace(tmp_path: Path) -> None:
    """The plugin's own network namespace is refused with error 8."""
    done = plugin(tmp_path, env=environ(tmp_path, CNI_NETNS="/proc/self/ns/net"))
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 8


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_closed_descriptors(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Descriptors that the runtime closed are not taken by our files."""
    script = (
        f"import os, sys\n"
        f"for number in {closed}: os.close(number)\n"
        f"os.execv(sys.executable, [sys.executable, '-Es', {str(SOURCES / 'main.py')!r}])\n"
    )
    done = plugin(tmp_path, "-c", script)
    assert done.returncode == (1 if 0 in closed else 0)  # without stdin there is no request
    if 1 in closed:
        assert done.stdout == b""
    else:
        answer = json.loads(done.stdout)
        assert answer == RESULT if 0 not in closed else answer["code"] == 6
    assert b"Traceback" not in done.stderr


def test_broken_stdout(tmp_path: Path) -> None:
    """A runtime that is gone before the answer gets no traceback, only exit code 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-Es", str(SOURCES / "main.py")],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environ(tmp_path),
    ) as process:
        os.close(writer)
        _, err = process.communicate(json.dumps(CONFIG).encode(), timeout=30)
    assert process.returncode == 1
    assert b"Traceback" not in err


def test_full_stdout(tmp_path: Path) -> None:
    """A stdout that takes nothing gives exit code 1."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-Es", str(SOURCES / "main.py")],
            input=json.dumps(CONFIG).encode(),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environ(tmp_path),
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_large_answer_to_a_slow_reader(tmp_path: Path) -> None:
    """An answer larger than the pipe reaches a reader that takes its time."""
    result = {**RESULT, "x": "y" * 1_000_000}
    with subprocess.Popen(
        [sys.executable, "-Es", str(SOURCES / "main.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ(tmp_path),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({**CONFIG, "prevResult": result}).encode())
        process.stdin.close()
        time.sleep(0.5)
        assert json.loads(process.stdout.read()) == result
        assert process.wait(10) == 0


def test_whatever_prints_reaches_stderr(tmp_path: Path) -> None:
    """Prints of a library or a child, by Python or by descriptor, never reach stdout."""
    script = (
        f"import os, subprocess, sys\n"
        f"sys.path.insert(0, {str(SOURCES)!r})\n"
        "from nearpath.cni import commands, doors\n"
        "def noisy(self, path):\n"
        "    print('from print')\n"
        "    os.write(1, b'from write\\n')\n"
        "    subprocess.run(['/bin/echo', 'from a child'])\n"
        "    raise RuntimeError\n"
        "doors.Doors.is_own_netns = noisy\n"
        "raise SystemExit(commands.main())\n"
    )
    done = plugin(tmp_path, "-c", script)
    assert done.returncode == 0
    assert json.loads(done.stdout) == RESULT
    for text in (b"from print", b"from write", b"from a child"):
        assert text in done.stderr


def test_invalid_utf8_in_the_environment(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are handled in every variable, and the answer is ASCII."""
    names = [name for name in environ(tmp_path) if name.startswith("CNI_")]
    for name in [*names, "CNI_ARGS", "NEARPATH_RUN_DIR"]:
        given = {key.encode(): value.encode() for key, value in environ(tmp_path).items()}
        done = plugin(tmp_path, env={**given, name.encode(): b"\xff\xfe\x80"})
        if done.stdout:
            json.loads(done.stdout.decode("ascii"))
        assert b"Traceback" not in done.stderr
        assert done.returncode in {0, 1}


def test_stdin_that_never_ends(tmp_path: Path) -> None:
    """A runtime that forgets to close stdin gets an error after its 10 s."""
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-Es", str(SOURCES / "main.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ(tmp_path, "DEL"),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"{")
        process.stdin.flush()
        answer = json.loads(process.stdout.read())
        process.stdin.close()
        assert process.wait(5) == 1
    assert answer["code"] == 5
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_imports_of_the_hot_path(tmp_path: Path, command: str) -> None:
    """Start-up is paid for by every pod: what is slow to import stays out of it."""
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(SOURCES)!r})\n"
        "from nearpath.cni import commands\n"
        "commands.main()\n"
        "sys.stderr.write('\\n'.join(sorted(set(sys.modules) - before)))\n"
    )
    done = plugin(tmp_path, "-S", "-c", script, env=environ(tmp_path, command))
    loaded = set(done.stderr.decode().split())
    assert "nearpath.cni.commands" in loaded
    slow = {
        "argparse", "dataclasses", "datetime", "inspect", "ipaddress", "logging",
        "pathlib", "pyroute2", "random", "rich", "selectors", "shutil", "signal", "socket",
        "subprocess", "tempfile", "threading", "typing", "urllib", "uuid", "yaml",
    }  # fmt: skip
    assert not slow & loaded
    assert "nearpath.cni.gc" not in loaded
    if command == "DEL":  # of nothing: needs no kernel at all
        assert not {"ctypes", "nearpath.datapath.libbpf"} & loaded
