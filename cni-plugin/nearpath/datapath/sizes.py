"""How many entries the maps have room for: by the node's memory, or as an operator says.

A node that runs out of room loses nothing but the lane for the connections beyond it
(counter map_full), so the sizes need not be generous. Maps keep their sizes for life.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nearpath.datapath.maps import Map

if TYPE_CHECKING:
    from nearpath.place import Place

# Paired connections that an operator may ask for.
LEAST, MOST = 1024, 1 << 20
# One per 256 KiB of memory. An entry of the preallocated map connections takes 344 bytes,
# so that is 0.13 % of the memory.
_MEMORY_EACH = 256 * 1024
_LEAST_BY_MEMORY, _MOST_BY_MEMORY = 4096, 1 << 18
# Handshakes that are under way; entries of SYNs that never come to anything are overwritten.
_LEAST_HALF_OPEN, _MOST_HALF_OPEN = 4096, 1 << 16
_NAMES = ("half_open", "sockets", "connections")


def most_connections(memory: int = 0) -> int:
    """Paired connections to make room for.

    Args:
        memory: bytes of the node's memory; 0: of this machine.
    """
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = min(max(memory // _MEMORY_EACH, _LEAST_BY_MEMORY), _MOST_BY_MEMORY)
    return int(1 << wanted.bit_length() - 1)


def of_maps(connections: int) -> dict[str, int]:
    """Most entries by map for a number of paired connections.

    Raises:
        ValueError: out of range.
    """
    if not LEAST <= connections <= MOST:
        raise ValueError(f"the number of connections must be from {LEAST} to {MOST}")
    half_open = min(max(connections // 2, _LEAST_HALF_OPEN), _MOST_HALF_OPEN)
    return {"half_open": half_open, "sockets": 2 * connections, "connections": connections}


def of_pinned(place: Place) -> dict[str, int]:
    """Most entries of the maps that are loaded, by map."""
    sizes = {}
    for name in _NAMES:
        with Map.pinned_unknown(f"{place.layout_dir}/{name}") as loaded:
            sizes[name] = loaded.most_entries()
    return sizes
