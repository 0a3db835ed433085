"""Records of CNI attachments, and the node lock, under the run directory.

One JSON file per attachment (containerID, ifname). A record is written before anything
in the kernel changes and removed last, so whatever kills the plugin in between leaves a
record from which DEL and GC can undo. Files are written to a temporary name, synced and
renamed; the directory is root-only and checked before it is trusted.
"""

from __future__ import annotations

import fcntl
import os
import stat

from nearpath import quickjson
from nearpath.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any

    from nearpath.place import Place

_SUFFIX = ".json"
_TEMPORARY = ".tmp-"
# NAME_MAX is 255; room for "@", the interface name (3 x 15 when quoted) and suffixes.
_LONGEST_ID = 180
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


def _quote(text: str) -> str:
    """Percent-encode all but [A-Za-z0-9_.-], so that no name can leave the directory."""
    if _PLAIN.issuperset(text):
        return text
    return "".join(
        char if char in _PLAIN else "".join(f"%{byte:02x}" for byte in os.fsencode(char))
        for char in text
    )


def record_name(container_id: str, ifname: str) -> str:
    """File name of the record of an attachment: ``<containerID>@<ifname>.json``.

    Container IDs too long for a file name are replaced by their BLAKE2 digest.
    """
    head = _quote(container_id)
    if len(head) > _LONGEST_ID:
        from _blake2 import blake2b  # rare: keep hashlib (OpenSSL) off the hot path

        head = "~" + blake2b(container_id.encode("utf-8", "surrogateescape")).hexdigest()[:64]
    return f"{head}@{_quote(ifname)}{_SUFFIX}"


def secure_dir(path: str) -> str:
    """Make a root-only directory, or check that an existing one can be trusted.

    Raises:
        StateError: it is a symlink, belongs to somebody else, or others may write to it.
    """
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        try:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass  # another ADD was first
            info = os.lstat(path)
        except OSError as error:
            raise StateError(f"cannot make directory {path}: {error.strerror}") from error
    except OSError as error:
        raise StateError(f"cannot look at directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise StateError(f"{path} is not a directory", "remove it")
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise StateError(
            f"directory {path} is not ours alone (owner {info.st_uid}, mode {info.st_mode:o})",
            "chown it to root and chmod it to 0700",
        )
    return path


def write_file(path: str, data: bytes) -> None:
    """Replace a file atomically and durably (write, fsync, rename), mode 0600."""
    temporary = os.path.join(
        os.path.dirname(path), f"{_TEMPORARY}{os.getpid()}-{os.path.basename(path)[:120]}"
    )
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except OSError as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise StateError(f"cannot write {path}: {error.strerror}") from error


def read_file(path: str, limit: int = 1 << 20) -> bytes | None:
    """Content of a regular file of ours, or None if there is none.

    Raises:
        StateError: unreadable, a symlink, or longer than ``limit`` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot open {path}: {error.strerror}") from error
    try:
        data = b""
        while len(data) <= limit:
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return data
            data += chunk
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    raise StateError(f"{path} is longer than {limit} bytes", "remove it")


def _open_lock(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _same_file(descriptor: int, path: str) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


class LockedError(StateError):
    """Somebody else holds a lock, and waiting was not wanted."""


class Lock:
    """An exclusive flock(2), released by the kernel if we are killed.

    Waits without a limit of its own; the command's deadline interrupts the wait.

    Args:
        path: of the file in the run directory; empty: the node lock.
        wait: for whoever holds it; otherwise entering raises LockedError.
    """

    def __init__(self, place: Place, path: str = "", *, wait: bool = True) -> None:
        self._place = place
        self._path = path or place.lock_file
        self._how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        self._descriptor = -1

    def __enter__(self) -> Lock:
        secure_dir(self._place.run_dir)
        path = self._path
        try:
            self._descriptor = _open_lock(path)
            fcntl.flock(self._descriptor, self._how)
            # Its last holder may have removed the directory, and the file with it.
            while not _same_file(self._descriptor, path):
                os.close(self._descriptor)
                secure_dir(self._place.run_dir)
                self._descriptor = _open_lock(path)
                fcntl.flock(self._descriptor, self._how)
        except BlockingIOError as error:
            self.__exit__(None, None, None)
            raise LockedError(f"{path} is locked") from error
        except OSError as error:
            self.__exit__(None, None, None)
            raise StateError(f"cannot lock {path}: {error.strerror}") from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def note(self, text: str) -> None:
        """Replace the content of the locked file, for whoever finds it locked."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def save(place: Place, record: dict[str, Any]) -> None:
    """Write the record of one attachment.

    Args:
        record: JSON object with at least ``container_id`` and ``ifname``.
    """
    secure_dir(place.run_dir)
    directory = secure_dir(place.attachments_dir)
    name = record_name(record["container_id"], record["ifname"])
    write_file(f"{directory}/{name}", quickjson.dumps(record).encode() + b"\n")


def _parse(path: str) -> dict[str, Any] | None:
    data = read_file(path)
    if data is None:
        return None
    try:
        record = quickjson.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError(f"record {path} is not JSON", "remove it") from error
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("container_id"), str)
        or not isinstance(record.get("ifname"), str)
    ):
        raise StateError(f"record {path} is not an attachment record", "remove it")
    return record


