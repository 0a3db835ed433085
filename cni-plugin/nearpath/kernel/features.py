"""What this kernel is and can do, one small probe per question.

Probes never raise: what cannot be found out is None or empty, and doctor says so.
"""

from __future__ import annotations

import os
import re

from nearpath.errors import BpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

Version = tuple[int, int, int]

# First release of each longterm series with "mptcp: Fix proto fallback detection with BPF"
# (c77b3b79a92e, December 2025), at the latest.
_MPTCP_FIXED: dict[tuple[int, int], int] = {
    (5, 10): 247,
    (5, 15): 197,
    (6, 1): 159,
    (6, 6): 119,
    (6, 12): 61,
    (6, 17): 11,
}

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as content:
            return content.read(65536).strip()
    except OSError:
        return ""


def parse_version(text: str) -> Version | None:
    """The first ``a.b`` or ``a.b.c`` in a text; a missing c is 0."""
    found = _VERSION.search(text)
    if not found:
        return None
    return int(found[1]), int(found[2]), int(found[3] or 0)


def upstream_version(release: str, build: str, signature: str) -> Version | None:
    """The kernel.org version that a distribution's kernel was made from.

    Debian's release says 6.1.0 for every 6.1.y and Ubuntu's 6.8.0; what they are made from
    stands elsewhere.

    Args:
        release: ``uname -r``, e.g. ``6.1.0-28-cloud-amd64``.
        build: ``uname -v``, e.g. ``#1 SMP PREEMPT_DYNAMIC Debian 6.1.119-1 (2024-11-22)``.
        signature: /proc/version_signature, e.g. ``Ubuntu 6.8.0-31.31-generic 6.8.1``.
    """
    debian = re.search(r"Debian (\d+\.\d+\.\d+)", build)
    if debian:
        return parse_version(debian[1])
    if signature:
        return parse_version(signature.rsplit(maxsplit=1)[-1])
    return parse_version(release)


def release() -> str:
    """Name of the running kernel, e.g. ``6.1.0-28-cloud-amd64``."""
    return os.uname().release


def version() -> Version | None:
    """Upstream version of the running kernel; see upstream_version."""
    kernel = os.uname()
    return upstream_version(kernel.release, kernel.version, _read("/proc/version_signature"))


def mptcp_children_are_safe(version: Version | None) -> bool:
    """True if accept(2) on MPTCP listeners survives sockets in a sockmap."""
    if version is None:
        return False
    if version >= (6, 18, 0):
        return True
    fixed = _MPTCP_FIXED.get(version[:2])
    return fixed is not None and version[2] >= fixed


def has_btf() -> bool:
    """True if the kernel describes its own types, which CO-RE needs."""
    return os.access("/sys/kernel/btf/vmlinux", os.R_OK)


def has_bpffs() -> bool:
    """True if the kernel knows the file system type ``bpf``."""
    return any(line.split()[-1:] == ["bpf"] for line in _read("/proc/filesystems").splitlines())


def has_netns_cookies() -> bool:
    """True if a network namespace tells its cookie (SO_NETNS_COOKIE, Linux 5.14)."""
    from nearpath.kernel import netns

    try:
        return netns.current_cookie() > 0
    except netns.NetnsError:
        return False


def sysctl(name: str) -> str:
    """Value of a sysctl such as ``net.core.bpf_jit_enable``; empty if there is none."""
    return _read("/proc/sys/" + name.replace(".", "/"))


def missing_prog_types(wanted: tuple[str, ...]) -> list[str]:
    """Those BPF program types that the kernel does not load (needs root)."""
    from nearpath.datapath import libbpf

    return [name for name in wanted if not libbpf.probe_prog_type(name)]


def missing_map_types(wanted: tuple[str, ...]) -> list[str]:
    """Those BPF map types that the kernel does not create (needs root)."""
    from nearpath.datapath import libbpf

    return [name for name in wanted if not libbpf.probe_map_type(name)]


def missing_helpers(prog_type: str, wanted: tuple[str, ...]) -> list[str]:
    """Those BPF helpers that programs of this type may not call (needs root)."""
    from nearpath.datapath import libbpf

    return [name for name in wanted if not libbpf.probe_helper(prog_type, name)]


def refused_programs(name: str) -> str:
    """Load the programs of a BPF object and let them go: why the kernel refuses, or empty.

    The proof that no version number gives: the verifier has seen every instruction and
    CO-RE has found every kernel member. Nothing is pinned or attached.
    """
    from nearpath.datapath import bundle, libbpf

    path = bundle.object_path(name)
    if not os.path.exists(path):
        return f"{path} is not there; run `make bpf`"
    problem = ""
    for left_out in (frozenset[str](), libbpf.YOUNG):
        try:
            with libbpf.Object(path) as built:
                built.leave_out(left_out)
                built.load()
        except BpfError as error:
            problem = problem or str(error)
        else:
            return ""
    return problem


def sock_ops_programs(cgroup: str) -> list[str]:
    """Names of the sock_ops programs attached to a cgroup or above it (needs root).

    Raises:
        BpfError, OSError: it cannot be asked.
    """
    from nearpath.datapath import libbpf

    return [str(program["name"]) for program in libbpf.cgroup_programs(cgroup)]


def exclusive_programs(cgroup: str) -> list[str]:
    """Names of the sock_ops programs that let no other one onto this cgroup (needs root).

    Raises:
        BpfError, OSError: it cannot be asked.
    """
    from nearpath.datapath import libbpf

    programs = libbpf.cgroup_programs(cgroup, effective=False)
    return [str(program["name"]) for program in programs if program["exclusive"]]


def pins(root: str = "/sys/fs/bpf") -> Iterator[str]:
    """Paths below ``root`` of everything pinned in bpffs, relative to it."""
    for directory, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            yield os.path.relpath(os.path.join(directory, name), root)
