"""Network namespaces: throwaway ones, commands inside them, and what is in them."""

from __future__ import annotations

import json
import secrets
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.commands import CommandError, run

if TYPE_CHECKING:
    from collections.abc import Iterator


def inside(netns: str) -> tuple[str, ...]:
    """The words to put before a command so that it runs in the namespace at this path."""
    return ("nsenter", f"--net={netns}", "--")


@contextmanager
def namespace() -> Iterator[str]:
    """A new network namespace with its loopback up; yields its path under /run/netns."""
    name = f"np-e2e-{secrets.token_hex(4)}"
    run(["ip", "netns", "add", name])
    try:
        run(["ip", "-n", name, "link", "set", "lo", "up"])
        yield f"/run/netns/{name}"
    finally:
        run(["ip", "netns", "delete", name])


@contextmanager
def veth(netns: str, address: str, ifname: str = "eth0") -> Iterator[str]:
    """A veth pair with one end in the namespace; yields the name of the host's end.

    Args:
        address: of the end in the namespace, e.g. ``10.9.0.2/24``.
    """
    host = f"np{secrets.token_hex(4)}"
    name = Path(netns).name
    run(["ip", "link", "add", host, "type", "veth", "peer", "name", ifname, "netns", name])
    try:
        run(["ip", "link", "set", host, "up"])
        run(["ip", "-n", name, "link", "set", ifname, "up"])
        run(["ip", "-n", name, "address", "add", address, "dev", ifname])
        yield host
    finally:
        run(["ip", "link", "delete", host], check=False)


def _link(netns: str, ifname: str) -> dict[str, Any]:
    shown = run([*inside(netns), "ip", "-json", "address", "show", "dev", ifname])
    links: list[dict[str, Any]] = json.loads(shown.stdout)
    return links[0]


def host_veth(netns: str, ifname: str = "eth0") -> str:
    """Name, in our own namespace, of the other end of a pod's interface."""
    link = _link(netns, ifname)
    if "link_index" not in link:
        raise CommandError(f"{ifname} in {netns} has no peer: {link}")
    return socket.if_indextoname(link["link_index"])


def addresses(netns: str, ifname: str = "eth0") -> list[str]:
    """The global addresses of a pod's interface with prefix length, IPv4 first."""
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in sorted(_link(netns, ifname)["addr_info"], key=lambda entry: entry["family"])
        if entry["scope"] == "global"
    ]


@contextmanager
def preserved_sysctls(*names: str) -> Iterator[None]:
    """Put these back on the way out, e.g. ``net/ipv4/ip_forward``, which CNI plugins set."""
    paths = [Path("/proc/sys", name) for name in names]
    before = [(path, path.read_text()) for path in paths if path.exists()]
    try:
        yield
    finally:
        for path, value in before:
            path.write_text(value)
