"""The figures of bench_tap.py: tables, and how the targets stand."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.report import MET, Ratios, Table, number, size_text
from bench.tap_plan import (
    ARMS,
    BASELINE,
    BRIDGE,
    CHECKSUMS,
    LATENCY,
    MODES,
    TESTS,
    UNITS,
    Arm,
)
from nearpath.lanes.checksum import SKIP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tap_plan import Point

_ARMS = {arm.name: arm for arm in ARMS}


@dataclass
class TapSeries(Ratios):
    """The runs of one point; the arms by name.

    Attributes:
        values: in the unit of the test, by arm, one of each arm per round.
        p99: of the time of a turn or window in µs, likewise.
    """

    point: Point
    values: dict[str, list[float]] = field(default_factory=dict)
    p99: dict[str, list[float]] = field(default_factory=dict)
    baseline: str = BASELINE.name

    @property
    def less_is_better(self) -> bool:
        """Of the values."""
        return self.point.less_is_better

    def target(self, arm: str) -> float | None:
        """What is asked of an arm here."""
        return self.point.target(_ARMS[arm])

    def add(self, arm: Arm, value: float, p99: float) -> None:
        """One run."""
        self.values.setdefault(arm.name, []).append(value)
        self.p99.setdefault(arm.name, []).append(p99)

    def p99_median(self, arm: str) -> float:
        """Of the runs, in µs."""
        return statistics.median(self.p99[arm])

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "test": self.point.test,
            "size": self.point.size,
            "unit": UNITS[self.point.test],
            "arms": {
                name: {
                    "mode": _ARMS[name].mode,
                    "checksum": _ARMS[name].checksum,
                    "median": self.median(name),
                    "runs": self.values[name],
                    "ratio": self.ratio(name),
                    "worst": self.worst(name),
                    "interval": self.interval(name),
                    "p99_us": self.p99_median(name),
                    "target": self.target(name),
                    "verdict": self.verdict(name),
                }
                for name in self.values
            },
        }


def _of_test(series: Sequence[TapSeries]) -> dict[str, list[TapSeries]]:
    """By test, those with netfilter."""
    found: dict[str, list[TapSeries]] = {}
    for test in TESTS:
        of_test = [each for each in series if each.point.test == test and each.point.netfilter]
        if of_test:
            found[test] = of_test
    return found


def _rows(series: Sequence[TapSeries]) -> list[tuple[TapSeries, str]]:
    """Each point with each checksum mode that was measured."""
    return [
        (each, checksum)
        for each in series
        for checksum in CHECKSUMS
        if any(_ARMS[name].checksum == checksum for name in each.values)
    ]


def _modes(series: Sequence[TapSeries]) -> list[str]:
    measured = {_ARMS[name].mode for each in series for name in each.values}
    return [mode for mode in MODES if mode in measured]


def tables(series: Sequence[TapSeries]) -> list[Table]:
    """One table per test, one of the round trips' tails, and one without netfilter."""
    by_test = _of_test(series)
    found = [_table(test, group) for test, group in by_test.items()]
    if LATENCY in by_test:
        found.append(_tails(by_test[LATENCY]))
    plain = [each for each in series if not each.point.netfilter]
    return [*found, _plain(plain)] if plain else found


def _plain(group: list[TapSeries]) -> Table:
    """Without netfilter: all tests in one table."""
    modes = _modes(group)
    heads = ["test", "message", "unit", BRIDGE]
    for mode in modes[1:]:
        heads += [mode, "ratio", "worst"]
    rows = []
    for each in group:
        point = each.point
        row = [point.test, size_text(point.size), UNITS[point.test]]
        row.append(number(each.median(BASELINE.name)))
        for mode in modes[1:]:
            row += _cells(each, Arm(mode, SKIP), with_target=False)
        rows.append(tuple(row))
    return Table("Without netfilter on the launcher's bridge (checksums: skip)", tuple(heads), rows)


def _table(test: str, group: list[TapSeries]) -> Table:
    modes, asked = _modes(group), _asked(group)
    heads = ["message", "checksums"]
    for mode in modes:
        heads += [mode, "ratio", "worst"]
        if mode in asked:
            heads.append("target")
    rows = []
    for each, checksum in _rows(group):
        row = [size_text(each.point.size), checksum]
        for mode in modes:
            row += _cells(each, Arm(mode, checksum), with_target=mode in asked)
        rows.append(tuple(row))
    better = "lower is better" if group[0].less_is_better else "higher is better"
    return Table(f"{test[0].upper()}{test[1:]}: {UNITS[test]}, {better}", tuple(heads), rows)


def _asked(group: list[TapSeries]) -> set[str]:
    """Modes of which something is asked anywhere in the table."""
    return {
        arm.mode
        for each in group
        for arm in ARMS
        if arm.name in each.values and each.target(arm.name) is not None
    }


def _cells(each: TapSeries, arm: Arm, *, with_target: bool) -> list[str]:
    if arm.name not in each.values:
        return [""] * (4 if with_target else 3)
    cells = [number(each.median(arm.name))]
    if arm == BASELINE:
        cells += ["", ""]
    else:
        cells += [f"{each.ratio(arm.name):.2f}", f"{each.worst(arm.name):.2f}"]
    if with_target:
        cells.append(f"{each.target_text(arm.name)} {each.verdict(arm.name)}".strip())
    return cells


def _tails(trips: list[TapSeries]) -> Table:
    modes = _modes(trips)
    rows = []
    for each, checksum in _rows(trips):
        row = [size_text(each.point.size), checksum]
        for mode in modes:
            name = Arm(mode, checksum).name
            row.append(number(each.p99_median(name)) if name in each.values else "")
        rows.append(tuple(row))
    title = "99th percentile of a single round trip: µs, median of the runs"
    return Table(title, ("message", "checksums", *modes), rows)


def summary(series: Sequence[TapSeries]) -> Table:
    """How the targets stand, one row per test and arm of which something is asked."""
    rows: list[tuple[str, ...]] = []
    for test, group in _of_test(series).items():
        for arm in ARMS:
            asked = [
                each
                for each in group
                if arm.name in each.values and each.target(arm.name) is not None
            ]
            if not asked:
                continue
            worst = sorted(asked, key=lambda each: each.ratio(arm.name))
            last = worst[-1] if worst[0].less_is_better else worst[0]
            verdicts = [each.verdict(arm.name) for each in asked]
            rows.append(
                (
                    test,
                    arm.name,
                    last.target_text(arm.name),
                    f"{sum(verdict.startswith(MET) for verdict in verdicts)} of {len(asked)}",
                    str(sum(verdict.endswith("?") for verdict in verdicts)),
                    f"{statistics.median(each.ratio(arm.name) for each in asked):.2f}",
                    f"{last.ratio(arm.name):.2f}",
                    size_text(last.point.size),
                )
            )
    heads = ("test", "arm", "target", "met", "within noise", "median ratio", "worst ratio", "where")
    return Table("Targets", heads, rows)
