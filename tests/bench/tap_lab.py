"""A node with a virtual machine for bench_tap.py, as KubeVirt's bridge binding lays it out.

    netns "client"         netns "node"            netns "launcher"
    eth0 10.244.1.2 ══ client ┐                              ┌ k6t-eth0 ┐
                              br0                            │          │
                              └ launcher ══ eth0-nic ────────┘          └─── tap0 ── guest

The guest is a process on the tap (tap.c); it has the MAC and the address of the launcher pod,
10.244.1.3. All of it is in namespaces that live as long as this process.
"""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import load
from helpers import virt_handler
from nearpath.errors import NearpathError
from nearpath.kernel import netns, throwaway

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from bench.tap_plan import Point
    from helpers.virt_handler import Bound

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/bench/tap"
SOURCE = Path(__file__).with_name("tap.c")
GUEST = "10.244.1.3"
_GATEWAY, _CLIENT = "10.244.1.1", "10.244.1.2"
_PATIENCE = 25.0  # seconds; a little more than the generator's own
HOST_VETH = "launcher"
_NETFILTER = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables")


@dataclass(frozen=True)
class Times:
    """Length of a run, in ms; warm is not measured.

    Short: a machine has slow moments that last for seconds, and only runs close to each other
    can be compared.
    """

    warm_ms: int = 5
    measure_ms: int = 25


@dataclass(frozen=True)
class Reading:
    """One run.

    Attributes:
        value: time of a turn in µs, the median of the run (round trip), or MB/s (streams).
        p99: of the time of a turn, or of a window, in µs.
        messages: that went to the guest or came from it while it was measured.
        disturbed: part of the time (0 to 1) that the CPU went to others; see load.disturbance.
    """

    value: float
    p99: float
    messages: int
    disturbed: float


@dataclass(frozen=True)
class Lab:
    """The node, with the guest running.

    Attributes:
        client, node: paths of the network namespaces.
        vm: what virt-handler made in the launcher's.
        host_veth: ifindex of the host end of the launcher's NIC, in the node's.
        cpu: that both ends are pinned to.
        guest: the process on the tap.
    """

    client: str
    node: str
    vm: Bound
    host_veth: int
    cpu: int
    guest: subprocess.Popen[bytes]

    def ask(self, point: Point, job: str, times: Times) -> Reading:
        """One run of a client.

        Raises:
            NearpathError: it failed, lost a message, or did not end in time.
        """
        words = (job, GUEST, point.size, point.window, times.warm_ms, times.measure_ms)
        before, begin = load.schedule(self.guest.pid), time.monotonic()
        process = load.start([*self._at(self.client), "ask", *map(str, words)])
        try:
            if not load.ended(process, _PATIENCE):
                raise NearpathError(f"{point.test} of {point.size} B did not end in time")
            wall = time.monotonic() - begin
            client = load.schedule(process.pid)  # still there, for nobody has waited for it
            stdout, stderr = process.communicate()
        finally:
            load.kill(process)
        if process.returncode:
            text = stderr.decode().strip() or f"status {process.returncode}"
            raise NearpathError(f"{point.test} of {point.size} B failed: {text}{self._obituary()}")
        after = load.schedule(self.guest.pid)
        guest = after[0] - before[0], after[1] - before[1]
        lost = load.disturbance(wall, client, guest, one_cpu=True)
        return interpret(point, json.loads(stdout), lost)

    def _obituary(self) -> str:
        """What the guest said if it has ended, for then the client only waits in vain."""
        if self.guest.poll() is None or self.guest.stderr is None:
            return ""
        return f"; the guest has ended: {self.guest.stderr.read().decode().strip()}"

    def set_netfilter(self, on: bool) -> None:
        """Whether bridged packets of the launcher go through netfilter."""
        _set_netfilter(self.vm.netns, on)

    def _at(self, netns: str) -> list[str]:
        return [str(PROGRAM), netns, str(self.cpu)]


def interpret(point: Point, printed: dict[str, Any], disturbed: float) -> Reading:
    """What the generator printed, in the units of a Reading.

    Raises:
        NearpathError: it has measured nothing.
    """
    count, seconds = int(printed["count"]), float(printed["seconds"])
    if count <= 0 or seconds <= 0:
        raise NearpathError(f"{point.test} of {point.size} B measured nothing: {printed}")
    p99 = float(printed["p99_us"])
    if point.less_is_better:
        return Reading(float(printed["p50_us"]), p99, count, disturbed)
    return Reading(count / seconds / 1e6, p99, count // point.size, disturbed)


@contextmanager
def lab(cpu: int) -> Iterator[Lab]:
    """Make the node and start the guest; everything is gone at the end.

    Args:
        cpu: that both ends are pinned to.
    """
    load.compiled(SOURCE, PROGRAM)
    with ExitStack() as stack:
        client, node, launcher = (_namespace(stack) for _ in range(3))
        virt_handler.batch(
            node,
            [
                "link add br0 type bridge",
                f"address add {_GATEWAY}/24 dev br0",
                "link set br0 up",
                f"link add client type veth peer name eth0 netns {client}",
                f"link add {HOST_VETH} type veth peer name eth0 netns {launcher}",
                "link set client master br0 up",
                f"link set {HOST_VETH} master br0 up",
            ],
        )
        # What is compared is the launcher's bridge, so the node's is as cheap as it can be.
        _set_netfilter(node, False)
        for pod, address in ((client, _CLIENT), (launcher, GUEST)):
            virt_handler.batch(
                pod,
                [
                    f"address add {address}/24 dev eth0",
                    "link set eth0 up",
                    f"route add default via {_GATEWAY}",
                ],
            )
        vm = virt_handler.bridge_binding(launcher)
        command = [str(PROGRAM), launcher, str(cpu), "guest", vm.names.tap, vm.mac, GUEST]
        guest = load.start(command)
        stack.callback(load.kill, guest)
        _wait_until_ready(guest)
        index = virt_handler.links(node)[HOST_VETH]["ifindex"]
        yield Lab(client, node, vm, index, cpu, guest)


def _set_netfilter(path: str, on: bool) -> None:
    with netns.entered(path):
        for name in _NETFILTER:
            switch = Path("/proc/sys/net/bridge", name)
            try:
                switch.write_text(str(int(on)), encoding="ascii")
            except FileNotFoundError as error:
                raise NearpathError(
                    "this kernel has no br_netfilter, as every node with kube-proxy has",
                    "modprobe br_netfilter",
                ) from error


def _namespace(stack: ExitStack) -> str:
    descriptor = throwaway.new_netns()
    stack.callback(os.close, descriptor)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _wait_until_ready(guest: subprocess.Popen[bytes]) -> None:
    assert guest.stdout is not None
    assert guest.stderr is not None
    ready, _, _ = select.select([guest.stdout], [], [], _PATIENCE)
    if not ready or not guest.stdout.readline():
        text = guest.stderr.read().decode().strip() if ready else "it says nothing"
        raise NearpathError(f"the guest on the tap has failed: {text}")
