"""kill -9 at every step of ADD, DEL, load and unload leaves nothing that cannot be undone.

A run under strace lists the program's system calls; then it is run again and killed as it
enters each one that touches the world outside: files of ours, namespaces, bpf(2), stdout.
Calls of the interpreter's own start (its modules and libraries) are left out: nothing has
happened yet.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from helpers.cni import nearpath_entry
from helpers.commands import run
from helpers.netns import inside, namespace, veth
from helpers.strace import steps, traced
from helpers.traffic import converse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from helpers.node import Node
    from helpers.strace import Step

    # What is killed: takes the words before the program, returns the exit status.
    Action = Callable[[tuple[str, ...]], int]

KILLED = (-9, 137)  # strace dies of the signal that killed its child
# Each costs a kill and a recovery.
MOST_PROBES = 10


class Pods:
    """Two pods: one whose ADD or DEL is killed, and the next one on the node."""

    def __init__(self, node: Node, first: str, following: str) -> None:
        self.node = node
        self.netns = {"first": first, "next": following}

    def call(
        self, command: str, name: str, prefix: tuple[str, ...] = ()
    ) -> tuple[int, dict[str, Any] | None]:
        """Invoke the plugin; the exit status, and what it printed."""
        config = {**nearpath_entry(), "cniVersion": "0.3.1", "name": "e2e-crash"}
        if command == "ADD":
            ips = [{"version": "4", "address": "10.9.0.2/24"}]
            config["prevResult"] = {"cniVersion": "0.3.1", "interfaces": [], "ips": ips}
        done = self.node.plugin(
            command, config, container_id=name, netns=self.netns[name], prefix=prefix
        )
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None

    def add(self, name: str) -> None:
        """ADD that must succeed and put the pod on the lane."""
        status, result = self.call("ADD", name)
        assert status == 0
        assert result is not None
        (record,) = (self.node.run_dir / "attachments").glob(f"{name}@*.json")
        lane = json.loads(record.read_text())["lanes"]["socket"]
        assert lane == {"state": "on", "reason": "", "unguarded": True}

    def delete(self, name: str) -> None:
        """DEL that must succeed."""
        assert self.call("DEL", name) == (0, None)

    def operate(self, word: str, prefix: tuple[str, ...] = ()) -> int:
        """Run ``nearpath load`` or ``unload``; the exit status."""
        return run(
            [*prefix, str(self.node.program), word], env=self.node.environ, check=False
        ).returncode

    def collect(self) -> None:
        """GC of everything."""
        config = {**nearpath_entry(), "cniVersion": "1.1.0", "name": "e2e-crash"}
        config["cni.dev/valid-attachments"] = []
        done = self.node.plugin("GC", config)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

    def touches_the_world(self, step: Step) -> bool:
        """Whether a traced call can make a difference to anything but the process."""
        if step.failed:
            return False
        ours = (self.node.directory, self.node.pin_dir, *self.netns.values())
        return step.call != "openat" or any(str(path) in step.arguments for path in ours)


@pytest.fixture
def pods(node: Node) -> Iterator[Pods]:
    """Two namespaces with the primary plugin's work done."""
    with ExitStack() as stack:
        paths = [stack.enter_context(namespace()) for _ in range(2)]
        for path in paths:
            stack.enter_context(veth(path, "10.9.0.2/24"))
        yield Pods(node, *paths)


def trace(pods: Pods, action: Action) -> list[Step]:
    """The steps of an action, done once."""
    log = pods.node.directory / "strace.log"
    assert action(traced(log)) == 0
    found = steps(log, pods.touches_the_world)
    assert found
    return found


def kill(action: Action, step: Step) -> bool:
    """Do the action and kill it at this step; False if it got by without the call."""
    status = action(step.killed_here())
    assert status in (*KILLED, 0), step
    return status != 0


def assert_recovers(pods: Pods, step: Step, *, again: bool) -> None:
    """The next ADD works, DEL of both works, and GC leaves nothing.

    Args:
        again: the runtime first tries the killed ADD again.
    """
    try:
        if again:
            pods.add("first")
        pods.add("next")
        pods.delete("first")
        pods.delete("next")
        assert pods.node.registered() == []
        assert pods.node.pods() == {}
        pods.collect()
        assert pods.node.files() == set()
    except AssertionError as error:
        error.add_note(f"after kill -9 at {step}")
        raise


