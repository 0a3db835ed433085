"""Hostile requests to the frozen plugin and the real kernel.

A sample of what tests/unit/test_fuzz_plugin.py sends in greater numbers to the same code in
process, with a fake kernel: here start-up, descriptors, namespaces and maps are real.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from helpers import fuzz
from helpers.fuzz import Hostile
from helpers.netns import namespace, veth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.node import Node

_REQUESTS = 120
_SECONDS = 20  # more than any deadline of the plugin, less than for ever


@pytest.fixture
def netns() -> Iterator[str]:
    """The namespace of a pod, with the primary plugin's work done."""
    with namespace() as path, veth(path, "10.9.0.2/24"):
        yield path


def serve(node: Node, request: Hostile) -> int:
    """One request to the frozen plugin; its answer is checked."""
    environ = {**node.environ, **request.environ}
    done = subprocess.run(
        [node.program],
        input=request.stdin,
        env={os.fsencode(name): os.fsencode(value) for name, value in environ.items()},
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    fuzz.check_answer(request, done.returncode, done.stdout)
    return done.returncode


def delete_all(node: Node) -> None:
    """DEL of everything that is recorded."""
    for path in Path(node.run_dir, "attachments").glob("*.json"):
        record = json.loads(path.read_text())
        names = {"CNI_CONTAINERID": record["container_id"], "CNI_IFNAME": record["ifname"]}
        assert serve(node, Hostile({"CNI_COMMAND": "DEL", **names}, b'{"name": "net"}')) == 0


def test_hostile_requests(node: Node, netns: str) -> None:
    """Whatever comes in: a proper answer, no traceback, and DEL leaves nothing behind."""
    added = 0

    @settings(
        max_examples=_REQUESTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=fuzz.requests(netns))
    def send(request: Hostile) -> None:
        nonlocal added
        code = serve(node, request)
        added += code == 0 and request.environ["CNI_COMMAND"] == "ADD"
        delete_all(node)
        assert node.files() == set()
        assert not added or node.registered() == []

    send()
    assert added, "no request got as far as the kernel"


@pytest.mark.parametrize(
    "path", ["", "/proc/self/ns/mnt", "/dev/null", "/dev/zero", "/", "a\nb", "x" * 5000]
)
def test_netns_that_is_none(node: Node, path: str) -> None:
    """A CNI_NETNS that is no network namespace leaves the pod on the kernel path."""
    result = {"cniVersion": "1.1.0", "ips": [{"address": "10.9.0.2/24"}]}
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "net", "prevResult": result}).encode()
    environ = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": path,
    }
    assert serve(node, Hostile(environ, stdin)) == (0 if path else 1)
    if path:
        assert node.lanes() == {"c1": ("off", "netns")}
    delete_all(node)


def test_fifo_as_netns(node: Node, tmp_path: Path) -> None:
    """A FIFO in the place of a namespace hangs nothing."""
    fifo = tmp_path / "netns"
    os.mkfifo(fifo)
    test_netns_that_is_none(node, str(fifo))
