"""What this kernel takes and what it does not: found out by trying, and said by doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers import needs
from helpers.commands import PATIENCE, run
from nearpath.datapath import bundle, libbpf, loader
from nearpath.node import doctor
from nearpath.node.finding import FAIL, OK

if TYPE_CHECKING:
    from nearpath.place import Place

# libbpf prints what the verifier has to say to stderr.
_LOAD = """
import ctypes, sys
libbpf = ctypes.CDLL("libbpf.so.1")
libbpf.bpf_object__open_file.restype = ctypes.c_void_p
found = ctypes.c_void_p(libbpf.bpf_object__open_file(sys.argv[1].encode(), None))
libbpf.bpf_object__find_program_by_name.restype = ctypes.c_void_p
for name in sys.argv[2:]:
    program = libbpf.bpf_object__find_program_by_name(found, name.encode())
    libbpf.bpf_program__set_autoload(ctypes.c_void_p(program), ctypes.c_bool(False))
sys.exit(not found or libbpf.bpf_object__load(found) < 0)
"""
_LOAD_WITHOUT_BPFFS = """
import os, sys
from nearpath.datapath import loader, unloader
from nearpath.kernel import mounts
from nearpath.place import Place
place = Place(*sys.argv[1:])
assert not mounts.bpffs_mounted("/sys/fs/bpf")
assert loader.ensure(place)
assert not loader.ensure(place)
assert mounts.bpffs_mounted("/sys/fs/bpf")
assert loader.is_loaded(place)
assert os.listdir(place.layout_dir)
assert unloader.unload(place, lambda _: None, 5)["drained"]
assert not os.path.exists(place.pin_dir)
"""


def _loading(name: str, *left_out: str) -> str:
    """What libbpf and the verifier say while they load an object by itself; empty if they do."""
    loading = subprocess.run(
        [sys.executable, "-c", _LOAD, bundle.object_path(name), *left_out],
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
        check=False,
    )
    return loading.stderr[-20_000:] if loading.returncode else ""


@pytest.mark.smoke
def test_the_verifier_takes_the_programs() -> None:
    """If not, the end of its log says why, which is more than any other test shows."""
    assert not (said := _loading("socket_lane")), said


@pytest.mark.smoke
@pytest.mark.needs_fentry
def test_the_verifier_takes_the_guards() -> None:
    """At least without those of functions that this kernel does not have yet."""
    if said := _loading("guards"):
        assert not _loading("guards", *libbpf.YOUNG), said


@pytest.mark.smoke
def test_loading_mounts_bpffs(place: Place) -> None:
    """As on a node that has just booted; in a mount namespace of its own."""
    script = 'umount -a -t bpf 2>/dev/null; exec "$@"'
    words = [sys.executable, "-c", _LOAD_WITHOUT_BPFFS, place.run_dir, place.pin_dir, place.cgroup]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words],
        env=environ,
    )
    assert not Path(place.pin_dir).exists()


def test_doctor_says_the_same_of_guards(place: Place) -> None:
    """Whether it has tried for itself or the datapath is loaded."""
    refused = bool(needs.fentry_refusal())

    def guards() -> str:
        findings = doctor.examine(place, ["/nonexistent"], "/nonexistent")
        (found,) = (finding for finding in findings if finding.name == "guards")
        return found.state

    before = guards()
    loader.ensure(place)
    assert (before != OK, guards() != OK) == (refused, refused)
    assert loader.is_guarded(place) == (not refused)


def test_doctor_finds_the_kernel_fit(place: Place) -> None:
    """Each kernel that the tests run on is one that nearpath works on."""
    findings = doctor.examine(place, ["/nonexistent"], "/nonexistent")
    assert [finding for finding in findings if finding.state == FAIL] == []
