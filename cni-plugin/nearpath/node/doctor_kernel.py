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


def check_fentry(missing: Sequence[str]) -> Finding:
    """Guards that spot readers which sockmap breaks will need fentry."""
    if not missing:
        return Finding("fentry", OK, "possible (this version does not need it)")
    return Finding(
        "fentry",
        OK,
        "not possible here (this version does not need it; guards in later versions will)",
    )


def check_mptcp(version: Version | None, enabled: str) -> Finding:
    """Kernels before December 2025 crash on accept(2) if a sockmap has an MPTCP child.

    nearpath leaves connections of MPTCP listeners alone on every kernel (counted as
    ``mptcp``); another user of sockmap may not.
    """
    if enabled in {"", "0"}:
        return Finding("mptcp", OK, "off in the host's network namespace")
    if features.mptcp_children_are_safe(version):
        return Finding(
            "mptcp", OK, "on; MPTCP listeners (Go 1.24 and newer: all) stay on the kernel path"
        )
    return Finding(
        "mptcp",
        WARN,
        "on, and this kernel may crash when a sockmap holds a child of an MPTCP listener",
        "nothing of nearpath's, which leaves such connections alone; other sockmap users may not",
        "update the kernel (fixed in December 2025, c77b3b79a92e), or sysctl -w "
        "net.mptcp.enabled=0 in the pods",
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
