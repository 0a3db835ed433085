"""Fixtures of the end-to-end tests: the frozen program, on this kernel, in real runtimes.

Nothing is skipped here: what is missing on the machine fails and names its remedy.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from helpers.cleanup import holding
from helpers.commands import CommandError, require
from helpers.leaks import nothing_left
from helpers.netns import preserved_sysctls
from helpers.node import frozen_program
from helpers.node import node as make_node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers.node import Node


@pytest.fixture(scope="session")
def program() -> Path:
    """The frozen plugin."""
    if os.geteuid() != 0:
        raise CommandError("the end-to-end tests need root; run `sudo make test`")
    require("ip", "nsenter", "strace")
    return frozen_program()


@pytest.fixture
def node(program: Path) -> Iterator[Node]:
    """A private installation; after the test nothing of it may be left on the machine."""
    with (
        # The bridge and ptp plugins switch forwarding on.
        preserved_sysctls("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"),
        nothing_left(),
        make_node(program) as made,
    ):
        yield made
        # What a test has not removed itself is a leak, except what `nearpath unload` is for.
        assert made.files() == set()
        assert holding(str(made.run_dir)) == {}
        made.cli("unload")
        assert list(made.pin_dir.rglob("*")) == []
