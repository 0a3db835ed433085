"""The figures of bench_lane.py: medians, ratios, and whether a target is met."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.plan import UNITS, Point

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KERNEL, NEARPATH = "kernel", "nearpath"
MET, MISSED = "met", "not met"


class Ratios:
    """Runs of several arms, one of each per round, against those of one of them, the baseline.

    Attributes:
        baseline: name of that arm.
        values: in one unit, by arm, one of each arm per round.
    """

    baseline: str
    values: dict[str, list[float]]

    @property
    def less_is_better(self) -> bool:
        """Of the values."""
        raise NotImplementedError

    def target(self, arm: str) -> float | None:
        """What the arm's ratio is to reach; None: nothing is asked."""
        raise NotImplementedError

    def median(self, arm: str) -> float:
        """Of the runs."""
        return statistics.median(self.values[arm])

    def _rounds(self, arm: str) -> list[float]:
        """Of each round the arm's value to the baseline's, the worst first."""
        pairs = zip(self.values[arm], self.values[self.baseline], strict=True)
        return sorted((own / base for own, base in pairs), reverse=self.less_is_better)

    def ratio(self, arm: str) -> float:
        """Of the arm to the baseline: the median of the rounds' ratios.

        And not the ratio of the medians, for a slow moment of the machine hits both runs of
        a round.
        """
        return statistics.median(self._rounds(arm))

    def worst(self, arm: str) -> float:
        """The worst round's ratio."""
        return self._rounds(arm)[0]

    def interval(self, arm: str) -> tuple[float, float]:
        """Where the ratio lies with 95 % confidence, as far as so few rounds allow; worse first.

        Ranks of the binomial distribution: it asks nothing of the noise but independence.
        """
        ratios = self._rounds(arm)
        count = len(ratios)
        rank = max(0, int((count + 1) / 2 - 1.96 * count**0.5 / 2) - 1)
        return ratios[rank], ratios[-1 - rank]

    def reaches(self, ratio: float, target: float) -> bool:
        """True if a ratio is at the target or better."""
        return ratio <= target if self.less_is_better else ratio >= target

    def verdict(self, arm: str) -> str:
        """MET, MISSED, or nothing without a target.

        With a question mark if the target lies within the interval: then this run does not
        tell.
        """
        target = self.target(arm)
        if target is None:
            return ""
        result = MET if self.reaches(self.ratio(arm), target) else MISSED
        return f"{result}?" if self.unsure(arm) else result

    def unsure(self, arm: str) -> bool:
        """True if there is a target and it lies within the interval."""
        target = self.target(arm)
        if target is None:
            return False
        worse, better = self.interval(arm)
        return self.reaches(worse, target) != self.reaches(better, target)

    def target_text(self, arm: str) -> str:
        """``≤ 0.92``; nothing without a target."""
        target = self.target(arm)
        return "" if target is None else f"{'≤' if self.less_is_better else '≥'} {target:.2f}"


