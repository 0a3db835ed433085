"""A node with a virtual machine's pod, two plain pods, and a network card to the outside.

    guest: vnic ══ virtio ══ tap0 ─ k6t-eth0 ─ eth0-nic ═══ vm ─┐
                             (launcher's namespace)             │
    pod:   eth0 ════════════════════════════════════════ plain ─┼─ cni0   (node)
    other: eth0 ════════════════════════════════════════ spare ─┤
    outside: wan ══ wire and card ═════════════════════ uplink ─┘

All are namespaces with whole network stacks on one network, 10.88.0.0/24 and fd88::/64; the
launcher's is laid out as virt-handler does. Cables are in helpers/cable.py.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import cable, virt_handler
from helpers.commands import PATIENCE, run, wait_until
from helpers.netns import inside, namespace
from nearpath.kernel import netns, offload, rtnl
from nearpath.lanes import checksum, tap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from helpers.cable import Cable
    from helpers.virt_handler import Bound

PORT = 5000
TIMEOUT = 20.0 * PATIENCE
VXLAN_PORT = 4789
VXLAN_HEADERS = 14 + 20 + 8 + 8  # over IPv4
_ETH_P_ALL = 0x0003
# Last numbers of their addresses.
_NUMBERS = {"guest": 2, "pod": 3, "other": 4, "outside": 9}


def address(name: str, version: int) -> str:
    """Address of one of those who talk."""
    return f"10.88.0.{_NUMBERS[name]}" if version == 4 else f"fd88::{_NUMBERS[name]}"


@dataclass
class Node:
    """The whole of it.

    Attributes:
        node, launcher: paths of their namespaces.
        talkers: paths of the namespaces of ``guest``, ``pod``, ``other`` and ``outside``.
        bound: what virt-handler made in the launcher's.
        nic: the guest's cable; its near end is the tap, its far end the guest.
        uplink: the node's card; its near end is the node's.
    """

    node: str
    launcher: str
    talkers: Mapping[str, str]
    bound: Bound
    nic: Cable
    uplink: Cable

    def index(self, path: str, name: str) -> int:
        """Ifindex of a device in a namespace."""
        with netns.entered(path):
            return socket.if_nametoindex(name)

    def devices(self) -> list[checksum.Device]:
        """What the packets of the VM pass, as the lane wants to know it."""
        names = self.bound.names
        return [
            checksum.Device("pod", self.bound.tap_index, names.tap, "tap"),
            checksum.Device("pod", self.bound.nic_index, names.nic, "nic"),
            checksum.Device("pod", self.bound.bridge_index, names.bridge, "bridge"),
            checksum.Device("host", self.index(self.node, "vm"), "vm", "veth"),
        ]

    @contextmanager
    def doors(self) -> Iterator[Mapping[str, offload.Door]]:
        """Doors to the launcher's namespace and the node's."""
        with netns.entered(self.launcher):
            pod = offload.Door()
        with netns.entered(self.node):
            host = offload.Door()
        with pod, host:
            yield {"pod": pod, "host": host}

    def attend(
        self, mode: str, ours: Sequence[checksum.Change] = (), *, insist: bool = True
    ) -> checksum.Work:
        """Put a checksum mode in force, as the watcher does."""
        with self.doors() as doors, netns.entered(self.node):
            work = checksum.work_out(doors, mode, [self.devices()], ours, insist=insist)
            checksum.execute(doors, work.plan.steps)
        return work

    def restore(self, ours: Sequence[checksum.Change]) -> None:
        """Undo a mode, as DEL does."""
        with self.doors() as doors:
            checksum.restore(doors, ours)

    @contextmanager
    def tap_lane(self, mode: str) -> Iterator[Callable[[], dict[str, int]]]:
        """Frames between tap and pod NIC take the tap lane while the block runs.

        Yields a function that says how many bytes took it so far, ``from_vm`` and ``to_vm``.
        """
        with ExitStack() as stack:
            with netns.entered(self.launcher):
                pod = stack.enter_context(rtnl.Rtnl())
            with netns.entered(self.node):
                host = stack.enter_context(rtnl.Rtnl())
                end = tap.host_end(host, self.index(self.node, "vm"))
            assert end is not None
            made = set[int]()

            def took() -> dict[str, int]:
                (counts,) = tap.counts(pod, tap.observe(pod)).values()
                return {direction: count["bytes"] for direction, count in counts.items()}

            for wanted in (mode, tap.OFF):
                plan = tap.plan(tap.observe(pod), wanted, made, {self.bound.nic_index: end})
                made = plan.made
                tap.execute(pod, plan)
                if wanted == mode:
                    (outcome,) = plan.outcomes
                    assert (outcome.mode, outcome.reason) == (mode, "")
                    yield took

    def switch(self, path: str, name: str, *words: str) -> None:
        """``ethtool -K``, by somebody who is not us."""
        run([*inside(path), "ethtool", "-K", name, *words])

    def switch_off(self) -> None:
        """TX checksum offload off at pod NIC and host veth, by somebody who is not us."""
        self.switch(self.launcher, self.bound.names.nic, "tx", "off")
        self.switch(self.node, "vm", "tx", "off")


@contextmanager
def node(*, bridge_off: bool = False, guest_takes: int = cable.SEGMENTS) -> Iterator[Node]:
    """Build it.

    Args:
        bridge_off: TX checksum offload of k6t-eth0 off, as KubeVirt before 1.8 has it.
        guest_takes: TUN_F_* bits: packets that the guest's driver accepts unfinished.
    """
    with ExitStack() as stack:
        host, launcher = (stack.enter_context(namespace()) for _ in range(2))
        talkers = {name: stack.enter_context(namespace()) for name in _NUMBERS}
        for path in (host, launcher, *talkers.values()):
            _quiet(path)
        virt_handler.batch(host, ["link add cni0 type bridge", "link set cni0 up"])
        ends = {"vm": launcher, "plain": talkers["pod"], "spare": talkers["other"]}
        for name, end in ends.items():
            virt_handler.batch(
                host,
                [
                    f"link add {name} type veth peer name eth0 netns {Path(end).name}",
                    f"link set {name} master cni0",
                    f"link set {name} up",
                ],
            )
        _give(launcher, "eth0", "guest")
        _give(talkers["pod"], "eth0", "pod")
        _give(talkers["other"], "eth0", "other")
        bound = virt_handler.bridge_binding(launcher, checksum_off=bridge_off)
        taken = cable.End(launcher, bound.names.tap, guest_takes)
        nic = stack.enter_context(cable.virtio(taken, cable.End(talkers["guest"], "vnic")))
        virt_handler.batch(talkers["guest"], [f"link set vnic address {bound.mac}"])
        _give(talkers["guest"], "vnic", "guest")
        wire = cable.End(talkers["outside"], "wan")
        uplink = stack.enter_context(cable.card(cable.End(host, "uplink"), wire))
        virt_handler.batch(host, ["link set uplink master cni0", "link set uplink up"])
        _give(talkers["outside"], "wan", "outside")
        yield Node(host, launcher, talkers, bound, nic, uplink)


def _quiet(path: str) -> None:
    """No packets but the test's, and addresses that are good at once."""
    settings = {
        "net/ipv6/conf/default/accept_dad": "0",
        "net/ipv6/conf/default/router_solicitations": "0",
        "net/ipv6/conf/default/accept_ra": "0",
    }
    with netns.entered(path):
        for name, value in settings.items():
            Path("/proc/sys", name).write_text(value, encoding="ascii")


