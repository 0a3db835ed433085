"""Runs a program step by step between two network namespaces and writes down all it sees.

After each step everything must come to rest before the next: each actor has answered or sleeps
in its call, and each connection has delivered what it was given. That makes a program's
observations the same every time, so that they can be compared.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from helpers.commands import PATIENCE
from nearpath.kernel import netns
from torture.diag import Diag, at_rest
from torture.worker import ACTORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torture.programs import Program, Step

TESTS = Path(__file__).resolve().parents[1]
# What is seen during each step: what is looked at → what is seen there.
Trace = list[dict[str, Any]]

# Seconds that anything may take to come to rest; TCP's timers start at 0.2.
_REST = 2.0 * PATIENCE
# What does not change for so long counts as rest too: a window that stays closed, bytes that
# wait behind it. Longer than TCP holds small segments back (cork: 200 ms).
_STILL_BLOCKED, _STILL = 0.06, 0.26
_FREE = 20.0 * PATIENCE  # seconds for a free-running program
# System calls in which a thread sleeps that goes on by itself: futex (it waits for another
# thread) and clock_nanosleep.
_PASSING = {"x86_64": {"202", "230"}, "aarch64": {"98", "115"}}[os.uname().machine]
_PORTS = range(20000, 25000)  # bind() takes those 5000 above


class Lane(Protocol):
    """What the arena does to the datapath."""

    @property
    def guarded(self) -> bool:
        """The guards are attached."""

    def enable(self, on: bool) -> None:
        """Let connections that begin from now on take the lane, or not."""

    def settings(self, values: Mapping[str, int]) -> None:
        """Change settings; those not named get their defaults."""

    def change(self, values: Mapping[str, int]) -> None:
        """Change settings; those not named stay as they are."""


class StuckError(Exception):
    """A process of the arena does not answer."""


class Actor:
    """One thread of execution in a pod; one order at a time."""

    def __init__(self, name: str, control: socket.socket) -> None:
        self.name = name
        self.control = control
        self.process = self.thread = 0
        self.doing = ""
        self.dead = False

    @property
    def busy(self) -> bool:
        """It has not answered its last order yet."""
        return bool(self.doing)

    def order(self, label: str, what: str, args: object) -> None:
        """Give it something to do."""
        self.control.send(json.dumps([what, args]).encode())
        self.doing = label

    def answer(self) -> Any:
        """Its answer to the last order; waits for it."""
        data = self.control.recv(1 << 18)
        if not data:
            self.dead = True
            raise StuckError(f"{self.name} has died doing {self.doing}")
        self.doing = ""
        return json.loads(data)

    def ask(self, what: str, args: object = None, timeout: float = 5.0) -> Any:
        """Order and answer; waits so many seconds, times PATIENCE.

        Raises:
            StuckError: no answer in time.
        """
        self.order(what, what, args or {})
        if not select.select([self.control], [], [], timeout * PATIENCE)[0]:
            raise StuckError(f"{self.name} does not answer to {what}")
        return self.answer()

    def comes_back(self) -> bool:
        """True if it waits for orders, or does so soon."""
        soon = 0.5 * PATIENCE
        if self.busy and not self.dead and select.select([self.control], [], [], soon)[0]:
            with suppress(StuckError):
                self.answer()
        return not self.busy and not self.dead

    def sleeps(self) -> bool:
        """True if its thread sleeps in a call that only another's doing can end."""
        try:
            path = f"/proc/{self.process}/task/{self.thread}/syscall"
            state = Path(path).read_text(encoding="ascii").split()[0]
        except (OSError, IndexError):
            return False
        return state != "running" and state not in _PASSING


