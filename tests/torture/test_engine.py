"""The torture's own parts: generator, comparison, limits, shrinking. No root needed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from torture.__main__ import programs
from torture.compare import Difference, differences, judge
from torture.generator import FEATURES, LIMITED, Maker
from torture.limits import LIMITS
from torture.operations import OPERATIONS, Table
from torture.programs import WAYS, Program, Step
from torture.shrink import shrink
from torture.torturer import Torturer

if TYPE_CHECKING:
    from pathlib import Path

    from torture.arena import Trace

_SERVICES = {"pass", "take", "set", "c", "s"}


# -- programs --------------------------------------------------------------------------------


def test_a_seed_makes_the_same_program_every_time() -> None:
    first, again = (list(itertools.islice(programs(7, [], []), 50)) for _ in range(2))
    assert first == again
    assert len({str(program) for program in first}) == 50


def test_programs_do_what_the_worker_knows_and_differ() -> None:
    """Every feature is drawn, every operation is known, every way is taken."""
    made = list(itertools.islice(programs(0, [], []), 800))
    done = {step.do for program in made for step in program.steps}
    assert done <= set(OPERATIONS) | _SERVICES
    assert {"splice_out", "recv_discard", "sendmmsg", "epoll_wait", "fork", "take"} <= done
    assert {program.where for program in made} == set(WAYS)
    assert {"OOB", "PEEK", "WAITALL", "ZEROCOPY", "MORE"} <= set().union(
        *(program.flags() for program in made)
    )
    assert any(step.by == "kill" for program in made for step in program.steps)


def test_features_can_be_left_out() -> None:
    for seed in range(100):
        maker = Maker(seed, without=["splice", "waitall", "polling"])
        assert not {maker.limited, *maker.features} & {"splice", "waitall", "polling"}
        assert not maker.make().uses("splice_out")
        assert Maker(seed, only=["look"]).features <= {"look"}
    assert not set(FEATURES) & set(LIMITED)


def test_a_program_survives_its_file(tmp_path: Path) -> None:
    for program in itertools.islice(programs(0, [], []), 100):
        path = tmp_path / "program.json"
        program.save(path)
        assert Program.from_json(path.read_text()) == program


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 1, "steps": [[1]]}', '{"steps": 1}'])
def test_another_file_is_no_program(text: str) -> None:
    with pytest.raises(ValueError, match="not a program"):
        Program.from_json(text)


def test_bytes_are_told_by_their_place() -> None:
    """What one side sends is what the other expects, and anything else is told apart."""
    client, server = Table("c"), Table("s")
    args: dict[str, Any] = {}
    data = client.next_bytes(args, 100)
    client.has_sent(args, 100)
    assert server.place(args, data[:40], keep=True) == "0+40"
    assert server.place(args, data[:40]) == "0+40"
    assert server.place(args, data[50:]) == "instead of 40: 50+50"
    assert server.place(args, b"other").startswith("wrong at 90")
    assert client.place(args, data).startswith("wrong at 0")
    assert len(client.next_bytes(args, 5 << 20)) == 5 << 20


# -- comparing -------------------------------------------------------------------------------

_CONNECTED = (Step("c0", "socket"), Step("c0", "connect"), Step("s0", "accept"))


def _case(
    steps: tuple[Step, ...], what: str, kernel: Any, lane: Any
) -> tuple[Program, Trace, Trace]:
    """Runs whose last step is the first with a difference."""
    program = Program(1, steps)
    quiet: Trace = [{} for _ in steps[:-1]]
    return program, [*quiet, {what: kernel}, {}], [*quiet, {what: lane}, {}]


def _limits(
    steps: tuple[Step, ...], what: str, kernel: Any, lane: Any, *, guarded: bool = False
) -> list[str]:
    """The limits that explain a difference at the last step; empty: it is a failure."""
    verdict = judge(*_case(steps, what, kernel, lane), LIMITS, guarded=guarded)
    assert bool(verdict.failures) != bool(verdict.limits)
    return verdict.limits


def test_what_is_missing_is_a_difference_too() -> None:
    found = differences([{"a": 1}, {"b": 2}], [{"a": 1}, {}, {"c 1 (step 0)": "for ever"}])
    assert [len(step) for step in found] == [0, 1, 1]
    assert found[1][0] == Difference(1, "b", 2, None)
    assert found[2][0].begun == 0


@pytest.mark.parametrize(
    ("step", "kernel", "lane", "limited"),
    [
        (Step("s0", "recv", {"n": 9}), ["ok", "0+9"], ["ok", "0+5"], True),
        (Step("s0", "recv", {"n": 9}), ["ok", "0+9"], ["ok", "4+5"], False),
        (Step("s0", "recv", {"n": 9}), ["ok", "0+5"], ["ok", "0+9"], False),
        (Step("s0", "recv", {"n": 9}), ["ok", "0+9"], ["EAGAIN"], False),
        (Step("s0", "recv_exact", {"n": 9}), ["ok", 9, "in place"], ["ok", 8, "in place"], False),
        (Step("s0", "splice_out", {"n": 9}), ["ok", "0+9"], ["EAGAIN"], True),
        (Step("s0", "recv_discard", {"n": 9}), ["ok", 9], ["EFAULT"], True),
        (Step("s0", "recv_discard", {"n": 9}), ["ok", 9], ["ok", 8], False),
        (Step("s0", "fionread"), ["ok", 9], ["ok", 5], True),
        (Step("s0", "fionread"), ["ok", 9], ["ok", 10], False),
        (Step("s0", "tcp_info"), ["ok", 9], ["ok", 1], True),
        (Step("s0", "so_error"), ["ok", 0], ["ok", "ECONNRESET"], False),
        (Step("s0", "send", {"n": 0}), ["EPIPE", "SIGPIPE"], ["ok", 0], True),
        (Step("s0", "send", {"n": 1}), ["EPIPE", "SIGPIPE"], ["ok", 1], False),
        (Step("s0", "poll", {"events": ["IN"]}), ["ok", "IN"], ["ok", "none"], False),
    ],
)
def test_limits_are_narrow(step: Step, kernel: Any, lane: Any, limited: bool) -> None:
    steps = (*_CONNECTED, step)
    assert bool(_limits(steps, f"{step.by} {step.do} (step 3)", kernel, lane)) == limited


def test_guards_end_their_limits() -> None:
    steps = (*_CONNECTED, Step("s0", "splice_out", {"n": 9}))
    said = ("s0 splice_out (step 3)", ["ok", "0+9"], ["EAGAIN"])
    assert _limits(steps, *said)
    assert not _limits(steps, *said, guarded=True)


def test_a_limit_of_another_step_explains_nothing() -> None:
    steps = (*_CONNECTED, Step("s0", "splice_out", {"n": 9}), Step("c0", "send", {"n": 1}))
    assert not _limits(steps, "c0 send (step 4)", ["ok", 1], ["EPIPE"])


def test_a_sleeper_is_woken_by_somebody() -> None:
    """EAGAIN for a reader asleep needs another thread of its own side, or a reset."""
    asleep = (*_CONNECTED, Step("s0", "recv", {"n": 9}))
    what = "s0 recv (step 3)"
    assert _limits((*asleep, Step("s1", "shutdown", {"how": "WR"})), what, None, ["EAGAIN"])
    assert not _limits((*asleep, Step("c0", "shutdown", {"how": "WR"})), what, None, ["EAGAIN"])
    assert _limits((*asleep, Step("c0", "close")), what, ["ECONNRESET"], ["EAGAIN"])
    assert not _limits((*asleep, Step("c0", "close")), what, ["ok", "nothing"], ["EAGAIN"])


def test_after_a_limit_that_changes_the_stream_nothing_is_compared() -> None:
    steps = (*_CONNECTED, Step("s0", "splice_out", {"n": 9}), Step("s0", "recv", {"n": 9}))
    program = Program(1, steps)
    kernel: Trace = [{}, {}, {}, {"s0 splice_out (step 3)": ["ok", "0+9"]}, {"x": 1}, {}]
    lane: Trace = [{}, {}, {}, {"s0 splice_out (step 3)": ["EAGAIN"]}, {"x": 2}, {}]
    assert not judge(program, kernel, lane, LIMITS, guarded=False).failures
    harmless: Trace = [{}, {}, {}, {"s0 unread": 5}, {"x": 1}, {}]
    fewer: Trace = [{}, {}, {}, {"s0 unread": 3}, {"x": 2}, {}]
    verdict = judge(program, harmless, fewer, LIMITS, guarded=False)
    assert [difference.what for difference in verdict.failures] == ["x"]
    assert verdict.limits


# -- shrinking and judging, with a lane that is broken on purpose -------------------------------


class _Broken:
    """A stand-in for the arena: everything goes well, but for one fault of its lane.

    The fault: a read after two sends of the other side, one of them of more than 100 bytes,
    gets nothing.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.moody = False  # the kernel path is never the same twice
        self.faulty = True

    def run(self, program: Program, accelerated: bool) -> Trace:
        self.runs += 1
        trace: Trace = []
        sent: list[int] = []
        for number, step in enumerate(program.steps):
            result: list[Any] = ["ok"]
            if step.do == "send":
                sent.append(step.args["n"])
            if step.do == "recv" and accelerated and self.faulty and self._hits(sent):
                result = ["EAGAIN"]
            if self.moody:
                result.append(self.runs)
            trace.append({f"{step.by} {step.do} (step {number})": result})
        return [*trace, {}]

    @staticmethod
    def _hits(sent: list[int]) -> bool:
        return len(sent) >= 2 and max(sent) > 100


