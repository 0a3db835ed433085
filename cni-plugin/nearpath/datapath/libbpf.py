"""libbpf by ctypes: loads and attaches programs. Maps have their own module (maps.py).

argtypes are set once; each wrapper turns libbpf's answer into BpfError with the noun that
failed. libbpf 1.x reports errors as NULL or a negative number with errno set (libbpf_get_error
is no longer needed; libbpf.h, "libbpf 1.0 migration").
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint32, c_void_p

from nearpath.datapath import bundle
from nearpath.datapath.maps import Descriptor
from nearpath.errors import BpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any

# Programs of ours that older kernels refuse, for they lack what these attach to.
YOUNG = frozenset({"nearpath_bpf_ioctl"})

# linux/bpf.h
ATTACH_SOCK_OPS = 3  # BPF_CGROUP_SOCK_OPS
ATTACH_SK_MSG = 7  # BPF_SK_MSG_VERDICT
_ATTACH_TCX_INGRESS = 46  # BPF_TCX_INGRESS, since Linux 6.6
_QUERY_EFFECTIVE = 1  # BPF_F_QUERY_EFFECTIVE
_ALLOW_MULTI = 2  # BPF_F_ALLOW_MULTI
_NAME = 16  # BPF_OBJ_NAME_LEN
_PROG_INFO_NAME = 64  # offset of name in struct bpf_prog_info
_PROG_INFO_SIZE = 80
_PROG_INFO_MAPS = 52  # offset of nr_map_ids, then the address of the array
_MAP_INFO_NAME = 24  # offset of name in struct bpf_map_info

_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    # name: (result, *arguments)
    "bpf_prog_attach": (c_int, c_int, c_int, c_int, c_uint32),
    "bpf_link_create": (c_int, c_int, c_int, c_int, c_void_p),
    "bpf_link_update": (c_int, c_int, c_int, c_void_p),
    "bpf_prog_query": (
        c_int,
        c_int,
        c_int,
        c_uint32,
        POINTER(c_uint32),
        POINTER(c_uint32),
        POINTER(c_uint32),
    ),
    "bpf_prog_get_fd_by_id": (c_int, c_uint32),
    "bpf_obj_get_info_by_fd": (c_int, c_int, c_void_p, POINTER(c_uint32)),
    "bpf_object__open_file": (c_void_p, c_char_p, c_void_p),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__next_map": (c_void_p, c_void_p, c_void_p),
    "bpf_object__next_program": (c_void_p, c_void_p, c_void_p),
    "bpf_map__name": (c_char_p, c_void_p),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__set_max_entries": (c_int, c_void_p, c_uint32),
    "bpf_map__set_pin_path": (c_int, c_void_p, c_char_p),
    "bpf_map__set_initial_value": (c_int, c_void_p, c_char_p, c_size_t),
    "bpf_map_get_fd_by_id": (c_int, c_uint32),
    "bpf_raw_tracepoint_open": (c_int, c_char_p, c_int),
    "bpf_program__set_autoload": (c_int, c_void_p, c_bool),
    "bpf_program__name": (c_char_p, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "libbpf_probe_bpf_prog_type": (c_int, c_int, c_void_p),
    "libbpf_probe_bpf_map_type": (c_int, c_int, c_void_p),
    "libbpf_probe_bpf_helper": (c_int, c_int, c_int, c_void_p),
    "libbpf_set_print": (c_void_p, c_void_p),
}

_PrintFunction = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)


class _Library:
    """libbpf, opened at first use; functions get their prototype at first use."""

    def __init__(self) -> None:
        self._handle: ctypes.CDLL | None = None
        self._said: list[str] = []
        self._print = _PrintFunction(self._listen)

    def __getattr__(self, name: str) -> Any:
        if self._handle is None:
            path = bundle.libbpf_path()
            try:
                self._handle = ctypes.CDLL(path, use_errno=True)
            except OSError as error:
                raise BpfError(f"cannot open {path}: {error}", remedy="install libbpf1") from error
            # libbpf's own messages go into our errors, never to stdout or stderr.
            self.libbpf_set_print(ctypes.cast(self._print, c_void_p))
        result, *arguments = _PROTOTYPES[name]
        function = getattr(self._handle, name)
        function.restype = result
        function.argtypes = arguments
        setattr(self, name, function)
        return function

    def _listen(self, level: int, form: bytes, arguments: int) -> int:
        """libbpf_print_fn_t: keep the warnings.

        The third argument is a va_list, which both x86-64 and arm64 pass by address.
        """
        if level == 0:
            buffer = ctypes.create_string_buffer(2048)
            ctypes.CDLL(None).vsnprintf(buffer, c_size_t(2048), c_char_p(form), c_void_p(arguments))
            self._said.extend(buffer.value.decode("utf-8", "replace").strip().splitlines())
            del self._said[:-40]
        return 0

    def said(self) -> str:
        """Last lines that libbpf has printed since the last call; empty if none."""
        text = " | ".join(line for line in self._said[-4:] if line)
        self._said.clear()
        return text


_lib = _Library()


def _error(what: str, result: int = 0) -> BpfError:
    number = -result if result < -1 else ctypes.get_errno()
    text = f"cannot {what}: {os.strerror(number)}"
    said = _lib.said()
    return BpfError(f"{text} ({said})" if said else text, number)


def _check(what: str, result: int) -> int:
    if result < 0:
        raise _error(what, result)
    return result


class Object:
    """A BPF object file: open, set pin paths, load; a context that closes it.

    Descriptors of programs and maps live as long as the object is open.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._pointer = _lib.bpf_object__open_file(path.encode(), None)
        if not self._pointer:
            raise _error(f"open BPF object {path}")

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _lib.bpf_object__close(self._pointer)

    def _walk(self, function: str) -> Iterator[int]:
        item = None
        while True:
            item = getattr(_lib, function)(self._pointer, item)
            if not item:
                return
            yield item

    def pin_maps_under(self, directory: str) -> list[str]:
        """Pin every map as ``directory/<name>`` on load, or reuse what is pinned there.

        Maps whose name has a dot (.rodata, .bss) belong to the programs alone.

        Returns:
            The names of the maps.
        """
        names = []
        for item in self._walk("bpf_object__next_map"):
            name = _lib.bpf_map__name(item).decode()
            if "." in name:
                continue
            path = f"{directory}/{name}".encode()
            _check(f"pin map {name}", _lib.bpf_map__set_pin_path(item, path))
            names.append(name)
        return names

    def set_sizes(self, entries: dict[str, int]) -> None:
        """Make maps larger or smaller than their source says, before load().

        Args:
            entries: most entries by the map's name; other maps stay as they are.
        """
        for item in self._walk("bpf_object__next_map"):
            name = _lib.bpf_map__name(item).decode()
            if name in entries:
                result = _lib.bpf_map__set_max_entries(item, entries[name])
                _check(f"set the size of map {name}", result)

    def set_constants(self, content: bytes) -> None:
        """Fill in the object's ``const volatile`` data, before load().

        Args:
            content: all of it, as long as the source says.
        """
        for item in self._walk("bpf_object__next_map"):
            if _lib.bpf_map__name(item).endswith(b".rodata"):
                result = _lib.bpf_map__set_initial_value(item, content, len(content))
                _check(f"set the constants of {self._path}", result)

    def leave_out(self, names: frozenset[str]) -> None:
        """Do not load these programs."""
        for item in self._walk("bpf_object__next_program"):
            if _lib.bpf_program__name(item).decode() in names:
                _check("leave a program out", _lib.bpf_program__set_autoload(item, False))

    def load(self) -> None:
        """Create the maps and load the programs (verifier)."""
        _check(f"load BPF object {self._path}", _lib.bpf_object__load(self._pointer))

    def programs(self) -> dict[str, Descriptor]:
        """Loaded programs by name; their descriptors belong to the object."""
        return {
            name: Descriptor(number, name)
            for item in self._walk("bpf_object__next_program")
            for name in [_lib.bpf_program__name(item).decode()]
            for number in [_lib.bpf_program__fd(item)]
            if number >= 0  # not one that was left out
        }

    def maps(self) -> dict[str, Descriptor]:
        """Created maps by name; their descriptors belong to the object."""
        return {
            name: Descriptor(_lib.bpf_map__fd(item), name)
            for item in self._walk("bpf_object__next_map")
            for name in [_lib.bpf_map__name(item).decode()]
        }


