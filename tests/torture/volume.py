"""Very many connections, checked byte by byte: builds and runs volume.c.

python -m torture.volume --connections 1000000
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import PATIENCE, CommandError, run
from helpers.netns import inside

if TYPE_CHECKING:
    from torture.lab import Datapath

_SOURCE = Path(__file__).with_name("volume.c")
_BUILD = Path(__file__).resolve().parents[2] / "build/torture"
_PORT = 6000
_THREADS = 6
# So many connections a second outlive TIME_WAIT's 60 s in the ports that there are; the arena
# has those below.
_SYSCTLS = {
    "net.ipv4.tcp_tw_reuse": "1",
    "net.ipv4.ip_local_port_range": "30001 65000",
    "net.ipv4.tcp_max_tw_buckets": "20000",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        connections, differences: made, and ends of connections where something was wrong.
        woken_by_end, woken_by_reset: blocking reads that ended with EAGAIN after the own
            half-close with answers unread, and at the peer's reset: known limits of the lane.
        woken_in_doubt: the same after a half-close with nothing unread; see is_same().
        seconds: that it took.
        wrong: what was wrong, one line each.
    """

    connections: int
    differences: int
    woken_by_end: int
    woken_by_reset: int
    woken_in_doubt: int
    seconds: float
    wrong: str

    def is_same(self, *, guarded: bool) -> bool:
        """True if there was nothing but known limits.

        Without guards it is at times in doubt, when a FIN is sent, whether something is on its
        way to the sender: then its next read may be woken early. On a node as busy as this.
        """
        most = 0 if guarded else 2 + self.connections // 5000
        return not self.differences and self.woken_in_doubt <= most

    def __str__(self) -> str:
        rate = self.connections / max(self.seconds, 0.001)
        return (
            f"{self.connections:,} connections in {self.seconds:.0f} s ({rate:,.0f} a second), "
            f"{self.differences:,} differences; EAGAIN from blocking reads: {self.woken_by_end:,} "
            f"after half-close with answers unread, {self.woken_by_reset:,} at a reset, "
            f"{self.woken_in_doubt:,} in doubt of what was on its way\n{self.wrong}"
        ).rstrip()


def build() -> Path:
    """Compile volume.c if need be; the program."""
    program = _BUILD / "volume"
    if program.exists() and program.stat().st_mtime > _SOURCE.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("clang")
    if not compiler:
        raise CommandError("no C compiler; run `make setup`")
    _BUILD.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    run([compiler, *flags, "-o", fresh, _SOURCE], timeout=60)
    fresh.rename(program)
    return program


def pour(
    lanes: Datapath, *, seconds: float, connections: int = 0, seed: int = 1, address: str = ""
) -> Outcome:
    """Make connections between the two pods for some time, or so many.

    Args:
        seconds: 0: as long as the connections take.
        address: that clients connect to; default the right pod's IPv4 address.
    """
    program = build()
    for pod in lanes.pods:
        settings = [f"{name}={value}" for name, value in _SYSCTLS.items()]
        run([*inside(pod), "sysctl", "-qw", *settings])
    # The shell joins the cgroup first, so that no socket is made outside.
    words = [
        *["sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{lanes.place.cgroup}/cgroup.procs"],
        *[str(program), *lanes.pods, address or "10.77.0.2", str(_PORT), str(_THREADS)],
        *[str(seconds), str(connections), str(seed)],
    ]
    limit = PATIENCE * (seconds + 60 if seconds else 60 + connections / 500)
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=limit, errors="replace"
    )
    try:
        counted = json.loads(done.stdout)
    except ValueError:
        raise CommandError(f"volume: status {done.returncode}\n{done.stderr}") from None
    return Outcome(
        counted["connections"],
        counted["differences"],
        counted["woken_by_end"],
        counted["woken_by_reset"],
        counted["woken_in_doubt"],
        counted["seconds"],
        done.stderr,
    )
