"""Emulated machines with a stock kernel: boot one, run a command in it as root.

The guest is one initramfs (image.py). The console is the first serial port (ttyS0): kernel
messages and what the command prints. What the command writes to descriptor 3 comes out of the
second one (ttyS1), so that no kernel message can fall between its lines.

Emulated (TCG), for these kernels do not boot under every host's KVM, and no KVM is needed.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.commands import kill_group, require

from . import image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_MEMORY = 1536  # MiB
_SHOWN = 6000  # characters of the console's end in an error


@dataclass(frozen=True)
class Outcome:
    """What a command did in a guest.

    Attributes:
        written: to descriptor 3.
        problem: why the guest did not power itself off; empty if it did.
        console: path of the console's log.
        seconds: from the start of the emulator to its end.
    """

    written: str
    problem: str
    console: Path
    seconds: float

    def end_of_console(self) -> str:
        """The last lines of the console."""
        said = self.console.read_text(errors="backslashreplace") if self.console.exists() else ""
        return f"end of {self.console}:\n{said[-_SHOWN:]}"


class Guest:
    """A kernel that boots, runs a command as root, and powers off.

    Args:
        tree: an unpacked kernel; see packages.py.
        work: directory for the console's log and the initramfs; the log stays there.
        command: runs alone in the guest, in /nearpath, with /proc, /sys, /dev, /run, /tmp and
            cgroup v2 mounted and the loopback up.
        environ: variables of the command.
        timeout: seconds for all of it; the emulator is killed then.
    """

    def __init__(
        self,
        tree: Path,
        work: Path,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        timeout: float,
    ) -> None:
        require("qemu-system-x86_64", "timeout")
        (kernel,) = tree.glob("boot/vmlinuz-*")
        self._initrd, self._console, self._output = (
            work / name for name in ("initrd", "console.log", "output.log")
        )
        shutil.copyfile(image.machine(tree), self._initrd)
        with self._initrd.open("ab") as initrd:
            initrd.write(image.project(command, environ))
        self._started = time.monotonic()
        self._timeout = timeout
        # timeout(1) also ends the guest when this process is killed and cannot do it.
        limit = ("timeout", "--kill-after=5", f"{timeout + 5:g}")
        self._process = subprocess.Popen(
            [*limit, *_emulator(kernel, self._initrd, self._console, self._output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self) -> Outcome:
        """Wait for its end."""
        problem = ""
        left = self._started + self._timeout - time.monotonic()
        try:
            said, _ = self._process.communicate(timeout=max(left, 0))
        except subprocess.TimeoutExpired:
            problem = "the guest was killed, for it took too long"
        else:
            if self._process.returncode:
                problem = f"the emulator ended with status {self._process.returncode}: {said}"
        self.kill()
        output = self._output
        written = output.read_text(errors="backslashreplace") if output.exists() else ""
        return Outcome(written, problem, self._console, time.monotonic() - self._started)

    def kill(self) -> None:
        """End it, if it still runs, and remove what is large."""
        kill_group(self._process)
        self._initrd.unlink(missing_ok=True)


def _emulator(kernel: Path, initrd: Path, console: Path, output: Path) -> list[str]:
    arguments = (
        # With -no-reboot: a kernel that dies ends the emulator at once.
        "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off "
        # The emulated counter is good, but Linux would distrust it and take a much slower clock.
        "tsc=reliable "
        # A busy host stops the guest's processors for seconds; hung tests have time-outs.
        "watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=300"
    )
    return [
        "qemu-system-x86_64",
        # One thread for both processors: with several, one may go on executing code that another
        # has patched, and a function that gets or loses its fentry spins for ever.
        *("-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", str(_MEMORY)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-serial", f"file:{output}"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", arguments),
    ]