def attach_to_map(program: Descriptor, sockmap: Descriptor) -> None:
    """Make ``program`` the sk_msg program of sockets that join ``sockmap`` from now on."""
    result = _lib.bpf_prog_attach(program.number, sockmap.number, ATTACH_SK_MSG, 0)
    _check(f"attach {program.name} to {sockmap.name}", result)


def attach_to_cgroup(program: Descriptor, cgroup: str) -> Descriptor:
    """Attach a sock_ops program to a cgroup directory; detached when the link is closed.

    A bpf_link, because a legacy attachment without BPF_F_ALLOW_MULTI would block every
    child cgroup (kernel/bpf/cgroup.c, hierarchy_allows_attach).
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        number = _lib.bpf_link_create(program.number, directory, ATTACH_SOCK_OPS, None)
        return Descriptor(_check(f"attach {program.name} to cgroup {cgroup}", number), cgroup)
    finally:
        os.close(directory)


def attach_tracing(program: Descriptor) -> Descriptor:
    """Attach an fentry program to the function that its section names."""
    number = _lib.bpf_raw_tracepoint_open(None, program.number)
    return Descriptor(_check(f"attach {program.name}", number), program.name)


def update_link(link: Descriptor, program: Descriptor) -> None:
    """Replace the program of a link; no event goes unseen meanwhile."""
    result = _lib.bpf_link_update(link.number, program.number, None)
    _check(f"replace the program of {link.name}", result)


def cgroup_programs(cgroup: str, effective: bool = True) -> list[dict[str, object]]:
    """The sock_ops programs of a cgroup: ``[{"id", "name", "exclusive"}]``.

    Exclusive ones were attached without BPF_F_ALLOW_MULTI and so keep out all others.

    Args:
        effective: those that run for it, including ancestors' (the kernel does not tell
            which are exclusive then); else only its own.
    """
    most = 64
    ids, count = (c_uint32 * most)(), c_uint32(most)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how, attached = _QUERY_EFFECTIVE if effective else 0, c_uint32()
        result = _lib.bpf_prog_query(directory, ATTACH_SOCK_OPS, how, attached, ids, count)
        _check(f"query the programs of cgroup {cgroup}", result)
    finally:
        os.close(directory)
    exclusive = not effective and not attached.value & _ALLOW_MULTI
    return [
        {"id": number, "name": _program_name(number), "exclusive": exclusive}
        for number in ids[: count.value]
    ]


def _program_name(number: int) -> str:
    info = ctypes.create_string_buffer(_PROG_INFO_SIZE)
    if not _information(_lib.bpf_prog_get_fd_by_id(number), info, close=True):
        return ""
    name = info.raw[_PROG_INFO_NAME : _PROG_INFO_NAME + _NAME]
    return name.partition(b"\0")[0].decode("utf-8", "replace")


def map_of_program(number: int, name: str) -> Descriptor | None:
    """The map of this name that the program with this ID uses; None: no such one (any more)."""
    ids, most = (c_uint32 * 8)(), 8
    info = ctypes.create_string_buffer(_PROG_INFO_SIZE)
    c_uint32.from_buffer(info, _PROG_INFO_MAPS).value = most
    ctypes.c_uint64.from_buffer(info, _PROG_INFO_MAPS + 4).value = ctypes.addressof(ids)
    if not _information(_lib.bpf_prog_get_fd_by_id(number), info, close=True):
        return None
    count = c_uint32.from_buffer(info, _PROG_INFO_MAPS).value
    for map_number in ids[: min(count, most)]:
        found = _lib.bpf_map_get_fd_by_id(map_number)
        about = ctypes.create_string_buffer(_PROG_INFO_SIZE)
        if _information(found, about, close=False):
            called = about.raw[_MAP_INFO_NAME : _MAP_INFO_NAME + _NAME].partition(b"\0")[0]
            if called == name.encode():
                return Descriptor(found, name)
            os.close(found)
    return None


def _information(descriptor: int, info: ctypes.Array[ctypes.c_char], *, close: bool) -> bool:
    """Fill in the bpf_…_info of an object; False if there is no such object."""
    if descriptor < 0:
        return False
    size = c_uint32(len(info))
    told: int = _lib.bpf_obj_get_info_by_fd(descriptor, info, size)
    if close or told < 0:
        os.close(descriptor)
    return told >= 0


def has_tcx(index: int) -> bool:
    """True if a device of our namespace has tcx programs at ingress (none before Linux 6.6)."""
    ids, count, flags = (c_uint32 * 1)(), c_uint32(0), c_uint32()
    result = _lib.bpf_prog_query(index, _ATTACH_TCX_INGRESS, 0, flags, ids, count)
    return result >= 0 and count.value > 0


# enum bpf_prog_type, bpf_map_type and bpf_func_id of linux/bpf.h: those doctor asks for.
_PROG_TYPES = {"sched_cls": 3, "sock_ops": 13, "sk_msg": 16, "tracing": 26}
_MAP_TYPES = {
    "hash": 1,
    "array": 2,
    "percpu_hash": 5,
    "lru_hash": 9,
    "sockhash": 18,
    "sk_storage": 24,
}
_HELPERS = {
    "ktime_get_ns": 5,
    "sock_hash_update": 70,
    "msg_redirect_hash": 71,
    "sock_ops_cb_flags_set": 59,
    "sk_storage_get": 107,
    "probe_read_kernel": 113,
    "get_netns_cookie": 122,
    "skc_to_tcp_sock": 137,
    "redirect_peer": 155,
}


def probe_prog_type(name: str) -> bool:
    """True if the kernel loads programs of this type (needs CAP_BPF)."""
    return bool(_lib.libbpf_probe_bpf_prog_type(_PROG_TYPES[name], None) == 1)


def probe_map_type(name: str) -> bool:
    """True if the kernel creates maps of this type."""
    return bool(_lib.libbpf_probe_bpf_map_type(_MAP_TYPES[name], None) == 1)


def probe_helper(prog_type: str, helper: str) -> bool:
    """True if the kernel lets programs of this type call this helper."""
    kind, number = _PROG_TYPES[prog_type], _HELPERS[helper]
    return bool(_lib.libbpf_probe_bpf_helper(kind, number, None) == 1)
