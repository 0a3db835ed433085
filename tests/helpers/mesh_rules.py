"""Netfilter rules of the mesh: services as kube-proxy translates them, sidecars as Istio does.

Each function gives the text for one ``iptables-restore``, ``ip6tables-restore`` or ``nft -f``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helpers.mesh import Stack

VIP, VIP6 = "10.96.0.10", "fd96::10"
SERVICE_PORT, APP_PORT = 80, 8080
PROXY_UID = 1337
OUTBOUND, INBOUND = 15001, 15006
# The address that a sidecar speaks to its own application from, so that the rules let it by.
PASSTHROUGH, PASSTHROUGH6 = "127.0.0.6", "::6"
# Packets that are to be masqueraded.
_MARK = "0x4000"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def kube_proxy(endpoints: Sequence[str], *, masquerade_all: bool = False) -> str:
    """A ClusterIP as kube-proxy's iptables mode writes it: VIP:80 to the endpoints' 8080.

    One of the endpoints at random; a connection that comes back to where it started is
    masqueraded, for else the pod would get the answer from its own address.

    Args:
        endpoints: addresses, all of one family.
        masquerade_all: every connection to the service gets the node's address as source.
    """
    vip = VIP6 if ":" in endpoints[0] else VIP
    bits = 128 if ":" in endpoints[0] else 32
    rules = []
    for number, address in enumerate(endpoints):
        chain = f"KUBE-SEP-{number}"
        left = len(endpoints) - number
        # The last one takes what is left.
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        rules += [
            f"-A KUBE-SVC-MESH {chance}-j {chain}",
            f"-A {chain} -s {address}/{bits} -j KUBE-MARK-MASQ",
            f"-A {chain} -p tcp -m tcp -j DNAT --to-destination {_bracketed(address)}:{APP_PORT}",
        ]
    masquerade = f"-A KUBE-SVC-MESH -d {vip}/{bits} -j KUBE-MARK-MASQ" if masquerade_all else ""
    chains = "\n".join(f":KUBE-SEP-{number} - [0:0]" for number in range(len(endpoints)))
    text = "\n".join(rules)
    return f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-MESH - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
{chains}
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {vip}/{bits} -p tcp -m tcp --dport {SERVICE_PORT} -j KUBE-SVC-MESH
-A KUBE-MARK-MASQ -j MARK --set-xmark {_MARK}/{_MARK}
-A KUBE-POSTROUTING -m mark ! --mark {_MARK}/{_MARK} -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark {_MARK}/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{masquerade}
{text}
COMMIT
"""


def kube_proxy_nft(endpoints: Sequence[str], *, masquerade_all: bool = False) -> str:
    """The same service in the manner of kube-proxy's nftables mode: a verdict map, numgen."""
    version = "ip6" if ":" in endpoints[0] else "ip"
    vip = VIP6 if ":" in endpoints[0] else VIP
    chains = "\n".join(
        f"""  chain endpoint-{number} {{
    {version} saddr {address} jump mark-for-masquerade
    meta l4proto tcp dnat to {_bracketed(address)}:{APP_PORT}
  }}"""
        for number, address in enumerate(endpoints)
    )
    choices = ", ".join(f"{number} : goto endpoint-{number}" for number in range(len(endpoints)))
    masquerade = "jump mark-for-masquerade" if masquerade_all else ""
    return f"""table {version} kube-proxy {{
  chain mark-for-masquerade {{ meta mark set meta mark or {_MARK} ; }}
{chains}
  chain service-mesh {{
    {masquerade}
    numgen random mod {len(endpoints)} vmap {{ {choices} }}
  }}
  map service-ips {{
    type {"ipv6_addr" if version == "ip6" else "ipv4_addr"} . inet_proto . inet_service : verdict
    elements = {{ {vip} . tcp . {SERVICE_PORT} : goto service-mesh }}
  }}
  chain services {{ {version} daddr . meta l4proto . th dport vmap @service-ips ; }}
  chain prerouting {{ type nat hook prerouting priority dstnat ; jump services ; }}
  chain output {{ type nat hook output priority -100 ; jump services ; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat ;
    meta mark and {_MARK} != 0 meta mark set meta mark xor {_MARK} masquerade fully-random
  }}
}}
"""


def istio(*, ipv6: bool = False) -> str:
    """What a sidecar's init container puts into a pod.

    Outbound: what the application sends goes to 15001; what the proxy (user 1337) sends goes
    out, unless it calls its own pod by the pod's address, then it comes in by 15006 like a
    stranger. Inbound: everything goes to 15006 but the proxy's own ports.
    """
    local = "::1/128" if ipv6 else "127.0.0.1/32"
    passthrough = f"{PASSTHROUGH6}/128" if ipv6 else f"{PASSTHROUGH}/32"
    proxy = [f"-m owner --uid-owner {PROXY_UID}", f"-m owner --gid-owner {PROXY_UID}"]
    other = [f"-m owner ! --uid-owner {PROXY_UID}", f"-m owner ! --gid-owner {PROXY_UID}"]
    output = [f"-o lo -s {passthrough} -j RETURN"]
    for ours, theirs in zip(proxy, other, strict=True):
        output += [
            f"-o lo ! -d {local} -p tcp -m tcp ! --dport 15008 {ours} -j ISTIO_IN_REDIRECT",
            f"-o lo {theirs} -j RETURN",
            f"{ours} -j RETURN",
        ]
    output += [f"-d {local} -j RETURN", "-j ISTIO_REDIRECT"]
    own = "\n".join(
        f"-A ISTIO_INBOUND -p tcp -m tcp --dport {port} -j RETURN"
        for port in (15008, 15090, 15021, 15020)
    )
    rules = "\n".join(f"-A ISTIO_OUTPUT {rule}" for rule in output)
    return f"""*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
:ISTIO_REDIRECT - [0:0]
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND}
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND}
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A OUTPUT -p tcp -j ISTIO_OUTPUT
{own}
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
{rules}
COMMIT
"""


def restore(stack: Stack, rules: str, *, ipv6: bool = False) -> None:
    """Put iptables rules into a namespace."""
    stack.run("ip6tables-restore" if ipv6 else "iptables-restore", "--noflush", text=rules)


def nft(stack: Stack, rules: str) -> None:
    """Put nftables rules into a namespace."""
    stack.run("nft", "-f", "-", text=rules)
