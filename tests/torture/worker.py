"""Runs inside one pod: makes the processes whose threads are a program's actors.

    python -m torture.worker SIDE DESCRIPTOR

The first process (the zygote) has one thread and forks; each child is one process of a
program with its actors, used again and again until it is killed. Everything talks in JSON over
SOCK_SEQPACKET. Orders to an actor are ``[operation, args]`` or a list of such for a script;
what ``Service`` adds is for the arena alone.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import threading
from typing import TYPE_CHECKING, Any

from torture.operations import STATES, Stream, Table, mask_names, perform, query, set_option
from torture.programs import HELPER, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable

# Control sockets of one process: one for each thread, the observer's, and the helper's.
ACTORS = (*THREADS, "watch", HELPER)
_MOST = 1 << 17
_ALL_EVENTS = 0x2000 | 0x1 | 0x2 | 0x4  # POLLRDHUP, IN, PRI, OUT


def _say(control: socket.socket, answer: object) -> None:
    control.send(json.dumps(answer).encode())


def _watched(opened: socket.socket, unread: bool) -> tuple[str, int | None, str]:
    poller = select.poll()
    poller.register(opened, _ALL_EVENTS)
    events = poller.poll(0)
    mask = mask_names(events[0][1]) if events else "0"
    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return mask, query(opened, termios.FIONREAD) if unread else None, STATES[info[0]]


class Service:
    """What the arena asks of a process beside the program's own steps."""

    def __init__(self, table: Table, link: socket.socket) -> None:
        self._table = table
        self._link = link  # to the helper, or from it to us

    def prepare(self, args: dict[str, Any]) -> list[Any]:
        """Forget the last program; the server gets its listener."""
        table = self._table
        table.clear()
        table.flows.clear()
        family, address, port = args["target"]
        table.target = (family, address, port)
        if table.side == "s" and "listener" in args:
            table.listener = socket.socket(args["family"])
            table.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for name, value in args["listener"].items():
                set_option(table.listener, name, value)
            table.listener.bind(("" if args["family"] == socket.AF_INET else "::", port))
            table.listener.listen(64)
        return ["ok"]

    def release(self, _: dict[str, Any]) -> list[Any]:
        """Make whoever is blocked in one of our sockets come back, and close them all."""
        for opened in list(self._table.slots.values()):
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if self._table.listener:
            try:
                self._table.listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        return ["ok"]

    def flows(self, _: dict[str, Any]) -> list[Any]:
        """Addresses of the connections begun here."""
        return self._table.flows

    def progress(self, _: dict[str, Any]) -> list[Any]:
        """What each script has done so far."""
        return sorted(self._table.progress.items())

    def watch(self, args: dict[str, Any]) -> list[Any]:
        """What can be seen of each socket without changing anything: events, bytes, state.

        Bytes only if args["unread"]; else they are null.
        """
        seen = []
        for slot, opened in sorted(self._table.slots.items()):
            try:
                seen.append([slot, *_watched(opened, args["unread"])])
            except OSError as error:
                seen.append([slot, "?", error.errno, "?"])
        return seen

    def pass_(self, args: dict[str, Any]) -> list[Any]:
        """Send a socket to the process at the other end of the link (SCM_RIGHTS)."""
        opened, stream = self._table.socket(args), self._table.stream(args)
        about = json.dumps([args.get("slot", 0), stream.sent, stream.received]).encode()
        rights = array.array("i", [opened.fileno()])
        self._link.sendmsg([about], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        return ["ok"]

    def take(self, _: dict[str, Any]) -> list[Any]:
        """Take the socket that the other process has sent."""
        try:
            about, rights, *_rest = self._link.recvmsg(100, 100, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return ["none sent"]
        slot, sent, received = json.loads(about)
        (number,) = struct.unpack("=i", rights[0][2][:4])
        taken = socket.socket(fileno=number)
        if slot in self._table.slots:
            taken.close()
            return ["taken"]
        self._table.slots[slot] = taken
        self._table.streams[slot] = Stream(sent, received)
        return ["ok"]


def _actor(control: socket.socket, table: Table, link: socket.socket) -> None:
    """Take orders until the arena closes the control socket."""
    service = Service(table, link)
    own: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
        "prepare": service.prepare,
        "release": service.release,
        "flows": service.flows,
        "progress": service.progress,
        "watch": service.watch,
        "pass": service.pass_,
        "take": service.take,
    }

    def run(name: str, args: dict[str, Any]) -> list[Any]:
        if name not in own:
            return perform(table, name, args)
        try:
            return own[name](args)
        except OSError as error:
            return ["failed", str(error)]

    while order := control.recv(_MOST):
        name, args = json.loads(order)
        if name == "script":
            done = table.progress[threading.current_thread().name] = []
            for part in args:
                done += [run(*part)]  # one by one, for the observer looks meanwhile
            _say(control, done)
        else:
            _say(control, run(name, args))


def _process(side: str, controls: dict[str, socket.socket]) -> None:
    """One process of a program, with its helper; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helper = os.fork()
    if not helper:
        ours.close()
        for name, control in controls.items():
            if name != HELPER:
                control.close()
        _say(controls[HELPER], [os.getpid(), os.getpid()])
        _actor(controls[HELPER], Table(side), theirs)
        os._exit(0)
    theirs.close()
    controls.pop(HELPER).close()
    table = Table(side)

    def serve(control: socket.socket) -> None:
        _say(control, [os.getpid(), threading.get_native_id()])
        _actor(control, table, ours)

    threads = [
        threading.Thread(target=serve, args=(control,), name=side + name)
        for name, control in controls.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


def main() -> None:
    """The zygote: a child for each set of control sockets that comes."""
    side = sys.argv[1]
    orders = socket.socket(fileno=int(sys.argv[2]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        _, rights, _, _ = orders.recvmsg(1, 200)
        if not rights:
            return
        numbers = array.array("i")
        numbers.frombytes(rights[0][2])
        if os.fork():
            for number in numbers:
                os.close(number)
            orders.send(b"x")
            continue
        orders.close()
        _process(
            side,
            {name: socket.socket(fileno=fd) for name, fd in zip(ACTORS, numbers, strict=True)},
        )


if __name__ == "__main__":
    main()
