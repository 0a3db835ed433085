"""Virtual machines: real guests on taps that are laid out as KubeVirt does, and a plain pod.

    launcher one                                    launcher two
    qemu ═ tap0 ─ k6t-eth0 ─ eth0-nic ═ veth ─┐   ┌─ veth ═ eth0-nic ─ k6t-eth0 ─ tap0 ═ qemu
            └───── tap lane ────┘           bridge           └───── tap lane ────┘
                                              │
                        plain pod eth0 ═ veth ┘

That the lane was taken is shown twice: its counters move, and a capture of all that crosses
k6t-eth0 does not see the conversation. Machine one starts without lane and is the control.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers import talk
from helpers.cleanup import holding
from helpers.cni import network
from helpers.commands import run, wait_until
from helpers.containerd import containerd
from helpers.dhcp import DISCOVER, REQUEST, dhcp
from helpers.guest import Lease
from helpers.machine import Machine, Pod, bridge, crossed
from helpers.netns import inside, namespace, veth
from helpers.tap import Tap
from helpers.virt_handler import bridge_binding, secondary, unplug

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from helpers.node import Node

MODES = ("mirror", "redirect", "peer")
# How often the middle of their life is lived.
_ROUNDS = int(os.environ.get("NEARPATH_VM_ROUNDS", "1"))
_TALKS = 20
_BULK = 256 << 10  # bytes
# Milliseconds. What a busy machine may stop an emulated guest for; a lost frame of TCP alone
# would take 200, a lost route for ever.
_LONGEST = 4000
# Milliseconds between the messages of those who talk meanwhile, and what a device may stop for.
_PAUSE, _STOPPED = 5, 200


class Cluster:
    """Two virtual machines and a plain pod on one network of this node.

    Attributes:
        net: the network; its gateway is the node.
        one, two, pod: as in the picture.
        offloads: of machine one's devices when its guest has booted.
    """

    def __init__(self, node: Node, stack: ExitStack) -> None:
        self.node = node
        self.net = stack.enter_context(network("1.0.0", "bridge", node.directory, dual_stack=True))
        self._stack = stack
        off = {"nearpath.io/tap-lane": "off"}
        self.one = stack.enter_context(Machine(node, self.net, "one", off))
        self.two = stack.enter_context(Machine(node, self.net, "two"))
        self.pod = self.make_pod("plain")

    def make_pod(self, name: str) -> Pod:
        """Another plain pod, not added yet."""
        return self._stack.enter_context(Pod(self.node, self.net, name, {}))

    def watcher(self) -> int:
        """Process ID of the node's watcher; 0: there is none."""
        running: int = self.node.status()["lanes"]["tap"]["watcher"]
        return running

    def start(self) -> None:
        """ADD, virt-handler, qemu, for all."""
        for pod in (self.pod, self.one, self.two):
            pod.add()
        # As KubeVirt before 1.8, and as later ones with several queues.
        self.one.bind()
        self.two.bind(queues=2, checksum_off=False)
        for machine in (self.one, self.two):
            machine.boot()
        self._stack.enter_context(talk.serving(self.pod.inside))
        for machine in (self.one, self.two):
            machine.guest.wait()
        self.offloads = self.one.offloads()

    def get_address(self, machine: Machine) -> None:
        """By DHCP through the bridge: what the pod had. The IPv6 address by hand."""
        ipv4, ipv6 = machine.bound.addresses
        heard = [machine.dhcp.heard(kind, machine.bound.mac) for kind in (DISCOVER, REQUEST)]
        assert machine.guest.dhcp() == Lease(ipv4, 1500, self.net.gateway, 999 * 86400)
        now = [machine.dhcp.heard(kind, machine.bound.mac) for kind in (DISCOVER, REQUEST)]
        assert all(after > before for before, after in zip(heard, now, strict=True))
        if ipv6 not in machine.guest.run("ip -6 addr"):
            machine.guest.add_address(ipv6)

    def converse(self) -> int:
        """All ways, IPv4 and IPv6, small and large; the messages that machine one had part in."""
        one, two, pod = self.one, self.two, self.pod
        addresses = (*pod.ips, *two.ips)
        talks = one.guest.talks(
            *(
                talk.words(kind, address, count=_TALKS)
                for kind in ("tcp", "udp")
                for address in addresses
            ),
            # Longer than a frame: TCP in segments, UDP in fragments.
            *(
                talk.words("tcp", address, count=1, size=_BULK, answer=_BULK)
                for address in addresses
            ),
            talk.words("udp", pod.ips[0], count=3, size=8000, answer=8000),
        )
        talks += [
            talk.ask(pod.inside, kind, address, count=_TALKS)
            for kind in ("tcp", "udp")
            for address in one.ips
        ]
        for made in talks:
            made.check()
        return sum(made.answered for made in talks)

    def assert_lane(self, machine: Machine, mode: str) -> None:
        """Conversations of a machine go by the lane, all of them."""
        machine.wait_lane(mode)
        before = machine.packets()
        with bridge(machine.bound) as view:
            messages = self.converse()
        moved = [after - was for was, after in zip(before, machine.packets(), strict=True)]
        assert crossed(view, talk.PORT) == 0
        if machine is self.one:
            # A message and its answer are at least a packet each.
            assert all(packets >= messages for packets in moved), (moved, messages)

    def assert_bridge(self, machine: Machine) -> None:
        """Conversations of a machine go by the bridge, all of them: both ways."""
        with bridge(machine.bound) as view:
            messages = self.converse()
        assert crossed(view, talk.PORT) >= 2 * messages


