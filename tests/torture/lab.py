"""Two pods and a datapath of one's own, outside pytest too.

pod left ── eth0 10.77.0.1, fd77::1 ═══ veth ═══ eth0 10.77.0.2, fd77::2 ── pod right
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import run
from helpers.leaks import nothing_left
from helpers.netns import namespace, preserved_sysctls
from nearpath.datapath import loader, settings, tables, unloader
from nearpath.kernel import cgroup, netns
from nearpath.lanes import socket as lane
from nearpath.place import Place
from torture.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SYSCTLS = {
    "net/ipv4/tcp_congestion_control": "cubic",
    # Client and server, and both without cookies, which would make the first connection special.
    "net/ipv4/tcp_fastopen": "519",
    # Programs must not learn from each other how long the way is: a long one before, and TCP holds
    # back a small segment (MSG_MORE) longer than we look.
    "net/ipv4/tcp_no_metrics_save": "1",
}


class Datapath:
    """The lane between two pods; the arena's Lane."""

    def __init__(self, place: Place, pods: tuple[str, str]) -> None:
        self.place = place
        self.pods = pods
        self._cookies = [netns.cookie(path) for path in pods]

    def enable(self, on: bool) -> None:
        """Let connections that begin from now on take the lane, or not."""
        for cookie in self._cookies:
            lane.register(self.place, cookie, on)

    def settings(self, values: Mapping[str, int]) -> None:
        """Change settings; those not named get the defaults of the torture.

        Time plays no part unless a program says so, and the lane is taken at once.
        """
        quiet = {"revalidate_ms": 0, "probation": 0}
        settings.write(self.place, **{**settings.DEFAULTS, **quiet, **values})

    def change(self, values: Mapping[str, int]) -> None:
        """Change settings; those not named stay as they are."""
        settings.write(self.place, **values)

    @property
    def guarded(self) -> bool:
        """The guards are attached: this kernel lets programs do that."""
        return loader.is_guarded(self.place)

    def left(self) -> str:
        """What is still in the maps of connections and of sockets."""
        connections = tables.connections(self.place)[tables.GONE]
        return f"{connections} connections, {unloader.sockets_left(self.place.layout_dir)} sockets"

    def counts(self) -> dict[str, int]:
        """Counters so far: redirected_messages, kernel_messages, connections, and reasons."""
        totals = lane.totals(self.place)
        return {**totals.pop("reasons"), **totals}


@contextmanager
def joined_pods() -> Iterator[tuple[str, str]]:
    """Two network namespaces and the veth between them; yields their paths."""
    with ExitStack() as stack:
        paths = [stack.enter_context(namespace()) for _ in range(2)]
        names = [Path(path).name for path in paths]
        run(
            [
                *["ip", "link", "add", "eth0", "netns", names[0], "type", "veth"],
                *["peer", "name", "eth0", "netns", names[1]],
            ]
        )
        for number, name in enumerate(names, start=1):
            in_pod = ["ip", "-n", name]
            run([*in_pod, "address", "add", f"10.77.0.{number}/24", "dev", "eth0"])
            run([*in_pod, "address", "add", f"fd77::{number}/64", "dev", "eth0", "nodad"])
            run([*in_pod, "link", "set", "eth0", "up"])
        # Other namespaces may only use what the first one allows (tcp_cong.c).
        stack.enter_context(preserved_sysctls("net/ipv4/tcp_allowed_congestion_control"))
        allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
        allowed.write_text(allowed.read_text(encoding="ascii").strip() + " cubic", encoding="ascii")
        for path in paths:
            with netns.entered(path):
                for name, value in _SYSCTLS.items():
                    Path("/proc/sys", name).write_text(value, encoding="ascii")
        yield paths[0], paths[1]


@contextmanager
def datapath() -> Iterator[Datapath]:
    """Two joined pods and a datapath that knows them; nothing is left of it afterwards."""
    name = f"np-node-{secrets.token_hex(4)}"  # a name that nothing_left looks for
    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        place = Place(f"{directory}/run", f"/sys/fs/bpf/{name}", f"{cgroup.v2_root()}/{name}")
        Path(place.cgroup).mkdir()
        stack.callback(Path(place.cgroup).rmdir)
        pods = stack.enter_context(joined_pods())
        loader.ensure(place)
        stack.callback(unloader.unload, place, lambda _: None, 5)
        yield Datapath(place, pods)


@contextmanager
def arena() -> Iterator[tuple[Arena, Datapath]]:
    """An arena whose lane is a real one."""
    with datapath() as lanes, Arena(*lanes.pods, lanes.place.cgroup, lanes) as made:
        yield made, lanes
