"""TCP and UDP between pods and guests, one static program at both ends; see talk.c."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import PATIENCE, CommandError, kill_group, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SOURCE = Path(__file__).with_name("talk.c")
PORT = 5555


@dataclass(frozen=True)
class Talk:
    """What a client has seen.

    Attributes:
        sent, answered, wrong: messages; wrong answers have other bytes than they should have.
        longest: milliseconds without an answer while one was due.
        error: why it ended early; empty if it did not.
    """

    sent: int
    answered: int
    wrong: int
    longest: int
    error: str

    def check(self, lost: int = 0) -> None:
        """Fail unless all but ``lost`` messages were answered, with the right bytes.

        Raises:
            CommandError: says what happened instead.
        """
        if self.error or self.wrong or not self.sent or self.sent - self.answered > lost:
            raise CommandError(f"not all messages came through: {self}")


def build() -> Path:
    """The compiled program, linked statically; compiled again when its source is newer."""
    directory = Path(__file__).resolve().parents[2] / "build"
    directory.mkdir(exist_ok=True)
    program = directory / "talk"
    if not program.exists() or program.stat().st_mtime < _SOURCE.stat().st_mtime:
        fresh = directory / f"talk-{os.getpid()}"
        run(["clang", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", fresh, _SOURCE])
        fresh.rename(program)
    return program


def words(
    kind: str,
    address: str,
    *,
    count: int = 20,
    size: int = 64,
    answer: int = 64,
    pause: int = 0,
    port: int = PORT,
) -> list[str]:
    """Arguments of the client.

    Args:
        kind: ``tcp`` or ``udp``.
        count: messages; 0: until SIGTERM.
        size, answer: bytes of a message's body and of its answer.
        pause: milliseconds between messages.
    """
    return [kind, address, *(str(number) for number in (port, count, size, answer, pause))]


def parsed(text: str) -> Talk:
    """What a client has printed."""
    return Talk(**json.loads(text))


class Background:
    """A client that talks on until it is asked what it has seen."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> Talk:
        """Let it finish, and what it has seen."""
        self._process.send_signal(signal.SIGTERM)
        try:
            said, trouble = self._process.communicate(timeout=60 * PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise CommandError("a conversation in the background does not end") from error
        if not said:
            raise CommandError(f"a conversation in the background failed: {trouble}")
        return parsed(said)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # A killed test run takes it along.
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def background(
    inside: Sequence[str], kind: str, address: str, *, pause: int
) -> Iterator[Background]:
    """A client in a pod that sends a message every ``pause`` milliseconds.

    Args:
        inside: words before the command, to run it in its pod (``netns.inside(…)``).
    """
    command = [*inside, str(build()), *words(kind, address, count=0, pause=pause)]
    process = _start(command)
    try:
        yield Background(process)
    finally:
        kill_group(process)


@contextmanager
def serving(inside: Sequence[str], port: int = PORT) -> Iterator[None]:
    """A server in a pod, TCP and UDP, while the block runs."""
    process = _start([*inside, str(build()), "serve", str(port)])
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 10 * PATIENCE)
        if not ready or process.stdout.readline() != "ready\n":
            raise CommandError("the server of a pod does not listen")
        yield
    finally:
        kill_group(process)


def ask(inside: Sequence[str], kind: str, address: str, **plan: int) -> Talk:
    """Converse from a pod; see `words`."""
    command = [*inside, str(build()), *words(kind, address, **plan)]
    return parsed(run(command, timeout=90).stdout)
