"""CNI networks for the tests, and calling plugins directly, as a runtime would."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.commands import CommandError, run

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping

# Where Debian and Ubuntu put containernetworking-plugins.
PLUGINS = Path("/usr/lib/cni")
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
_SECONDS = 30
# In the name of every iptables chain of portmap.
_PORTMAP = "CNI-HOSTPORT"


def nearpath_entry(**keys: object) -> dict[str, Any]:
    """Our entry of a conflist; guards preferred, for some test machines refuse fentry."""
    entry = {"type": "nearpath", "capabilities": {ANNOTATIONS: True}, "guards": "preferred"}
    return {**entry, **keys}


class Network:
    """A network of the tests' own: names, subnets and IPAM files that nothing else uses.

    Attributes:
        conflist: the CNI network configuration list.
        gateway: IPv4 address of the node on this network.
    """

    def __init__(self, version: str, kind: str, directory: Path, *, dual_stack: bool) -> None:
        unique = secrets.token_hex(3)
        prefix = f"10.{64 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        ranges = [[{"subnet": f"{prefix}.0/24"}]]
        if dual_stack:
            ranges.append([{"subnet": f"fd{unique[:2]}:{unique[2:]}::/64"}])
        self.gateway = f"{prefix}.1"
        self.bridge = f"np{unique}br"
        self.data = directory / "ipam"
        ipam = {"type": "host-local", "dataDir": str(self.data), "ranges": ranges}
        # libcni and the plugins keep files per name.
        name = f"e2e-{kind}-{unique}"
        self.conflist: dict[str, Any] = {"cniVersion": version, "name": name, "plugins": []}
        if kind == "bridge":
            primary = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipam": ipam}
            self.conflist["plugins"] += [primary]
        elif kind == "ptp":
            default_route = {**ipam, "routes": [{"dst": "0.0.0.0/0"}]}
            self.conflist["plugins"] += [
                {"type": "ptp", "ipam": default_route},
                {"type": "portmap", "capabilities": {"portMappings": True}},
                {"type": "bandwidth", "capabilities": {"bandwidth": True}},
            ]
        else:
            raise ValueError(kind)

    def chained(self, **keys: object) -> dict[str, Any]:
        """The conflist with our entry at its end."""
        plugins = [*self.conflist["plugins"], nearpath_entry(**keys)]
        return {**self.conflist, "plugins": plugins}


@contextmanager
def network(
    version: str, kind: str, directory: Path, *, dual_stack: bool = False
) -> Iterator[Network]:
    """A network ``bridge`` or ``ptp`` (+ portmap + bandwidth); its bridge goes afterwards."""
    if not (PLUGINS / "bridge").exists():
        raise CommandError(f"no CNI plugins in {PLUGINS}; run `make setup`")
    made = Network(version, kind, directory, dual_stack=dual_stack)
    rules = _nat_rules()
    try:
        yield made
    finally:
        run(["ip", "link", "delete", made.bridge], check=False)
        # portmap never removes the chains that all its networks share.
        if _PORTMAP not in rules and _PORTMAP in (rules := _nat_rules()):
            kept = [line for line in rules.splitlines() if _PORTMAP not in line]
            run(["iptables-restore", "-T", "nat"], text="\n".join([*kept, ""]))


def _nat_rules() -> str:
    return run(["iptables-save", "-t", "nat"]).stdout


def call(
    program: Path,
    command: str,
    config: Mapping[str, Any] | str,
    *,
    container_id: str | None = None,
    netns: str | None = None,
    ifname: str | None = "eth0",
    arguments: str = "",
    environ: Mapping[str, str],
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """One invocation of one plugin; None leaves the variable out.

    Args:
        config: what goes to standard input: JSON, or its text.
        arguments: CNI_ARGS.
        prefix: words before the program (strace).
    """
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id,
        "CNI_NETNS": netns,
        "CNI_IFNAME": ifname,
        "CNI_ARGS": arguments,
        "CNI_PATH": os.pathsep.join((str(program.parent), str(PLUGINS))),
    }
    return run(
        [*prefix, program],
        text=config if isinstance(config, str) else json.dumps(config),
        env={**environ, **{name: value for name, value in variables.items() if value is not None}},
        check=False,
        timeout=_SECONDS,
    )


class Chain:
    """A conflist, run plugin by plugin as libcni runs it."""

    def __init__(
        self, conflist: Mapping[str, Any], nearpath: Path, environ: Mapping[str, str]
    ) -> None:
        self._list = conflist
        self._nearpath = nearpath
        self._environ = environ

    def _entries(self) -> list[tuple[Path, dict[str, Any]]]:
        common = {"cniVersion": self._list["cniVersion"], "name": self._list["name"]}
        return [
            (
                self._nearpath if entry["type"] == "nearpath" else PLUGINS / entry["type"],
                {**entry, **common},
            )
            for entry in self._list["plugins"]
        ]

    def add(self, container_id: str, netns: str, *, arguments: str = "") -> dict[str, Any]:
        """ADD through the chain; the last plugin's result.

        Raises:
            CommandError: a plugin failed.
        """
        result: dict[str, Any] = {}
        for program, entry in self._entries():
            config = {**entry, "prevResult": result} if result else entry
            done = call(
                program,
                "ADD",
                config,
                container_id=container_id,
                netns=netns,
                arguments=arguments,
                environ=self._environ,
            )
            if done.returncode != 0:
                raise CommandError(f"ADD {program.name}: {done.stdout}{done.stderr}")
            result = json.loads(done.stdout)
        return result

    def delete(self, container_id: str, netns: str) -> None:
        """DEL in reverse order, without prevResult (as before cniVersion 0.4.0).

        Raises:
            CommandError: a plugin failed.
        """
        for program, entry in reversed(self._entries()):
            done = call(
                program,
                "DEL",
                entry,
                container_id=container_id,
                netns=netns,
                environ=self._environ,
            )
            if done.returncode != 0:
                raise CommandError(f"DEL {program.name}: {done.stdout}{done.stderr}")
