"""The sidecar proxy: a program that copies bytes, as user 1337, inside a pod.

    haproxy select   HAProxy without epoll: reads until it is told the end; a patient reader
    haproxy epoll    HAProxy as it comes: waits for EPOLLRDHUP and then takes a short read for
                     the end; a careful reader (bpf/path.h), to which nothing is redirected
    edge             a stand-in for Envoy (edge_proxy.py): edge-triggered, reads until EAGAIN; a
                     careful reader that the guards let in

All ask the kernel for the destination that a connection had before REDIRECT (SO_ORIGINAL_DST)
and connect there themselves, so the way of a request depends on the rules alone. They do so for
IPv4 only; with IPv6 HAProxy's upstreams are given. None splices. (nginx would read as HAProxy
with epoll does: distributions build it without poll(2) and select(2).)
"""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import CommandError, kill_group, require, wait_until
from helpers.mesh_rules import (
    INBOUND,
    OUTBOUND,
    PASSTHROUGH,
    PASSTHROUGH6,
    PROXY_UID,
    istio,
    restore,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.mesh import Stack

# To where the connection wanted to go.
ORIGINAL = "*"
_TCP_LISTEN = "0A"  # include/net/tcp_states.h, as /proc/net/tcp shows it
_EDGE = Path(__file__).with_name("edge_proxy.py")
_AS_PROXY = ("setpriv", f"--reuid={PROXY_UID}", f"--regid={PROXY_UID}", "--clear-groups")


def _haproxy(outbound: str, inbound: str, source: str, *, ipv6: bool, careful: bool) -> str:
    anywhere = ":::" if ipv6 else "0.0.0.0:"
    return f"""
global
    {"" if careful else "noepoll"}
    {"" if careful else "nopoll"}
    uid {PROXY_UID}
    gid {PROXY_UID}
    nbthread 1
    maxconn 200
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend outbound
    bind {anywhere}{OUTBOUND}
    default_backend upstream
backend upstream
    server original {outbound}
frontend inbound
    bind {anywhere}{INBOUND}
    default_backend application
backend application
    source {source}
    server original {inbound}
"""


def _command(
    proxy: str, directory: str, outbound: str, inbound: str, source: str, *, ipv6: bool
) -> list[str]:
    """What to run in the pod; its configuration is in the directory then."""
    config = Path(directory, "proxy.cfg")
    if proxy == "edge":
        require("setpriv")
        program = ("/usr/bin/python3", "-I", "-S", "-c", _EDGE.read_text(encoding="utf-8"))
        return [*_AS_PROXY, *program, str(OUTBOUND), str(INBOUND), source]
    require("haproxy")
    careful = proxy == "haproxy epoll"
    config.write_text(
        _haproxy(outbound, inbound, source, ipv6=ipv6, careful=careful), encoding="ascii"
    )
    return ["haproxy", "-db", "-f", str(config)]  # -db: in the foreground


@contextmanager
def sidecar(
    pod: Stack,
    outbound: str = ORIGINAL,
    inbound: str = ORIGINAL,
    *,
    source_port: int = 0,
    proxy: str = "haproxy select",
) -> Iterator[subprocess.Popen[str]]:
    """The pod has Istio's rules, and a proxy that listens on 15001 and 15006; yields it.

    Args:
        pod: to put both into.
        outbound: where the proxy connects to for its application; ``address:port``, with
            brackets for IPv6. One proxy speaks one version.
        inbound: where it connects to for those who connect to the pod.
        source_port: that the inbound connections come from; 0: any.
        proxy: which one; see above.
    """
    ipv6 = outbound.startswith("[")
    if ipv6:
        pod.run("ip", "address", "add", f"{PASSTHROUGH6}/128", "dev", "lo")
    source = f"[{PASSTHROUGH6}]" if ipv6 else PASSTHROUGH
    if source_port:
        source += f":{source_port}"
    restore(pod, istio(ipv6=ipv6), ipv6=ipv6)
    with tempfile.TemporaryDirectory(prefix="np-proxy-") as directory:
        command = _command(proxy, directory, outbound, inbound, source, ipv6=ipv6)
        log = Path(directory, "log")
        with log.open("w", encoding="ascii") as output:
            process = subprocess.Popen(
                [*pod.inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        try:
            wait_until(
                lambda: {OUTBOUND, INBOUND} <= _listening(process, log, ipv6=ipv6),
                f"{proxy} listening",
            )
            yield process
        finally:
            kill_group(process)


def _listening(process: subprocess.Popen[str], log: Path, *, ipv6: bool) -> set[int]:
    """Ports with a listener in its namespace; looked up, for a connection would be counted."""
    if process.poll() is not None:
        raise CommandError(f"the proxy does not start: {log.read_text()}")
    table = Path(f"/proc/{process.pid}/net/tcp{'6' if ipv6 else ''}").read_text(encoding="ascii")
    sockets = [line.split() for line in table.splitlines()[1:]]
    return {int(words[1].split(":")[1], 16) for words in sockets if words[3] == _TCP_LISTEN}
