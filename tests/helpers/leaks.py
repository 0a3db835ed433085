"""What exists on this machine, to show that everything created is gone afterwards."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import CommandError, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Offsets in struct bpf_prog_info and struct bpf_map_info (linux/bpf.h, stable ABI).
_NAMES = {"prog": 64, "map": 24}
_ID = 4
_MAP_IDS_COUNT, _MAP_IDS = 52, 56
_INFO_BYTES = 256
_MOST_MAPS = 64


class Bpf:
    """The kernel's lists of BPF objects, by libbpf's wrappers of bpf(2)."""

    def __init__(self) -> None:
        try:
            self._libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise CommandError(f"{error}; run `make setup`") from error

    def _ids(self, kind: str) -> Iterator[int]:
        following = getattr(self._libbpf, f"bpf_{kind}_get_next_id")
        current = ctypes.c_uint32(0)
        while following(current, ctypes.byref(current)) == 0:
            yield current.value

    def _info(self, descriptor: int, info: ctypes.Array[ctypes.c_char]) -> bool:
        """Fill in the object's bpf_…_info and close the descriptor; False if it is gone."""
        if descriptor < 0:
            return False
        try:
            length = ctypes.c_uint32(len(info))
            got: int = self._libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(length))
        finally:
            os.close(descriptor)
        return got == 0

    def objects(self, kind: str) -> dict[int, str]:
        """All objects of a kind (``prog``, ``map``, ``link``): ID to name (links: empty)."""
        found = {}
        for number in self._ids(kind):
            info = ctypes.create_string_buffer(_INFO_BYTES)
            if self._info(getattr(self._libbpf, f"bpf_{kind}_get_fd_by_id")(number), info):
                start = _NAMES.get(kind, _INFO_BYTES)
                found[number] = info.raw[start : start + 16].rstrip(b"\0").decode()
        return found

    def pinned(self, pins: Iterable[Path]) -> set[tuple[str, int]]:
        """Kind and ID of the objects behind these pins."""
        found = set()
        for pin in pins:
            descriptor = self._libbpf.bpf_obj_get(os.fsencode(pin))
            if descriptor < 0:
                continue  # removed meanwhile, or no object (bpffs has files of its own)
            # "anon_inode:bpf-map", "anon_inode:bpf-prog", "anon_inode:bpf_link"
            kind = os.readlink(f"/proc/self/fd/{descriptor}")[len("anon_inode:bpf-") :]
            info = ctypes.create_string_buffer(_INFO_BYTES)
            if self._info(descriptor, info):
                found.add((kind, int.from_bytes(info.raw[_ID : _ID + 4], sys.byteorder)))
        return found

    def programs_of(self, maps: Iterable[Path]) -> dict[int, str]:
        """The programs that use any of these pinned maps: ID to name."""
        wanted = {number for kind, number in self.pinned(maps) if kind == "map"}
        found = {}
        for number, name in self.objects("prog").items():
            used = (ctypes.c_uint32 * _MOST_MAPS)()
            info = ctypes.create_string_buffer(_INFO_BYTES)
            ctypes.c_uint32.from_buffer(info, _MAP_IDS_COUNT).value = _MOST_MAPS
            ctypes.c_uint64.from_buffer(info, _MAP_IDS).value = ctypes.addressof(used)
            if self._info(self._libbpf.bpf_prog_get_fd_by_id(number), info) and wanted & set(used):
                found[number] = name
        return found

    def entries(self, pinned: Path, key_size: int) -> list[bytes]:
        """Keys of a pinned map."""
        descriptor = self._libbpf.bpf_obj_get(os.fsencode(pinned))
        if descriptor < 0:
            raise CommandError(f"{pinned}: {os.strerror(ctypes.get_errno())}")
        keys = []
        try:
            key = ctypes.create_string_buffer(key_size)
            previous = None
            while self._libbpf.bpf_map_get_next_key(descriptor, previous, key) == 0:
                keys.append(key.raw)
                previous = ctypes.create_string_buffer(key.raw, key_size)
        finally:
            os.close(descriptor)
        return keys


# Of things with names, those that the tests, their runtimes and nearpath make; other
# programs on the machine come and go as they like.
_OURS = re.compile(r"np-(e2e|node|podman)-|/nearpath(/|$)|/k8s\.io|/libpod|/cni-|/netns-")


def _bpf() -> set[str]:
    """BPF objects that have no pin: what has one is reported by its path or is another's."""
    bpf = Bpf()
    walk = os.walk("/sys/fs/bpf")  # unlike glob, it bears directories that vanish meanwhile
    pinned = bpf.pinned(Path(directory, name) for directory, _, names in walk for name in names)
    return {
        f"BPF {kind} {number} {name}".rstrip()
        for kind in ("prog", "map", "link")
        for number, name in bpf.objects(kind).items()
        if (kind, number) not in pinned
    }


# The modules of these kinds make some in the first namespace as soon as anybody wants one.
_BY_MODULE = {"dummy0", "ifb0", "ifb1"}


def _links() -> set[str]:
    return {f"link {name}" for name in set(os.listdir("/sys/class/net")) - _BY_MODULE}


def _paths() -> set[str]:
    """Pins, cgroups, mounts and named network namespaces of ours."""
    paths = {
        f"{directory}/{name}"
        for top in ("/sys/fs/bpf", "/sys/fs/cgroup", "/run/netns")
        for directory, folders, files in os.walk(top)
        for name in ((*folders, *files) if top != "/sys/fs/cgroup" else folders)
    }
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    paths |= {f"mount {line.split()[4]}" for line in mounts}
    return {path for path in paths if _OURS.search(path)}


def snapshot() -> set[str]:
    """Kernel objects of the machine, one line of text each."""
    return _bpf() | _links() | _paths()


@contextmanager
def nothing_left(timeout: float = 10) -> Iterator[None]:
    """Fail if the block leaves kernel objects behind.

    The kernel frees BPF objects, devices and cgroups after a grace period, so what is
    new is given ``timeout`` seconds to go.

    Raises:
        CommandError: names what is left.
    """
    before = snapshot()
    yield
    left: set[str] = set()

    def gone() -> bool:
        left.clear()
        left.update(snapshot() - before)
        return not left

    try:
        wait_until(gone, "", timeout)
    except CommandError:
        raise CommandError("left behind:\n" + "\n".join(sorted(left))) from None
