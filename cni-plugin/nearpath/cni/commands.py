"""ADD, DEL, CHECK and STATUS (GC has its own module), and the way in from the runtime.

ADD: verify the request, find the namespace and the host veth, write the record, make sure
that the datapath is loaded, register the namespace, print prevResult. The record is on
disk before the kernel changes and goes last on DEL, so whatever kills the plugin in
between leaves something that the next ADD, DEL or GC can undo.

Only a malformed request fails ADD. Anything of our own that goes wrong is logged, counted
and recorded, and the pod starts on the kernel path, unless ``"required": true``. DEL
does what it can and succeeds.
"""

from __future__ import annotations

import os
import time

from nearpath import state
from nearpath.cni import identity, netconf, protocol, result, vm
from nearpath.cni.context import (
    CODE_CHECK,
    GRACE,
    Context,
    Failure,
    has_siblings,
    old_record,
    others,
    release,
)
from nearpath.cni.deadline import Deadline
from nearpath.cni.doors import Doors
from nearpath.cni.protocol import CniError
from nearpath.errors import DeadlineExceeded, StateError
from nearpath.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from nearpath.cni.protocol import Request

# -- ADD -------------------------------------------------------------------------------------


def add(context: Context) -> bytes:
    """Put one attachment on the lanes; the answer is prevResult."""
    request, conf = context.request, context.conf
    conf.check()
    previous = result.previous(request.config, request.version)
    answer = protocol.encode(previous)  # before anything is touched: a failure changes nothing
    if previous["cniVersion"] != request.version:
        conf.warnings.append("prevResult has another cniVersion, passed on as it is")
    pod = identity.parse_args(request.args, conf.warnings.append)
    unguarded = not conf.guards or netconf.asks_for_lane(conf)
    record: dict[str, Any] = {
        "version": 1,
        "container_id": request.container_id,
        "ifname": request.ifname,
        "netns": request.netns,
        "netns_cookie": 0,
        "pod": pod,
        "network": request.network,
        "ips": result.addresses(previous),
        "host_ifindex": None,
        "host_ifname": None,
        "created": time.time(),
        "lanes": {"socket": {"state": "off", "reason": "internal", "unguarded": unguarded}},
    }
    try:
        if pod["name"]:
            context.log.context += f" {pod['namespace']}/{pod['name']}"
        for text in conf.warnings:
            context.log.warning(text)
        _attach(context, record)
    except CniError:
        raise
    except Exception as error:
        context.deadline.restart(GRACE)
        failure = Failure(error)
        try:
            _give_up(context, record, failure)
        except DeadlineExceeded:
            pass  # no time left to clear up: the record is there, DEL will
        if conf.required:
            raise CniError(failure.code, f"nearpath: {failure.text}", failure.reason) from error
    return answer


def _attach(context: Context, record: dict[str, Any]) -> None:
    """Do the steps of ADD that may fail, and fill in the record on the way.

    Raises:
        CniError: CNI_NETNS is the plugin's own namespace; nothing was touched.
        Exception: whatever failed; what was done so far is in the record.
    """
    request, place, doors = context.request, context.place, context.doors
    # Until the namespace is known, what an earlier ADD registered is what there is to undo.
    before = record["netns_cookie"] = state.cookie_of(old_record(context))
    enabled, reason = netconf.socket_lane(context.conf, record["pod"])
    own = doors.is_own_netns(request.netns)
    if own:
        if not request.override:
            raise CniError(
                protocol.INVALID_NETNS,
                "plugin's netns and netns from CNI_NETNS should not be the same",
            )
        # Allowed, but then it is no pod: registering it would take in the whole host.
        enabled, reason = False, "own-netns"
    cookie, index = doors.inspect(request.netns, request.ifname)
    record["netns_cookie"] = cookie
    record["host_ifindex"] = index
    record["host_ifname"] = doors.link_name(index) if index else None
    siblings = others(context, cookie) if has_siblings(context) else []
    if enabled and not all(state.wants_lane(other) for other in siblings):
        enabled, reason = False, "other-attachment"
    lane = record["lanes"]["socket"]
    lane.update(state="on" if enabled else "off", reason=reason)
    vm.note(context, record, own_netns=own)
    if before != cookie:  # before the record that knows it is replaced
        context.attempt("old registration", lambda: release(context, before))
    state.save(place, record)
    vm.watch(context, record)  # before what may fail: the tap lane needs none of it
    if enabled:
        if doors.prepare(place, context.conf.most_connections):
            context.log.info("datapath loaded")
        enabled = state.may_go_unguarded(record) or doors.is_guarded(place)
    if enabled:
        doors.register(place, cookie)
    elif lane["state"] == "on":
        lane.update(state="off", reason="no-guards")
        _take_out(context, cookie, siblings)
        state.save(place, record)
    elif before == cookie or siblings:
        _take_out(context, cookie, siblings)
    context.log.info(f"socket lane {lane['state']} {lane['reason']}".rstrip())


