"""One datapath, two pods and their processes for all tests of a module: programs share nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from torture.lab import arena

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torture.arena import Arena
    from torture.lab import Datapath


@pytest.fixture(scope="module")
def pods() -> Iterator[tuple[Arena, Datapath]]:
    """An arena with a real lane."""
    with arena() as made:
        yield made