def _give(path: str, name: str, who: str) -> None:
    number = _NUMBERS[who]
    virt_handler.batch(
        path,
        [
            f"address add 10.88.0.{number}/24 dev {name}",
            f"address add fd88::{number}/64 dev {name} nodad",
            f"link set {name} up",
        ],
    )


# -- conversations ----------------------------------------------------------------------------

_BLOCK = bytes(range(256)) * 4


def _blob(size: int, salt: int) -> bytes:
    shift = salt % 251
    return (_BLOCK[shift:] * (size // (len(_BLOCK) - shift) + 1))[:size]


def udp(
    lab: Node, client: str, server: str, version: int, sizes: Sequence[int], timeout: float = 2
) -> int:
    """Send a datagram of each size and have it echoed; the count of echoes that were exact.

    Args:
        timeout: seconds for one way, times PATIENCE; short where loss is expected.
    """
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with netns.entered(lab.talkers[server]):
        there = socket.socket(family, socket.SOCK_DGRAM)
    with netns.entered(lab.talkers[client]):
        here = socket.socket(family, socket.SOCK_DGRAM)
    exact = 0
    with there, here:
        there.bind((address(server, version), PORT))
        there.settimeout(timeout * PATIENCE)
        here.settimeout(timeout * PATIENCE)
        here.connect((address(server, version), PORT))
        for size in sizes:
            here.send(_blob(size, size))
            with suppress(TimeoutError):
                data, sender = there.recvfrom(1 << 16)
                there.sendto(data, sender)
                exact += here.recv(1 << 16) == _blob(size, size)
    return exact


def tcp(lab: Node, client: str, server: str, version: int, size: int) -> bool:
    """Send ``size`` bytes there, and as many back; True if both arrived exactly."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with netns.entered(lab.talkers[server]):
        listener = socket.socket(family)
    with netns.entered(lab.talkers[client]):
        here = socket.socket(family)
    arrived: list[bytes] = []
    with listener, here:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.settimeout(TIMEOUT)
        listener.bind((address(server, version), PORT))
        listener.listen(1)

        def serve() -> None:
            there, _ = listener.accept()
            with there:
                there.settimeout(TIMEOUT)
                arrived.append(_read(there))
                there.sendall(_blob(size, 2))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        here.settimeout(TIMEOUT)
        here.connect((address(server, version), PORT))
        here.sendall(_blob(size, 1))
        here.shutdown(socket.SHUT_WR)
        back = _read(here)
        thread.join(TIMEOUT)
    return arrived == [_blob(size, 1)] and back == _blob(size, 2)


def _read(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


@contextmanager
def vxlan(lab: Node) -> Iterator[None]:
    """Between node and outside, packets travel inside VXLAN while the block runs."""
    outside = lab.talkers["outside"]
    make = f"link add vxlan7 mtu 1450 type vxlan id 7 dstport {VXLAN_PORT} udpcsum remote"
    virt_handler.batch(
        lab.node,
        [
            "link set uplink nomaster",
            "address add 192.168.7.1/24 dev uplink",
            f"{make} 192.168.7.9",
            "link set vxlan7 master cni0",
            "link set vxlan7 up",
        ],
    )
    virt_handler.batch(
        outside,
        [
            "address flush dev wan",
            "address add 192.168.7.9/24 dev wan",
            f"{make} 192.168.7.1",
        ],
    )
    _give(outside, "vxlan7", "outside")
    try:
        yield
    finally:
        virt_handler.batch(lab.node, ["link delete vxlan7", "link set uplink master cni0"])
        virt_handler.batch(outside, ["link delete vxlan7", "address flush dev wan"])
        _give(outside, "wan", "outside")


def answer_from_bridge(lab: Node) -> None:
    """Send a datagram to the guest from k6t-eth0 itself, as the launcher's DHCP server does."""
    with netns.entered(lab.launcher):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server:
        bridge = lab.bound.names.bridge.encode()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind(("", PORT))
        before = len(lab.nic.near.out)
        server.sendto(_blob(300, 0), ("255.255.255.255", PORT + 1))
        wait_until(lambda: len(lab.nic.near.out) > before, "the datagram at the guest's NIC")


@contextmanager
def userspace_switch(lab: Node, names: Sequence[str]) -> Iterator[None]:
    """A switch of our own in place of the bridge: a process that moves frames between two veths.

    By packet sockets bound to them, as OVS does for its netdev datapath: bytes go from one to the
    other, and with them no word about their checksum.
    """
    stop = os.eventfd(0)
    sockets = []
    with ExitStack() as stack:
        for name in names:
            with netns.entered(lab.node):
                reader = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            stack.enter_context(reader)
            reader.bind((name, _ETH_P_ALL))
            sockets.append(reader)
            virt_handler.batch(lab.node, [f"link set {name} nomaster"])

        def work() -> None:
            poll = select.poll()
            for descriptor in (stop, *(reader.fileno() for reader in sockets)):
                poll.register(descriptor, select.POLLIN)
            while stop not in (ready := {descriptor for descriptor, _ in poll.poll()}):
                for reader, writer in zip(sockets, reversed(sockets), strict=True):
                    if reader.fileno() in ready:
                        data, sender = reader.recvfrom(1 << 17)
                        if sender[2] != socket.PACKET_OUTGOING:
                            writer.send(data)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(stop, 1)
            thread.join(10)
            os.close(stop)
            for name in names:
                virt_handler.batch(lab.node, [f"link set {name} master cni0"])
