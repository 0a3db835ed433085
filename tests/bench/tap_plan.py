"""What bench_tap.py measures, on which arms and for how long, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from nearpath.lanes.checksum import KEEP, SKIP, SOFTWARE

# How a frame gets from the tap to the pod's NIC and back; BRIDGE is KubeVirt's own way.
BRIDGE, MIRROR, REDIRECT, PEER = "bridge", "mirror", "redirect", "peer"
MODES = (BRIDGE, MIRROR, REDIRECT, PEER)
CHECKSUMS = (KEEP, SKIP, SOFTWARE)
# Tests, as the tables name them.
LATENCY = "round trip"
TO_VM, FROM_VM = "stream to the VM", "stream from the VM"
SUPER_TO_VM, SUPER_FROM_VM = "super packets to the VM", "super packets from the VM"
TESTS = (LATENCY, TO_VM, FROM_VM, SUPER_TO_VM, SUPER_FROM_VM)
UNITS = {LATENCY: "µs", **dict.fromkeys(TESTS[1:], "MB/s")}
# Test of tap.c, by ours.
JOBS = {
    LATENCY: "lat",
    TO_VM: "to_vm",
    FROM_VM: "from_vm",
    SUPER_TO_VM: "to_vm_gso",
    SUPER_FROM_VM: "from_vm_gso",
}

KiB = 1024
_MTU, _HEADERS, _PIECE = 1500, 28, 1480
# Segments of a super packet, which fill the MTU.
_SEGMENTS = 40
SUPER = _SEGMENTS * (_MTU - _HEADERS)
# Frames under way at most: the tap's queue has room for 500 (TUN_READQ_SIZE, drivers/net/tun.c).
_UNDER_WAY = 400
_MOST_MESSAGES = 64
# With switching and the start of a process.
_RUN_SECONDS = 0.06
_SIZES = (1, 16, 64, 256, KiB, 4 * KiB, 16 * KiB)
_STREAM_SIZES = (64, KiB, 4 * KiB, 16 * KiB)
_QUICK_SIZES = (1, KiB, 16 * KiB)
_QUICK_STREAM_SIZES = (KiB, 16 * KiB)


@dataclass(frozen=True)
class Arm:
    """One way to run a point.

    Attributes:
        mode: BRIDGE, MIRROR, REDIRECT or PEER.
        checksum: KEEP, SKIP or SOFTWARE.
    """

    mode: str
    checksum: str

    @property
    def name(self) -> str:
        """``mirror, skip``."""
        return f"{self.mode}, {self.checksum}"


# What a node without nearpath does.
BASELINE = Arm(BRIDGE, KEEP)
# What goes around the NIC's transmit path, as with peer, finds nobody there who computes its
# checksum; nearpath then takes redirect.
ARMS = tuple(
    Arm(mode, checksum)
    for checksum in CHECKSUMS
    for mode in MODES
    if (mode, checksum) != (PEER, SOFTWARE)
)


@dataclass(frozen=True)
class Point:
    """One thing that is measured on every arm in turn.

    Attributes:
        test: one of TESTS.
        size: of a message in bytes.
        rounds: runs on each arm.
        netfilter: bridged packets of the launcher go through netfilter. That is how a new
            network namespace begins on every node that has br_netfilter, and kube-proxy
            asks for it.
    """

    test: str
    size: int
    rounds: int
    netfilter: bool = True

    @property
    def arms(self) -> tuple[Arm, ...]:
        """That are measured here."""
        if self.netfilter:
            return ARMS
        return (BASELINE, *(arm for arm in ARMS if arm.checksum == SKIP))

    @property
    def seconds(self) -> float:
        """About how long its runs take, with switching and the start of a process."""
        return self.rounds * len(self.arms) * _RUN_SECONDS

    @property
    def less_is_better(self) -> bool:
        """Of the values."""
        return UNITS[self.test] == "µs"

    @property
    def frames(self) -> int:
        """That a message takes on the wire at most; above the MTU it is fragmented.

        A super packet is one frame, unless checksums are computed by software: then the
        kernel cuts it on the way.
        """
        if self.test in {SUPER_TO_VM, SUPER_FROM_VM}:
            return _SEGMENTS
        return -(-(self.size + _HEADERS - 20) // _PIECE)

    @property
    def window(self) -> int:
        """Messages of a stream that are under way at most."""
        return max(1, min(_MOST_MESSAGES, _UNDER_WAY // self.frames))

    def target(self, arm: Arm) -> float | None:
        """What the ratio to the unmodified bridge is to reach; None: nothing is asked.

        At most it where less is better, else at least it. Asked for is what a VM gets by
        default, that is with SKIP, and where the bridge has netfilter.
        """
        if not self.netfilter or arm.checksum != SKIP or arm.mode == BRIDGE:
            return None
        if self.test == LATENCY:
            return {MIRROR: 0.92, PEER: 0.83}.get(arm.mode)
        return 1.2 if self.test in {TO_VM, FROM_VM} else None


def points(*, quick: bool, rounds: int = 0) -> list[Point]:
    """Everything that is measured.

    Args:
        quick: fewer sizes and rounds.
        rounds: on each arm; 0: as many as the time allows.
    """
    count = rounds or (11 if quick else 31)
    sizes = _QUICK_SIZES if quick else _SIZES
    streams = _QUICK_STREAM_SIZES if quick else _STREAM_SIZES
    wanted = [
        *((LATENCY, size) for size in sizes),
        *((test, size) for test in (TO_VM, FROM_VM) for size in streams),
        *((test, SUPER) for test in (SUPER_TO_VM, SUPER_FROM_VM)),
    ]
    plain = [(LATENCY, size) for size in (64, 16 * KiB)]
    plain += [(test, KiB) for test in (TO_VM, FROM_VM)]
    return [
        *(Point(test, size, count) for test, size in wanted),
        *(Point(test, size, count, netfilter=False) for test, size in plain if not quick),
    ]
