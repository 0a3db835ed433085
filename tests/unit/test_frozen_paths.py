"""Paths and environment in the frozen program and in a source tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nearpath.datapath import bundle
from nearpath.kernel import children


def test_source_tree_paths() -> None:
    assert bundle.libbpf_path() == "libbpf.so.1"
    root = Path(__file__).resolve().parents[2]
    assert bundle.object_path("socket_lane") == str(root / "bpf/build/socket_lane.bpf.o")


def test_frozen_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_FROZEN", "/opt/np/_internal")
    assert bundle.libbpf_path() == "/opt/np/_internal/lib/libbpf.so.1"
    assert bundle.object_path("x") == "/opt/np/_internal/bpf/x.bpf.o"


def test_children_of_a_source_tree_inherit_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a")
    assert children.clean_environ() == dict(os.environ)


@pytest.mark.parametrize("original", ["", "/a:/b"])
def test_children_of_the_frozen_program(monkeypatch: pytest.MonkeyPatch, original: str) -> None:
    """They get the environment that the caller of nearpath had."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if original:
        monkeypatch.setenv("LD_LIBRARY_PATH", original)
        monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", original)
    expected = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH_ORIG"}
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/np/_internal:" + original)
    monkeypatch.setenv("_PYI_ARCHIVE_FILE", "/opt/np/nearpath")
    monkeypatch.setattr("sys._MEIPASS", "/opt/np/_internal", raising=False)
    assert children.clean_environ() == expected
