"""Sizes of the maps: by the node's memory, or as an operator says."""

from __future__ import annotations

import os

import pytest

from nearpath.datapath import sizes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "connections"),
    [
        (GIB // 8, 4096),
        (GIB, 4096),
        (2 * GIB, 8192),
        (4 * GIB, 16384),
        (16 * GIB, 65536),
        (64 * GIB, 262144),
        (4096 * GIB, 262144),
        # Never more than one per 256 KiB: "16 GiB" are a little less, and so the power below.
        (16 * GIB - 1, 32768),
        (23 * GIB, 65536),
    ],
)
def test_connections_by_memory(memory: int, connections: int) -> None:
    assert sizes.most_connections(memory) == connections


def test_without_a_number_it_is_this_machine() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sizes.most_connections() == sizes.most_connections(memory)


@pytest.mark.parametrize("memory", [2**exponent + 12345 for exponent in range(26, 46)])
def test_defaults_are_what_an_operator_may_ask_for(memory: int) -> None:
    connections = sizes.most_connections(memory)
    assert sizes.LEAST <= connections <= sizes.MOST
    of_maps = sizes.of_maps(connections)
    assert of_maps["connections"] == connections
    assert of_maps["sockets"] == 2 * connections


@pytest.mark.parametrize(
    ("connections", "half_open"),
    [(1024, 4096), (8192, 4096), (20000, 10000), (131072, 65536), (1 << 20, 65536)],
)
def test_handshakes_are_a_share_of_the_connections(connections: int, half_open: int) -> None:
    assert sizes.of_maps(connections) == {
        "half_open": half_open,
        "sockets": 2 * connections,
        "connections": connections,
    }


@pytest.mark.parametrize("connections", [-1, 0, sizes.LEAST - 1, sizes.MOST + 1])
def test_what_is_out_of_range_is_refused(connections: int) -> None:
    with pytest.raises(ValueError, match="from 1024 to 1048576"):
        sizes.of_maps(connections)