def _long_program() -> Program:
    sends = tuple(Step("c1", "send", {"n": n, "flags": ["MORE"]}) for n in (3, 7, 5000, 40, 900))
    noise = tuple(Step("s0", "poll", {"events": ["IN"]}) for _ in range(10))
    reads = (Step("s2", "recv", {"n": 10}), Step("s2", "recv", {"n": 10}))
    steps = (*_CONNECTED, *noise, *sends, *noise, *reads, *noise)
    return Program(5, steps, where="v6", settings={"revalidate_ms": 1}, listener={"SO_RCVBUF": 1})


def test_a_failure_is_shrunk_to_what_matters() -> None:
    failure = Torturer(_Broken()).try_program(_long_program())
    assert failure is not None
    smallest = failure.smallest
    assert [str(step) for step in smallest.steps][-1] == "s0   recv n=1"
    sizes = sorted(step.args["n"] for step in smallest.steps[:-1])
    assert len(sizes) == 2
    assert sizes[0] == 1
    assert 100 < sizes[1] <= 200  # halved as long as it fails
    assert (smallest.where, smallest.settings, smallest.listener) == ("v4", {}, {})
    assert (failure.times, failure.of) == (10, 10)
    assert "s0 recv (step 2): kernel path ['ok'], lane ['EAGAIN']" in str(failure)


