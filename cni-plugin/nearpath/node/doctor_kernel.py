"""doctor's questions to the kernel: from what a probe found to a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath.errors import NearpathError
from nearpath.kernel import features
from nearpath.kernel.mounts import BPFFS
from nearpath.node.finding import FAIL, OK, WARN, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nearpath.kernel.features import Version

# What the programs in bpf/ need, and the kernel that had it first.
OLDEST: Version = (5, 15, 0)
PROG_TYPES = ("sock_ops", "sk_msg")
MAP_TYPES = ("hash", "array", "percpu_hash", "lru_hash", "sockhash", "sk_storage")
HELPERS = {
    "sock_ops": (
        "get_netns_cookie",
        "sock_hash_update",
        "sock_ops_cb_flags_set",
        "sk_storage_get",
        "probe_read_kernel",
        "ktime_get_ns",
    ),
    "sk_msg": (
        "get_netns_cookie",
        "msg_redirect_hash",
        "skc_to_tcp_sock",
        "sk_storage_get",
        "probe_read_kernel",
        "ktime_get_ns",
    ),
}
EVERYTHING = "the socket lane: TCP stays on the kernel path"


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)


def check_version(version: Version | None, release: str, cookies: bool) -> Finding:
    """5.14 for SO_NETNS_COOKIE, 5.15 for bpf_get_netns_cookie in sock_ops and sk_msg."""
    name = "kernel-version"
    if not cookies:
        return Finding(
            name,
            FAIL,
            f"{release} has no network namespace cookies",
            EVERYTHING,
            "use Linux 5.15 or newer (SO_NETNS_COOKIE came with 5.14)",
        )
    if version is None or version < OLDEST:
        # A distribution may have carried the helper over; the check "programs" will tell.
        return Finding(
            name,
            WARN,
            f"{release} is older than {_text(OLDEST)}",
            "certainty: bpf_get_netns_cookie for sock_ops and sk_msg came with 5.15",
            "see the check programs, or use a newer kernel",
        )
    made_from = _text(version)
    return Finding(name, OK, release if made_from in release else f"{release} ({made_from})")


def check_btf(present: bool) -> Finding:
    """CO-RE adapts the programs to this kernel's structures by its BTF."""
    if present:
        return Finding("btf", OK, "/sys/kernel/btf/vmlinux")
    return Finding(
        "btf",
        FAIL,
        "no /sys/kernel/btf/vmlinux",
        f"{EVERYTHING}; the programs cannot find the members of kernel structures",
        "use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
    )


def check_cgroup(find: Callable[[], str]) -> Finding:
    """sock_ops programs attach to a cgroup v2 directory; beside cgroup v1 will do."""
    try:
        return Finding("cgroup-v2", OK, find())
    except NearpathError as error:
        return Finding("cgroup-v2", FAIL, error.message, EVERYTHING, error.remedy)


def check_bpffs(mounted: bool, known: bool) -> Finding:
    """Maps and programs are pinned in bpffs, for no process of ours stays."""
    if mounted:
        return Finding("bpffs", OK, f"mounted at {BPFFS}")
    if known:
        return Finding("bpffs", OK, f"not mounted; nearpath mounts it at {BPFFS} on load")
    return Finding(
        "bpffs",
        FAIL,
        "the kernel has no BPF file system",
        EVERYTHING,
        "use a kernel built with CONFIG_BPF_SYSCALL=y",
    )


def check_jit(value: str) -> Finding:
    """Without the JIT each program is interpreted."""
    if value in {"1", "2"} or not value:  # no such file: always on (CONFIG_BPF_JIT_ALWAYS_ON)
        return Finding("bpf-jit", OK, "on")
    return Finding(
        "bpf-jit",
        WARN,
        "net.core.bpf_jit_enable is 0",
        "most of the gain: every message runs an interpreted program",
        "sysctl -w net.core.bpf_jit_enable=1",
    )


def check_missing(name: str, missing: Sequence[str], found: str) -> Finding:
    """A list of things that the programs cannot do without."""
    if not missing:
        return Finding(name, OK, found)
    return Finding(
        name,
        FAIL,
        f"missing: {', '.join(missing)}",
        EVERYTHING,
        "use a newer kernel, or one built with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF, "
        "CONFIG_NET_SOCK_MSG and CONFIG_BPF_EVENTS",
    )


