"""Start-up time and memory of the frozen plugin, against an empty frozen program.

Every container runtime starts the plugin anew for every pod, so what counts is the whole
process, exec to exit. One round runs each program once, in turn, so that a slow moment of
the machine hits all alike; the table has medians over the rounds:

    plain     an empty script frozen with PyInstaller's defaults, for comparison
    empty     an empty script frozen by build.spec, the unit of the column "ratio"
    VERSION   the plugin without work
    ADD, DEL  a plain pod, datapath loaded
    ADD that loads   the first one on a node: loads, pins and attaches the programs

Needs root. Keeps to its own network namespace, cgroup, run and pin directories.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/bench"
LIMIT_RATIO = 1.5  # ADD of a plain pod, datapath loaded, against the empty program
LIMIT_FIRST = 500.0  # ms, ADD that loads
LIMIT_MEMORY = 25.0  # MiB, any command

# Reports a child's peak memory. A child's figure starts at its parent's size (exec(2) keeps
# the maximum), so the parent is the smallest interpreter there is.
_MEASURE = """
import os, sys
with open(sys.argv[1]) as stdin:
    pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, stdin.fileno(), 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
print(os.wait4(pid, 0)[2].ru_maxrss)
"""


def run(*command: str | Path) -> None:
    """Run a set-up command; its output shows only if it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")


def freeze(name: str, *arguments: str | Path) -> Path:
    """Freeze the empty script as ``name``, unless that is there and not older than its recipe."""
    program = BUILD / name / name
    recipe = [ROOT / "build.spec", ROOT / "requirements.lock", Path(__file__)]
    if not program.exists() or any(f.stat().st_mtime > program.stat().st_mtime for f in recipe):
        print(f"freezing the program {name!r}", file=sys.stderr)
        places = ("--distpath", BUILD, "--workpath", BUILD / "work")
        run(sys.executable, "-m", "PyInstaller", "--noconfirm", *places, *arguments)
    return program


def programs() -> dict[str, Path]:
    """The empty programs."""
    script = BUILD / "empty.py"
    BUILD.mkdir(parents=True, exist_ok=True)
    if not script.exists():
        script.write_text("pass\n")
    return {
        "plain": freeze("plain", "--specpath", BUILD, "--name", "plain", script),
        "empty": freeze("empty", ROOT / "build.spec", "--", "--main", script, "--name", "empty"),
    }


class Pod:
    """A network namespace with a veth, and requests to the plugin about it."""

    def __init__(self, stack: ExitStack, program: Path) -> None:
        self._program = program
        self._name = f"npbench{os.getpid()}"
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # /run of a node is a tmpfs; that of a container or sandbox may be a disk, whose
        # fsync(2) would be most of what we measure.
        run("mount", "-t", "tmpfs", "-o", "mode=0700", "nearpath-bench", self._directory)
        stack.callback(run, "umount", "--lazy", self._directory)
        self._host = f"npb{os.getpid()}"
        run("ip", "netns", "add", self._name)
        stack.callback(run, "ip", "netns", "del", self._name)
        run("ip", "link", "add", self._host, "type", "veth", "peer", "eth0", "netns", self._name)
        self._result = {
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": self._host},
                {"name": "eth0", "sandbox": f"/var/run/netns/{self._name}"},
            ],
            "ips": [{"address": "192.0.2.7/24", "interface": 1}],
        }
        config = {"cniVersion": "1.0.0", "name": "bench", "type": "nearpath", "required": True}
        self.request = self._directory / "request.json"
        self.request.write_text(json.dumps({**config, "prevResult": self._result}))
        self._cgroup = self._own_cgroup()
        stack.callback(self._cgroup.rmdir)

    def _own_cgroup(self) -> Path:
        """An empty cgroup: attached to it, the programs see no connection of this node."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        (root, *_) = [line.split()[4] for line in mounts if " - cgroup2 " in line]
        cgroup = Path(root, self._name)
        cgroup.mkdir()
        return cgroup

    def node(self, stack: ExitStack, number: int) -> dict[str, str]:
        """Environment of a plugin on a node of its own, without datapath so far."""
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "NEARPATH_RUN_DIR": f"{self._directory}/run{number}",
            "NEARPATH_PIN_DIR": f"/sys/fs/bpf/{self._name}-{number}",
            "NEARPATH_CGROUP": str(self._cgroup),
        }
        stack.callback(self._unload, environ)
        return environ

    def _unload(self, environ: dict[str, str]) -> None:
        subprocess.run(
            [self._program, "unload"], env=environ, capture_output=True, check=False, timeout=60
        )
        shutil.rmtree(environ["NEARPATH_PIN_DIR"], ignore_errors=True)

    def environ(self, command: str) -> dict[str, str]:
        """What a runtime puts into the environment."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self._name,
            "CNI_NETNS": f"/var/run/netns/{self._name}",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod;K8S_POD_UID=0",
            "CNI_PATH": "/opt/cni/bin",
        }

    def check(self, command: str, output: bytes) -> None:
        """Exit unless the answer to a request is what it must be."""
        expected = {"ADD": self._result, "DEL": None}.get(command, ...)
        if expected is not ... and (json.loads(output) if output else None) != expected:
            raise SystemExit(f"wrong answer to {command}: {output!r}")


