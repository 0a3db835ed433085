"""What counts as a passed run of the tests in a virtual machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.report import Report
from kernels.vm import Outcome

_KERNEL = "6.1.0-56-cloud-amd64"


def _report(*lines: object, problem: str = "", cut: int = 0) -> Report:
    written = "\n".join(json.dumps(line) for line in lines)
    return Report(Outcome(written[: len(written) - cut], problem, Path("/nonexistent"), 1.0))


def _collected(*names: str) -> dict[str, object]:
    return {"collected": list(names), "kernel": _KERNEL}


def _ran(name: str, outcome: str, text: str = "") -> dict[str, object]:
    return {"test": name, "outcome": outcome, "text": text, "seconds": 1}


def test_all_passed() -> None:
    report = _report(_collected("a"), {"started": "a"}, _ran("a", "passed"), {"status": 0})
    report.check("a")
    report.check_end()
    assert report.kernel == _KERNEL


def test_a_failure_shows_its_traceback() -> None:
    report = _report(_collected("a"), _ran("a", "failed", "assert 1 == 2"), {"status": 1})
    with pytest.raises(pytest.fail.Exception, match="assert 1 == 2"):
        report.check("a")
    report.check_end()


@pytest.mark.parametrize(
    ("reason", "excused"),
    [
        ("needs Linux 6.5: completions", True),
        ("needs Linux 6.2: something", True),
        ("needs Linux 6.1: something", False),
        ("needs Linux 5.15: something", False),
        ("needs Linux 6.5: ", False),
        ("needs Linux 6.5", False),
        ("needs fentry, which this kernel refuses: it does not load", False),
        ("needs TLS, which this kernel does not have", False),
        ("", False),
    ],
)
def test_only_an_older_kernel_excuses_a_skip(reason: str, *, excused: bool) -> None:
    report = _report(_collected("a"), _ran("a", "skipped", reason), {"status": 0})
    expected = pytest.skip.Exception if excused else pytest.fail.Exception
    with pytest.raises(expected):
        report.check("a")


def test_a_test_that_did_not_end_has_failed() -> None:
    report = _report(_collected("a", "b"), _ran("a", "passed"), {"started": "b"}, problem="killed")
    report.check("a")
    with pytest.raises(pytest.fail.Exception, match="did not run to its end"):
        report.check("b")
    with pytest.raises(pytest.fail.Exception, match="killed, running b"):
        report.check_end()


def test_a_line_that_is_cut_off_counts_for_nothing() -> None:
    report = _report(_collected("a"), {"started": "a"}, _ran("a", "passed"), cut=5)
    with pytest.raises(pytest.fail.Exception, match="did not run to its end"):
        report.check("a")
    with pytest.raises(pytest.fail.Exception, match="the guest stopped, running a"):
        report.check_end()


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="nothing"),
        pytest.param([{"status": 0}], id="no test"),
        pytest.param([_collected(), {"status": 5}], id="no test selected"),
        pytest.param([_collected("a"), _ran("a", "passed"), {"status": 1}], id="unnamed failure"),
        pytest.param([_collected("a"), _ran("a", "passed"), {"status": 3}], id="pytest crashed"),
        pytest.param([_ran("a", "failed"), {"status": 2}], id="not importable"),
    ],
)
def test_other_ends_are_failures(lines: list[object]) -> None:
    with pytest.raises(pytest.fail.Exception):
        _report(*lines).check_end()