def check_programs(refused: str) -> Finding:
    """The proof: the kernel takes our programs."""
    if not refused:
        return Finding("programs", OK, "the kernel accepts the programs of the socket lane")
    return Finding(
        "programs",
        FAIL,
        refused,
        EVERYTHING,
        "see the other findings; if all of them are ok, report this text as a bug",
    )


def check_guards(refused: str, attached: bool | None) -> Finding:
    """Guards spot readers that sockmap breaks (splice and the like), by fentry programs.

    Args:
        refused: why the kernel refuses them; empty if it does not.
        attached: those of the loaded datapath are; None: nothing is loaded.
    """
    name = "guards"
    if attached:
        return Finding(name, OK, "attached")
    if not refused and attached is None:
        return Finding(name, OK, "possible; they are attached when the datapath is loaded")
    # The rest is libbpf's log, which is in `nearpath status --json`.
    why = refused.partition(" (libbpf:")[0] or "attached by no load yet"
    return Finding(
        name,
        WARN,
        f"not attached: {why}",
        'the lane for pods without the annotation nearpath.io/socket-lane: "on", where the '
        'conflist does not say "guards": "preferred"',
        "a kernel with BTF that allows fentry (CONFIG_FUNCTION_TRACER, no lockdown), then "
        "`nearpath unload` and `load`; or one of these two, if no program on the lane reads with "
        "splice(2), MSG_WAITALL or MSG_TRUNC: without guards such a reader hangs or comes short",
    )


def check_mptcp(version: Version | None, enabled: str) -> Finding:
    """Kernels before December 2025 crash on accept(2) if a sockmap has an MPTCP child.

    There nearpath leaves the connections of MPTCP listeners alone (counted as ``mptcp``);
    another user of sockmap may not. With the fix, TCP connections that such a listener has
    accepted take the lane (setting mptcp_fallback).
    """
    if enabled in {"", "0"}:
        return Finding("mptcp", OK, "off in the host's network namespace")
    if features.mptcp_children_are_safe(version):
        return Finding(
            "mptcp",
            OK,
            "on; TCP connections of MPTCP listeners (Go 1.24 and newer: all) take the lane, for "
            "this kernel has the fix (setting mptcp_fallback); MPTCP itself stays on the kernel "
            "path",
        )
    return Finding(
        "mptcp",
        WARN,
        "on, and this kernel may crash when a sockmap holds a child of an MPTCP listener",
        "the lane for connections of MPTCP listeners (Go 1.24 and newer: all listeners), which "
        "nearpath leaves alone here; other sockmap users may not",
        "update the kernel (fixed in December 2025, c77b3b79a92e), or sysctl -w "
        "net.mptcp.enabled=0 in the pods; of a Go program: GODEBUG=multipathtcp=0",
    )


def check_exclusive(ask: Callable[[], list[str]]) -> Finding:
    """A legacy attachment without BPF_F_ALLOW_MULTI keeps all others off the cgroup."""
    name = "cgroup-attachment"
    try:
        others = [program or "(unnamed)" for program in ask()]
    except (NearpathError, OSError) as error:
        return Finding(name, OK, f"cannot be asked: {error}")
    if not others:
        return Finding(name, OK, "free for our program")
    return Finding(
        name,
        FAIL,
        f"the cgroup root belongs to {', '.join(sorted(others))} alone",
        EVERYTHING,
        "see `bpftool cgroup tree`; stop its owner, or let it attach with BPF_F_ALLOW_MULTI",
    )


def check_sock_ops(ask: Callable[[], list[str]]) -> Finding:
    """Other sock_ops programs may want the same sockets; a socket has one sockmap program."""
    name = "other-sock-ops"
    try:
        others = [program or "(unnamed)" for program in ask()]
    except (NearpathError, OSError) as error:
        return Finding(name, OK, f"cannot be asked: {error}")
    others = [program for program in others if not program.startswith("nearpath_")]
    if not others:
        return Finding(name, OK, "none on the cgroup root")
    return Finding(
        name,
        WARN,
        f"on the cgroup root: {', '.join(sorted(others))}",
        "the lane for sockets that these put into a sockmap first (counted as socket_busy)",
        "see `bpftool cgroup tree`; let only one of them accelerate sockets",
    )
