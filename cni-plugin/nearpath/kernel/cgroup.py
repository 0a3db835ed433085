"""Where this node's cgroup v2 hierarchy is mounted."""

from __future__ import annotations

from nearpath.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def unescape(field: str) -> str:
    r"""A mountinfo field with its octal escapes (``\040`` for a space) undone; see proc(5)."""
    parts = field.split("\\")
    return parts[0] + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts[1:])


def mounts(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(root within the file system, mount point, type) of each line of mountinfo."""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        kind = after.split()
        if len(fields) >= 5 and kind:
            yield unescape(fields[3]), unescape(fields[4]), kind[0]


def v2_root(mountinfo: str = "/proc/self/mountinfo") -> str:
    """Mount point of the root of the cgroup v2 hierarchy (unified or hybrid).

    Programs attached there see the sockets of every cgroup, thus of every pod.

    Raises:
        Unavailable: ``no-cgroup2``.
    """
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
            for root, point, kind in mounts(lines):
                # Other roots are bind mounts of a part of the tree (a container's view).
                if kind == "cgroup2" and root == "/":
                    return point
    except OSError as error:
        raise Unavailable("no-cgroup2", f"cannot read {mountinfo}: {error.strerror}") from error
    raise Unavailable(
        "no-cgroup2",
        "no cgroup v2 hierarchy is mounted",
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    )
