"""The load: our own generator load.c, and qperf, each inside a namespace, cgroup and CPU."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nearpath.errors import NearpathError
from nearpath.node import demo_qperf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/bench/load"
_SOURCE = Path(__file__).with_name("load.c")
_PATIENCE = 25.0  # seconds; a little more than the generator's own
_QPERF_GRACE = 15.0


@dataclass(frozen=True)
class Where:
    """Where a process runs: path of the network namespace, cgroup directory, CPU."""

    netns: str
    cgroup: str
    cpu: int

    def command(self, *words: str | Path | float) -> list[str]:
        """A command of load.c that runs there."""
        return [str(word) for word in (PROGRAM, self.netns, self.cgroup, self.cpu, *words)]


@dataclass(frozen=True)
class Job:
    """One kind of load; the arguments of load.c.

    Attributes:
        test: ``lat``, ``stream``, ``request`` or ``connect``.
        size: of a message in bytes; only lat and stream have one.
        nodelay: Nagle's algorithm is off.
        warm_ms: load before the measurement begins.
        measure_ms: length of the measurement.
    """

    test: str
    size: int
    nodelay: bool
    warm_ms: int
    measure_ms: int

    def arguments(self, port: int, address: str) -> tuple[str | int, ...]:
        """Words of the command line."""
        nodelay = int(self.nodelay)
        return (self.test, port, address, self.size, nodelay, self.warm_ms, self.measure_ms)


@dataclass(frozen=True)
class Reading:
    """One run.

    Attributes:
        value: one-way latency in µs (lat), MB/s (stream), connections/s (request, connect).
        p99: of the time of a turn in µs; 0: not measured.
        work: bytes that were moved while it was measured, both ways, or connections.
        disturbed: part of the time (0 to 1) that the CPU went to others, or 0 if that is not
            known. A few per cent are the kernel's own threads; see `disturbance`.
    """

    value: float
    p99: float
    work: int
    disturbed: float = 0.0


def build() -> None:
    """Compile load.c, unless that is done.

    Raises:
        NearpathError: no compiler, or it failed.
    """
    compiled(_SOURCE, PROGRAM)


def compiled(source: Path, program: Path) -> None:
    """Compile a generator, unless that is done.

    Raises:
        NearpathError: no compiler, or it failed.
    """
    changed = max(path.stat().st_mtime for path in (source, source.with_name("common.h")))
    if program.exists() and program.stat().st_mtime > changed:
        return
    compiler = shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise NearpathError("no C compiler is installed", "make setup")
    program.parent.mkdir(parents=True, exist_ok=True)
    options = ("-O2", "-Wall", "-Wextra", "-Werror")
    command = [compiler, *options, "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise NearpathError(f"{source} does not compile:\n{done.stderr}")


def interpret(job: Job, printed: dict[str, Any]) -> Reading:
    """What the generator printed, in the units of a Reading."""
    count, seconds = int(printed["count"]), float(printed["seconds"])
    if count <= 0 or seconds <= 0:
        raise NearpathError(f"{job.test} of {job.size} B measured nothing: {printed}")
    p99 = float(printed.get("p99_us", 0))
    if job.test == "stream":
        return Reading(count / seconds / 1e6, 0.0, count)
    if job.test == "lat":
        # One way, as qperf has it.
        return Reading(seconds / count / 2 * 1e6, p99, 2 * count * job.size)
    return Reading(count / seconds, p99, count)


class Round(Protocol):
    """One run of each arm."""

    @property
    def disturbed(self) -> float:
        """Of the run that was disturbed most; see Reading."""


_R = TypeVar("_R", bound=Round)


def calm(rounds: Iterable[Round], limit: float) -> int:
    """How many were not disturbed more than that."""
    return sum(each.disturbed <= limit for each in rounds)


def gather(
    rounds: list[_R], run: Callable[[int], _R], limit: float, wanted: int, spare: int
) -> list[_R]:
    """Add to the rounds until there are as many as wanted; the calmest.

    As many more as others have disturbed, while there are spare ones, but not more than twice
    as many in all.

    Args:
        run: one round; told its number, from 0.
        limit: what others may have of the CPU in a calm one.
    """
    most = min(2 * wanted, wanted + spare)
    while len(rounds) < wanted or (calm(rounds, limit) < wanted and len(rounds) < most):
        rounds.append(run(len(rounds)))
    return sorted(rounds, key=lambda each: each.disturbed)[:wanted]


class Server:
    """A running ``load … serve``; used inside `serving`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._text = b""

    def times(self) -> tuple[float, float]:
        """See `schedule`."""
        return schedule(self._process.pid)

    def line(self, timeout: float) -> dict[str, Any]:
        """The next line that it prints.

        Raises:
            NearpathError: it has ended, or says nothing.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + timeout
        while b"\n" not in self._text:
            ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
            read = os.read(descriptor, 4096) if ready else b""
            if not read:
                assert self._process.stderr is not None
                error = self._process.stderr.read().decode() if ready else "says nothing"
                raise NearpathError(f"the load server has failed: {error.strip()}")
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def schedule(process: int) -> tuple[float, float]:
    """Seconds that a process was on a CPU, and that it waited for one though it could run."""
    fields = Path(f"/proc/{process}/schedstat").read_text(encoding="ascii").split()
    return int(fields[0]) / 1e9, int(fields[1]) / 1e9


def disturbance(
    wall: float, client: tuple[float, float], server: tuple[float, float], *, one_cpu: bool
) -> float:
    """How much others had of the CPUs that the load was pinned to (0 to 1).

    On one CPU, where the load never sleeps, what client and server have not used; on two,
    where each has its own, the longer of their waits.

    Args:
        wall: seconds that it took.
        client: see `schedule`; of this time.
        server: likewise.
        one_cpu: both were on the same.
    """
    lost = wall - client[0] - server[0] if one_cpu else max(client[1], server[1])
    return min(1.0, max(0.0, lost / wall))


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def ended(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait for a child without reaping it; False if it is still running after ``timeout`` s."""
    descriptor = os.pidfd_open(process.pid)
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process that leads a session, with pipes for what it says."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},
    )