def spawn(program: Path, environ: dict[str, str], stdin: Path, output: Path) -> float:
    """Milliseconds from exec to exit; the answer goes to the file ``output``."""
    reading, writing = os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, str(stdin), reading, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(output), writing, 0o600),
    ]
    start = time.perf_counter()
    pid = os.posix_spawn(program, [str(program)], environ, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    taken = time.perf_counter() - start
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"{program.name} failed with {code}: {output.read_text()}")
    return taken * 1000


def peak_memory(program: Path, environ: dict[str, str], stdin: Path) -> float:
    """Peak resident memory in MiB."""
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", _MEASURE, stdin, program],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout) / 1024


def measure(plugin: Path, rounds: int, loads: int) -> dict[str, dict[str, float]]:
    """Run everything; per row "median", "p95" (ms), "ratio" to empty, and "memory" (MiB)."""
    empties = programs()
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        pod = Pod(stack, plugin)
        output = BUILD / "output"

        def once(row: str, program: Path, environ: dict[str, str]) -> None:
            times.setdefault(row, []).append(spawn(program, environ, pod.request, output))
            pod.check(row[:3], output.read_bytes())

        for number in range(loads):
            fresh = pod.node(stack, number)
            once("ADD that loads", plugin, fresh | pod.environ("ADD"))
        node = pod.node(stack, loads)
        spawn(plugin, node | pod.environ("ADD"), pod.request, output)
        rows = [(name, program, node) for name, program in empties.items()]
        rows += [
            (command, plugin, node | pod.environ(command)) for command in ("VERSION", "ADD", "DEL")
        ]
        for number in range(-2, rounds):
            for row, program, environ in rows:
                once(row, program, environ)
            if number < 0:  # warm-up
                for row, *_ in rows:
                    times[row].clear()
        for row, program, environ in rows:
            memory[row] = peak_memory(program, environ, pod.request)
        fresh = pod.node(stack, loads + 1) | pod.environ("ADD")
        memory["ADD that loads"] = peak_memory(plugin, fresh, pod.request)
    unit = median(times["empty"])
    return {
        row: {
            "median": median(values),
            "p95": sorted(values)[int(len(values) * 0.95)],
            "ratio": median(values) / unit,
            "memory": memory[row],
        }
        for row, values in times.items()
    }


def main() -> int:
    """Measure, print, and fail if a limit is passed."""
    parser = argparse.ArgumentParser(description="start-up of the frozen plugin")
    parser.add_argument("--program", type=Path, default=ROOT / "dist/nearpath/nearpath")
    parser.add_argument("--rounds", type=int, default=60, help="default 60")
    parser.add_argument("--loads", type=int, default=10, help="first ADDs; default 10")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench_startup.py needs root: it makes a network namespace")
    rows = measure(options.program.resolve(), options.rounds, options.loads)
    limits = {
        f"ADD at most {LIMIT_RATIO}x empty": rows["ADD"]["ratio"] <= LIMIT_RATIO,
        f"ADD that loads under {LIMIT_FIRST:.0f} ms": rows["ADD that loads"]["median"]
        < LIMIT_FIRST,
        f"memory under {LIMIT_MEMORY:.0f} MiB": all(
            row["memory"] < LIMIT_MEMORY for name, row in rows.items() if name != "plain"
        ),
    }
    if options.json:
        kernel = os.uname().release
        print(json.dumps({"kernel": kernel, "rows": rows, "limits": limits}, indent=1))
    else:
        print(f"kernel {os.uname().release}, {os.cpu_count()} CPUs, {options.rounds} rounds")
        print(f"{'':16}{'median ms':>10}{'p95 ms':>10}{'ratio':>8}{'peak MiB':>10}")
        for name, row in rows.items():
            values = "{median:10.1f}{p95:10.1f}{ratio:8.2f}{memory:10.1f}".format(**row)
            print(f"{name:16}{values}")
        for text, kept in limits.items():
            print(f"{'ok    ' if kept else 'MISSED'}  {text}")
    return 0 if all(limits.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
