"""Running other programs, always with a time limit and an error text that says why."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Multiplies every time-out of the tests, for emulated machines; never what a test measures.
PATIENCE = float(os.environ.get("NEARPATH_PATIENCE", "1"))
# Enough to see what happened, short enough to read in a test report.
_SHOWN = 4000


class CommandError(AssertionError):
    """A program failed or did not end in time; the text has its output.

    An AssertionError, so that pytest reports a failed test and not a broken one.
    """


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:1000]}\n[…]\n{text[-_SHOWN + 1000 :]}"


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 30,
    check: bool = True,
    text: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its exit status, stdout and stderr.

    Args:
        command: program and arguments; no shell.
        timeout: seconds, times PATIENCE; the whole process group is killed afterwards.
        check: raise on an exit status other than 0.
        text: standard input.
        env: the whole environment; None: ours.

    Raises:
        CommandError: it failed (with ``check``), is missing, or took too long.
    """
    timeout *= PATIENCE
    shown = shlex.join(os.fspath(part) for part in command)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            env=env,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise CommandError(f"{error.filename} is not there; run `make setup`") from error
    try:
        stdout, stderr = process.communicate(text, timeout)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"`{shown}` did not end in {timeout:g} s") from error
    finally:
        if process.poll() is None:
            kill_group(process)
    if check and process.returncode != 0:
        raise CommandError(
            f"`{shown}` ended with status {process.returncode}\n"
            f"stdout: {_shorten(stdout)}\nstderr: {_shorten(stderr)}"
        )
    return subprocess.CompletedProcess(shown, process.returncode, stdout, stderr)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill (-9) a process that was started in a session of its own, with its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    process.wait(timeout=10)


def require(*programs: str) -> None:
    """Fail, with the remedy, if a program that the tests need is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise CommandError(f"not installed: {', '.join(missing)}; run `make setup`")


def wait_until(condition: Callable[[], object], what: str, timeout: float = 10) -> None:
    """Poll until ``condition()`` is true.

    Raises:
        CommandError: it did not become true within ``timeout`` seconds, times PATIENCE; names
            ``what``.
    """
    timeout *= PATIENCE
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise CommandError(f"{what}: not within {timeout:g} s")
        time.sleep(0.02)