# Reasons for a lane being off that were somebody's choice; all others are failures, which
# the next load of the datapath mends.
CHOSEN = frozenset(
    {
        "excluded-namespace",
        "annotation",
        "config",
        "no-guards",
        "own-netns",
        "other-attachment",
    }
)


def lane_of(record: dict[str, Any], lane: str = "socket") -> tuple[str, str]:
    """State ("on" or "off") and reason of a lane in a record, whatever the record holds."""
    lanes = record.get("lanes")
    found = lanes.get(lane) if isinstance(lanes, dict) else None
    if not isinstance(found, dict):
        return "off", ""
    return ("on" if found.get("state") == "on" else "off"), str(found.get("reason", ""))


def wants_lane(record: dict[str, Any], lane: str = "socket") -> bool:
    """True unless somebody chose that this attachment stays off the lane."""
    found, reason = lane_of(record, lane)
    return found == "on" or reason not in CHOSEN


def is_vm(record: dict[str, Any]) -> bool:
    """True if an attachment's pod said at ADD that it is a virtual machine's."""
    lanes = record.get("lanes")
    return isinstance(lanes, dict) and isinstance(lanes.get("tap"), dict)


def may_go_unguarded(record: dict[str, Any]) -> bool:
    """True if this attachment accepts the socket lane without guards."""
    lanes = record.get("lanes")
    found = lanes.get("socket") if isinstance(lanes, dict) else None
    return isinstance(found, dict) and found.get("unguarded") is True


def lane_cookies(place: Place, guarded: bool) -> list[int]:
    """Namespace cookies of the recorded pods that the socket lane is to serve.

    A pod, one of whose attachments requires guards, is not among them without guards: a
    socket belongs to the pod, not to one of its interfaces.
    """
    wanted: dict[int, bool] = {}
    for record in records(place):
        cookie = cookie_of(record)
        if cookie and wants_lane(record):
            wanted[cookie] = wanted.get(cookie, True) and (guarded or may_go_unguarded(record))
    return [cookie for cookie, served in wanted.items() if served]


def cookie_of(record: dict[str, Any] | None) -> int:
    """Network namespace cookie of a record; 0 if it holds none."""
    cookie = record.get("netns_cookie") if record else 0
    usable = isinstance(cookie, int) and not isinstance(cookie, bool) and 0 < cookie < 1 << 64
    return cookie if usable and isinstance(cookie, int) else 0


def load(place: Place, container_id: str, ifname: str) -> dict[str, Any] | None:
    """The record of one attachment, or None.

    Raises:
        StateError: there is one and it cannot be read or parsed.
    """
    return _parse(f"{place.attachments_dir}/{record_name(container_id, ifname)}")


def remove_file(path: str) -> None:
    """Remove a file; none there is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StateError(f"cannot remove {path}: {error.strerror}") from error


def remove(place: Place, container_id: str, ifname: str) -> None:
    """Remove the record of one attachment; none there is fine."""
    remove_file(f"{place.attachments_dir}/{record_name(container_id, ifname)}")


def records(place: Place) -> Iterator[dict[str, Any]]:
    """All readable records, sorted by file name; unreadable ones are passed over."""
    try:
        names = sorted(os.listdir(place.attachments_dir))
    except OSError:
        return
    for name in names:
        if not name.endswith(_SUFFIX) or name.startswith(_TEMPORARY):
            continue
        try:
            record = _parse(f"{place.attachments_dir}/{name}")
        except StateError:
            continue
        if record is not None:
            yield record


def sweep(place: Place) -> int:
    """Remove temporary files of writers that no longer live; the count removed."""
    removed = 0
    for directory in (place.run_dir, place.attachments_dir, place.vms_dir):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            if not name.startswith(_TEMPORARY):
                continue
            pid = name[len(_TEMPORARY) :].partition("-")[0]
            if pid.isdigit() and os.path.exists(f"/proc/{pid}"):
                continue
            try:
                os.unlink(f"{directory}/{name}")
                removed += 1
            except OSError:
                pass
    return removed


def count_failure(place: Place, reason: str) -> None:
    """Add one to the count of a failure reason; call it with the node lock not held.

    Never raises: counting must not make a failure worse.
    """
    try:
        with Lock(place):
            counts = failures(place)
            counts[reason] = counts.get(reason, 0) + 1
            write_file(place.failures_file, quickjson.dumps(counts).encode() + b"\n")
    except StateError:
        pass


def failures(place: Place) -> dict[str, int]:
    """Counts of failures by reason; empty if there are none or the file is damaged."""
    try:
        counts = quickjson.loads(read_file(place.failures_file) or b"{}")
    except (StateError, ValueError, RecursionError):
        return {}
    if not isinstance(counts, dict):
        return {}
    return {key: value for key, value in counts.items() if isinstance(value, int)}
