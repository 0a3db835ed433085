"""A virtual machine's pod as virt-handler lays it out, for tests of the tap lane.

namespace "host"              namespace "pod"
launcher (Outside)  ═══  eth0-nic ─ k6t-eth0 (Watcher) ─ tap0 (Tap)
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import virt_handler
from helpers.commands import run, wait_until
from helpers.leaks import nothing_left
from helpers.netns import inside, namespace
from helpers.tap import Outside, Tap, Watcher
from nearpath.kernel import netns
from nearpath.kernel.rtnl import Rtnl
from nearpath.lanes import tap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from helpers.virt_handler import Bound

HOST = "launcher"
GUEST_MAC = "02:00:00:00:11:11"
MODES = ("mirror", "redirect", "peer")


@dataclass
class TapLab:
    """The pod, what is known of it, and both ends of the wire."""

    pod: str
    host: str
    bound: Bound
    made: set[int]
    stack: ExitStack

    def look(self, mode: str, *, withdraw: bool = False) -> tap.Plan:
        """Observe, plan and execute, as the watcher does, or DEL."""
        ends = {}
        with netns.entered(self.host), Rtnl() as host:
            for wire in self.observe().wires:
                if wire.nic and (end := tap.host_end(host, wire.nic.peer)):
                    ends[wire.nic.index] = end
        with netns.entered(self.pod), Rtnl() as pod:
            plan = tap.plan(tap.observe(pod), mode, self.made, ends, withdraw=withdraw)
            self.made = plan.made
            tap.execute(pod, plan)
        return plan

    def observe(self) -> tap.Observed:
        """What there is in the pod."""
        with netns.entered(self.pod), Rtnl() as pod:
            return tap.observe(pod)

    def counts(self) -> tuple[int, int]:
        """Packets that took the lane: from the machine, to it."""
        with netns.entered(self.pod), Rtnl() as pod:
            counted = tap.counts(pod, tap.observe(pod))[self.bound.tap_index]
        return counted["from_vm"]["packets"], counted["to_vm"]["packets"]

    def tc(self, *words: str) -> str:
        """tc(8) in the pod."""
        return run([*inside(self.pod), "tc", *words]).stdout

    def shown(self) -> str:
        """All qdiscs and filters of tap and NIC, without statistics."""
        names = (self.bound.names.tap, self.bound.names.nic)
        return "".join(self.shown_of(name) for name in names)

    def shown_of(self, name: str) -> str:
        """The same of one device."""
        text = self.tc("qdisc", "show", "dev", name)
        sides = ("ingress", "egress") if "clsact" in text else ("ingress",)
        return text + "".join(self.tc("filter", "show", "dev", name, side) for side in sides)

    def address(self, name: str) -> str:
        """MAC address of a device in the pod, or of the host veth."""
        place = self.host if name == HOST else self.pod
        return str(virt_handler.links(place)[name]["address"])

    def plug(self, *, offloads: bool = True) -> Tap:
        """Open the tap, and wait until the bridge forwards to it."""
        opened = Tap(self.pod, self.bound.names.tap, offloads=offloads, queues=self.bound.queues)
        self.stack.enter_context(opened)
        port = self.bound.names.tap
        wait_until(lambda: self._forwards(port), f"{port} forwards")
        return opened

    def _forwards(self, port: str) -> bool:
        link = virt_handler.links(self.pod)[port]
        return bool(link["linkinfo"]["info_slave_data"]["state"] == "forwarding")

    def outside(self) -> Outside:
        """The other end of the wire."""
        return self.stack.enter_context(Outside(self.host, HOST))

    def watcher(self) -> Watcher:
        """What the bridge gets."""
        return self.stack.enter_context(Watcher(self.pod, self.bound.names.bridge))


@contextmanager
def tap_lab(
    *,
    queues: int = 0,
    mtu: int = 1500,
    binding: Callable[..., Bound] = virt_handler.bridge_binding,
) -> Iterator[TapLab]:
    """A pod with a wire; nothing may be left of it, or of what was done to it."""
    with nothing_left(), ExitStack() as stack:
        pod, host = stack.enter_context(namespace()), stack.enter_context(namespace())
        names = Path(pod).name, Path(host).name
        run(
            [
                *["ip", "link", "add", HOST, "mtu", str(mtu), "netns", names[1], "type", "veth"],
                *["peer", "name", "eth0", "mtu", str(mtu), "netns", names[0]],
            ]
        )
        run(["ip", "-n", names[1], "link", "set", HOST, "up"])
        run(["ip", "-n", names[0], "link", "set", "eth0", "address", GUEST_MAC, "up"])
        run(["ip", "-n", names[0], "address", "add", "10.7.0.2/24", "dev", "eth0"])
        bound = binding(pod, queues=queues)
        ends = stack.enter_context(ExitStack())  # closed before the namespaces go
        yield TapLab(pod, host, bound, set(), ends)
