"""What KubeVirt has laid out in a pod's namespace: wires that the tap lane can short-circuit.

A wire is a bridge whose name begins with ``k6t-`` and whose ports are one tap and one other
device. Neither the pod's name nor its annotations count: who claims to be a virtual machine's
pod and has no such bridge has no wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearpath.kernel.rtnl import Link, Rtnl

BRIDGE_PREFIX = "k6t-"
# A pod may make as many links as it likes. KubeVirt makes one bridge for each interface.
MOST_BRIDGES, MOST_WIRES = 256, 32
_MOST_PORTS = 4  # more than two are no wire, however many


@dataclass(frozen=True)
class Wire:
    """A bridge of KubeVirt's, with the ports that it has.

    Attributes:
        tap, nic: the tap port and the other one, if there is exactly one of them.
        reason: why it is not fit for the lane, a stable word; empty if it is.
    """

    bridge: Link
    tap: Link | None
    nic: Link | None
    reason: str


def wires(pod: Rtnl) -> list[Wire]:
    """Wires of the pod's namespace by the bridge's ifindex, also unfit ones."""
    found = [link for link in pod.bridges(MOST_BRIDGES) if link.name.startswith(BRIDGE_PREFIX)]
    found.sort(key=lambda link: link.index)
    return [wire(bridge, pod.ports(bridge.index, _MOST_PORTS)) for bridge in found[:MOST_WIRES]]


def wire(bridge: Link, ports: list[Link]) -> Wire:
    """The wire of a bridge with these ports."""
    taps = [port for port in ports if port.kind == "tap"]
    nics = [port for port in ports if port.kind != "tap"]
    tap = taps[0] if len(taps) == 1 else None
    nic = nics[0] if len(nics) == 1 else None
    return Wire(bridge, tap, nic, _reason(bridge, taps, nics))


def _reason(bridge: Link, taps: list[Link], nics: list[Link]) -> str:
    if not taps:
        return "no-tap"  # not yet, or it was unplugged
    if len(taps) > 1:
        return "several-taps"
    if not nics:
        return "no-nic"  # masquerade: NAT lies between the bridge and the pod's interface
    if len(nics) > 1:
        return "several-nics"
    (tap,), (nic,) = taps, nics
    if not (bridge.up and tap.up and nic.up):
        return "down"
    if bridge.vlan_filtering:
        return "vlan-filtering"
    if bridge.stp:
        return "stp"  # a port may be blocked
    if tap.port_policy or nic.port_policy:
        return "port-policy"
    if tap.mtu != nic.mtu:
        return "mtu-differs"  # the bridge enforces the smaller one
    return ""
