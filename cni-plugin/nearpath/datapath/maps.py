"""Pinned maps by bpf(2) itself: all that ADD and DEL want of BPF, without libbpf.

Opening libbpf through ctypes would cost every pod's start 1.5 ms. Loading and attaching
programs is libbpf's work (libbpf.py).
"""

from __future__ import annotations

import os
import struct
from errno import E2BIG, EINTR, ENOENT

from nearpath.errors import BpfError
from nearpath.kernel.syscall import BPF, address, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# enum bpf_cmd of linux/bpf.h, and what each takes of union bpf_attr
_LOOKUP, _UPDATE, _DELETE, _NEXT_KEY = 1, 2, 3, 4
_ELEMENT = struct.Struct("=IIQQQ")  # map_fd, padding, key, value or next_key, flags
_PIN, _GET = 6, 7
_OBJECT = struct.Struct("=QII")  # pathname, bpf_fd, file_flags
_INFO_BY_FD = 15
_INFO = struct.Struct("=IIQ")  # bpf_fd, info_len, info
_MAP_INFO = struct.Struct("=5I")  # start of struct bpf_map_info: type, id, sizes, max_entries
_LOOKUP_BATCH = 24
_BATCH = struct.Struct("=QQQQIIQQ")  # in, out, keys, values, count, map_fd, flags, flags
_BATCH_COUNT = 32  # offset of count
ANY, NOEXIST, EXIST = 0, 1, 2


def _bpf(what: str, command: int, attributes: bytearray) -> int:
    """One bpf(2); the caller holds all buffers that the attributes point to.

    Raises:
        BpfError: "cannot ``what``".
    """
    try:
        return syscall(BPF, command, address(attributes), len(attributes))
    except OSError as error:
        raise BpfError(f"cannot {what}: {error.strerror}", error.errno or 0) from error


def possible_cpus() -> int:
    """Number of possible CPUs: the length of a per-CPU value."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as content:
        last = content.read().strip().replace("-", ",").rpartition(",")[2]
    return int(last) + 1  # the list starts at 0 and has no gaps (Documentation/cputopology)


class Descriptor:
    """A file descriptor of a map, program or link; a context that closes it."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name

    @classmethod
    def open_pinned(cls, path: str) -> Descriptor:
        """Open what is pinned at ``path`` in bpffs.

        Raises:
            BpfError: errno ENOENT if nothing is pinned there.
        """
        return cls(_get(path), path)

    def pin(self, path: str) -> None:
        """Pin at ``path``; it must not exist."""
        name = bytearray(os.fsencode(path) + b"\0")
        attributes = bytearray(_OBJECT.pack(address(name), self.number, 0))
        _bpf(f"pin {path}", _PIN, attributes)

    def close(self) -> None:
        """Close the descriptor; harmless when closed already."""
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _get(path: str) -> int:
    name = bytearray(os.fsencode(path) + b"\0")
    return _bpf(f"open pin {path}", _GET, bytearray(_OBJECT.pack(address(name), 0, 0)))


def _information(number: int, name: str) -> tuple[int, int, int, int]:
    """Kind, key size, value size and most entries of a map."""
    information = bytearray(_MAP_INFO.size)
    attributes = bytearray(_INFO.pack(number, len(information), address(information)))
    _bpf(f"describe map {name}", _INFO_BY_FD, attributes)
    kind, _, key_size, value_size, entries = _MAP_INFO.unpack(information)
    return kind, key_size, value_size, entries