@contextmanager
def ended(node: Node) -> Iterator[ExitStack]:
    """What is put on the stack ends, and then neither emulator nor server nor watcher is left."""
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("only Debian's package sources have the guests' kernel")
    with ExitStack() as stack:
        directory = str(node.directory)
        stack.callback(wait_until, lambda: not holding(directory), "the end of all processes")
        yield stack


# --- the life of the machines, in this order ---------------------------------------------------


def first_addresses(made: Cluster) -> None:
    """DHCP goes to the bridge, with lane (two) and without (one)."""
    made.one.wait_lane("off")
    assert made.one.wire()["reason"] == "annotation"
    made.two.wait_lane("mirror")
    for machine in (made.one, made.two):
        made.get_address(machine)


def without_lane(made: Cluster) -> None:
    """A pod that does not want it is left alone."""
    assert made.one.qdiscs() == {}
    made.assert_bridge(made.one)
    made.assert_lane(made.two, "mirror")


def switch(made: Cluster, mode: str) -> None:
    """Another mode while others talk to the machine: nothing is lost.

    But the first time: to make an ingress qdisc the kernel stops the device for a moment
    (qdisc_graft), which costs a frame or two, and more on a busy machine.
    """
    one, pod = made.one, made.pod
    lost = 0 if one.qdiscs() else _STOPPED // _PAUSE
    with (
        talk.background(pod.inside, "udp", one.ips[0], pause=_PAUSE) as datagrams,
        talk.background(pod.inside, "tcp", one.ips[0], pause=_PAUSE) as stream,
    ):
        made.node.cli("tap-lane", mode, "--pod", one.identity)
        one.wait_lane(mode)
        for talked in (datagrams.end(), stream.end()):
            talked.check(lost)
        assert talked.longest < _LONGEST
    assert one.wire()["reason"] == ""
    made.assert_lane(one, mode)


def checksums(made: Cluster) -> None:
    """Computed by nobody as ever; then by everybody, as the operator says."""
    one = made.one
    # Nothing had been switched off, so there was nothing to do.
    assert one.offloads() == made.offloads
    made.node.cli("tap-lane", "--checksum", "software", "--pod", one.identity)
    wire = one.wire()
    assert (wire["checksum"], wire["checksum_reason"]) == ("software", "")
    # Frames would pass the device that computes.
    assert (wire["mode"], wire["reason"]) == ("redirect", "peer-unavailable")
    assert one.offloads() != made.offloads
    made.assert_lane(one, "redirect")


