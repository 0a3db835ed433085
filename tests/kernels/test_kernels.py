"""The socket lane on the kernels that distributions ship, not only on this machine's."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from helpers.commands import run

from . import vm

_GUEST = Path(__file__).with_name("guest_socket_lane.py")
# Listed here too, so that a check that no longer runs is missed.
_CHECKS = [
    "load",
    "request_response_v4",
    "request_response_v6",
    "request_response_mapped_server",
    "request_response_mapped_client",
    "receive_memory",
    "not_drained",
    "random_order",
    "half_close",
    "half_close_at_once",
    "half_close_in_full_flow",
    "half_close_while_paused",
    "close_after_write",
    "slow_reader",
    "slow_reader_small",
    "small_messages_memory",
    "duplex",
    "unregistered",
    "unload_drains",
    "half_close_while_draining",
    "memory_returned",
    "kernel_log",
]


@pytest.mark.kernels
@pytest.mark.timeout(400)
@pytest.mark.parametrize("series", vm.SERIES)
def test_the_socket_lane_works(series: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Every check of guest_socket_lane.py holds; its facts are in report.json of the test."""
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("only Debian's package sources have these kernels")
    run(["make", "-s", "-C", str(vm.ROOT / "bpf")], timeout=60)
    outcome = vm.run_script(vm.kernel(series), _GUEST, tmp_path, modules=("veth",), timeout=150)
    report = json.loads(outcome.stdout)
    (tmp_path / "report.json").write_text(json.dumps(report, indent=1))
    assert report["kernel"].startswith(f"{series}.")
    checks = report["checks"]
    for name in _CHECKS:
        with subtests.test(name):
            assert name in checks, "it did not run"
            assert checks[name]["error"] == "", f"see {outcome.console}"
    assert sorted(checks) == sorted(_CHECKS)
