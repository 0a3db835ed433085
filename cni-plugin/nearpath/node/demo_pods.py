"""Two throwaway pods on this node, made by a real CNI configuration list.

    pod client ── eth0 ══ veth ── bridge npdemo-<pid> ── veth ══ eth0 ── pod server

The list is bridge + host-local + nearpath, run as a container runtime runs it. Nothing is
shared with the node's own pods: bridge, addresses and IPAM state are the demo's, the
namespaces live as long as this process, and no forwarding or NAT is switched on.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import socket
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearpath import state
from nearpath.errors import NearpathError
from nearpath.kernel import netns, throwaway
from nearpath.lanes import socket as lane
from nearpath.node.chain import Attachment, Chain, ChainError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nearpath.node.interrupt import Interrupts
    from nearpath.place import Place

BRIDGE = "npdemo-"
CONTAINER = "nearpath-demo-"
CONGESTION_CONTROL = "cubic"
PATH = "bridge + veth (CNI: bridge, host-local, nearpath)"
# RFC 2544 sets 198.18.0.0/15 aside for benchmarks: nobody routes it.
_BENCHMARK_NETWORK = ipaddress.ip_network("198.18.0.0/15")
_SYSCTLS = Path("/proc/sys/net/ipv4")


@dataclass(frozen=True)
class Pod:
    """One throwaway pod.

    Attributes:
        netns: path of its network namespace.
        cookie: of the namespace.
        address: IPv4 address.
    """

    netns: str
    cookie: int
    address: str


def free_network(routes: str) -> str:
    """A small network of the benchmark range that no route of this node touches.

    Args:
        routes: content of /proc/net/route.
    """
    taken = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7:
            address, mask = (
                int.from_bytes(bytes.fromhex(fields[index]), sys.byteorder) for index in (1, 7)
            )
            if mask:  # else the default route, which touches everything
                taken.append(ipaddress.ip_network((address, mask.bit_count())))
    for network in _BENCHMARK_NETWORK.subnets(new_prefix=28):
        if not any(network.overlaps(other) for other in taken):
            return str(network)
    raise NearpathError(f"all of {_BENCHMARK_NETWORK} is routed on this node")


def conflist(bridge: str, subnet: str, data_dir: str) -> dict[str, Any]:
    """The configuration list of the two pods."""
    return {
        "cniVersion": "0.4.0",
        "name": "nearpath-demo",
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                # No address on the bridge, no forwarding, no NAT: the pods need only each other.
                "isGateway": False,
                "ipMasq": False,
                "ipam": {"type": "host-local", "subnet": subnet, "dataDir": data_dir},
            },
            # A demo without the lane would show nothing, so here a failure is an error, and
            # guards against calls that the demo's own programs do not make are a luxury.
            {
                "type": "nearpath",
                "required": True,
                "guards": "preferred",
                "timeoutSeconds": 20,
            },
        ],
    }


def _plugin_link(directory: Path) -> None:
    """Put this very program into ``directory`` as the CNI plugin nearpath."""
    target = directory / "nearpath"
    if hasattr(sys, "_MEIPASS"):  # frozen; build.spec says why sys.frozen is not set
        target.symlink_to(sys.executable)
        return
    main = Path(__file__).resolve().parents[2] / "main.py"
    target.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(main))}\n")
    target.chmod(0o755)


@contextmanager
def _directory() -> Iterator[Path]:
    """A private directory for the plugin's link and IPAM state, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=f"{CONTAINER}{os.getpid()}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _namespace() -> Iterator[str]:
    """A throwaway network namespace; its path."""
    descriptor = throwaway.new_netns()
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def _bridge(name: str) -> Iterator[None]:
    """The bridge plugin makes the bridge and leaves it; this removes it."""
    try:
        yield
    finally:
        throwaway.delete_bridge(name)


@contextmanager
def _attached(chain: Chain, attachment: Attachment) -> Iterator[str]:
    """One attachment, detached at the end; its IPv4 address."""
    try:
        result = chain.add(attachment)
        addresses = [str(ip.get("address", "")) for ip in result.get("ips", [])]
        if not addresses:
            raise ChainError("the demo's configuration list gave a pod no address")
        yield addresses[0].partition("/")[0]
    finally:
        # Also after a failed ADD, which has undone its own steps already: DEL may come twice.
        chain.delete(attachment)


