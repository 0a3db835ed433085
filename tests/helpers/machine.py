"""A virtual machine as KubeVirt makes one: a virt-launcher pod, its network, a guest on its tap.

one = Machine(node, net, "one")
one.add()        the CNI chain, as the runtime calls it for the pod
one.bind()       virt-handler's work, and virt-launcher's DHCP server
one.boot()       qemu
one.lane()       what nearpath says of its tap
"""

from __future__ import annotations

import json
import secrets
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from helpers import virt_handler
from helpers.capture import capture
from helpers.cni import ANNOTATIONS, Chain
from helpers.commands import run, wait_until
from helpers.dhcp import dhcp
from helpers.guest import Guest, started
from helpers.netns import addresses, host_veth, inside, namespace
from nearpath.kernel import netns as namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from helpers.capture import Capture
    from helpers.cni import Network
    from helpers.dhcp import Dhcp
    from helpers.node import Node
    from helpers.virt_handler import Bound

_DOMAIN = "kubevirt.io/domain"
_NAMESPACE = "vms"


class Pod:
    """A pod whose CNI chain the test runs itself; a context that runs DEL if that was not done.

    Attributes:
        id: the container's.
        netns: path of its network namespace.
        ips: its addresses without prefix length, IPv4 first.
    """

    def __init__(self, node: Node, net: Network, name: str, annotations: Mapping[str, str]) -> None:
        self.node = node
        self.name = name
        self.id = f"{name}-{secrets.token_hex(4)}"
        self.ips: tuple[str, ...] = ()
        self._net = net
        self._stack = ExitStack()
        self.netns = self._stack.enter_context(namespace())
        # Emulators keep this machine busy, and what is tested is not how patient a command is.
        patient = {"timeoutSeconds": 30}
        conflist = net.chained(runtimeConfig={ANNOTATIONS: dict(annotations)}, **patient)
        self._entry = {
            **conflist["plugins"][-1],
            "cniVersion": conflist["cniVersion"],
            "name": conflist["name"],
        }
        self._chain = Chain(conflist, node.program, node.environ)
        self._added = False

    @property
    def inside(self) -> tuple[str, ...]:
        """Words to put before a command that shall run in the pod."""
        return inside(self.netns)

    @property
    def identity(self) -> str:
        """What the command line calls it."""
        return f"{_NAMESPACE}/{self.name}"

    def add(self) -> None:
        """ADD through the chain."""
        self._added = True
        arguments = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={_NAMESPACE};K8S_POD_NAME={self.name}"
        self._chain.add(self.id, self.netns, arguments=arguments)
        self.ips = tuple(entry.partition("/")[0] for entry in addresses(self.netns))

    def delete_ours(self) -> None:
        """DEL of our plugin alone, which is the first one; the others' network stays."""
        done = self.node.plugin("DEL", self._entry, container_id=self.id, netns=self.netns)
        assert (done.returncode, done.stdout) == (0, ""), done

    def delete(self) -> None:
        """DEL through the chain."""
        self._added = False
        self._chain.delete(self.id, self.netns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if self._added:
                self.delete()


class Machine(Pod):
    """A virt-launcher pod with what runs in it."""

    bound: Bound
    dhcp: Dhcp
    guest: Guest

    def __init__(
        self, node: Node, net: Network, name: str, annotations: Mapping[str, str] | None = None
    ) -> None:
        """Make its namespace.

        Args:
            name: of the virtual machine; the pod's is made from it as KubeVirt does.
            annotations: of the VMI, which KubeVirt copies to the pod.
        """
        launcher = f"virt-launcher-{name}-{secrets.token_hex(3)[:5]}"
        super().__init__(node, net, launcher, {_DOMAIN: name, **(annotations or {})})
        self.host_veth = ""

    def bind(self, **options: Any) -> None:
        """Lay out its network; see `virt_handler.bridge_binding`."""
        self.host_veth = host_veth(self.netns)
        self.bound = virt_handler.bridge_binding(self.netns, gateway=self._net.gateway, **options)
        self.dhcp = self._stack.enter_context(dhcp(self.bound, self.node.directory))

    def bind_by_nat(self) -> None:
        """Lay out its network with masquerade binding in place of bridge binding."""
        self.host_veth = host_veth(self.netns)
        self.bound = virt_handler.masquerade_binding(self.netns)
        self.dhcp = self._stack.enter_context(dhcp(self.bound, self.node.directory))

    def boot(self) -> None:
        """Start its guest; `guest.wait()` waits until it has booted."""
        self.guest = self._stack.enter_context(started(self.bound, self.node.directory))

    def replug(self) -> None:
        """Unplug the guest's NIC, make the tap anew, and plug one in again."""
        self.guest.unplug()
        self.bound = virt_handler.plug_tap(virt_handler.unplug_tap(self.bound))
        self.guest.plug(self.bound)

    # --- its lane -----------------------------------------------------------

    def shown(self) -> dict[str, Any]:
        """The tap lane's part of ``nearpath pods``."""
        shown: dict[str, Any] = self.node.pods()[self.id]["lanes"]["tap"]
        return shown

    def wire(self, bridge: str = "k6t-eth0") -> dict[str, Any]:
        """What is shown of one of its bridges."""
        (wire,) = (wire for wire in self.shown()["wires"] if wire["bridge"] == bridge)
        found: dict[str, Any] = wire
        return found

    def wait_lane(self, *modes: str) -> None:
        """Wait until its taps are in the lane in these modes, or out of it ("off")."""

        def there() -> bool:
            return [wire["mode"] for wire in self.shown()["wires"]] == [*modes]

        wait_until(there, f"tap lane {modes} of {self.name}", timeout=15)

    def packets(self) -> tuple[int, int]:
        """Packets from and to the machine that took the lane, since its rules are there."""
        wire = self.wire()
        return wire["from_vm"]["packets"], wire["to_vm"]["packets"]

    # --- what is left -------------------------------------------------------

    def filters(self) -> dict[str, str]:
        """Filters at the ingress of all devices; those without are left out."""
        found = {}
        for device in self.qdiscs():
            show = [*self.inside, "tc", "filter", "show", "dev", device, "ingress"]
            if said := run(show).stdout:
                found[device] = said
        return found

    def qdiscs(self) -> dict[str, str]:
        """Ingress and clsact qdiscs of all devices; those without are left out."""
        found = {}
        for line in run([*self.inside, "tc", "qdisc", "show"]).stdout.splitlines():
            _, kind, _, _, device, *_ = line.split()
            if kind in {"ingress", "clsact"}:
                found[device] = kind
        return found

    def offloads(self) -> dict[str, dict[str, bool]]:
        """Offloads of pod NIC, bridge and host veth, as ethtool shows them."""
        nic, bridge = self.bound.names.nic, self.bound.names.bridge
        return {
            nic: _features(self.inside, nic),
            bridge: _features(self.inside, bridge),
            self.host_veth: _features((), self.host_veth),
        }


def _features(words: tuple[str, ...], device: str) -> dict[str, bool]:
    said = run([*words, "ethtool", "--json", "--show-features", device]).stdout
    (features,) = json.loads(said)
    return {name: value["active"] for name, value in features.items() if isinstance(value, dict)}


@contextmanager
def bridge(bound: Bound) -> Iterator[Capture]:
    """Capture all that crosses a bridge, not only what is for the bridge itself."""
    promiscuous = [*inside(bound.netns), "ip", "link", "set", bound.names.bridge, "promisc"]
    run([*promiscuous, "on"])
    try:
        with ExitStack() as stack:
            with namespaces.entered(bound.netns):
                # The socket stays in the namespace in which it was made.
                view = stack.enter_context(capture(bound.names.bridge))
            yield view
    finally:
        run([*promiscuous, "off"])


def crossed(view: Capture, port: int) -> int:
    """How many packets of a conversation on this port (TCP or UDP) a capture has seen."""
    return sum(port in _ports(protocol, head) for protocol, head, _ in view.packets)


def _ports(protocol: int, head: bytes) -> tuple[int, ...]:
    """Ports of a packet that is the first fragment of TCP or UDP; empty for others."""
    if protocol == 0x0800 and len(head) >= 20:
        start, carried = (head[0] & 0x0F) * 4, head[9]
    elif protocol == 0x86DD and len(head) >= 40:
        start, carried = 40, head[6]
    else:
        return ()
    if carried not in {socket.IPPROTO_TCP, socket.IPPROTO_UDP} or len(head) < start + 4:
        return ()
    return int.from_bytes(head[start : start + 2], "big"), int.from_bytes(
        head[start + 2 : start + 4], "big"
    )
