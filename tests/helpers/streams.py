"""Verified TCP traffic in the background, between two network namespaces; see streams.c."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import CommandError, kill_group, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SOURCE = Path(__file__).with_name("streams.c")
# struct state of streams.c
_HEAD = struct.Struct("=II")
_WORKER = struct.Struct("=5QI100s")
_WORKER_SIZE = (_WORKER.size + 7) // 8 * 8
_STATE_BYTES = _HEAD.size + 64 * _WORKER_SIZE
# A blocking read after the own half-close may be woken early: one of so many connections.
_WOKEN_OF = 50
# Everything that pods do: long and short connections, both ways, half-closed, slow readers.
ALL_KINDS = ("ask", "late", "bulk", "flood", "half", "brief")


@dataclass(frozen=True)
class Worker:
    """What one end of one kind of traffic has done so far.

    Attributes:
        read: bytes that it has read and compared.
        woken: blocking reads after its half-close that got EAGAIN (a limit), and were repeated.
        failure: what went wrong; it has ended then.
    """

    name: str
    connections: int
    messages: int
    read: int
    woken: int
    ended: bool
    failure: str


class Streams:
    """Traffic that is running; every byte is compared where it is read."""

    def __init__(
        self, process: subprocess.Popen[str], state: mmap.mmap, kinds: Sequence[str]
    ) -> None:
        self._process = process
        self._state = state
        self._kinds = kinds

    def workers(self) -> list[Worker]:
        """Client and server of each kind."""
        found = []
        for number in range(2 * len(self._kinds)):
            connections, messages, read, _, woken, ended, failure = _WORKER.unpack_from(
                self._state, _HEAD.size + number * _WORKER_SIZE
            )
            kind = number // 2
            name = f"{kind} {self._kinds[kind]} {('client', 'server')[number % 2]}"
            text = failure.partition(b"\0")[0].decode()
            found.append(Worker(name, connections, messages, read, woken, bool(ended), text))
        return found

    def check(self) -> None:
        """Fail if an end has seen anything that it should not have.

        Raises:
            CommandError: what.
        """
        workers = self.workers()
        failures = [f"{worker.name}: {worker.failure}" for worker in workers if worker.failure]
        failures += [
            f"{worker.name}: {worker.woken} reads after half-close got EAGAIN"
            for worker in workers
            if worker.woken > 2 + worker.connections / _WOKEN_OF
        ]
        if failures:
            raise CommandError("\n".join(failures))
        if self._process.poll() not in (None, 0):
            raise CommandError(f"streams ended with status {self._process.returncode}")

    def advance(self, messages: int = 1, timeout: float = 20) -> None:
        """Wait until every end has got further by so many messages: none hangs.

        Raises:
            CommandError: one does, or has failed.
        """
        before = {worker.name: worker.messages for worker in self.workers()}

        def moved() -> bool:
            self.check()
            now = self.workers()
            return all(worker.messages >= before[worker.name] + messages for worker in now)

        try:
            wait_until(moved, "progress of all streams", timeout)
        except CommandError as error:
            stuck = [
                worker
                for worker in self.workers()
                if worker.messages < before[worker.name] + messages
            ]
            raise CommandError(f"{error}; behind: {stuck}") from error

    @property
    def messages(self) -> int:
        """Of all kinds so far."""
        return sum(worker.messages for worker in self.workers())

    @property
    def connections(self) -> int:
        """Connections that servers have finished."""
        return sum(worker.connections for worker in self.workers()[1::2])

    def finish(self, timeout: float = 30) -> None:
        """Let the connections come to their ends, all bytes read, and check.

        Raises:
            CommandError: an end hangs, or has seen what it should not have.
        """
        _HEAD.pack_into(self._state, 0, 1, 0)
        self.wait(timeout)

    def wait(self, timeout: float) -> None:
        """Wait for the end of limited traffic (``count`` of `streams`), and check."""

        def ended() -> bool:
            self.check()
            return self._process.poll() is not None

        try:
            wait_until(ended, "the end of the streams", timeout)
        except CommandError as error:
            late = [worker for worker in self.workers() if not worker.ended]
            raise CommandError(f"{error}; still running: {late}") from error
        self.check()


def build() -> Path:
    """The compiled program; compiled again when its source is newer."""
    directory = Path(__file__).resolve().parents[2] / "build"
    directory.mkdir(exist_ok=True)
    program = directory / "streams"
    if not program.exists() or program.stat().st_mtime < _SOURCE.stat().st_mtime:
        fresh = directory / f"streams-{os.getpid()}"
        run(["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", fresh, _SOURCE])
        fresh.rename(program)
    return program


@contextmanager
def streams(
    directory: Path,
    clients: str,
    servers: str,
    address: str,
    kinds: Sequence[str] = ALL_KINDS,
    *,
    port: int = 6000,
    count: int = 0,
) -> Iterator[Streams]:
    """Start traffic of these kinds; whatever is still running at the end is killed.

    Args:
        directory: where its state may be.
        clients: path of the clients' network namespace.
        servers: path of the servers'.
        address: that the clients connect to.
        port: of the first kind; the others have the next ones.
        count: connections of each kind; 0: until `Streams.finish`.
    """
    path = directory / f"streams-{port}"
    path.write_bytes(bytes(_STATE_BYTES))
    program = build()
    words = [str(path), clients, servers, address, str(port), str(count), *kinds]
    process = subprocess.Popen(
        ["nice", str(program), *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), _STATE_BYTES) as state:
            running = Streams(process, state, kinds)

            def listening() -> bool:
                running.check()
                return int(_HEAD.unpack_from(state)[1]) == len(kinds)

            wait_until(listening, "all kinds to listen")
            yield running
    finally:
        kill_group(process)