def addresses_again(made: Cluster) -> None:
    """DHCP in the lane."""
    for machine in (made.one, made.two):
        made.get_address(machine)


def watcher_killed(made: Cluster) -> None:
    """kill -9: what is in the lane stays there."""
    os.kill(made.watcher(), signal.SIGKILL)
    wait_until(lambda: made.watcher() == 0, "the watcher's end")
    made.assert_lane(made.two, "mirror")


def unwatched_tap(made: Cluster) -> None:
    """A tap plugged anew while there is no watcher: by the bridge."""
    made.one.replug()
    made.get_address(made.one)
    made.assert_bridge(made.one)


def next_add(made: Cluster) -> None:
    """The next ADD starts a watcher, which finds what was missed."""
    made.make_pod("later").add()
    wait_until(made.watcher, "another watcher")
    made.assert_lane(made.one, "redirect")


def watched_tap(made: Cluster) -> None:
    """A tap plugged anew: its lane comes by itself."""
    made.one.replug()
    made.one.wait_lane("redirect")
    made.get_address(made.one)
    made.assert_lane(made.one, "redirect")


def second_interface(made: Cluster) -> None:
    """A secondary network is plugged in and out; the first one does not notice."""
    one = made.one
    name = secondary("blue")
    with (
        namespace() as other,
        veth(one.netns, "10.7.0.2/24", name) as end,
        ExitStack() as stack,
    ):
        run(["ip", "link", "set", end, "netns", Path(other).name, "name", "blue"])
        run(["ip", "-n", Path(other).name, "address", "add", "10.7.0.3/24", "dev", "blue"])
        run(["ip", "-n", Path(other).name, "link", "set", "blue", "up"])
        stack.enter_context(talk.serving(inside(other)))
        bound = bridge_binding(one.netns, name, number=1)
        server = stack.enter_context(dhcp(bound, made.node.directory))
        one.guest.plug(bound, 1)
        one.wait_lane("redirect", "redirect")
        assert one.guest.dhcp("eth1").address == "10.7.0.2/24"
        assert server.heard(REQUEST, bound.mac)
        with bridge(bound) as view:
            one.guest.talk("tcp", "10.7.0.3", count=_TALKS).check()
            talk.ask(inside(other), "udp", "10.7.0.2", count=_TALKS).check()
        assert crossed(view, talk.PORT) == 0
        assert set(one.filters()) == {"tap0", "eth0-nic", bound.names.tap, bound.names.nic}
        one.guest.unplug(1)
        unplug(bound)
        one.wait_lane("redirect")
        wait_until(
            lambda: set(one.filters()) == {"tap0", "eth0-nic"}, "no rules on the NIC that is left"
        )
        made.assert_lane(one, "redirect")


def paused(made: Cluster) -> None:
    """An operator takes all machines out of the lane at once, and back."""
    made.node.cli("pause")
    for machine in (made.one, made.two):
        assert machine.filters() == {}
        assert machine.wire()["reason"] == "paused"
    made.assert_bridge(made.one)
    made.node.cli("resume")
    made.assert_lane(made.two, "mirror")


def deleted(made: Cluster) -> None:
    """DEL takes all back; the watcher ends with the last machine."""
    one, two = made.one, made.two
    one.delete_ours()
    assert one.qdiscs() == {}
    assert one.offloads() == made.offloads
    made.assert_bridge(one)
    made.assert_lane(two, "mirror")
    assert made.watcher() > 0
    two.delete_ours()
    assert two.qdiscs() == {}
    wait_until(lambda: made.watcher() == 0, "the watcher's end")


def as_at_first(made: Cluster) -> None:
    """What the operator chose is taken back: the pod's annotation counts again."""
    one = made.one
    made.node.cli("tap-lane", "default", "--checksum", "default", "--pod", one.identity)
    assert one.wire()["reason"] == "annotation"
    assert one.filters() == {}
    assert one.offloads() == made.offloads
    made.assert_bridge(one)


