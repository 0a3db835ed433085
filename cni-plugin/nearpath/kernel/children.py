"""The environment of child processes."""

from __future__ import annotations

import os
import sys


def clean_environ() -> dict[str, str]:
    """A copy of our environment without what the frozen program's launcher put there.

    PyInstaller's launcher points LD_LIBRARY_PATH at the bundled libraries and runs itself
    again; a child such as ``ip`` or ``qperf`` would load our libraries in place of the
    system's. The launcher keeps the caller's own value in LD_LIBRARY_PATH_ORIG, and its
    ``_PYI_*`` variables would make a child copy of nearpath take itself for this process.
    """
    environ = dict(os.environ)
    if not hasattr(sys, "_MEIPASS"):
        return environ
    original = environ.pop("LD_LIBRARY_PATH_ORIG", "")
    environ.pop("LD_LIBRARY_PATH", None)
    if original:
        environ["LD_LIBRARY_PATH"] = original
    return {name: value for name, value in environ.items() if not name.startswith("_PYI_")}


def own_command() -> list[str]:
    """The words that start this program again, from the same files."""
    if hasattr(sys, "_MEIPASS"):  # frozen; build.spec says why sys.frozen is not set
        return [sys.executable]
    main = os.path.realpath(os.path.join(os.path.dirname(__file__), "../../main.py"))
    return [sys.executable, main]


def spawn_detached(words: list[str], environ: dict[str, str]) -> None:
    """Start a program that outlives us and holds nothing of ours.

    A container runtime waits until all copies of a plugin's stdout and stderr are closed,
    so none may be left in the new process. It gets a session of its own, and init as parent:
    nobody of ours could wait for it. The caller is single-threaded.

    Args:
        words: the first is the path of the program.

    Raises:
        OSError: fork failed. A program that cannot be executed is not noticed.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if not os.fork():
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.chdir("/")
            os.execve(words[0], words, environ)  # noqa: S606 - no shell is wanted
    finally:
        os._exit(127)
