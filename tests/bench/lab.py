"""A node of its own for the benches: two pods, a peer elsewhere, light or heavy network path.

    pod client ── eth0 10.244.1.2 ══ veth ┐             ┌ veth ══ eth0 10.244.1.3 ── pod server
                                          └ bridge br0 ─┘
                                            10.244.1.1
                          netns "node"      192.168.50.1
                                            uplink ══ veth ══ eth0 192.168.50.2 ── netns "peer"

light: the bridge alone, without netfilter; the client connects to the server's address.
heavy: what a node with a bridge CNI and kube-proxy (iptables) has. Bridged packets go through
netfilter and conntrack; 1,000 services, of which the client connects to one in the middle; a
new connection walks KUBE-SERVICES, every packet the rules of FORWARD.

All of it is in namespaces that live as long as this process; the machine's own network, its
rules and its sysctls are left alone (but see `use_congestion_control`).
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nearpath.errors import NearpathError
from nearpath.kernel import netns, throwaway

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIGHT, HEAVY = "light", "heavy"
PATHS = {
    LIGHT: "two veth pairs and a bridge, no netfilter",
    HEAVY: "two veth pairs, bridge with br_netfilter, conntrack, ClusterIP DNAT, "
    "1,000 services as kube-proxy writes them",
}
SERVICES = 1000
CLIENT, SERVER, NODE, PEER = "client", "server", "node", "peer"
_POD_CIDR = "10.244.0.0/16"
_GATEWAY, _CLIENT, _SERVER = "10.244.1.1", "10.244.1.2", "10.244.1.3"
_UPLINK, _PEER = "192.168.50.1", "192.168.50.2"
_CLUSTER_IP = "10.96.200.200"
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_CHOSEN = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def _run(command: list[str], text: str = "") -> str:
    """Run a set-up command; its standard output.

    Raises:
        NearpathError: it failed or is missing.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError as error:
        raise NearpathError(f"{command[0]} is not installed", "make setup") from error
    if done.returncode:
        raise NearpathError(f"`{' '.join(command)}` failed: {done.stderr.strip()[:500]}")
    return done.stdout


@dataclass(frozen=True)
class Lab:
    """One node with its pods.

    Attributes:
        path: LIGHT or HEAVY.
        netns: paths of the network namespaces: CLIENT, SERVER, NODE and PEER.
        address: where the client reaches the server: its own address or the service's.
        peer: address of the peer elsewhere.
        cookies: of the namespaces of the two pods.
        details: what the path consists of, found and not only wished for.
    """

    path: str
    netns: dict[str, str]
    address: str
    peer: str
    cookies: tuple[int, int]
    details: str

    def veth_bytes(self) -> int:
        """Bytes that have crossed the client pod's interface, both ways, with headers."""
        with netns.entered(self.netns[CLIENT]):
            # By thread: /proc/self is the thread group's leader, which may be elsewhere.
            lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
        (fields,) = (line.split() for line in lines if line.split()[0] == "eth0:")
        return int(fields[1]) + int(fields[9])


@contextmanager
def _namespace() -> Iterator[str]:
    descriptor = throwaway.new_netns()
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _in(path: str, command: list[str], text: str = "") -> str:
    return _run(["nsenter", f"--net={path}", "--", *command], text)


def _sysctls(path: str, values: dict[str, int]) -> None:
    with netns.entered(path):
        for name, value in values.items():
            try:
                Path("/proc/sys/net", name).write_text(str(value), encoding="ascii")
            except OSError as error:
                raise NearpathError(f"cannot set net/{name}: {error.strerror}") from error


@contextmanager
def lab(path: str, ports: Iterable[int]) -> Iterator[Lab]:
    """Make the node; everything is gone at the end.

    Args:
        path: LIGHT or HEAVY.
        ports: of the server, which the heavy path's service forwards one to one.
    """
    with _namespace() as node, _namespace() as client, _namespace() as server, _namespace() as peer:
        # In this order: the switch for bridged packets takes effect with the first bridge.
        _sysctls(node, {"ipv4/ip_forward": 1, "bridge/bridge-nf-call-iptables": int(path == HEAVY)})
        _in(node, ["ip", "-batch", "-"], _links(client, server, peer))
        for inside, address, gateway in (
            (client, _CLIENT, _GATEWAY),
            (server, _SERVER, _GATEWAY),
            (peer, _PEER, _UPLINK),
        ):
            _in(inside, ["ip", "-batch", "-"], _end(address, gateway))
        details = PATHS[path]
        if path == HEAVY:
            _in(node, ["iptables-restore"], kube_proxy_rules(ports))
            _sysctls(
                node,
                {
                    # As kube-proxy sets them.
                    "netfilter/nf_conntrack_tcp_timeout_established": 86400,
                    "netfilter/nf_conntrack_tcp_timeout_close_wait": 3600,
                },
            )
            details += f" ({_in(node, ['iptables', '--version']).strip()})"
        yield Lab(
            path,
            {CLIENT: client, SERVER: server, NODE: node, PEER: peer},
            _CLUSTER_IP if path == HEAVY else _SERVER,
            _PEER,
            (netns.cookie(client), netns.cookie(server)),
            details,
        )


def _links(client: str, server: str, peer: str) -> str:
    return f"""
link add br0 type bridge
address add {_GATEWAY}/24 dev br0
link set br0 up
link add client type veth peer name eth0 netns {client}
link add server type veth peer name eth0 netns {server}
link add uplink type veth peer name eth0 netns {peer}
link set client master br0 up
link set server master br0 up
address add {_UPLINK}/24 dev uplink
link set uplink up
"""


