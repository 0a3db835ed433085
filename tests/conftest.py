"""Marks that say what a test needs of the kernel, and when it may be skipped for that."""

from __future__ import annotations

import pytest

from helpers import needs


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the test by the name of what this kernel does not have."""
    reason = needs.missing(item)
    if reason:
        pytest.skip(reason)
