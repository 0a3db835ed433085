"""Making a failing program as small as it can be: delta debugging of steps, then of values."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torture.programs import Program, Step

_SECONDS = 60.0


def shrink(
    program: Program, fails: Callable[[Program], bool], seconds: float = _SECONDS
) -> Program:
    """The smallest program found within the time that still fails.

    Args:
        fails: run a candidate and tell; the program itself must fail.
        seconds: after which the smallest so far must do.
    """
    end = time.monotonic() + seconds
    best = program

    def better(candidate: Program) -> bool:
        nonlocal best
        if time.monotonic() > end or candidate == best or not fails(candidate):
            return False
        best = candidate
        return True

    while time.monotonic() < end:
        before = best
        _fewer_steps(lambda: best, better)
        for simpler in (_plainer, _smaller):
            _each(lambda: best, better, simpler)
        if best == before:
            break
    return best


def _fewer_steps(best: Callable[[], Program], better: Callable[[Program], bool]) -> None:
    """Take steps away, at first many at a time, the last ones first."""
    size = max(len(best().steps) // 2, 1)
    while True:
        at = len(best().steps)
        while at > 0:
            at = max(at - size, 0)
            steps = best().steps
            better(replace(best(), steps=steps[:at] + steps[at + size :]))
        if size == 1:
            return
        size = max(size // 2, 1)


def _each(
    best: Callable[[], Program],
    better: Callable[[Program], bool],
    simpler: Callable[[Program], Iterator[Program]],
) -> None:
    """Try every simplification, again from the start after each that holds."""
    going = True
    while going:
        going = any(better(candidate) for candidate in simpler(best()))


def _plainer(program: Program) -> Iterator[Program]:
    """With defaults in place of what was drawn."""
    yield replace(program, where="v4")
    yield replace(program, settings={})
    for name in program.listener:
        rest = {key: value for key, value in program.listener.items() if key != name}
        yield replace(program, listener=rest)
    for number, step in enumerate(program.steps):
        for name in ("flags", "slot", "piece", "pause"):
            if name in step.args:
                rest = {key: value for key, value in step.args.items() if key != name}
                yield _with(program, number, replace(step, args=rest))
        if step.by[1:] in {"1", "2"}:
            yield _with(program, number, replace(step, by=f"{step.by[0]}0"))
        if step.do == "write":
            yield _with(program, number, replace(step, do="send"))
        if step.do == "read":
            yield _with(program, number, replace(step, do="recv"))


def _smaller(program: Program) -> Iterator[Program]:
    """With smaller numbers."""
    for number, step in enumerate(program.steps):
        for name, value in step.args.items():
            for less in _less(value):
                yield _with(program, number, replace(step, args={**step.args, name: less}))


def _less(value: Any) -> Iterator[Any]:
    if isinstance(value, list) and value and isinstance(value[0], int):
        if len(value) > 1:
            yield value[:1]
            yield value[: len(value) // 2]
            yield value[1:]
        return
    if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
        return
    for less in sorted({1, 10, 100, value // 2}):
        if less < value:
            yield less


def _with(program: Program, number: int, step: Step) -> Program:
    steps = [*program.steps]
    steps[number] = step
    return replace(program, steps=tuple(steps))