class Side:
    """The processes of one side: a zygote inside the pod and what it forks.

    Args:
        side: ``c`` or ``s``.
        pod: path of the network namespace.
        cgroup: that the processes belong to; empty for ours.
    """

    def __init__(self, side: str, pod: str, cgroup: str) -> None:
        self.name = side
        self.actors: dict[str, Actor] = {}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders = ours
        with theirs, netns.entered(pod):
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "torture.worker", side, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
        if cgroup:
            Path(cgroup, "cgroup.procs").write_text(str(self._zygote.pid), encoding="ascii")

    def start(self) -> None:
        """A fresh process with all its actors."""
        self.stop()
        pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in ACTORS}
        rights = array.array("i", [theirs.fileno() for _, theirs in pairs.values()])
        self._orders.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for name, (ours, theirs) in pairs.items():
            theirs.close()
            self.actors[name] = Actor(self.name + name, ours)
        for actor in self.actors.values():
            actor.process, actor.thread = actor.answer()
        self._orders.recv(1)

    def kill(self, name: str) -> None:
        """kill -9 of the process that an actor belongs to; waits until it is gone."""
        if name not in self.actors or self.actors[name].dead:
            return
        process = self.actors[name].process
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(process)
            os.kill(process, signal.SIGKILL)
            select.select([pidfd], [], [], 5)
            os.close(pidfd)
        for actor in self.actors.values():
            if actor.process == process:
                actor.dead = True

    @property
    def whole(self) -> bool:
        """All actors live and wait for orders."""
        return bool(self.actors) and not any(a.dead or a.busy for a in self.actors.values())

    def stop(self) -> None:
        """End the processes; the zygote stays."""
        for name in ("0", "9"):
            self.kill(name)
        for actor in self.actors.values():
            actor.control.close()
        self.actors.clear()

    def close(self) -> None:
        """End everything."""
        self.stop()
        self._orders.close()
        self._zygote.wait(timeout=10)


class Arena:
    """Two pods and the processes in them.

    Args:
        left, right: paths of the clients' and the servers' network namespaces, joined, with
            addresses 10.77.0.1 and .2, fd77::1 and ::2.
        cgroup: for the processes.
        lane: None: there is no datapath, everything takes the kernel path.
    """

    def __init__(self, left: str, right: str, cgroup: str = "", lane: Lane | None = None) -> None:
        self._lane = lane
        self._stack = ExitStack()
        self._diags = {path: Diag(path) for path in (left, right)}
        for diag in self._diags.values():
            self._stack.callback(diag.close)
        # In the loopback way both ends are in the left pod.
        self._places = {"c": left, "s": right, "l": left}
        self._sides = {
            name: Side("s" if name == "l" else name, path, cgroup)
            for name, path in self._places.items()
        }
        for side in self._sides.values():
            self._stack.callback(side.close)
        self._port = 0
        self.unsettled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, program: Program, accelerated: bool) -> Trace:
        """Run a program and tell what was seen at each step, and at last who never came back.

        Raises:
            StuckError: the processes failed in a way that is no observation.
        """
        run = _Run(
            self._prepare(program, accelerated), program, self._lane if accelerated else None
        )
        try:
            return run.freely() if program.free else run.steps()
        finally:
            self._release(run)

    def _prepare(self, program: Program, accelerated: bool) -> _Stage:
        self._port = self._port % len(_PORTS) + 1
        port = _PORTS.start + self._port - 1
        family, address, listen = {
            "v4": (socket.AF_INET, "10.77.0.2", socket.AF_INET),
            "v6": (socket.AF_INET6, "fd77::2", socket.AF_INET6),
            "mapped_server": (socket.AF_INET, "10.77.0.2", socket.AF_INET6),
            "mapped_client": (socket.AF_INET6, "::ffff:10.77.0.2", socket.AF_INET),
            "loopback": (socket.AF_INET, "127.0.0.1", socket.AF_INET),
        }[program.where]
        server = "l" if program.where == "loopback" else "s"
        sides = {"c": self._sides["c"], "s": self._sides[server]}
        if self._lane:
            self._lane.enable(accelerated)
            # Those that the guards have something to see of, as on a node; the others at once.
            probation = 8 if self._lane.guarded and not program.fit else 0
            self._lane.settings({"probation": probation, **program.settings})
        orders = {"target": [family, address, port], "family": listen}
        for side in sides.values():
            if not side.whole:
                side.start()
            for name in ("watch", "9"):
                own = {"listener": program.listener} if name == "watch" else {}
                said = side.actors[name].ask("prepare", {**orders, **own})
                if said != ["ok"]:
                    side.stop()
                    raise StuckError(f"{side.name}{name}: {said}")
        diags = self._diags[self._places["c"]], self._diags[self._places[server]]
        return _Stage(sides, diags, (address, port))

    def _release(self, run: _Run) -> None:
        """Bring everybody back who still sleeps, or let that side start anew next time."""
        self.unsettled += run.unsettled
        for side in run.stage.sides.values():
            with suppress(StuckError, OSError):
                for actor in (side.actors.get("watch"), side.actors.get("9")):
                    if actor and not actor.dead and not actor.busy:
                        actor.ask("release")
        for side in run.stage.sides.values():
            if not all(actor.comes_back() for actor in side.actors.values()):
                side.stop()


