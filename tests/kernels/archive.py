"""A cpio archive in the format that the kernel unpacks as its first file system (newc)."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Archive:
    """Entries in the order of their adding; files are read when it is written."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes | Path]] = {}

    def add(self, name: str, mode: int, data: bytes | Path = b"") -> None:
        """Add an entry with its parent directories; a second one of the same name is ignored.

        Args:
            name: absolute path in the guest.
            mode: kind and permissions, as in ``st_mode``.
            data: content, the file that has it, or the target of a symbolic link.
        """
        name = name.strip("/")
        if name in self._entries:
            return
        if "/" in name:
            self.add(name.rpartition("/")[0], stat.S_IFDIR | 0o755)
        self._entries[name] = mode, data

    def directory(self, name: str) -> None:
        """Add an empty directory."""
        self.add(name, stat.S_IFDIR | 0o755)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def text(self, name: str, content: str, permissions: int = 0o644) -> None:
        """Add a file with this content."""
        self.add(name, stat.S_IFREG | permissions, content.encode())

    def file(self, source: str | Path, name: str = "") -> None:
        """Add a copy of a file of this machine; ``name``: its path if it is another there."""
        name = name or str(source)
        if re.match(r"/(bin|sbin|lib|lib64)/", name):
            name = f"/usr{name}"
        self.add(name, Path(source).stat().st_mode, Path(source))

    def programs(self, paths: Iterable[str]) -> None:
        """Add programs and libraries of this machine with the libraries that they need."""
        wanted = [*paths]
        for path in wanted:
            self.file(path)
        # Of programs that are scripts or linked statically ldd says so and fails.
        for library in re.findall(r"(/\S+) \(0x", run(["ldd", *wanted], check=False).stdout):
            self.file(library)

    def digest(self) -> str:
        """Changes when an entry does: of files by path, size and time of modification."""
        found = hashlib.sha256()
        for name, (mode, data) in self._entries.items():
            known = data
            if isinstance(known, Path):
                info = known.stat()
                known = f"{known} {info.st_size} {info.st_mtime_ns}".encode()
            found.update(f"{name} {mode} {len(known)} ".encode() + known)
        return found.hexdigest()[:16]

    def packed(self) -> bytes:
        """The whole archive. Archives may follow each other: the kernel unpacks them in order."""
        return b"".join(self._parts())

    def _parts(self) -> Iterator[bytes]:
        for number, (name, (mode, data)) in enumerate(self._entries.items()):
            content, modified = data, 0
            if isinstance(content, Path):
                modified = int(content.stat().st_mtime)  # Python trusts its .pyc files by it
                content = content.read_bytes()
            yield from _entry(number + 1, name, mode, content, modified)
        yield from _entry(0, "TRAILER!!!", 0, b"", 0)


def _entry(number: int, name: str, mode: int, data: bytes, modified: int) -> Iterator[bytes]:
    path = name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize dev(2) rdev(2) namesize check
    fields = (number, mode, 0, 0, 1, modified, len(data), 0, 0, 0, 0, len(path), 0)
    header = "070701" + "".join(f"{field:08x}" for field in fields)
    for part in (header.encode() + path, data):
        yield part + bytes(-len(part) % 4)
