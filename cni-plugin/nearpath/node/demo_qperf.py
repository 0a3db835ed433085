"""qperf between two pods: one run of one test, with both ends pinned."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nearpath.errors import NearpathError
from nearpath.kernel import children, netns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nearpath.node.demo_pods import Pod
    from nearpath.node.interrupt import Interrupts

_libc = ctypes.CDLL(None)
_PORT = 19765  # qperf's default
_GRACE = 15.0  # seconds beyond a run's own time
# A line of `qperf -vvs -uu`: name = number unit.
_LINE = re.compile(r"^ *(\w+) *= *([\d.,]+(?:e[+-]?\d+)?) *(\S*) *$", re.MULTILINE)
_TO_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "sec": 1e6}
_TO_MEGABYTES = {"bytes/sec": 1e-6, "KB/sec": 1e-3, "MB/sec": 1.0, "GB/sec": 1e3}


@dataclass(frozen=True)
class Reading:
    """One run.

    Attributes:
        value: one-way latency in µs, or bandwidth in MB/s (10^6 bytes).
        messages: sent by both ends together.
    """

    value: float
    messages: int


def executable() -> str:
    """Path of qperf.

    Raises:
        NearpathError: not installed.
    """
    path = shutil.which("qperf")
    if path is None:
        raise NearpathError("qperf is not installed", "apt-get install qperf")
    return path


def parse(test: str, text: str) -> Reading:
    """What ``qperf -vvs -uu`` printed for one test.

    Raises:
        NearpathError: something else.
    """
    found = {name: (number.replace(",", ""), unit) for name, number, unit in _LINE.findall(text)}
    name, units = ("latency", _TO_MICROSECONDS) if test == "tcp_lat" else ("bw", _TO_MEGABYTES)
    try:
        number, unit = found[name]
        value = float(number) * units[unit]
        # tcp_lat names the messages of both ends, tcp_bw those of its one sender.
        messages = sum(
            round(float(found[sent][0]))
            for sent in ("loc_send_msgs", "rem_send_msgs", "send_msgs")
            if sent in found
        )
    except (KeyError, ValueError) as error:
        raise NearpathError(f"qperf {test} printed no result: {text.strip()[:200]!r}") from error
    if value <= 0 or messages <= 0:
        raise NearpathError(f"qperf {test} measured nothing: {text.strip()[:200]!r}")
    return Reading(round(value, 4), messages)


def _die_with_parent() -> None:
    """In the child: be killed if the demo is, for it keeps a namespace alive."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Qperf:
    """A qperf server in one pod, and clients in the other.

    Args:
        cpus: of the client and of the server.
    """

    def __init__(
        self, client: Pod, server: Pod, cpus: tuple[int, int], interrupts: Interrupts
    ) -> None:
        self._client = client
        self._server = server
        self._cpus = cpus
        self._interrupts = interrupts

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The server runs inside."""
        with netns.entered(self._server.netns):
            process = subprocess.Popen(
                [executable()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                env=children.clean_environ(),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - nothing that takes a lock
            )
        try:
            os.sched_setaffinity(process.pid, {self._cpus[1]})  # its children inherit
            self._wait_for_port(process)
            yield
        finally:
            _kill(process)

    def _wait_for_port(self, server: subprocess.Popen[str]) -> None:
        """Wait until the server listens, by its namespace's table of sockets."""
        end = time.monotonic() + 5
        while time.monotonic() < end and server.poll() is None:
            self._interrupts.check()
            for table in ("tcp", "tcp6"):
                with open(f"/proc/{server.pid}/net/{table}", encoding="ascii") as lines:
                    # local address:port (hexadecimal), remote, state 0A: listening
                    if any(
                        fields[1].endswith(f":{_PORT:04X}") and fields[3] == "0A"
                        for fields in map(str.split, lines)
                    ):
                        return
            time.sleep(0.02)
        raise NearpathError("the qperf server did not start in its pod")

    def run(self, test: str, size: int, seconds: int) -> Reading:
        """One run of ``tcp_lat`` or ``tcp_bw`` with messages of ``size`` bytes.

        Raises:
            NearpathError: it failed, or did not end in time.
            Interrupted: a signal came; the client has been killed.
        """
        command = [executable(), self._server.address, "-t", str(seconds), "-m", str(size)]
        command += ["-vvs", "-uu", "-e", "6", test]
        with netns.entered(self._client.netns):
            client = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**children.clean_environ(), "LC_ALL": "C"},
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - nothing that takes a lock
            )
        try:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(client.pid, {self._cpus[0]})
            if not self._interrupts.wait(client, seconds + _GRACE):
                raise NearpathError(f"qperf {test} {size} B did not end in {seconds + _GRACE:g} s")
            stdout, stderr = client.communicate()  # little enough to have fit into the pipes
        finally:
            _kill(client)
        if client.returncode != 0:
            raise NearpathError(f"qperf {test} {size} B failed: {stderr.strip()[:300]}")
        return parse(test, stdout)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a child and its children for good."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
