"""The differences that README.md tells of under Limits, each as narrow as it can be told.

A limit that guards prevent counts only without them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torture.compare import Limit

if TYPE_CHECKING:
    from torture.compare import Case
    from torture.programs import Step

_READS = {"recv", "read", "readv", "recvmsg", "recv_some", "fork", "splice_out"}
_PLACE = re.compile(r"(?:instead of \d+: )?(\d+)\+(\d+)")


def _step(case: Case) -> Step | None:
    """The step whose call saw the difference."""
    begun = case.difference.begun
    return case.program.steps[begun] if begun >= 0 else None


def _flag(case: Case, flag: str) -> bool:
    step = _step(case)
    return step is not None and flag in step.args.get("flags", ())


def _place(result: Any) -> tuple[int, int] | None:
    """First place and number of bytes that a read got."""
    if not isinstance(result, list) or len(result) < 2 or not isinstance(result[1], str):
        return None
    found = _PLACE.fullmatch(result[1])
    return (int(found[1]), int(found[2])) if found else None


def _shorter(case: Case) -> bool:
    """The lane's read got less, from the same place on."""
    ours, theirs = _place(case.difference.kernel), _place(case.difference.lane)
    return bool(ours and theirs and ours[0] == theirs[0] and theirs[1] < ours[1])


def _sends(case: Case, flag: str) -> bool:
    """Somebody has sent with this flag before."""
    return any(
        flag in step.args.get("flags", ()) and "send" in step.do
        for step in case.program.steps[: case.difference.step + 1]
    )


def _has_set(case: Case, *names: str) -> bool:
    """An actor of the difference's side has set one of these options before."""
    return any(
        step.do == "option" and step.by[0] == case.difference.side and step.args["name"] in names
        for step in case.program.steps[: case.difference.step + 1]
    )


def _fionread(case: Case) -> bool:
    ours, theirs = case.difference.kernel, case.difference.lane
    step = _step(case)
    if step is not None and step.do == "fionread":
        ours, theirs = ours and ours[-1], theirs and theirs[-1]
    elif not case.difference.what.endswith(" unread"):
        return False
    return isinstance(ours, int) and isinstance(theirs, int) and 0 <= theirs < ours


def _splice(case: Case) -> bool:
    step = _step(case)
    return not case.guarded and step is not None and step.do == "splice_out"


def _wait_all(case: Case) -> bool:
    """Short, or asleep for ever: in tcp_recvmsg, which does not see what is redirected."""
    return not case.guarded and any(
        step.by[0] == case.difference.side and "WAITALL" in step.args.get("flags", ())
        for step in case.program.steps[: case.difference.step + 1]
    )


def _discard(case: Case) -> bool:
    step = _step(case)
    return step is not None and step.do == "recv_discard" and case.difference.lane == ["EFAULT"]


def _low_water(case: Case) -> bool:
    return _has_set(case, "SO_RCVLOWAT")


def _zero_copy(case: Case) -> bool:
    return _sends(case, "ZEROCOPY") and (
        _flag(case, "ERRQUEUE") or "ERR" in str(case.difference.kernel)
    )


def _urgent(case: Case) -> bool:
    return _sends(case, "OOB")


def _information(case: Case) -> bool:
    step = _step(case)
    return step is not None and step.do == "tcp_info"


def _asleep_at(case: Case, number: int, side: str) -> bool:
    """An actor of this side sleeps in a read at this step; it keeps a closed socket open."""
    return any(
        step.by[0] == side
        and step.do in {*_READS, "recv_exact"}
        and f"{step.by} {step.do} (step {begun})" not in case.kernel[begun]
        for begun, step in enumerate(case.program.steps[:number])
    )


def _left_unread(case: Case) -> bool:
    """The other side has closed before with bytes unread."""
    other = "s" if case.difference.side == "c" else "c"
    for number, step in enumerate(case.program.steps[: case.difference.step + 1]):
        closes = (step.do == "close" and step.by[0] == other) or (
            step.by == "kill" and step.do[0] == other
        )
        before = case.kernel[number - 1] if number else {}
        process = f"{step.by}:" if step.by[1:] == "9" else other
        slot = f"{process}{step.args.get('slot', 0)} unread"
        if closes and (before.get(slot, 0) > 0 or _asleep_at(case, number, other)):
            return True
    return False


def _boundary(case: Case) -> bool:
    step = _step(case)
    return step is not None and step.do in _READS and _shorter(case)


def _peek_offset(case: Case) -> bool:
    return _has_set(case, "SO_PEEK_OFF") and _flag(case, "PEEK")


def _unread_hint(case: Case) -> bool:
    step = _step(case)
    return step is not None and step.do == "recvmsg" and _has_set(case, "TCP_INQ")


