"""Taking away what a test or a runtime left: its processes, mounts and cgroups."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from helpers.commands import run, wait_until


def holding(text: str) -> dict[int, str]:
    """Processes, not us, with the text in their command line or environment: ID to command.

    Args:
        text: a path that only one test uses.
    """
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        with suppress(OSError):  # it has ended meanwhile
            command = (directory / "cmdline").read_bytes()
            if text.encode() in command + (directory / "environ").read_bytes():
                words = command.replace(b"\0", b" ").decode(errors="replace")
                found[int(directory.name)] = words
    return found


def kill_holding(text: str) -> None:
    """kill -9 all the processes of `holding`."""
    for process in holding(text):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def unmount_below(directory: Path) -> None:
    """Unmount everything below a directory, the last mounted first."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        mount = line.split()[4]
        if mount.startswith(f"{directory}/"):
            run(["umount", "--lazy", mount], check=False)


def remove_cgroups(name: str) -> None:
    """Remove the cgroups of this name, with those below, in every hierarchy.

    What still runs in them is killed: pods whose runtime was killed before it stopped them.

    Raises:
        CommandError: one stays busy; a killed process needs a moment to leave.
    """

    def removed() -> bool:
        tops = [top for top, folders, _ in os.walk("/sys/fs/cgroup") if name in folders]
        for top in tops:
            for directory, _, _ in os.walk(f"{top}/{name}", topdown=False):
                with suppress(OSError):
                    for process in Path(directory, "cgroup.procs").read_text().split():
                        os.kill(int(process), signal.SIGKILL)
                    Path(directory).rmdir()
        return not tops

    wait_until(removed, f"cgroups {name} removed")


def empty_directory(directory: Path) -> None:
    """Remove a directory of files and directories; bpffs is one that rmtree does not like."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            Path(folder, name).unlink()
        Path(folder).rmdir()