def _take_out(context: Context, cookie: int, siblings: list[dict[str, Any]]) -> None:
    """Unregister a pod, one of whose attachments must stay off the lane.

    A socket belongs to the pod, not to one of its interfaces: off wins.
    """
    context.doors.unregister(context.place, cookie)
    for other in siblings:
        if state.wants_lane(other):
            other["lanes"]["socket"] = {"state": "off", "reason": "other-attachment"}
            state.save(context.place, other)


def _give_up(context: Context, record: dict[str, Any], failure: Failure) -> None:
    """After a failed ADD: undo, and record why (or remove the record if required)."""
    request, place = context.request, context.place
    cookie = state.cookie_of(record)
    required = context.conf.required
    context.failed(failure, "ADD failed" if required else "pod stays on the kernel path")
    context.attempt("undo", lambda: release(context, cookie))
    if required:
        context.attempt("undo", lambda: state.remove(place, request.container_id, request.ifname))
    else:
        record["lanes"]["socket"].update(state="off", reason=failure.reason)
        context.attempt("record", lambda: state.save(place, record))


# -- DEL -------------------------------------------------------------------------------------


def delete(context: Context) -> bytes:
    """Undo ADD, from our record alone; always succeeds.

    That CNI_NETNS is the plugin's own namespace is no error here, other than in the
    reference: nothing of it is touched, and a failed DEL keeps the runtime from calling the
    plugins before us, so that the pod's address is never released.
    """
    request, place = context.request, context.place
    try:
        context.log_problems()
        record = old_record(context)
        cookie = state.cookie_of(record) or _cookie_without_record(context)
        if context.attempt("unregister", lambda: release(context, cookie)):
            vm.retire(
                context,
                record,
                lambda: context.attempt(
                    "record", lambda: state.remove(place, request.container_id, request.ifname)
                ),
            )
            context.log.info("removed" if cookie else "nothing to remove")
        context.attempt("retired maps", lambda: context.doors.sweep(place))
    except Exception as error:
        context.deadline.restart(GRACE)
        context.failed(Failure(error), "DEL is incomplete")
    return b""


def _cookie_without_record(context: Context) -> int:
    """Cookie of CNI_NETNS, for an attachment whose record was lost or damaged; 0 if none."""
    request, place, doors = context.request, context.place, context.doors
    if not request.netns:
        return 0
    try:
        if not doors.is_loaded(place) or doors.is_own_netns(request.netns):
            return 0
        return doors.inspect(request.netns, request.ifname)[0]
    except DeadlineExceeded:
        raise
    except Exception:
        return 0  # the namespace is gone: the usual case of a repeated DEL


# -- CHECK, STATUS ---------------------------------------------------------------------------


