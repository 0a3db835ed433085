"""How much of the tests runs on each stock kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the virtual machines."""
    group = parser.getgroup("kernels", "tests on stock kernels in virtual machines")
    group.addoption(
        "--in-kernels",
        default="-m smoke tests/integration",
        metavar="ARGUMENTS",
        help="arguments of pytest in the virtual machines (default: %(default)s)",
    )
    group.addoption(
        "--in-kernels-seconds",
        type=float,
        default=1200,
        metavar="SECONDS",
        help="how long a virtual machine may run (default: %(default)s)",
    )
