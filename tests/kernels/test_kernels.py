"""The integration tests on the kernels that distributions ship, not only on this machine's."""

from __future__ import annotations

import platform
import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from helpers import streams
from helpers.commands import run
from torture import volume

from . import packages, vm
from .image import ROOT
from .report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

# An emulated processor is some ten times slower than the real one, and the machine may be busy.
_PATIENCE = 5
_ENVIRON = {
    "NEARPATH_PATIENCE": str(_PATIENCE),
    "NEARPATH_CONNECTIONS": "2000",
    "PYTHONPATH": "/nearpath/cni-plugin:/nearpath/tests:/nearpath/site",
}
_PYTEST = (
    *("python3", "-m", "pytest", "-p", "no:hypothesispytest", "-p", "kernels.guest"),
    *("--color=no", "-q", "--durations=30", "--timeout", str(60 * _PATIENCE)),
)
_MOST_SECONDS = 4 * 3600  # the guests have limits of their own: --in-kernels-seconds


@pytest.fixture(scope="module")
def guests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, vm.Guest]]:
    """All kernels that are asked for, running at once: each alone leaves processors idle."""
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("only Debian's package sources have these kernels")
    run(["make", "-s", "-C", str(ROOT / "bpf")], timeout=60)
    streams.build()
    volume.build()
    command = [*_PYTEST, *shlex.split(request.config.getoption("--in-kernels"))]
    seconds = request.config.getoption("--in-kernels-seconds")
    running = {}
    with ExitStack() as stack:
        for series in packages.SERIES:
            if any(series == _series(item) for item in request.session.items):
                tree, work = packages.kernel(series), tmp_path_factory.mktemp(series)
                guest = vm.Guest(tree, work, command, environ=_ENVIRON, timeout=seconds)
                stack.callback(guest.kill)
                running[series] = guest
        yield running


def _series(item: pytest.Item) -> str:
    """The kernel of one of our own tests; empty for any other."""
    call = getattr(item, "callspec", None)  # of parametrised tests alone
    return str(call.params.get("series", "")) if call else ""


@pytest.mark.kernels
@pytest.mark.timeout(_MOST_SECONDS)
@pytest.mark.parametrize("series", packages.SERIES)
def test_the_integration_tests_pass(
    series: str, guests: dict[str, vm.Guest], subtests: pytest.Subtests
) -> None:
    """Every test that ran in the guest is a subtest here, with its outcome."""
    report = Report(guests[series].wait())
    for name in dict.fromkeys((*report.collected, *report.results)):
        with subtests.test(name):
            report.check(name)
    report.check_end()
    assert report.kernel.startswith(f"{series}.")
