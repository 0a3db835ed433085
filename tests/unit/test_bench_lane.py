"""The pure parts of the socket lane's bench: what is measured, and what is made of it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from bench import lab, load, plan, report
from bench.bench_lane import chosen
from bench.lane import Arm, Bench, Other, Times, _Round
from bench.report import KERNEL, NEARPATH, Series
from nearpath.errors import NearpathError
from nearpath.node.interrupt import Interrupts
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable


def point(
    test: str = plan.LATENCY, size: int = 64, path: str = lab.HEAVY, cpus: int = 1
) -> plan.Point:
    return plan.Point(path, plan.CUBIC, cpus, test, size, 3)


def series(at: plan.Point, kernel: list[float], nearpath: list[float]) -> Series:
    made = Series(at)
    for values in zip(kernel, nearpath, strict=True):
        for arm, value in zip((KERNEL, NEARPATH), values, strict=True):
            made.add(arm, value, 0.0, 1.0)
    return made


# -- figures ---------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    """A slow moment that hits both runs of a round changes nothing."""
    calm = series(point(), [10, 10, 10], [5, 4, 6])
    slow = series(point(), [10, 20, 10], [5, 8, 6])
    assert calm.ratio(NEARPATH) == slow.ratio(NEARPATH) == 0.5
    assert (calm.median(KERNEL), calm.median(NEARPATH)) == (10, 5)


def test_the_worst_round_is_the_slowest() -> None:
    assert series(point(), [10, 10, 10], [5, 4, 6]).worst(NEARPATH) == 0.6
    stream = series(point(plan.STREAM), [10, 10, 10], [5, 4, 6])
    assert stream.worst(NEARPATH) == 0.4


@pytest.mark.parametrize(
    ("count", "rank"),
    # Of n independent values the median lies between those of rank r and n + 1 - r with a
    # probability of 1 - 2 * sum(comb(n, k) for k in range(r)) / 2 ** n; about 0.95.
    [(3, 0), (5, 0), (7, 0), (9, 1), (15, 3), (17, 3)],
)
def test_the_interval_is_that_of_the_binomial_distribution(count: int, rank: int) -> None:
    made = series(point(), [1.0] * count, [float(n + 1) for n in range(count)])
    assert made.interval(NEARPATH) == (count - rank, rank + 1)


@pytest.mark.parametrize(
    ("test", "nearpath", "verdict"),
    [
        (plan.LATENCY, [4.0, 4.1, 4.2], "met"),
        (plan.LATENCY, [4.0, 4.9, 5.1], "met?"),
        (plan.LATENCY, [4.0, 5.1, 5.2], "not met?"),
        (plan.LATENCY, [6.0, 5.1, 5.2], "not met"),
        (plan.REQUEST, [9.8, 9.9, 9.7], "met"),
        (plan.REQUEST, [9.8, 9.9, 9.6], "met?"),
        (plan.REQUEST, [9.6, 9.5, 9.6], "not met"),
        (plan.CONNECT, [1.0, 1.0, 1.0], ""),
    ],
)
def test_the_verdict_says_when_a_run_does_not_tell(
    test: str, nearpath: list[float], verdict: str
) -> None:
    assert series(point(test), [10, 10, 10], nearpath).verdict(NEARPATH) == verdict


def test_saved_bytes_are_those_of_the_kernel_path() -> None:
    made = Series(point())
    made.add(KERNEL, 1, 0, 80.0)
    made.add(NEARPATH, 1, 0, 20.0)
    made.add("other", 1, 0, 90.0)
    assert (made.share(NEARPATH), made.share("other")) == (0.75, 0)


def test_what_others_had_of_the_cpu() -> None:
    """On one CPU what the load has not used; on two the longer wait."""
    client, server = (0.04, 0.03), (0.05, 0.01)
    assert load.disturbance(0.1, client, server, one_cpu=True) == pytest.approx(0.1)
    assert load.disturbance(0.1, client, server, one_cpu=False) == pytest.approx(0.3)
    assert load.disturbance(0.08, client, server, one_cpu=True) == 0


def test_what_the_generator_prints() -> None:
    turns = {"count": 1000, "seconds": 0.02, "p50_us": 19.0, "p99_us": 30.0}
    lat, stream, request = (
        load.interpret(load.Job(test, 8, nodelay=False, warm_ms=1, measure_ms=1), turns)
        for test in ("lat", "stream", "request")
    )
    values = [lat.value, stream.value, request.value]
    assert values == pytest.approx([10, 0.05, 50000])  # of latency one way
    assert (lat.p99, lat.work) == (30, 16000)
    assert (stream.p99, stream.work) == (0, 1000)
    assert (request.p99, request.work) == (30, 1000)
    with pytest.raises(NearpathError, match="measured nothing"):
        load.interpret(
            load.Job("lat", 8, nodelay=False, warm_ms=1, measure_ms=1), {"count": 0, "seconds": 1}
        )


# -- tables ----------------------------------------------------------------------------------


def test_tables() -> None:
    all_series = [
        series(point(), [10, 10, 10], [4.0, 4.9, 5.1]),
        series(point(plan.CONNECT, 0), [12345, 12345, 12345], [12345, 12345, 12345]),
        series(point(path=lab.LIGHT, cpus=2), [1, 1, 1], [1, 1, 1]),
    ]
    first, second = report.tables(all_series)
    assert first.title == "heavy path, cubic, both ends on one CPU"
    assert second.title == "light path, cubic, each end on a CPU of its own"
    assert first.rows[0] == (
        *("latency", "64 B", "3", "µs", "10.0", "4.90", "0.49", "0.51", "", "0%", "≤ 0.50", "met?"),
    )
    assert first.rows[1][4:7] == ("12,345", "12,345", "1.00")
    lines = first.markdown().splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[2].startswith("| test | message | rounds | unit | kernel | nearpath | ratio |")


def test_the_summary_names_the_worst() -> None:
    made = [
        series(point(plan.STREAM, 1), [10, 10, 10], [9, 9, 9]),
        series(point(plan.STREAM, 16), [10, 10, 10], [10, 10, 10]),
        series(point(plan.CONNECT), [10, 10, 10], [1, 1, 1]),
    ]
    assert report.summary(made).rows == [
        ("stream", "≥ 0.95", "1 of 2", "0", "0.95", "0.90", "heavy, cubic, 1 CPU, 1 B")
    ]


# -- how many rounds -------------------------------------------------------------------------


class _Scripted(Bench):
    """A bench whose rounds are given: of each the ratio, and what others had of the CPU."""

    def __init__(self, rounds: list[tuple[float, float]], patience: int, spare: int = 0) -> None:
        arms = [Arm(name, "", number) for number, name in enumerate((KERNEL, NEARPATH))]
        super().__init__(Place("/nowhere"), arms, Times(), Interrupts())
        self.patience, self.spare = patience, spare
        self._script = iter(rounds)

    def _counters(self) -> dict[str, int]:
        return {}

    def _run(self, *_: object) -> Callable[[], load.Reading]:
        return lambda: load.Reading(0, 0, 1)

    def _round(self, *_: object) -> _Round:
        ratio, disturbed = next(self._script)
        readings = [load.Reading(value, 0, 1, disturbed) for value in (10, 10 * ratio)]
        return _Round([(reading, 1.0) for reading in readings])


def measured(bench: Bench) -> list[float]:
    made = lab.Lab(lab.HEAVY, {}, "", "", (0, 0), "")
    return bench.measure(made, point(plan.STREAM)).values[NEARPATH]


def test_sure_rounds_are_enough() -> None:
    bench = _Scripted([(1.0, 0)] * 3, patience=4)
    assert (len(measured(bench)), bench.rounds, bench.disturbed) == (3, 3, 0)


def test_unsure_rounds_are_doubled_as_far_as_patience_goes() -> None:
    assert len(measured(_Scripted([(0.9, 0), *[(1.0, 0)] * 11], patience=8))) == 12
    assert len(measured(_Scripted([(0.9, 0), (1.1, 0)] * 6, patience=4))) == 12
    assert len(measured(_Scripted([(0.9, 0), (1.1, 0)] * 6, patience=1))) == 3


def test_disturbed_rounds_are_run_again_while_there_are_spare_ones() -> None:
    noisy = [(0.5, 0.9), (0.5, 0.9), (1.0, 0), (1.0, 0), (1.0, 0)]
    bench = _Scripted(noisy, patience=1, spare=2)
    assert measured(bench) == [10, 10, 10]
    assert (bench.spare, bench.disturbed) == (0, 0)
    bench = _Scripted(noisy, patience=1, spare=1)
    assert sorted(measured(bench)) == [5, 10, 10]
    assert (bench.spare, bench.disturbed) == (0, 1)


# -- what is measured ------------------------------------------------------------------------


def test_the_targets() -> None:
    stream = {
        (path, size): point(plan.STREAM, size, path).target
        for path in lab.PATHS
        for size in (1, 1024, 16384, 65536)
    }
    assert {key for key, target in stream.items() if target == 1.2} == {
        (lab.HEAVY, 1024),
        (lab.HEAVY, 16384),
    }
    assert set(stream.values()) == {1.2, 0.95}
    assert point().target == 0.5
    assert (point(cpus=2).target, point(path=lab.LIGHT).target) == (None, None)
    assert point(plan.OFF_STREAM).target == 0.99
    assert point(plan.OFF_LATENCY).target == pytest.approx(1.01, abs=0.001)


def test_the_time_that_it_takes() -> None:
    """Both arms; somebody else's would be a third."""
    assert 8 < sum(each.seconds for each in plan.points(quick=False)) * 2 / 60 < 12
    assert 1 < sum(each.seconds for each in plan.points(quick=True)) * 2 / 60 < 2.5


