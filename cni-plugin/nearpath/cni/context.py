"""What every command shares: the request being served, how failures are told, releases."""

from __future__ import annotations

import os

from nearpath import state
from nearpath.cni import netconf, protocol
from nearpath.errors import BpfError, DeadlineExceeded, NearpathError, StateError, Unavailable
from nearpath.log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nearpath.cni.deadline import Deadline
    from nearpath.cni.doors import Doors
    from nearpath.cni.netconf import NetConf
    from nearpath.cni.protocol import Request
    from nearpath.place import Place

# Our own error codes; conf/README.md lists them.
CODE_UNAVAILABLE = 100
CODE_DATAPATH = 101
CODE_STATE = 102
CODE_CHECK = 110


_SHORT_ID = 13  # as container runtimes abbreviate an ID, and an ellipsis
# Seconds for clearing up after a failure, beyond the deadline.
GRACE = 0.5


class Failure:
    """An internal failure, classified: counted reason, CNI code, text."""

    __slots__ = ("code", "reason", "text")

    def __init__(self, error: BaseException) -> None:
        self.code = protocol.INTERNAL
        self.reason = "internal"
        self.text = str(error)
        if isinstance(error, DeadlineExceeded):
            self.code, self.reason = protocol.TRY_AGAIN_LATER, "deadline"
        elif isinstance(error, Unavailable):
            self.code, self.reason = CODE_UNAVAILABLE, error.reason
        elif isinstance(error, BpfError):
            self.code, self.reason = CODE_DATAPATH, "bpf"
        elif isinstance(error, StateError):
            self.code, self.reason = CODE_STATE, "state"
        elif isinstance(error, NearpathError):
            from nearpath.kernel.netns import NetnsError

            if isinstance(error, NetnsError):
                self.code, self.reason = protocol.INVALID_NETNS, "netns"
        else:
            # A bug or a broken machine. The type and the place alone: the text of a foreign
            # error may hold anything.
            what = error.strerror if isinstance(error, OSError) else type(error).__name__
            self.text = f"internal error ({what}{_where(error)})"


def _where(error: BaseException) -> str:
    """``file:line`` of the innermost frame, for a report of a bug."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"


def _title(request: Request) -> str:
    """What log lines about a request begin with."""
    if not request.container_id:
        return f"{request.command} {request.network}"
    container = request.container_id
    if len(container) > _SHORT_ID:
        container = container[: _SHORT_ID - 1] + "…"
    return f"{request.command} {container}/{request.ifname}"


class Context:
    """One command being served.

    Attributes:
        request, conf: the request, and our keys of its configuration.
        place, doors: where things are kept, and what the kernel is asked through.
        log, deadline: of this command.
    """

    __slots__ = ("_uncounted", "conf", "deadline", "doors", "log", "place", "request")

    def __init__(self, place: Place, doors: Doors, deadline: Deadline, request: Request) -> None:
        self.place = place
        self.doors = doors
        self.deadline = deadline
        self.request = request
        self.conf: NetConf = netconf.parse(request.config)
        deadline.restart(self.conf.deadline(request.command))
        self.log = Log(place, _title(request), level=self.conf.log_level)
        self._uncounted: list[str] = []

    def log_problems(self) -> None:
        """Log keys of ours that are unusable, for commands that go on regardless."""
        for text in self.conf.problems:
            self.log.error(f"configuration: {text}")

    def failed(self, failure: Failure, what: str) -> None:
        """Note an internal failure: log it, and count it when there is time.

        The deadline does not end this (a stderr that nobody reads can block): it comes again.
        """
        self._uncounted.append(failure.reason)
        try:
            self.log.error(f"{what}: {failure.text} [{failure.reason}]")
        except DeadlineExceeded:
            pass

    def count_failures(self) -> None:
        """Count what failed; last, for it waits for the node lock, which a load may hold."""
        if not self._uncounted:
            return
        self.deadline.restart(GRACE)
        try:
            while self._uncounted:
                state.count_failure(self.place, self._uncounted.pop())
        except DeadlineExceeded:
            pass

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Do one step that must not stop the others; False if it failed (logged, counted)."""
        try:
            action()
        except DeadlineExceeded:
            raise
        except Exception as error:
            self.failed(Failure(error), what)
            return False
        return True


# Records. A namespace may belong to several attachments (a pod's second interface), and
# its registration with them.


def _same_attachment(record: dict[str, Any], request: Request) -> bool:
    return bool(
        record["container_id"] == request.container_id and record["ifname"] == request.ifname
    )


def others(context: Context, cookie: int) -> list[dict[str, Any]]:
    """Records of other attachments in the same namespace."""
    return [
        record
        for record in state.records(context.place)
        if state.cookie_of(record) == cookie and not _same_attachment(record, context.request)
    ]


def has_siblings(context: Context) -> bool:
    """True if there are records of other attachments of the same container; cheap."""
    request = context.request
    own = state.record_name(request.container_id, request.ifname)
    every = state.record_name(request.container_id, "").removesuffix(".json")
    try:
        names = os.listdir(context.place.attachments_dir)
    except OSError:
        return False
    return any(name.startswith(every) and name != own for name in names)


def release(context: Context, cookie: int) -> None:
    """Unregister a namespace, unless another attachment in it wants the lane."""
    if cookie and not any(state.wants_lane(other) for other in others(context, cookie)):
        context.doors.unregister(context.place, cookie)


def old_record(context: Context) -> dict[str, Any] | None:
    """The record of this attachment from before; None also if it is damaged (logged)."""
    try:
        return state.load(context.place, context.request.container_id, context.request.ifname)
    except StateError as error:
        context.failed(Failure(error), "old record")
        return None
