"""Where the BPF objects and libbpf are: inside the frozen program, or in a source tree."""

from __future__ import annotations

import os
import sys

_FROZEN: str = getattr(sys, "_MEIPASS", "")  # PyInstaller's directory of collected files


def libbpf_path() -> str:
    """What to hand to dlopen(3): our own libbpf, or the system's in a source tree."""
    return f"{_FROZEN}/lib/libbpf.so.1" if _FROZEN else "libbpf.so.1"


def object_path(name: str) -> str:
    """Path of the compiled BPF object ``<name>.bpf.c``; a source tree needs ``make bpf``.

    Args:
        name: the source's name without suffixes, e.g. ``socket_lane``.
    """
    if _FROZEN:
        return f"{_FROZEN}/bpf/{name}.bpf.o"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    return os.path.abspath(f"{root}/bpf/build/{name}.bpf.o")