def _end(address: str, gateway: str) -> str:
    return f"""
address add {address}/24 dev eth0
link set eth0 up
route add default via {gateway}
"""


def conntrack_entries(made: Lab) -> int:
    """Connections that the node tracks at the moment; 0 on the light path."""
    with netns.entered(made.netns[NODE]):
        count = Path("/proc/sys/net/netfilter/nf_conntrack_count")
        return int(count.read_text(encoding="ascii")) if count.exists() else 0


def kube_proxy_rules(ports: Iterable[int], services: int = SERVICES) -> str:
    """Input for iptables-restore: the tables nat and filter of a node with kube-proxy.

    As kube-proxy 1.29 writes them in iptables mode, with flannel's rule that lets pods
    through: services with two endpoints each, and in the middle of them ours, with one.

    Args:
        ports: of our service and of the server behind it.
        services: number of others.
    """
    before: list[str] = []
    chains: list[str] = []
    rules: list[str] = []
    for number in range(services):
        cluster_ip = f"10.96.{number // 250}.{number % 250 + 1}"
        pods = [f"10.244.{2 + number % 100}.{10 + 2 * (number // 100) + end}" for end in (0, 1)]
        before.append(_service(chains, rules, f"{number:016d}", f"{cluster_ip}:80", pods, 8080))
    ours = [
        _service(chains, rules, f"OURS{port:012d}", f"{_CLUSTER_IP}:{port}", [_SERVER], port)
        for port in ports
    ]
    middle = services // 2
    portals = [*before[:middle], *ours, *before[middle:]]
    return "\n".join(
        [
            "*nat",
            ":PREROUTING ACCEPT",
            ":INPUT ACCEPT",
            ":OUTPUT ACCEPT",
            ":POSTROUTING ACCEPT",
            ":KUBE-SERVICES -",
            ":KUBE-NODEPORTS -",
            ":KUBE-POSTROUTING -",
            ":KUBE-MARK-MASQ -",
            *chains,
            "-A PREROUTING -m comment --comment portals -j KUBE-SERVICES",
            "-A OUTPUT -m comment --comment portals -j KUBE-SERVICES",
            "-A POSTROUTING -m comment --comment postrouting -j KUBE-POSTROUTING",
            "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
            "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
            "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
            "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
            *portals,
            "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
            *rules,
            "COMMIT",
            *_FILTER,
            "COMMIT\n",
        ]
    )


_FILTER = (
    "*filter",
    ":INPUT ACCEPT",
    ":FORWARD ACCEPT",
    ":OUTPUT ACCEPT",
    ":KUBE-PROXY-FIREWALL -",
    ":KUBE-FORWARD -",
    ":KUBE-SERVICES -",
    ":KUBE-EXTERNAL-SERVICES -",
    ":FLANNEL-FWD -",
    "-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
    "-A FORWARD -m comment --comment forwarding -j KUBE-FORWARD",
    "-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES",
    "-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES",
    "-A FORWARD -m comment --comment flanneld -j FLANNEL-FWD",
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
    "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    f"-A FLANNEL-FWD -s {_POD_CIDR} -j ACCEPT",
    f"-A FLANNEL-FWD -d {_POD_CIDR} -j ACCEPT",
)


def _service(
    chains: list[str], rules: list[str], name: str, portal: str, pods: list[str], target: int
) -> str:
    """Add the chains and rules of one service; its rule in KUBE-SERVICES."""
    address, _, port = portal.partition(":")
    match = f"-d {address}/32 -p tcp -m tcp --dport {port}"
    service = f"KUBE-SVC-{name}"
    chains.append(f":{service} -")
    rules.append(f"-A {service} ! -s {_POD_CIDR} {match} -j KUBE-MARK-MASQ")
    for index, pod in enumerate(pods):
        endpoint = f"KUBE-SEP-{index}{name[1:]}"
        left = len(pods) - index
        chance = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        chains.append(f":{endpoint} -")
        rules.append(f"-A {service} -m comment --comment {name}{chance} -j {endpoint}")
        rules.append(f"-A {endpoint} -s {pod}/32 -j KUBE-MARK-MASQ")
        rules.append(f"-A {endpoint} -p tcp -m tcp -j DNAT --to-destination {pod}:{target}")
    return f"-A KUBE-SERVICES {match} -m comment --comment {name} -j {service}"


def use_congestion_control(name: str, made: Lab) -> None:
    """New connections of the pods and the peer use this congestion control.

    Namespaces other than the first may choose only what the first one allows
    (net/ipv4/tcp_cong.c), so the first one's list is extended for a moment.

    Raises:
        NearpathError: this kernel does not have it.
    """
    if name not in _AVAILABLE.read_text(encoding="ascii").split():
        subprocess.run(["modprobe", f"tcp_{name}"], capture_output=True, check=False, timeout=30)
    allowed = _ALLOWED.read_text(encoding="ascii").strip()
    extended = name not in allowed.split()
    try:
        if extended:
            _ALLOWED.write_text(f"{allowed} {name}", encoding="ascii")
        for key in (CLIENT, SERVER, PEER):
            with netns.entered(made.netns[key]):
                _CHOSEN.write_text(name, encoding="ascii")
    except OSError as error:
        raise NearpathError(
            f"this kernel does not have congestion control {name}: {error.strerror}"
        ) from error
    finally:
        if extended:
            _ALLOWED.write_text(allowed, encoding="ascii")