def test_points_come_in_groups() -> None:
    """A path's node is made once, and a group has a table."""
    keys = [(each.path, each.control, each.cpus) for each in plan.points(quick=False)]
    changes = sum(one != other for one, other in pairwise(keys))
    assert changes + 1 == len(set(keys)) == 8


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 8),
        (["heavy"], 4),
        (["heavy", "bbr"], 2),
        (["heavy", "light", "two-cpus"], 4),
        (["no such test"], 0),
    ],
)
def test_only(words: list[str], count: int) -> None:
    points = [each for each in plan.points(quick=False) if each.test == plan.CONNECT]
    assert len(chosen(points, words)) == count


def test_only_by_part_of_a_test() -> None:
    tests = {each.test for each in chosen(plan.points(quick=False), ["off-node", "qperf tcp_lat"])}
    assert tests == {*plan.OFF_NODE, plan.QPERF_LATENCY}


@pytest.mark.parametrize("text", ["", "name", "name:on", ":on:off", "a:b:c:d", "kernel:on:off"])
def test_others_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME:ON:OFF|is taken"):
        Other.parse(text)


def test_others() -> None:
    assert Other.parse("it:on -x:off") == Other("it", "on -x", "off")


def test_the_rules_are_those_of_a_thousand_services() -> None:
    """Ours is in the middle of what a new connection walks; chains are made before use."""
    lines = lab.kube_proxy_rules([5000, 5001]).splitlines()
    nat = lines[: lines.index("COMMIT")]
    portals = [line for line in nat if line.startswith("-A KUBE-SERVICES -d ")]
    ours = [index for index, line in enumerate(portals) if "--dport 500" in line]
    assert len(portals) == 1002
    assert ours == [500, 501]
    chains = {line.split()[0][1:] for line in nat if line.startswith(":")}
    jumps = {line.split(" -j ")[1].split()[0] for line in nat if " -j KUBE" in line}
    assert jumps <= chains
    assert all(len(chain) < 29 for chain in chains)  # XT_EXTENSION_MAXNAMELEN
    targets = [line for line in nat if line.endswith("10.244.1.3:5001")]
    assert len(targets) == 1