def use_cubic(paths: Iterable[str]) -> None:
    """Make cubic the congestion control of new connections in these namespaces.

    Namespaces other than the first may choose only what the first one allows
    (net/ipv4/tcp_cong.c), so where its default is another, cubic is allowed for a moment.
    """
    allowed = _SYSCTLS / "tcp_allowed_congestion_control"
    before = allowed.read_text(encoding="ascii").strip()
    extended = CONGESTION_CONTROL not in before.split()
    try:
        if extended:
            allowed.write_text(f"{before} {CONGESTION_CONTROL}", encoding="ascii")
        for path in paths:
            with netns.entered(path):
                chosen = _SYSCTLS / "tcp_congestion_control"
                chosen.write_text(CONGESTION_CONTROL, encoding="ascii")
    except OSError as error:
        raise NearpathError(
            f"cannot use congestion control {CONGESTION_CONTROL}: {error.strerror}",
            f"modprobe tcp_{CONGESTION_CONTROL}",
        ) from error
    finally:
        if extended:
            allowed.write_text(before, encoding="ascii")


def check_connected(client: Pod, server: Pod) -> None:
    """Open one connection from pod to pod.

    Raises:
        NearpathError: the node's own filtering stops it.
    """
    with netns.entered(server.netns):
        listener = socket.create_server((server.address, 0))
    with listener:
        with netns.entered(client.netns):
            connection = socket.socket()
        with connection:
            connection.settimeout(5)
            try:
                connection.connect(listener.getsockname())
            except OSError as error:
                raise NearpathError(
                    f"the demo's pods cannot reach each other: {error}",
                    "the bridge's traffic is filtered on this node: see the chain FORWARD and "
                    "sysctl net.bridge.bridge-nf-call-iptables",
                ) from error


@contextmanager
def pods(bin_dirs: Sequence[str], interrupts: Interrupts) -> Iterator[list[Pod]]:
    """Client and server pod; everything made for them is gone at the end.

    Raises:
        ChainError: a plugin failed or is missing.
    """
    bridge = f"{BRIDGE}{os.getpid()}"
    subnet = free_network(Path("/proc/net/route").read_text(encoding="ascii"))
    with _directory() as directory, _namespace() as first, _namespace() as second:
        _plugin_link(directory)
        chain = Chain(
            conflist(bridge, subnet, f"{directory}/ipam"), (str(directory), *bin_dirs), timeout=30
        )
        sides = [
            Attachment(
                f"{CONTAINER}{os.getpid()}-{number}",
                path,
                args={
                    "IgnoreUnknown": "1",
                    "K8S_POD_NAMESPACE": "nearpath-demo",
                    "K8S_POD_NAME": name,
                },
            )
            for number, (name, path) in enumerate((("client", first), ("server", second)))
        ]
        with _bridge(bridge), _attached(chain, sides[0]) as client:
            interrupts.check()
            with _attached(chain, sides[1]) as server:
                interrupts.check()
                use_cubic((first, second))
                made = [
                    Pod(path, netns.cookie(path), address)
                    for path, address in ((first, client), (second, server))
                ]
                check_connected(*made)
                yield made


def sweep(place: Place) -> None:
    """Remove what a demo left that was killed (-9): its namespaces went with it."""

    def dead(name: str, prefix: str) -> bool:
        pid = name.removeprefix(prefix).partition("-")[0]
        return name.startswith(prefix) and pid.isdigit() and not os.path.exists(f"/proc/{pid}")

    for name in os.listdir("/sys/class/net"):
        if dead(name, BRIDGE):
            throwaway.delete_bridge(name)
    for record in list(state.records(place)):
        if dead(record["container_id"], CONTAINER):
            cookie = state.cookie_of(record)
            if cookie:
                lane.unregister(place, cookie)
            state.remove(place, record["container_id"], record["ifname"])
    for path in Path(tempfile.gettempdir()).glob(f"{CONTAINER}*"):
        if dead(path.name, CONTAINER):
            shutil.rmtree(path, ignore_errors=True)
