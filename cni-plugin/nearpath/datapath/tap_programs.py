"""The programs of the tap lane (bpf/tap_lane.bpf.c): one instance for each device.

What an instance is to do stands in its constants. The filter that it is put into holds it, so
there is nothing to pin and nothing to clean up.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nearpath.datapath import bundle, libbpf
from nearpath.datapath.maps import Map

if TYPE_CHECKING:
    from nearpath.datapath.maps import Descriptor

_OBJECT, _PROGRAM, _MAP = "tap_lane", "nearpath_tap", "taken"
ADDRESSES = 3
# struct lane: own[ADDRESSES], host, target, peer, switched, unused
_LANE = struct.Struct(f"={ADDRESSES}QQIIII")
_TAKEN = struct.Struct("=QQ")  # struct taken: packets, bytes


@dataclass(frozen=True)
class Program:
    """What a program is to do.

    Attributes:
        target: ifindex to redirect to.
        own: MAC addresses of the pod's own devices, at most three; frames to them pass.
        host: MAC address of the host veth; empty: redirect to the target itself.
        switched: the host veth is the port of a bridge or the like.
    """

    target: int
    own: tuple[bytes, ...]
    host: bytes = b""
    switched: bool = False

    def name(self) -> str:
        """Name of its filter: equal if and only if it does the same."""
        addresses = ",".join(address.hex() for address in self.own)
        peer = f" peer {self.host.hex()}{' switched' * self.switched}" if self.host else ""
        return f"nearpath {_digest()} to {self.target} but {addresses}{peer}"


def _digest() -> str:
    """Digest of our BPF object, to tell the programs of another version from ours."""
    from hashlib import blake2b

    with open(bundle.object_path(_OBJECT), "rb") as content:
        return blake2b(content.read(), digest_size=6).hexdigest()


def _number(address: bytes) -> int:
    return int.from_bytes(address, "little")


class Loaded:
    """A loaded program; a context. It lives on if a filter has taken it meanwhile."""

    def __init__(self, wanted: Program) -> None:
        self._object = libbpf.Object(bundle.object_path(_OBJECT))
        self._wanted = wanted

    def __enter__(self) -> Descriptor:
        wanted, built = self._wanted, self._object.__enter__()
        try:
            own = [_number(address) for address in wanted.own]
            own += [0] * (ADDRESSES - len(own))
            peer, switched = int(bool(wanted.host)), int(wanted.switched)
            host = _number(wanted.host)
            built.set_constants(_LANE.pack(*own, host, wanted.target, peer, switched, 0))
            built.load()
            return built.programs()[_PROGRAM]
        except BaseException:
            built.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        self._object.__exit__(None, None, None)


def counts(number: int) -> tuple[int, int]:
    """Packets and bytes that the program with this ID has redirected; zeros if it is gone."""
    found = libbpf.map_of_program(number, _MAP)
    if found is None:
        return 0, 0
    with Map(found.number, _MAP, 4, _TAKEN.size, per_cpu=True) as opened:
        value = opened.lookup(bytes(4)) or b""
    packets, count = zip(*_TAKEN.iter_unpack(value), strict=True)
    return sum(packets), sum(count)