def check(context: Context) -> bytes:
    """Look after one attachment: what ADD switched on must still be on.

    A failed CHECK makes runtimes kill the pod, so without ``required`` whatever is wrong is
    logged and repaired if possible, and the answer is success.
    """
    required = context.conf.required
    if required:
        context.conf.check()
    try:
        context.log_problems()
        problem = _check(context)
        if problem:
            context.log.warning(problem)
    except Exception as error:
        context.deadline.restart(GRACE)
        failure = Failure(error)
        context.failed(failure, "CHECK")
        if required:
            raise CniError(failure.code, f"nearpath: {failure.text}", failure.reason) from error
        return b""
    if problem and required:
        raise CniError(CODE_CHECK, f"nearpath: {problem}")
    return b""


def _check(context: Context) -> str:
    """Compare record, namespace and datapath; what is wrong and could not be repaired."""
    request, place, doors = context.request, context.place, context.doors
    record = state.load(place, request.container_id, request.ifname)
    if record is None:
        return "there is no record of this attachment"
    vm.watch(context, record)
    if not state.wants_lane(record):
        return ""
    cookie, _ = doors.inspect(request.netns, request.ifname)
    if cookie != state.cookie_of(record):
        return "the attachment's network namespace is not the one that ADD saw"
    if doors.is_loaded(place) and doors.is_registered(place, cookie):
        return ""
    doors.prepare(place)
    if not state.may_go_unguarded(record) and not doors.is_guarded(place):
        return "the guards that this attachment requires are not attached"
    doors.register(place, cookie)
    context.log.warning("the registration was gone and has been made again")
    return ""


def status(context: Context) -> bytes:
    """Ready, unless the datapath is required and cannot be had.

    Silent otherwise, for containerd asks every few seconds. Code 51 (existing containers have
    limited connectivity) is never true of nearpath.
    """
    if not context.conf.required:
        return b""
    context.conf.check()
    try:
        context.doors.prepare(context.place)
    except Exception as error:
        context.deadline.restart(GRACE)
        failure = Failure(error)
        raise CniError(
            protocol.NOT_AVAILABLE, f"nearpath: {failure.text}", failure.reason
        ) from error
    return b""


def collect(context: Context) -> bytes:
    """GC; see nearpath.cni.gc."""
    from nearpath.cni import gc

    return gc.collect(context)


_HANDLERS: dict[str, Callable[[Context], bytes]] = {
    "ADD": add,
    "DEL": delete,
    "CHECK": check,
    "GC": collect,
    "STATUS": status,
}


# -- the way in ------------------------------------------------------------------------------


def run(
    environ: Mapping[str, str], read: Callable[[int], bytes], doors: Doors | None = None
) -> tuple[int, bytes]:
    """Serve one request inside this process.

    Args:
        environ: the runtime's environment variables.
        read: returns up to that many bytes of stdin, and nothing at its end.
        doors: the kernel; another one for tests.

    Returns:
        The exit code, and the bytes for stdout.
    """
    deadline = Deadline(netconf.TIMEOUT_STDIN)

    def serve(request: Request) -> bytes:
        try:
            place = Place.from_environ(environ)
        except StateError as error:
            raise CniError(protocol.INVALID_ENVIRONMENT, error.message) from error
        context = Context(place, doors or Doors(), deadline, request)
        try:
            return _HANDLERS[request.command](context)
        finally:
            context.count_failures()

    deadline.start()
    try:
        return protocol.dispatch(environ, read, dict.fromkeys(protocol.COMMANDS, serve))
    finally:
        deadline.stop()


def _open_standard_descriptors() -> None:
    """Fill 0, 1 and 2 if the runtime closed them, or our files would get these numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # takes the lowest free number, this one


def _write_all(descriptor: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:  # the runtime is gone, nobody is left to tell
        return False
    return True


def main() -> int:
    """Serve the request in the environment and on stdin; the exit code.

    Whatever else writes to stdout by mistake (a library, a child) lands on stderr: the
    runtime takes every byte on stdout for the result.
    """
    _open_standard_descriptors()
    output = os.dup(1)
    os.dup2(2, 1)
    code, answer = run(os.environ, lambda size: os.read(0, size))
    return code if _write_all(output, answer) else 1
