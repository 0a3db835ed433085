"""The DHCP server that virt-launcher runs on the bridge of a VM's interface; see dhcp_server.py."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.commands import kill_group, wait_until
from helpers.netns import inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.virt_handler import Bound

_SERVER = Path(__file__).with_name("dhcp_server.py")
_PYTHON = ("/usr/bin/python3", "-I", "-S")
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
DISCOVER, REQUEST = 1, 3


class Dhcp:
    """A running server."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def _lines(self) -> list[dict[str, Any]]:
        text = self._log.read_text()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def ready(self) -> bool:
        """True as soon as it listens."""
        return bool(self._lines())

    def heard(self, kind: int, mac: str = "") -> int:
        """How many messages of a type have reached it, from a MAC or from all."""
        return sum(
            line["type"] == kind and (not mac or line["mac"] == mac) for line in self._lines()
        )


@contextmanager
def dhcp(bound: Bound, directory: Path) -> Iterator[Dhcp]:
    """Serve a VM's interface while the block runs: its addresses are the pod's.

    Args:
        bound: has an IPv4 address, and its bridge is there.
        directory: for the log.
    """
    address = next(address for address in bound.addresses if ":" not in address)
    wanted = {
        "device": bound.names.bridge,
        "mac": bound.mac,
        "address": address,
        "router": bound.gateway,
        "server": bound.server,
        "mtu": bound.mtu,
    }
    log = directory / f"dhcp-{Path(bound.netns).name}-{bound.bridge_index}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            # A killed test run takes it along.
            [*_WITH_US, *inside(bound.netns), *_PYTHON, str(_SERVER), json.dumps(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    server = Dhcp(log)
    try:
        wait_until(server.ready, f"the DHCP server on {bound.names.bridge}")
        yield server
    finally:
        kill_group(process)
