"""What KubeVirt's virt-handler does to the network of a virt-launcher pod, step by step.

Bridge binding, for the pod's interface eth0 (KubeVirt 1.0 to 1.8, ``bridgeBindingSpec`` and
``NMState.Apply``); the packets of the VM cross k6t-eth0:

    before:   host veth ═ eth0 (MAC, IPs)

    after:    host veth ═ eth0-nic ─┐ (same ifindex, MAC of the bridge, no IP, learning off)
                                    k6t-eth0 (169.254.75.10/32, its own DHCP server)
               the VM  ═  tap0   ───┘ (MTU of eth0)
              eth0: a dummy, down, that keeps the pod's MAC and IPs; the guest's NIC has them

Masquerade binding leaves eth0 as it is; k6t-eth0 has the guest's gateway, and NAT lies between:

    host veth ═ eth0 (MAC, IPs)  ·  nft NAT  ·  k6t-eth0 (02:00:00:00:00:00, 10.0.2.1/24) ─ tap0

Everything works in any network namespace that has such an interface, with ip(8), ethtool(8) and
nft(8) alone. A namespace that goes takes all of it along; `tear_down()` is for a living pod.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.commands import CommandError, run
from helpers.netns import inside

if TYPE_CHECKING:
    from collections.abc import Sequence

# link.StaticMasqueradeBridgeMAC, and the guest's network behind it (api.DefaultVMCIDR).
MASQUERADE_MAC = "02:00:00:00:00:00"
MASQUERADE_NETWORK = "10.0.2"
# bridgeFakeIPBase; the number of the interface in the VM's specification follows.
_BRIDGE_ADDRESS = "169.254.75.1"


@dataclass(frozen=True)
class Names:
    """Names that KubeVirt gives to the devices of one interface of the pod."""

    pod: str
    bridge: str
    nic: str
    tap: str


def names(interface: str) -> Names:
    """The names for an interface: ``eth0``, ``pod`` + 11 hexadecimal digits, or ``net1``.

    Only the primary interface's tap is called tap0 (link/names.go).
    """
    if interface.startswith("pod"):
        short = interface.removeprefix("pod")
        return Names(interface, f"k6t-{short}", f"{short}-nic", f"tap{short}")
    number = interface.removeprefix("net") if interface.startswith("net") else "0"
    return Names(interface, f"k6t-{interface}", f"{interface}-nic", f"tap{number}")


def secondary(network: str) -> str:
    """Name of the pod's interface on a secondary network of this name (namescheme)."""
    return f"pod{hashlib.sha256(network.encode()).hexdigest()[:11]}"


@dataclass(frozen=True)
class Bound:
    """An interface that a VM is bound to.

    Attributes:
        netns: path of the pod's network namespace.
        names: of the devices.
        mac: of the guest's NIC.
        addresses: with prefix length; the pod's own (bridge), or the guest's (masquerade).
        mtu: of the pod's interface, which the tap gets.
        gateway: that the guest is told by DHCP; empty: none.
        server: IPv4 address of the bridge, where the DHCP server is; empty without IPv4.
        nic_index, bridge_index, tap_index: ifindexes; the tap's is 0 while there is none.
        queues: of the tap; 0: no multi-queue tap.
    """

    netns: str
    names: Names
    mac: str
    addresses: tuple[str, ...]
    mtu: int
    gateway: str
    server: str
    nic_index: int
    bridge_index: int
    tap_index: int
    queues: int = 0


def links(netns: str) -> dict[str, dict[str, Any]]:
    """``ip -details address`` of a namespace by device name."""
    shown = run([*inside(netns), "ip", "-json", "-details", "address", "show"])
    return {link["ifname"]: link for link in json.loads(shown.stdout)}


def batch(netns: str, commands: Sequence[str]) -> None:
    """Run lines of ip(8) in a namespace; the first that fails ends it."""
    run([*inside(netns), "ip", "-batch", "-"], text="\n".join([*commands, ""]))


# --- bridge binding ---------------------------------------------------------