@contextmanager
def serving(where: Where, job: Job, port: int) -> Iterator[Server]:
    """A server for this job; it listens inside the block."""
    process = start(where.command("serve", *job.arguments(port, "0.0.0.0")))  # noqa: S104 - in a netns
    try:
        server = Server(process)
        server.line(_PATIENCE)
        yield server
    finally:
        kill(process)


def ask(
    where: Where, job: Job, address: str, port: int, server: Server, *, one_cpu: bool
) -> Reading:
    """One run against a server of the same job.

    Args:
        one_cpu: the server is on the client's CPU.

    Raises:
        NearpathError: it failed or did not end in time.
    """
    before = server.times()
    begin = time.monotonic()
    process = start(where.command("ask", *job.arguments(port, address)))
    try:
        if not ended(process, _PATIENCE):
            raise NearpathError(f"{job.test} of {job.size} B did not end in time")
        wall = time.monotonic() - begin
        client = schedule(process.pid)  # still there, for nobody has waited for it
        stdout, stderr = process.communicate()
    finally:
        kill(process)
    if process.returncode:
        text = stderr.decode().strip() or f"status {process.returncode}"
        raise NearpathError(f"{job.test} of {job.size} B failed: {text}")
    reading = interpret(job, server.line(1.0) if job.test == "stream" else json.loads(stdout))
    used = tuple(after - earlier for after, earlier in zip(server.times(), before, strict=True))
    lost = disturbance(wall, client, (used[0], used[1]), one_cpu=one_cpu)
    return replace(reading, disturbed=lost)


# -- qperf -----------------------------------------------------------------------------------


@contextmanager
def serving_qperf(where: Where, port: int) -> Iterator[None]:
    """A qperf server; ``port`` is for control, the client names the other one."""
    process = start(where.command("exec", demo_qperf.executable(), "-lp", port))
    try:
        end = time.monotonic() + _PATIENCE
        while not _listens(process, port):
            if process.poll() is not None or time.monotonic() > end:
                raise NearpathError("the qperf server did not start")
            time.sleep(0.01)
        yield
    finally:
        kill(process)


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """True if there is a listener on this port in the namespace of the process."""
    with suppress(OSError):
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/{process.pid}/net/{table}").read_text(encoding="ascii")
            # local address:port (hexadecimal), remote, state 0A: listening
            if any(
                fields[1].endswith(f":{port:04X}") and fields[3] == "0A"
                for fields in map(str.split, lines.splitlines())
            ):
                return True
    return False


def ask_qperf(
    where: Where, test: str, size: int, address: str, ports: tuple[int, int], seconds: int
) -> Reading:
    """One run of ``tcp_lat`` or ``tcp_bw``; ports of control and data."""
    control, data = ports
    connect = (demo_qperf.executable(), address, "-lp", control, "-ip", data)
    what = ("-t", seconds, "-m", size, "-vvs", "-uu", "-e", 6, test)
    process = start(where.command("exec", *connect, *what))
    try:
        stdout, stderr = process.communicate(timeout=seconds + _QPERF_GRACE)
    except subprocess.TimeoutExpired as error:
        raise NearpathError(f"qperf {test} {size} B did not end in time") from error
    finally:
        kill(process)
    if process.returncode:
        raise NearpathError(f"qperf {test} {size} B failed: {stderr.decode().strip()[:300]}")
    reading = demo_qperf.parse(test, stdout.decode())
    return Reading(reading.value, 0.0, reading.messages * size)
