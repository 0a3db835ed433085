"""System calls for which Python 3.11 has no function: setns(2) and bpf(2).

``import ctypes`` builds classes for every C type there is: 1 ms, a tenth of what an ADD
takes. Its C half is enough to call syscall(2) with integers and addresses.
"""

from __future__ import annotations

import os
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    _SimpleCData,
    addressof,
    dlopen,
    dlsym,
    get_errno,
)

# asm/unistd.h; asm-generic/unistd.h (arm64) has its own numbers.
SETNS, BPF, UNSHARE = (268, 280, 97) if os.uname().machine == "aarch64" else (308, 321, 272)


class _Long(_SimpleCData):  # type: ignore[type-arg]  # cannot be subscripted when it runs
    _type_ = "l"


class _Byte(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Long
    _argtypes_ = (_Long, _Long, _Long, _Long)


_program = dlopen(None, 0)  # type: ignore[arg-type]  # None: this program and its libraries
_syscall = _Function(dlsym(_program, "syscall"))


def syscall(number: int, first: int = 0, second: int = 0, third: int = 0) -> int:
    """Call the kernel.

    Raises:
        OSError: with the call's errno.
    """
    result: int = _syscall(number, first, second, third)
    if result < 0:
        number = get_errno()
        raise OSError(number, os.strerror(number))
    return result


def address(buffer: bytearray) -> int:
    """Where a buffer is; valid as long as somebody holds it and it keeps its length."""
    return addressof(_Byte.from_buffer(buffer))
