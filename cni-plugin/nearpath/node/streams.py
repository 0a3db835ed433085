"""One-way TCP streams between two processes, each in a network namespace of its own.

    this process ── orders, answers (socketpair) ── sender ═══ TCP ═══ receiver

One send(2) per message from a buffer made before, in a loop without any other work: Python adds
0.15 µs to each (a send of nothing takes 0.54 µs here and 0.39 in C), the same on both paths.
Handing the kernel many messages at once (sendmmsg) would save that, but keeps the scheduler from
doing what it does between the calls of real programs.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import select
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nearpath.errors import NearpathError
from nearpath.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from nearpath.node.interrupt import Interrupts

LARGEST = 1 << 16
_BUFFER = 1 << 16  # what large readers such as proxies use
_PATIENCE = 10.0  # seconds for one answer
_PR_SET_PDEATHSIG = 1


# -- in the children ---------------------------------------------------------------------------


class _End:
    """What either end does on order: a method per verb."""

    def __init__(self) -> None:
        self._connections: dict[str, socket.socket] = {}
        self._data = bytes(LARGEST)
        self._buffer = bytearray(_BUFFER)

    def listen(self, address: str) -> object:
        """Listen on any port; the port."""
        listener = self._connections[""] = socket.create_server((address, 0))
        return listener.getsockname()[1]

    def accept(self, name: str) -> object:
        """Take the next connection."""
        self._connections[name] = self._connections[""].accept()[0]
        return None

    def connect(self, name: str, address: str, port: int) -> object:
        """Make a connection."""
        made = self._connections[name] = socket.socket()
        made.connect((address, port))
        return None

    def send(self, name: str, size: int, count: int) -> object:
        """Send ``count`` messages; when it began (CLOCK_MONOTONIC, ns)."""
        write, data = self._connections[name].send, memoryview(self._data)[:size]
        began = time.monotonic_ns()
        for _ in itertools.repeat(None, count):
            write(data)
        return began

    def receive(self, name: str, amount: int) -> object:
        """Read ``amount`` bytes; when the last one was there (CLOCK_MONOTONIC, ns)."""
        read, buffer = self._connections[name].recv_into, self._buffer
        while amount > 0:
            got = read(buffer)
            if not got:
                raise ConnectionResetError("the stream ended")
            amount -= got
        return time.monotonic_ns()


def _serve(orders: socket.socket) -> None:
    end = _End()
    while order := orders.recv(4096):
        verb, arguments = json.loads(order)
        try:
            answer = {"is": getattr(end, verb)(**arguments)}
        except Exception as error:
            answer = {"error": f"{verb}: {error}"}
        orders.send(json.dumps(answer).encode())


def _become_child(parent: int, prepare: Callable[[], None]) -> None:
    """In the child: signals are the parent's business, and so is our life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    prepare()


# -- in this process ---------------------------------------------------------------------------


class Worker:
    """A process that obeys orders in a namespace; a context that ends it.

    Forked, so make it before any thread is started.

    Args:
        name: for error messages.
        path: of its network namespace.
        cgroup: cgroup v2 directory that it moves to before it makes a socket.
    """

    def __init__(self, name: str, path: str, cgroup: str, interrupts: Interrupts) -> None:
        self._name = name
        self._path = path
        self._cgroup = cgroup
        self._interrupts = interrupts
        self._orders, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = 0

    def __enter__(self) -> Worker:
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            status = 1
            try:
                self._orders.close()
                _become_child(parent, self._move)
                _serve(self._theirs)
                status = 0
            except BaseException as error:
                with suppress(OSError):
                    self._theirs.send(json.dumps({"error": str(error)}).encode())
            finally:
                os._exit(status)
        self._theirs.close()
        return self

    def _move(self) -> None:
        with open(f"{self._cgroup}/cgroup.procs", "w", encoding="ascii") as processes:
            processes.write(str(os.getpid()))
        # For good: entered() would come back.
        netns.entered(self._path).__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._orders.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def pin(self, cpu: int) -> None:
        """Let it run on one CPU only."""
        os.sched_setaffinity(self._pid, {cpu})

    def order(self, verb: str, **arguments: object) -> None:
        """Tell it to do something (a method of _End); answer() must follow."""
        try:
            self._orders.send(json.dumps([verb, arguments]).encode())
        except OSError as error:
            raise NearpathError(f"the {self._name} has ended: {error.strerror}") from error

    def answer(self) -> Any:
        """Wait until it is done; what it answers.

        Raises:
            NearpathError: it failed, or takes too long.
            Interrupted: a signal came.
        """
        ready = select.poll()
        ready.register(self._orders, select.POLLIN)
        end = time.monotonic() + _PATIENCE
        while not ready.poll(100):
            self._interrupts.check()
            if time.monotonic() > end:
                raise NearpathError(f"the {self._name} did not finish in {_PATIENCE:g} s")
        said = self._orders.recv(4096)
        answer = json.loads(said) if said else {"error": "ended"}
        if "error" in answer:
            raise NearpathError(f"the {self._name} failed: {answer['error']}")
        return answer["is"]

    def do(self, verb: str, **arguments: object) -> Any:
        """order() and answer()."""
        self.order(verb, **arguments)
        return self.answer()


def connect(sender: Worker, receiver: Worker, name: str, address: str, port: int) -> None:
    """Open a connection that both know by ``name``; the receiver listens."""
    receiver.order("accept", name=name)
    sender.do("connect", name=name, address=address, port=port)
    receiver.answer()


def stream(sender: Worker, receiver: Worker, name: str, size: int, count: int) -> float:
    """Send ``count`` messages of ``size`` bytes; seconds until the last byte was read."""
    receiver.order("receive", name=name, amount=size * count)
    sender.order("send", name=name, size=size, count=count)
    began = sender.answer()
    ended = receiver.answer()
    return max(int(ended) - int(began), 1) / 1e9
