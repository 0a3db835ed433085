"""nearpath.datapath.maps on real maps, among them more entries than one batch."""

from __future__ import annotations

import os
import struct
from errno import EEXIST, ENOENT
from typing import TYPE_CHECKING

import pytest

from nearpath.datapath import loader, maps, tables
from nearpath.errors import BpfError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nearpath.place import Place


@pytest.fixture
def pods(place: Place) -> Iterator[maps.Map]:
    """The pinned map pods: u64 to u32, no entries."""
    loader.ensure(place)
    with maps.Map.pinned(f"{place.layout_dir}/pods", 8, 4) as found:
        yield found


def test_lookup_update_delete(pods: maps.Map) -> None:
    key, value = bytes(range(8)), b"abcd"
    assert pods.lookup(key) is None
    pods.update(key, value)
    assert pods.lookup(key) == value
    with pytest.raises(BpfError, match="cannot update map") as caught:
        pods.update(key, value, maps.NOEXIST)
    assert caught.value.errno == EEXIST
    assert pods.delete(key)
    assert not pods.delete(key)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 300])
def test_walks_see_every_entry_once(pods: maps.Map, count: int) -> None:
    expected = {struct.pack("=Q", n): struct.pack("=I", n) for n in range(1, count + 1)}
    for key, value in expected.items():
        pods.update(key, value)
    assert sorted(pods.keys()) == sorted(expected)
    for chunk in (256, 1024):
        assert sorted(pods.items(chunk)) == sorted(expected.items())


def test_wrong_sizes_never_reach_the_kernel(pods: maps.Map) -> None:
    for key, value in ((b"short", bytes(4)), (bytes(8), bytes(5))):
        with pytest.raises(ValueError, match="bytes long"):
            pods.update(key, value)
    with pytest.raises(ValueError, match="bytes long"):
        pods.lookup(bytes(9))


def test_per_cpu_values_have_a_part_for_each_cpu(place: Place) -> None:
    loader.ensure(place)
    path = f"{place.layout_dir}/counters"
    size = 8 * len(tables.COUNTERS)
    with maps.Map.pinned(path, 8, size, per_cpu=True) as counters:
        assert counters.value_size == size * maps.possible_cpus()
        value = os.urandom(counters.value_size)
        counters.update(bytes(8), value)
        assert counters.lookup(bytes(8)) == value


def test_a_missing_pin_is_enoent(place: Place) -> None:
    with pytest.raises(BpfError, match="cannot open pin") as caught:
        maps.Map.pinned(f"{place.pin_dir}/nothing", 8, 4)
    assert caught.value.errno == ENOENT
