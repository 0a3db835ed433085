"""What tests need of the kernel: probed or compared with its version, never assumed.

    @pytest.mark.needs_kernel("6.12", "tcx links")   from this version on, for this reason
    @pytest.mark.needs_fentry                        where the kernel takes fentry programs
    @pytest.mark.needs_tls                           where it has TLS

On the kernels of tests/kernels a test is skipped only by needs_kernel, and only on a kernel
older than the version it names: anything else there is a failure.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import socket
import struct
from typing import TYPE_CHECKING

from helpers.commands import CommandError

if TYPE_CHECKING:
    import pytest

_PROG_TYPE_TRACING = 26  # enum bpf_prog_type
_TRACE_FENTRY = 24  # enum bpf_attach_type
_TCP_ULP = 31  # linux/tcp.h
# struct bpf_insn: r0 = 0; exit
_RETURN_0 = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
_PATTERN = re.compile(r"needs Linux (\d+)\.(\d+): \S")


class _LoadOptions(ctypes.Structure):
    """The first members of struct bpf_prog_load_opts (bpf/bpf.h)."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
    )


@functools.cache
def fentry_refusal(function: str = "tcp_splice_read") -> str:
    """Why this kernel does not let a program run at the entry of a function of it, or empty.

    A program of two instructions is loaded and attached for a moment, by libbpf itself: what
    decides about skipping must not be the code under test.
    """
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    libbpf.libbpf_set_print(None)
    found = libbpf.libbpf_find_vmlinux_btf_id(function.encode(), _TRACE_FENTRY)
    if found < 0:
        return f"{function} is not in its BTF: {os.strerror(-found)}"
    options = _LoadOptions(expected_attach_type=_TRACE_FENTRY, attach_btf_id=found)
    options.sz = ctypes.sizeof(options)
    program = libbpf.bpf_prog_load(
        *(_PROG_TYPE_TRACING, b"np_probe", b"GPL", _RETURN_0, ctypes.c_size_t(2)),
        ctypes.byref(options),
    )
    if program < 0:
        return f"it does not load: {os.strerror(ctypes.get_errno())}"
    try:
        attached = libbpf.bpf_raw_tracepoint_open(None, program)
        if attached < 0:
            return f"it does not attach: {os.strerror(ctypes.get_errno())}"
        os.close(attached)
    finally:
        os.close(program)
    return ""


@functools.cache
def has_tls() -> bool:
    """True if the kernel has its TLS protocol; the module loads by asking for it."""
    with socket.socket() as unconnected:
        try:
            unconnected.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except OSError as error:
            return error.errno == errno.ENOTCONN
    return True


def version(release: str) -> tuple[int, int]:
    """Series of a kernel, (6, 12), from what ``uname -r`` says."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise CommandError(f"{release!r} is no release of a kernel")
    return int(match[1]), int(match[2])


def missing(item: pytest.Item) -> str:
    """What the test needs that the running kernel does not have; empty if nothing."""
    release = os.uname().release
    for mark in item.iter_markers("needs_kernel"):
        least, feature = mark.args
        if version(release) < version(least):
            return f"needs Linux {least}: {feature}"
    if item.get_closest_marker("needs_fentry") and (refusal := fentry_refusal()):
        return f"needs fentry, which this kernel refuses: {refusal}"
    if item.get_closest_marker("needs_tls") and not has_tls():
        return "needs TLS, which this kernel does not have"
    return ""


def excused(reason: str, release: str) -> bool:
    """May a test be skipped for this reason on a stock kernel of this release?"""
    match = _PATTERN.match(reason)
    return match is not None and version(release) < (int(match[1]), int(match[2]))