def bridge_binding(
    netns: str,
    interface: str = "eth0",
    *,
    number: int = 0,
    queues: int = 0,
    checksum_off: bool = True,
    gateway: str = "",
) -> Bound:
    """Bind a VM to an interface by bridge, in virt-handler's order of steps.

    Args:
        netns: path of a namespace that has the interface, up, with its addresses.
        number: position of the interface in the VM's specification; 0: the primary.
        queues: of the tap; KubeVirt makes a multi-queue tap from 2 on.
        checksum_off: switch TX checksum offload of the bridge off, as KubeVirt before 1.8 does.
        gateway: of the pod, for the guest; empty: taken from the pod's default route.
    """
    pod = _pod(netns, interface)
    called = names(interface)
    gateway = gateway or _default_gateway(netns)
    addresses = _global(pod)
    has_ipv4 = any(":" not in address for address in addresses)
    server = f"{_BRIDGE_ADDRESS}{number}" if has_ipv4 else ""

    batch(netns, [f"link add {called.bridge} type bridge"])
    if checksum_off:
        run([*inside(netns), "ethtool", "-K", called.bridge, "tx", "off"])
    # The NIC gets the MAC that the bridge was made with, so that the guest can have the pod's.
    bridge_mac = links(netns)[called.bridge]["address"]
    batch(
        netns,
        [
            *([f"address add {server}/32 dev {called.bridge}"] if server else []),
            f"link set {called.bridge} up",
            # By name, for ip(8) knows no index here; the index stays.
            f"link set {interface} down",
            f"link set {interface} name {called.nic}",
            f"link set {called.nic} address {bridge_mac}",
            f"link set {called.nic} master {called.bridge}",
            f"address flush dev {called.nic}",
            f"link set {called.nic} up",
            f"link set {called.nic} type bridge_slave learning off",
        ],
    )
    bound = Bound(
        netns=netns,
        names=called,
        mac=pod["address"],
        addresses=addresses,
        mtu=pod["mtu"],
        gateway=gateway,
        server=server,
        nic_index=pod["ifindex"],
        bridge_index=links(netns)[called.bridge]["ifindex"],
        tap_index=0,
        queues=queues,
    )
    bound = plug_tap(bound)
    # Never set up: it only answers to a runtime's CHECK.
    _add_dummy(netns, f"{interface} address {pod['address']} mtu {pod['mtu']}")
    batch(netns, [f"address add {address} dev {interface}" for address in addresses])
    if server:
        _sysctl(netns, "net/ipv4/conf/all/arp_ignore", "1")
    return bound


def _add_dummy(netns: str, device: str) -> None:
    """A dummy, or what comes closest on a kernel without them: an ifb without a source."""
    words = [*inside(netns), "ip", "link", "add", *device.split(), "type"]
    if run([*words, "dummy"], check=False).returncode:
        run([*words, "ifb"])


def plug_tap(bound: Bound) -> Bound:
    """Make the tap and put it into the bridge; what has been bound now, with its index."""
    tap, bridge = bound.names.tap, bound.names.bridge
    several = " multi_queue" if bound.queues > 1 else ""
    batch(
        bound.netns,
        [
            f"tuntap add dev {tap} mode tap vnet_hdr{several}",
            f"link set {tap} mtu {bound.mtu}",
            f"link set {tap} master {bridge}",
            f"link set {tap} up",
        ],
    )
    return replace(bound, tap_index=links(bound.netns)[tap]["ifindex"])


def unplug_tap(bound: Bound) -> Bound:
    """Delete the tap alone; the next one has another index."""
    batch(bound.netns, [f"link delete {bound.names.tap}"])
    return replace(bound, tap_index=0)


def unplug(bound: Bound) -> None:
    """Hot-unplug: bridge, tap and dummy go; the NIC is Multus' business and stays."""
    present = links(bound.netns)
    gone = [bound.names.bridge, bound.names.tap]
    if bound.names.nic != bound.names.pod:
        gone.append(bound.names.pod)
    batch(bound.netns, [f"link delete {name}" for name in gone if name in present])