_WAKES = {"shutdown", "option", "send_all"}


def _woken(case: Case) -> bool:
    """A reader asleep gets EAGAIN: another thread did something that wakes sleepers."""
    difference = case.difference
    step = _step(case)
    if step is None or difference.lane != ["EAGAIN"] or step.do not in {*_READS, "recv_exact"}:
        return False
    if "DONTWAIT" in step.args.get("flags", ()):
        return False
    return any(
        other.by[0] == difference.side
        and other.by != step.by
        and other.do in _WAKES
        # After it has fallen asleep, or one that had not ended when it did.
        and (difference.begun < number or other.loose)
        for number, other in enumerate(case.program.steps[: difference.step + 1])
    )


def _half_closed(case: Case) -> bool:
    """A blocking reader gets EAGAIN after its own half-close, in a free-running program."""
    difference = case.difference
    if not case.program.free or not difference.what.endswith(" script"):
        return False
    script = [step for step in case.program.steps if step.by == difference.what.split()[0]]
    runs = zip(script, difference.kernel or [], difference.lane or [], strict=False)
    shut = False
    for step, ours, theirs in runs:
        if ours != theirs:
            return shut and step.do.startswith("recv") and theirs[0] == "EAGAIN"
        shut |= step.do == "shutdown"
    return False


def _reset_asleep(case: Case) -> bool:
    """A reader asleep gets EAGAIN when the peer resets, and the error from its next call."""
    step = _step(case)
    return (
        step is not None
        and step.do in {*_READS, "recv_exact"}
        and case.difference.begun < case.difference.step
        and (case.difference.kernel, case.difference.lane) == (["ECONNRESET"], ["EAGAIN"])
    )


def _was_reset(case: Case) -> bool:
    """The other side has closed with SO_LINGER 0 before."""
    return any(
        step.do == "linger" and step.args["seconds"] == 0 and step.by[0] != case.difference.side
        for step in case.program.steps[: case.difference.step]
    )


def _error_stays(case: Case) -> bool:
    """An error that a write has reported stays pending: the socket had to stay in the map."""
    ours, theirs = case.difference.kernel, case.difference.lane
    if not (ours and theirs):
        return False
    if isinstance(ours, list) and isinstance(theirs, list):  # the next read reports it again
        # Where the kernel path has nothing more to read: bytes that are missing are another matter.
        over = ours[:2] in (["ok", "nothing"], ["ok", 0])
        return over and theirs[0] == "ECONNRESET" and _was_reset(case)
    if not case.difference.what.endswith(" events"):
        return False
    return set(theirs.split("|")) == {*ours.split("|"), "ERR"} and "ERR" not in ours


def _disconnected(case: Case) -> bool:
    """What was redirected and unread outlives connect(AF_UNSPEC)."""
    return case.difference.side == "c" and any(
        step.do == "disconnect" and case.kernel[number - 1].get("c0 unread", 0) > 0
        for number, step in enumerate(case.program.steps[: case.difference.step + 1])
        if number
    )


def _nothing_sent(case: Case) -> bool:
    step = _step(case)
    writes = step is not None and ("send" in step.do or step.do.startswith("write"))
    if step is None or not writes or case.difference.lane != ["ok", 0]:
        return False
    return step.args.get("n") == 0 and case.difference.kernel[0] == "EPIPE"


LIMITS = (
    Limit("a sleeping reader beside another thread: EAGAIN", _woken),
    Limit("a blocking read after half-close: EAGAIN", _half_closed),
    Limit("a sleeping reader whose peer resets: EAGAIN", _reset_asleep),
    Limit("an error stays pending after a write", _error_stays, ends=False),
    Limit("disconnected with bytes unread", _disconnected),
    Limit("send of 0 bytes after shutdown: no EPIPE", _nothing_sent),
    Limit("FIONREAD counts one path's bytes", _fionread, ends=False),
    Limit("splice from the socket", _splice),
    Limit("MSG_WAITALL may return less", _wait_all),
    Limit("MSG_TRUNC without a buffer: EFAULT", _discard),
    Limit("SO_RCVLOWAT", _low_water),
    Limit("MSG_ZEROCOPY never completes", _zero_copy, ends=False),
    Limit("MSG_OOB is an ordinary byte", _urgent),
    Limit("TCP_INFO does not count redirected data", _information, ends=False),
    Limit("closed with bytes unread: no reset", _left_unread),
    Limit("a read ends where the path changes", _boundary),
    Limit("SO_PEEK_OFF is ignored", _peek_offset),
    Limit("TCP_INQ is not told", _unread_hint, ends=False),
)