BEGIN: tuple[Callable[[Cluster], None], ...] = (first_addresses, without_lane)
MIDDLE: tuple[Callable[[Cluster], None], ...] = (
    *(partial(switch, mode=mode) for mode in MODES),
    checksums,
    addresses_again,
    watcher_killed,
    unwatched_tap,
    next_add,
    watched_tap,
    second_interface,
    paused,
)


@pytest.mark.timeout(300 * _ROUNDS)
def test_two_machines_and_a_pod(node: Node) -> None:
    """From ADD to DEL: the lane comes with the tap, changes, is lost, comes again, and goes."""
    rounds = MIDDLE + (as_at_first, *MIDDLE) * (_ROUNDS - 1)
    with ended(node) as stack:
        made = Cluster(node, stack)
        made.start()
        for stage in (*BEGIN, *rounds, deleted):
            start = time.monotonic()
            stage(made)
            name = getattr(stage, "__name__", f"switch {getattr(stage, 'keywords', '')}")
            print(f"{time.monotonic() - start:6.2f} s {name}")


@pytest.mark.timeout(180)
def test_masquerade_works_as_before(node: Node) -> None:
    """Behind NAT the bridge is a router: a machine there is left alone, and told so."""
    with ended(node) as stack:
        net = stack.enter_context(network("1.0.0", "bridge", node.directory))
        machine = stack.enter_context(Machine(node, net, "nat"))
        pod = stack.enter_context(Pod(node, net, "plain", {}))
        for added in (machine, pod):
            added.add()
        machine.bind_by_nat()
        machine.boot()
        stack.enter_context(talk.serving(pod.inside))
        machine.guest.wait()
        lease = machine.guest.dhcp()
        assert (lease.address, lease.router) == ("10.0.2.2/24", "10.0.2.1")
        with bridge(machine.bound) as view:
            for kind in ("tcp", "udp"):
                machine.guest.talk(kind, pod.ips[0], count=_TALKS).check()
                talk.ask(pod.inside, kind, machine.ips[0], count=_TALKS).check()
        assert crossed(view, talk.PORT) >= 8 * _TALKS
        shown = machine.shown()
        assert (shown["state"], shown["reason"]) == ("off", "no-nic")
        assert (machine.wire()["tap"], machine.wire()["nic"]) == ("tap0", "")
        assert machine.qdiscs() == {}


def test_a_sandbox_of_containerd(node: Node) -> None:
    """The annotation comes through CRI; record, watcher, lane; all gone with the sandbox."""
    with (
        network("0.3.1", "bridge", node.directory) as net,
        containerd(net.chained(), node.program, node.environ) as runtime,
    ):
        plain = runtime.run_sandbox("plain")
        assert "tap" not in node.pods()[plain.id]["lanes"]
        assert node.status()["lanes"]["tap"]["watcher"] == 0
        domain = {"kubevirt.io/domain": "one", "nearpath.io/tap-lane": "redirect"}
        launcher = runtime.run_sandbox("virt-launcher-one-x7k2p", annotations=domain)

        def lane() -> dict[str, Any]:
            shown: dict[str, Any] = node.pods()[launcher.id]["lanes"]["tap"]
            return shown

        assert (lane()["state"], lane()["mode"], lane()["wires"]) == ("off", "redirect", [])
        wait_until(lambda: lane()["reason"] == "no-bridge", "the watcher's first look")
        assert node.status()["lanes"]["tap"]["watcher"] > 0
        bound = bridge_binding(launcher.netns, gateway=net.gateway)
        with Tap(launcher.netns, bound.names.tap):
            wait_until(lambda: lane()["state"] == "on", "the lane of a tap that came")
            (wire,) = lane()["wires"]
            assert (wire["tap"], wire["mode"], wire["reason"]) == ("tap0", "redirect", "")
        for sandbox in (launcher, plain):
            runtime.remove_sandbox(sandbox.id)
        assert node.pods() == {}
        wait_until(lambda: node.status()["lanes"]["tap"]["watcher"] == 0, "the watcher's end")
