"""A minute of torture: the same programs on the kernel path and in the lane.

`python -m torture --minutes 60` goes on for longer; a failure prints the smallest program that
still fails, and `python -m torture --seed …` shows both its runs.
"""

from __future__ import annotations

import itertools
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from helpers.commands import PATIENCE
from torture import free, volume
from torture.__main__ import programs
from torture.compare import differences
from torture.generator import Maker
from torture.programs import Program, Step
from torture.torturer import Torturer

if TYPE_CHECKING:
    from torture.arena import Arena
    from torture.lab import Datapath

    Pods = tuple[Arena, Datapath]

_FIXED = 150  # programs


def _campaign(pods: Pods, first: int, count: int, seconds: float) -> Torturer:
    """Torture for a while; fails with the smallest program if anything is different."""
    runner, lanes = pods
    before = lanes.counts()["redirected_messages"]
    torturer = Torturer(runner, guarded=lanes.guarded, shrink_seconds=30)
    torturer.campaign(itertools.islice(programs(first, [], []), count), seconds)
    report = torturer.report
    print(f"seeds from {first} on: {report}")
    assert not report.failures, "\n".join(str(failure) for failure in report.failures)
    assert not report.stuck
    # A few programs race with themselves; many would mean that nothing is compared.
    assert len(report.flaky) <= 1 + report.programs // 20
    # With guards too: a tenth of the programs at least have much to do with the lane.
    assert lanes.counts()["redirected_messages"] - before > report.programs
    return torturer


@pytest.mark.timeout(180 * PATIENCE)
def test_known_seeds(pods: Pods) -> None:
    """The same programs every time, so that a change is to blame; `make soak` tries others."""
    assert _campaign(pods, 0, _FIXED, 0).report.programs == _FIXED


def test_the_kernel_path_is_always_the_same(pods: Pods) -> None:
    """The control: without the lane, no program sees anything else when it runs again."""
    runner, _ = pods
    different = [
        number
        for number, program in enumerate(itertools.islice(programs(0, [], []), 30))
        if any(differences(runner.run(program, False), runner.run(program, False)))
    ]
    assert len(different) <= 1


def test_a_lane_that_changes_the_order_is_found_and_shrunk(pods: Pods) -> None:
    """The rule that keeps the order of bytes is switched off: the torture must notice."""
    runner, lanes = pods
    only = ["switching", "look", "threads"]
    broken = {"drained": 0, "careful": 0, "probation": 1, "guards": 0}
    torturer = Torturer(runner, guarded=lanes.guarded, shrink_seconds=20)
    found = None
    for seed in range(200):
        made = Maker(seed, only=only).make()
        found = torturer.try_program(replace(made, settings=broken))
        if found:
            break
    assert found is not None
    assert found.times >= 8
    assert len(found.smallest.steps) <= 9
    assert len(found.smallest.steps) < len(found.program.steps)
    # The same program in the lane as it should be.
    intact = {**found.smallest.settings, "drained": 1}
    assert not torturer.verdict(replace(found.smallest, settings=intact)).failures


def test_a_program_that_hangs_is_seen_to_hang(pods: Pods) -> None:
    """A reader for whom nothing ever comes, and one who is woken."""
    runner, _ = pods
    steps = (
        Step("c0", "socket"),
        Step("c0", "connect"),
        Step("s0", "accept"),
        Step("s0", "recv", {"n": 5}),
        Step("c0", "recv", {"n": 5}),
        Step("c1", "send", {"n": 3}),
    )
    for accelerated in (False, True):
        trace = runner.run(Program(0, steps), accelerated)
        assert "s0 recv (step 3)" not in trace[3]
        assert trace[5]["s0 recv (step 3)"] == ["ok", "0+3"]
        assert trace[-1] == {"c0 recv (step 4)": "for ever"}


def test_a_killed_process_is_replaced(pods: Pods) -> None:
    """kill -9 of either side: the other sees the end, and the next program finds all in order."""
    runner, _ = pods
    begin = (Step("c0", "socket"), Step("c0", "connect"), Step("s0", "accept"))
    for side, other in (("c", "s"), ("s", "c")):
        steps = (
            *begin,
            Step("kill", side),
            Step(f"{other}0", "recv_eof"),
            Step(f"{side}0", "send"),
        )
        for accelerated in (False, True):
            trace = runner.run(Program(0, steps), accelerated)
            assert trace[4][f"{other}0 recv_eof (step 4)"] == ["ok", 0, "in place"]
            assert trace[5][f"{side}0 send (step 5)"] == "dead"


def test_volume(pods: Pods) -> None:
    """Thousands of connections a second, each byte and each errno checked; none is left over."""
    _, lanes = pods
    outcomes = []
    for on, seconds in ((False, 2.0), (True, 6.0)):
        lanes.enable(on)
        lanes.settings({})
        before = lanes.counts()["redirected_messages"]
        outcome = volume.pour(lanes, seconds=seconds, seed=secrets.randbelow(10**9))
        moved = lanes.counts()["redirected_messages"] - before
        print(f"{'lane' if on else 'kernel path'}: {outcome}, {moved:,} redirected")
        assert outcome.connections > 100
        assert outcome.is_same(guarded=lanes.guarded), outcome
        outcomes.append(outcome)
        assert (moved > 0) == on
    kernel = outcomes[0]
    assert not kernel.woken_by_end + kernel.woken_by_reset + kernel.woken_in_doubt
    assert lanes.counts()["connections"] == 0


def test_volume_sees_a_lane_that_changes_the_order(pods: Pods) -> None:
    """The control: with a broken lane the volume does not pass."""
    _, lanes = pods
    lanes.enable(on=True)
    # Streams change paths all the time, and nobody minds the order.
    lanes.settings({"drained": 0, "careful": 0, "receiver_percent": 1, "guards": 0})
    for _ in range(5):  # in an emulator hardly anything meets
        outcome = volume.pour(lanes, seconds=3 * PATIENCE)
        if outcome.differences:
            break
    lanes.settings({})
    assert outcome.differences > 0
    assert "seed " in outcome.wrong


def test_free_running_programs_use_every_way() -> None:
    """What the fixed seeds are made of."""
    made = [free.make(seed) for seed in range(100)]
    assert len({program.where for program in made}) == 5
    assert all(program.free for program in made)