@dataclass
class Series(Ratios):
    """The runs of one point; arms are KERNEL, NEARPATH and the names of others.

    Attributes:
        values: in the unit of the test, by arm, one of each arm per round.
        p99: of the time of a turn in µs, likewise; empty: not measured.
        wire: bytes that crossed the client's veth per byte of payload or connection, likewise.
        counters: of the lane, how far they moved in all rounds.
    """

    point: Point
    values: dict[str, list[float]] = field(default_factory=dict)
    p99: dict[str, list[float]] = field(default_factory=dict)
    wire: dict[str, list[float]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    baseline: str = KERNEL

    @property
    def less_is_better(self) -> bool:
        """Of the values."""
        return self.point.less_is_better

    def target(self, arm: str) -> float | None:
        """The point's, for every arm."""
        del arm
        return self.point.target

    def add(self, arm: str, value: float, p99: float, wire: float) -> None:
        """One run."""
        self.values.setdefault(arm, []).append(value)
        self.wire.setdefault(arm, []).append(wire)
        if p99:
            self.p99.setdefault(arm, []).append(p99)

    def share(self, arm: str) -> float:
        """Part of the kernel path's bytes on the wire that this arm has saved (0 to 1)."""
        kernel = statistics.median(self.wire[KERNEL])
        return max(0.0, 1 - statistics.median(self.wire[arm]) / kernel) if kernel else 0.0

    def p99_ratio(self, arm: str) -> float | None:
        """Of the arm's 99th percentile to the kernel path's; None: not measured."""
        if arm not in self.p99 or KERNEL not in self.p99:
            return None
        return statistics.median(self.p99[arm]) / statistics.median(self.p99[KERNEL])

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        point = self.point
        return {
            "path": point.path,
            "congestion_control": point.control,
            "cpus": point.cpus,
            "test": point.test,
            "size": point.size,
            "unit": UNITS[point.test],
            "target": point.target,
            "counters": self.counters,
            "arms": {
                arm: {
                    "median": self.median(arm),
                    "runs": self.values[arm],
                    "ratio": self.ratio(arm),
                    "worst": self.worst(arm),
                    "interval": self.interval(arm),
                    "p99_us": self.p99.get(arm, []),
                    "p99_ratio": self.p99_ratio(arm),
                    "off_the_wire": self.share(arm),
                    "verdict": self.verdict(arm) if arm != KERNEL else "",
                }
                for arm in self.values
            },
        }


@dataclass(frozen=True)
class Table:
    """A table of text; the first two columns are to be read from the left."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As GitHub has it."""
        lines = [
            f"### {self.title}",
            "",
            _line(self.heads),
            _line([":---" if index < 2 else "---:" for index in range(len(self.heads))]),
            *map(_line, self.rows),
        ]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def size_text(size: int) -> str:
    """``64 B``, ``16 KiB``; nothing for 0."""
    if not size:
        return ""
    return f"{size // 1024} KiB" if size >= 1024 and size % 1024 == 0 else f"{size} B"


def number(value: float) -> str:
    """Three digits, or all of a large number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _arms(series: Iterable[Series]) -> list[str]:
    """All but the kernel path, in the order of measurement."""
    found: dict[str, None] = {}
    for each in series:
        found |= dict.fromkeys(arm for arm in each.values if arm != KERNEL)
    return sorted(found, key=lambda arm: arm != NEARPATH)


def tables(series: Sequence[Series]) -> list[Table]:
    """One table per path, congestion control and number of CPUs."""
    groups: dict[tuple[str, str, int], list[Series]] = {}
    for each in series:
        point = each.point
        groups.setdefault((point.path, point.control, point.cpus), []).append(each)
    return [_table(key, group) for key, group in groups.items()]


def _table(key: tuple[str, str, int], group: list[Series]) -> Table:
    path, control, cpus = key
    arms = _arms(group)
    heads = ["test", "message", "rounds", "unit", KERNEL]
    for arm in arms:
        heads += [arm, "ratio", "worst", "p99", "saved"]
        if arm == NEARPATH:
            heads += ["target", ""]
    rows = []
    for each in group:
        point = each.point
        row = [point.test, size_text(point.size), str(len(each.values[KERNEL]))]
        row += [UNITS[point.test], number(each.median(KERNEL))]
        for arm in arms:
            tail = each.p99_ratio(arm)
            row += [
                number(each.median(arm)),
                f"{each.ratio(arm):.2f}",
                f"{each.worst(arm):.2f}",
                "" if tail is None else f"{tail:.2f}",
                f"{each.share(arm):.0%}",
            ]
            if arm == NEARPATH:
                row += [each.target_text(NEARPATH), each.verdict(arm)]
        rows.append(tuple(row))
    ends = "both ends on one CPU" if cpus == 1 else "each end on a CPU of its own"
    return Table(f"{path} path, {control}, {ends}", tuple(heads), rows)


def summary(series: Sequence[Series]) -> Table:
    """How the targets stand, one row per kind of test and target."""
    groups: dict[tuple[str, str], list[Series]] = {}
    for each in series:
        if each.point.target is not None:
            key = (each.point.test, each.target_text(NEARPATH))
            groups.setdefault(key, []).append(each)
    rows: list[tuple[str, ...]] = []
    for (test, target), group in groups.items():
        met = sum(each.verdict(NEARPATH).startswith(MET) for each in group)
        unsure = sum(each.verdict(NEARPATH).endswith("?") for each in group)
        ratios = sorted(
            group,
            key=lambda each: each.ratio(NEARPATH) * (-1 if each.point.less_is_better else 1),
        )
        last = ratios[0].point
        where = f"{last.path}, {last.control}, {last.cpus} CPU, {size_text(last.size)}"
        rows.append(
            (
                test,
                target,
                f"{met} of {len(group)}",
                str(unsure),
                f"{statistics.median(each.ratio(NEARPATH) for each in group):.2f}",
                f"{ratios[0].ratio(NEARPATH):.2f}",
                where.removesuffix(", "),
            )
        )
    heads = ("test", "target", "met", "within noise", "median ratio", "worst ratio", "where")
    return Table("Targets", heads, rows)