def leaves_something(step: Step) -> bool:
    """Whether the call changes files, pins, attachments or map entries."""
    if step.call == "bpf":
        return any(word in step.arguments for word in ("PIN", "ATTACH", "LINK", "UPDATE", "DELETE"))
    return step.call not in {"openat", "flock", "setns"} or "O_CREAT" in step.arguments


def thinned(found: list[Step]) -> list[Step]:
    """The steps without most of the bpf(2) calls that leave nothing behind, libbpf's probes."""
    probes = [step for step in found if step.call == "bpf" and not leaves_something(step)]
    some = set(probes[:: -(-len(probes) // MOST_PROBES)])
    return [step for step in found if step in some or step not in probes]


@contextmanager
def conversations(netns: str) -> Iterator[None]:
    """Connections inside a pod, one after the other, while the block runs: all intact."""
    intact = []
    stop = threading.Event()

    def talk() -> None:
        words = inside(netns)
        while not stop.is_set():
            intact.append(converse(words, words, "127.0.0.1", messages=2_000, size=200).intact)

    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk)
        try:
            yield
        finally:
            stop.set()
        talking.result(timeout=60)
    assert intact
    assert all(intact)


def test_plain_add(pods: Pods) -> None:
    """ADD of a pod on a node with the datapath loaded."""
    pods.add("next")

    def add(prefix: tuple[str, ...]) -> int:
        return pods.call("ADD", "first", prefix)[0]

    found = trace(pods, add)
    pods.delete("first")
    pods.delete("next")
    before = pods.node.programs()
    killed = 0
    for number, step in enumerate(found):
        killed += kill(add, step)
        assert_recovers(pods, step, again=number % 2 == 0)
    assert killed == len(found)
    assert pods.node.programs() == before, "loaded again"


def test_del(pods: Pods) -> None:
    """DEL of a pod: the runtime's next DEL finishes it."""
    pods.add("first")

    def delete(prefix: tuple[str, ...]) -> int:
        return pods.call("DEL", "first", prefix)[0]

    for step in trace(pods, delete):
        pods.add("first")
        assert kill(delete, step), step
        assert_recovers(pods, step, again=False)


@pytest.mark.timeout(240)
def test_first_add_which_loads(pods: Pods) -> None:
    """ADD on a node where nothing is loaded: the next one loads, once."""

    def add(prefix: tuple[str, ...]) -> int:
        return pods.call("ADD", "first", prefix)[0]

    found = trace(pods, add)
    pods.delete("first")
    pods.node.forget()
    chosen = thinned(found)
    killed = 0
    for number, step in enumerate(chosen):
        killed += kill(add, step)
        assert_recovers(pods, step, again=number % 2 == 0)
        pods.node.assert_loaded_once()
        pods.node.forget()
    # libbpf's probes may differ by one or two between runs.
    assert killed >= len(chosen) - 2


@pytest.mark.parametrize("word", ["load", "unload"])
@pytest.mark.timeout(240)
def test_load_and_unload_under_live_connections(pods: Pods, word: str) -> None:
    """Killed anywhere, it works the next time, and no connection loses a byte."""
    before = "unload" if word == "load" else "load"

    def operate(prefix: tuple[str, ...]) -> int:
        return pods.operate(word, prefix)

    pods.add("first")
    pods.add("next")
    with conversations(pods.netns["first"]):
        assert pods.operate(before) == 0
        for step in filter(leaves_something, trace(pods, operate)):
            assert pods.operate(before) == 0
            kill(operate, step)
            try:
                assert pods.operate(word) == 0
                assert pods.node.status()["loaded"] == (word == "load")
                assert pods.operate("load") == 0
                assert len(pods.node.registered()) == 2
                pods.node.assert_loaded_once()
            except AssertionError as error:
                error.add_note(f"after kill -9 at {step}")
                raise
    pods.delete("first")
    pods.delete("next")
    pods.collect()
