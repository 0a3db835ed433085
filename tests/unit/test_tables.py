"""User space and BPF agree on what is in the maps."""

from __future__ import annotations

import re
from pathlib import Path

from nearpath.datapath import settings, tables

_HEADER = (Path(__file__).parents[2] / "bpf" / "nearpath.h").read_text(encoding="utf-8")
_SIZES = {"__u16": 2, "__u32": 4, "__u64": 8}


def _enum(name: str) -> list[str]:
    body = re.search(rf"enum {name} {{(.*?)}};", _HEADER, re.DOTALL)
    assert body is not None
    return re.findall(r"^\t(\w+)(?: = \d+)?,", body[1], re.MULTILINE)


def _size(struct: str) -> int:
    body = re.search(rf"struct {struct} {{(.*?)}};", _HEADER, re.DOTALL)
    assert body is not None
    fields = re.findall(r"^\t(__u\d+|struct \w+) \w+(?:\[(\w+)\])?;", body[1], re.MULTILINE)
    assert fields
    counts = {"": 1, "2": 2, "4": 4, "COUNTERS": len(_enum("counter")) - 1}
    return sum(_size_of(kind) * counts[count] for kind, count in fields)


def _size_of(kind: str) -> int:
    return _SIZES[kind] if kind in _SIZES else _size(kind.removeprefix("struct "))


def test_counters_have_the_same_order() -> None:
    """A counter added on one side only would shift all that follow."""
    names = [name.removeprefix("C_").lower() for name in _enum("counter")]
    assert names == [*tables.COUNTERS, "counters"]


def test_values_have_the_same_size() -> None:
    """The formats that tables packs and unpacks are the structs of the header."""
    assert _size("pod") == tables._POD.size
    assert _size("sequences") == tables._SEQUENCES.size
    assert _size("connection") == tables._CONNECTION.size
    assert _size("counters") == tables._COUNTERS.size


def test_flags_are_the_same() -> None:
    """POD_SOCKET_LANE."""
    flag = re.search(r"#define POD_SOCKET_LANE (\d+)u", _HEADER)
    assert flag is not None
    assert int(flag[1]) == tables.POD_SOCKET_LANE


def test_settings_have_the_same_order() -> None:
    """Every member of struct settings is a u32, named alike, and paused comes first."""
    body = re.search(r"struct settings {(.*?)};", _HEADER, re.DOTALL)
    assert body is not None
    assert re.findall(r"^\t__u32 (\w+);", body[1], re.MULTILINE) == list(settings.SETTINGS)
    assert _size("settings") == settings._STRUCT.size
    assert next(iter(settings.SETTINGS)) == "paused"