def tear_down(bound: Bound) -> None:
    """Unplug, and give the NIC its name, MAC and addresses back."""
    unplug(bound)
    if bound.names.nic == bound.names.pod:
        run([*inside(bound.netns), "nft", "delete", "table", "ip", "nat"], check=False)
        return
    nic, pod = bound.names.nic, bound.names.pod
    batch(
        bound.netns,
        [
            f"link set {nic} down",
            f"link set {nic} name {pod}",
            f"link set {pod} address {bound.mac}",
            f"link set {pod} up",
            *(f"address add {address} dev {pod}" for address in bound.addresses),
        ],
    )


# --- masquerade binding -----------------------------------------------------


def masquerade_binding(netns: str, interface: str = "eth0", *, queues: int = 0) -> Bound:
    """Bind a VM to an interface by NAT: of the bridge's ports the tap is the only one.

    Args:
        netns: path of a namespace that has the interface, up, with its addresses.
        queues: of the tap.
    """
    pod = _pod(netns, interface)
    called = replace(names(interface), nic=interface)
    gateway, guest = f"{MASQUERADE_NETWORK}.1", f"{MASQUERADE_NETWORK}.2"
    batch(
        netns,
        [
            f"link add {called.bridge} address {MASQUERADE_MAC} mtu {pod['mtu']} type bridge",
            f"address add {gateway}/24 dev {called.bridge}",
            f"link set {called.bridge} up",
        ],
    )
    run([*inside(netns), "ethtool", "-K", called.bridge, "tx", "off"])
    bound = Bound(
        netns=netns,
        names=called,
        mac="02:00:00:00:00:01",
        addresses=(f"{guest}/24",),
        mtu=pod["mtu"],
        gateway=gateway,
        server=gateway,
        nic_index=pod["ifindex"],
        bridge_index=links(netns)[called.bridge]["ifindex"],
        tap_index=0,
        queues=queues,
    )
    bound = plug_tap(bound)
    _sysctl(netns, "net/ipv4/ip_forward", "1")
    _sysctl(netns, f"net/ipv4/conf/{called.bridge}/route_localnet", "1")
    rules = f"""
table ip nat {{
    chain KUBEVIRT_PREINBOUND {{ counter dnat to {guest}; }}
    chain KUBEVIRT_POSTINBOUND {{ ip saddr {{ 127.0.0.1 }} counter snat to {gateway}; }}
    chain prerouting {{
        type nat hook prerouting priority -100;
        iifname "{interface}" counter jump KUBEVIRT_PREINBOUND
    }}
    chain postrouting {{
        type nat hook postrouting priority 100;
        ip saddr {guest} counter masquerade
        oifname "{called.bridge}" counter jump KUBEVIRT_POSTINBOUND
    }}
}}
"""
    run([*inside(netns), "nft", "-f", "-"], text=rules)
    return bound


# --- the pod ----------------------------------------------------------------


def _pod(netns: str, interface: str) -> dict[str, Any]:
    found = links(netns)
    if interface not in found:
        raise CommandError(f"{netns} has no {interface}, only {', '.join(found)}")
    return found[interface]


def _global(link: dict[str, Any]) -> tuple[str, ...]:
    """Addresses with prefix length that are valid beyond the link, IPv4 first."""
    known = sorted(link["addr_info"], key=lambda entry: str(entry["family"]))
    return tuple(f"{a['local']}/{a['prefixlen']}" for a in known if a["scope"] == "global")


def _default_gateway(netns: str) -> str:
    shown = run([*inside(netns), "ip", "-json", "route", "show", "default"]).stdout
    routes: list[dict[str, Any]] = json.loads(shown or "[]")
    return str(routes[0].get("gateway", "")) if routes else ""


def _sysctl(netns: str, name: str, value: str) -> None:
    # /proc/sys/net is that of the process's namespace.
    run([*inside(netns), "tee", f"/proc/sys/{name}"], text=value)
