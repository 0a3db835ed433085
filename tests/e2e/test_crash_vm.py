"""kill -9 at every step of what concerns a virtual machine: ADD, a live switch, DEL.

As test_crash.py, for a pod that virt-handler has prepared: after each kill the next look
brings the lane about, and DEL leaves everything as virt-handler made it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from helpers import virt_handler
from helpers.cleanup import kill_holding
from helpers.cni import ANNOTATIONS, nearpath_entry
from helpers.commands import run
from helpers.netns import inside, namespace, veth
from helpers.strace import CALLS, NETLINK, steps, traced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.node import Node
    from helpers.strace import Step

# Rules of every mode and offloads of every device change: what there is to interrupt.
SWITCH = ("tap-lane", "peer", "--checksum", "software")


class Machine:
    """A virtual machine's pod, laid out by virt-handler; the watcher is not given time to act."""

    def __init__(self, node: Node, netns: str, host: str) -> None:
        self.node = node
        self.netns = netns
        self.host = host

    def call(self, command: str, prefix: tuple[str, ...] = ()) -> int:
        """Invoke the plugin; the exit status."""
        config = {**nearpath_entry(socketLane="off"), "cniVersion": "1.0.0", "name": "e2e-vm"}
        config["runtimeConfig"] = {ANNOTATIONS: {"kubevirt.io/domain": "db"}}
        if command == "ADD":
            config["prevResult"] = {"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]}
        done = self.node.plugin(command, config, container_id="vm", netns=self.netns, prefix=prefix)
        return done.returncode

    def cli(self, *words: str, prefix: tuple[str, ...] = ()) -> int:
        """Run a command of the CLI; the exit status."""
        command = [*prefix, str(self.node.program), *words]
        return run(command, env=self.node.environ, check=False, timeout=60).returncode

    def collect(self) -> set[str]:
        """GC of everything; files that are left."""
        config = {**nearpath_entry(), "cniVersion": "1.1.0", "name": "e2e-vm"}
        config["cni.dev/valid-attachments"] = []
        assert self.node.plugin("GC", config).returncode == 0
        return self.node.files() - {"watcher"}  # that of a killed one

    def stop_watcher(self) -> None:
        """So that nobody but the program under test does anything."""
        kill_holding(str(self.node.run_dir))

    def facts(self) -> tuple[Any, ...]:
        """All that may change: rules, qdiscs, offloads."""
        name = self.netns.rpartition("/")[2]
        found: list[Any] = [run(["tc", "-n", name, "qdisc", "show"]).stdout]
        for device in ("tap0", "eth0-nic"):
            words = ["tc", "-n", name, "filter", "show", "dev", device, "ingress"]
            found.append(run(words).stdout)
            words = [*inside(self.netns), "ethtool", "--json", "-k", device]
            found.append(json.loads(run(words).stdout))
        found.append(json.loads(run(["ethtool", "--json", "-k", self.host]).stdout))
        return tuple(found)

    def modes(self) -> list[str]:
        """Mode in force of each wire."""
        shown = json.loads(self.node.cli("tap-lane", "--json").stdout)
        return [wire["mode"] for pod in shown for wire in pod["wires"]]


@pytest.fixture
def machine(node: Node) -> Iterator[Machine]:
    """Its virtual machine has everything but the lane."""
    with namespace() as path, veth(path, "10.9.0.2/24") as host:
        virt_handler.bridge_binding(path)
        made = Machine(node, path, host)
        yield made
        made.stop_watcher()


def matters(step: Step) -> bool:
    """Whether the call changes anything outside of the process."""
    if step.failed:
        return False
    if step.call in NETLINK:
        return any(word in step.arguments for word in ("RTM_NEW", "RTM_DEL", "NLM_F_ACK"))
    if step.call in {"rename", "unlink"}:
        return True
    return step.call == "bpf" and any(word in step.arguments for word in ("LOAD", "ATTACH"))


def trace(machine: Machine, *words: str) -> list[Step]:
    """The steps of a command that matter, done once."""
    log = machine.node.directory / "strace.log"
    prefix = traced(log, (*CALLS, *NETLINK))
    status = (
        machine.call(words[0], prefix) if words[0].isupper() else machine.cli(*words, prefix=prefix)
    )
    assert status == 0
    found = steps(log, matters)
    assert found
    return found


@pytest.mark.timeout(300)
def test_switch(machine: Machine) -> None:
    """Killed while rules and offloads change: the next look finishes, and DEL undoes all."""
    before = machine.facts()
    assert machine.call("ADD") == 0
    machine.stop_watcher()
    assert machine.cli("tap-lane", "mirror") == 0
    chosen = trace(machine, *SWITCH)
    assert machine.call("DEL") == 0
    assert machine.facts() == before
    for step in chosen:
        try:
            assert machine.call("ADD") == 0
            machine.stop_watcher()
            assert machine.cli("tap-lane", "mirror") == 0
            assert machine.modes() == ["mirror"]
            machine.cli(*SWITCH, prefix=step.killed_here())
            assert machine.cli("tap-lane", "redirect", "--checksum", "keep") == 0
            assert machine.modes() == ["redirect"]
            assert machine.call("DEL") == 0
            assert machine.facts() == before
            assert machine.collect() == set()
        except AssertionError as error:
            error.add_note(f"after kill -9 at {step}")
            raise
    machine.stop_watcher()
    (machine.node.run_dir / "watcher").unlink(missing_ok=True)


@pytest.mark.timeout(240)
def test_del(machine: Machine) -> None:
    """DEL killed anywhere: the runtime's next DEL finishes it."""
    before = machine.facts()
    chosen: list[Step] = []
    while True:
        assert machine.call("ADD") == 0
        machine.stop_watcher()
        assert machine.cli(*SWITCH) == 0
        assert machine.facts() != before
        if not chosen:
            chosen = trace(machine, "DEL")
            count = len(chosen)
        else:
            step = chosen.pop()
            machine.call("DEL", step.killed_here())
            assert machine.call("DEL") == 0, step
        assert machine.facts() == before
        assert machine.collect() == set()
        if not chosen:
            break
    assert count > 5
    machine.stop_watcher()
    (machine.node.run_dir / "watcher").unlink(missing_ok=True)
