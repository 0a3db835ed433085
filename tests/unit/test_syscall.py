"""nearpath.kernel.syscall: numbers, errors and addresses."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from nearpath.kernel.syscall import BPF, SETNS, address, syscall


def test_result() -> None:
    getpid = 172 if os.uname().machine == "aarch64" else 39
    assert syscall(getpid) == os.getpid()


def test_errno_becomes_an_exception() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        syscall(SETNS, -1, 0)
    assert caught.value.errno == errno.EBADF


def test_bpf_is_bpf() -> None:
    """An unknown command is refused by bpf(2), with or without privileges."""
    attributes = bytearray(8)
    with pytest.raises(OSError, match=r".") as caught:
        syscall(BPF, 9999, address(attributes), len(attributes))
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)


def test_address() -> None:
    buffer = bytearray(b"nearpath")
    assert ctypes.string_at(address(buffer), 8) == b"nearpath"
    buffer.extend(b"!")  # nothing holds on to it