class Map(Descriptor):
    """A map with keys and values as bytes of fixed sizes.

    Args:
        key_size: bytes of a key.
        value_size: bytes of a value; of a per-CPU map the value of one CPU.
        per_cpu: values are arrays over all possible CPUs, each padded to 8 bytes.
    """

    def __init__(
        self, number: int, name: str, key_size: int, value_size: int, per_cpu: bool = False
    ) -> None:
        super().__init__(number, name)
        self.key_size = key_size
        self.value_size = value_size
        if per_cpu:
            self.value_size = (value_size + 7) // 8 * 8 * possible_cpus()

    @classmethod
    def pinned(cls, path: str, key_size: int, value_size: int, per_cpu: bool = False) -> Map:
        """Open the map pinned at ``path``.

        Raises:
            BpfError: errno ENOENT if nothing is pinned there.
        """
        return cls(_get(path), path, key_size, value_size, per_cpu)

    @classmethod
    def pinned_unknown(cls, path: str) -> Map:
        """Open the map pinned at ``path``, whatever its sizes; not for per-CPU maps.

        Raises:
            BpfError: errno ENOENT if nothing is pinned there.
        """
        number = _get(path)
        try:
            _, key_size, value_size, _ = _information(number, path)
        except BpfError:
            os.close(number)
            raise
        return cls(number, path, key_size, value_size)

    def most_entries(self) -> int:
        """Entries that the map has room for."""
        return _information(self.number, self.name)[3]

    def __enter__(self) -> Map:
        return self

    def _element(
        self,
        what: str,
        command: int,
        key: bytearray | None,
        value: bytearray | None,
        flags: int = 0,
    ) -> None:
        if key is not None and len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key {len(key)} bytes long")
        _bpf(
            f"{what} map {self.name}",
            command,
            bytearray(
                _ELEMENT.pack(
                    self.number,
                    0,
                    0 if key is None else address(key),
                    0 if value is None else address(value),
                    flags,
                )
            ),
        )

    def lookup(self, key: bytes) -> bytes | None:
        """The value of ``key``, or None."""
        value = bytearray(self.value_size)
        try:
            self._element("look up in", _LOOKUP, bytearray(key), value)
        except BpfError as error:
            if error.errno == ENOENT:
                return None
            raise
        return bytes(value)

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Set ``key`` to ``value``."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name}: value {len(value)} bytes long")
        try:
            self._element("update", _UPDATE, bytearray(key), bytearray(value), flags)
        except BpfError as error:
            if error.errno == E2BIG:  # "Argument list too long" would mislead
                raise BpfError(f"map {self.name} is full", E2BIG) from error
            raise

    def delete(self, key: bytes) -> bool:
        """Delete ``key``; False if it was not there."""
        try:
            self._element("delete from", _DELETE, bytearray(key), None)
        except BpfError as error:
            if error.errno == ENOENT:
                return False
            raise
        return True

    def keys(self) -> Iterator[bytes]:
        """All keys; entries that come or go meanwhile may be seen or not, none forever."""
        key: bytearray | None = None
        seen: set[bytes] = set()
        while True:
            following = bytearray(self.key_size)
            try:
                self._element("walk", _NEXT_KEY, key, following)
            except BpfError as error:
                if error.errno == ENOENT:
                    return
                raise
            key = following
            # A deleted key restarts the walk (map_get_next_key of hash maps).
            if bytes(key) not in seen:
                seen.add(bytes(key))
                yield bytes(key)
            elif len(seen) > 1 << 20:
                return

    def items(self, chunk: int = 1024) -> Iterator[tuple[bytes, bytes]]:
        """All (key, value) of a hash map in batches (Linux 5.6); as complete as keys()."""
        keys = bytearray(self.key_size * chunk)
        values = bytearray(self.value_size * chunk)
        # The cursor is a u32 bucket number, but keep room for a key as the API documents.
        cursor = bytearray(max(self.key_size, 4))
        start, last = 0, False
        while not last:
            places = (start, address(cursor), address(keys), address(values))
            attributes = bytearray(_BATCH.pack(*places, chunk, self.number, 0, 0))
            try:
                _bpf(f"read map {self.name}", _LOOKUP_BATCH, attributes)
            except BpfError as error:
                if error.errno == EINTR:
                    continue
                if error.errno != ENOENT:
                    raise
                last = True
            (count,) = struct.unpack_from("=I", attributes, _BATCH_COUNT)
            for number in range(count):
                at_key, at_value = number * self.key_size, number * self.value_size
                yield (
                    bytes(keys[at_key : at_key + self.key_size]),
                    bytes(values[at_value : at_value + self.value_size]),
                )
            start = address(cursor)