def test_the_smallest_program_in_the_report_can_be_read_back() -> None:
    failure = Torturer(_Broken()).try_program(_long_program())
    text = str(failure).split("as JSON:\n")[1]
    assert failure is not None
    assert Program.from_json(text) == failure.smallest


def test_a_lane_without_fault_passes() -> None:
    broken = _Broken()
    broken.faulty = False
    torturer = Torturer(broken)
    assert torturer.try_program(_long_program()) is None
    assert (torturer.report.programs, torturer.report.same) == (1, 1)


def test_a_program_that_differs_from_itself_is_called_so() -> None:
    """Neither a failure nor the same."""
    broken = _Broken()
    broken.moody = True
    torturer = Torturer(broken)
    assert torturer.try_program(_long_program()) is None
    assert torturer.report.flaky == [5]
    assert torturer.report.same == 0
    assert "1 not the same twice" in str(torturer.report)


def test_shrinking_stops_when_its_time_is_over() -> None:
    tried = []

    def fails(program: Program) -> bool:
        tried.append(program)
        return True

    program = _long_program()
    assert shrink(program, fails, seconds=0) == program
    assert not tried


def test_shrinking_keeps_to_the_kind_of_failure() -> None:
    """A shorter program that fails in another way is not the one that was found."""

    class Two(_Broken):
        def run(self, program: Program, accelerated: bool) -> Trace:
            trace = super().run(program, accelerated)
            if accelerated and len(program.steps) < 3:
                trace[0] = {**trace[0], "c0 events": "ERR"}
            return trace

    failure = Torturer(Two()).try_program(replace(_long_program(), settings={}))
    assert failure is not None
    assert [step.do for step in failure.smallest.steps] == ["send", "send", "recv"]