class _Stage:
    """What one run uses."""

    def __init__(
        self, sides: dict[str, Side], diags: tuple[Diag, Diag], target: tuple[str, int]
    ) -> None:
        self.sides = sides
        self.diags = diags
        self.target = target

    def actor(self, name: str) -> Actor:
        return self.sides[name[0]].actors[name[1:]]

    def actors(self) -> Iterable[Actor]:
        for side in self.sides.values():
            yield from side.actors.values()


_CONNECTING = {"connect", "connect_send", "fast_open"}
_WRITES = " send"  # in the label of an actor that may sleep for room
# Calls that sleep and come back whatever the other side does.
_ENDS_ITSELF = {*_CONNECTING, "close", "fork"}


def _label(number: int, step: Step) -> str:
    return f"{step.by} {step.do} (step {number})"


class _Run:
    """One run of one program."""

    def __init__(self, stage: _Stage, program: Program, lane: Lane | None) -> None:
        self.stage = stage
        self.program = program
        self.lane = lane
        self.unsettled = 0
        self._flows: list[tuple[tuple[str, int], tuple[str, int]]] = []
        self._connecting = False
        self._takes = {
            name: any(step.by == name and step.do == "take" for step in program.steps)
            for name in ("c9", "s9")
        }
        self._held: list[Any] = []  # bytes that were still held back when we last waited
        # What an acknowledgement changes for the program: completions of MSG_ZEROCOPY.
        self._until_acknowledged = "ZEROCOPY" in program.flags()

    def steps(self) -> Trace:
        trace: Trace = []
        for number, step in enumerate(self.program.steps):
            seen: dict[str, Any] = {}
            trace.append(seen)
            self._begin(number, step, seen)
            if step.loose:
                continue
            waiting = None
            if step.wait or step.do in _ENDS_ITSELF:
                actor = self.stage.actor(step.by)
                waiting = actor if actor.doing == _label(number, step) else None
            if not self._settle(seen, waiting):
                self.unsettled += 1
                seen["rest"] = "not within 2 s"
            self._watch(seen)
        trace.append({actor.doing: "for ever" for actor in self.stage.actors() if actor.busy})
        return trace

    def freely(self) -> Trace:
        """Each actor goes through its own steps at its own pace."""
        scripts: dict[str, list[Any]] = {}
        for step in self.program.steps:
            if step.by == "lane":
                if self.lane:
                    self.lane.change(step.args)
                continue
            scripts.setdefault(step.by, []).append([step.do, step.args])
        for name, script in scripts.items():
            self.stage.actor(name).order(f"{name} script", "script", script)
        seen: dict[str, Any] = {}
        end = time.monotonic() + _FREE
        while any(actor.busy for actor in self.stage.actors()) and time.monotonic() < end:
            self._collect(seen, 0.1)
        hanging = [actor.name for actor in self.stage.actors() if actor.busy]
        if hanging:
            for side in "cs":
                watcher = self.stage.actor(f"{side}watch")
                done = dict(watcher.ask("progress"))
                for name in hanging:
                    if name in done:
                        seen[f"{name} script"] = ["hangs after", *done[name]]
            self._watch(seen)
        return [seen]

    def _begin(self, number: int, step: Step, seen: dict[str, Any]) -> None:
        label = _label(number, step)
        if step.by == "lane":
            if self.lane:
                self.lane.change(step.args)
        elif step.by == "kill":
            self._collect(seen, 0)
            self.stage.sides[step.do[0]].kill(step.do[1:] or "0")
        else:
            actor = self.stage.actor(step.by)
            if actor.dead:
                seen[label] = "dead"
            elif actor.busy:
                seen[label] = "busy"
            else:
                self._connecting |= step.do in _CONNECTING
                actor.order(label, step.do, step.args)

    def _collect(self, seen: dict[str, Any], timeout: float) -> bool:
        """Take the answers that there are; True if any."""
        busy = {
            actor.control: actor for actor in self.stage.actors() if actor.busy and not actor.dead
        }
        ready = select.select(list(busy), [], [], timeout)[0] if busy else []
        for control in ready:
            label = busy[control].doing
            seen[label] = busy[control].answer()
        return bool(ready)

    def _settle(self, seen: dict[str, Any], waiting: Actor | None) -> bool:
        """Wait until nothing moves any more; False if it goes on for too long."""
        end = time.monotonic() + _REST
        before, since = None, 0.0
        while True:
            while self._collect(seen, 0.0005):
                pass
            busy = [actor for actor in self.stage.actors() if actor.busy and not actor.dead]
            if all(actor.sleeps() for actor in busy) and not (waiting and waiting.busy):
                ends = self._look()
                rest = all(at_rest(*pair) and at_rest(*pair[::-1]) for pair in ends)
                if self._until_acknowledged:
                    rest &= not any(one and one.unacknowledged for pair in ends for one in pair)
                now = time.monotonic()
                if ends != before:
                    before, since = ends, now
                writing = any(_WRITES in actor.doing for actor in busy)
                still = _STILL_BLOCKED if writing else _STILL
                if rest or now - since > still or ends == self._held:
                    sleeping = all(actor.sleeps() for actor in busy)
                    if sleeping and not self._collect(seen, 0):
                        self._held = ends
                        return True
                    continue
            if time.monotonic() > end:
                return False

    def _look(self) -> list[Any]:
        """Both ends of every connection that this program has begun."""
        if self._connecting:
            watcher = self.stage.actor("cwatch")
            if not watcher.dead:
                for own_address, own_port, *target in watcher.ask("flows"):
                    flow = ((own_address, own_port), (target[0], target[1]))
                    if flow not in self._flows:
                        self._flows.append(flow)
        left, right = self.stage.diags
        return [(left.look(own, other), right.look(other, own)) for own, other in self._flows]

    def _watch(self, seen: dict[str, Any]) -> None:
        names = [f"{side}watch" for side in "cs"]
        names += [name for name in ("c9", "s9") if self._takes[name]]
        watchers = [self.stage.actor(name) for name in names]
        watchers = [watcher for watcher in watchers if not watcher.dead and not watcher.busy]
        # Guards would take our own asking for the program's, and the lane would not be used.
        unread = self.lane is None or not self.lane.guarded
        for watcher in watchers:
            watcher.order("watch", "watch", {"unread": unread})
        for watcher in watchers:
            if not select.select([watcher.control], [], [], 5)[0]:
                raise StuckError(f"{watcher.name} does not answer")
            said = watcher.answer()
            if said and said[0] == "failed":
                raise StuckError(f"{watcher.name}: {said[1]}")
            for slot, mask, count, state in said:
                process = watcher.name.removesuffix("watch")
                name = f"{process}:{slot}" if process[1:] else f"{process}{slot}"
                seen[f"{name} events"] = mask
                if count is not None:
                    seen[f"{name} unread"] = count
                seen[f"{name} state"] = state
