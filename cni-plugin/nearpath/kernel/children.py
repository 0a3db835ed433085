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
