"""Torture for as long as you like, or one program again.

    cd tests/.. && sudo PYTHONPATH=cni-plugin:tests .venv/bin/python -m torture --minutes 60
    … -m torture --seed 4711            one program again, with all that it sees
    … -m torture --file program.json    one from a file, as failures are saved
    … -m torture --connections 1000000  the volume alone

Exit status 1: something was different in the lane that no known limit explains.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torture import free, volume
from torture.generator import Maker
from torture.lab import arena, datapath
from torture.programs import Program
from torture.torturer import Torturer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torture.lab import Datapath
    from torture.torturer import Failure, Report

_SLICE = 240.0  # seconds of programs before the next volume
_VOLUME = 60.0
_FREE_SHARE = 5  # each fifth program runs freely


def programs(seed: int, without: list[str], only: list[str]) -> Iterator[Program]:
    """Programs of ascending seeds, both kinds."""
    for number in itertools.count(seed):
        if number % _FREE_SHARE == 0:
            yield free.make(number)
        else:
            yield Maker(number, without, only).make()


def _say(text: object) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _keep(failure: Failure, directory: Path) -> None:
    path = directory / f"torture-{failure.program.seed}.json"
    failure.smallest.save(path)
    _say(f"DIFFERENT, saved as {path}\n{failure}")


def _volume(lanes: Datapath, arguments: argparse.Namespace, seconds: float, seed: int) -> bool:
    """One volume run in the lane; True if all was the same."""
    lanes.enable(on=True)
    lanes.settings({})
    before = lanes.counts()
    outcome = volume.pour(lanes, seconds=seconds, connections=arguments.connections, seed=seed)
    after = lanes.counts()
    moved = after["redirected_messages"] - before["redirected_messages"]
    _say(f"volume, seed {seed}: {outcome}; {moved:,} messages redirected, {lanes.left()} left")
    return outcome.is_same(guarded=lanes.guarded) and moved > 0


def _once(program: Program) -> int:
    """Both runs of one program, with all that was seen."""
    with arena() as (runner, lanes):
        torturer = Torturer(runner, guarded=lanes.guarded)
        print(program)
        for accelerated in (False, True):
            print("in the lane:" if accelerated else "on the kernel path:")
            for number, seen in enumerate(runner.run(program, accelerated)):
                step = program.steps[number] if number < len(program.steps) else "end"
                print(f"  {step}\n      {seen}")
        failure = torturer.try_program(program)
        print(failure or torturer.report)
    return int(failure is not None)


def _soak(arguments: argparse.Namespace) -> int:
    end = time.monotonic() + arguments.minutes * 60
    source = programs(arguments.first, arguments.without, arguments.only)
    good = True
    with arena() as (runner, lanes):
        torturer = Torturer(runner, guarded=lanes.guarded)
        _say(f"programs from seed {arguments.first} on, guards {'on' if lanes.guarded else 'off'}")
        while (left := end - time.monotonic()) > 0:
            slice_end = time.monotonic() + min(_SLICE, left)
            said = time.monotonic()
            while time.monotonic() < slice_end:
                failure = torturer.try_program(next(source))
                if failure:
                    _keep(failure, arguments.save)
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    _say(_short(torturer.report))
            if end - time.monotonic() > _VOLUME / 2:
                good &= _volume(lanes, arguments, _VOLUME, time.monotonic_ns())
        _say(torturer.report)
        _say(f"counters: {lanes.counts()}")
    return int(bool(torturer.report.failures) or not good)


def _short(report: Report) -> str:
    return str(report).splitlines()[0]


def main() -> int:
    """Parse the command line and go; exit status."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=time.time_ns() % 10**9, help="first seed")
    parser.add_argument("--seed", type=int, help="one program, with all that it sees")
    parser.add_argument("--free", action="store_true", help="with --seed: the free-running one")
    parser.add_argument("--file", type=Path, help="one program from a file")
    parser.add_argument("--connections", type=int, default=0, help="the volume alone")
    parser.add_argument("--save", type=Path, default=Path("build/torture"), help="for failures")
    for name in ("without", "only"):
        parser.add_argument(
            f"--{name}", type=lambda text: text.split(","), default=[], help="features: a,b,c"
        )
    arguments = parser.parse_args()
    if arguments.file:
        return _once(Program.from_json(arguments.file.read_text(encoding="ascii")))
    if arguments.seed is not None:
        made = free.make(arguments.seed) if arguments.free else None
        return _once(made or Maker(arguments.seed, arguments.without, arguments.only).make())
    if arguments.connections:
        with datapath() as lanes:
            return int(not _volume(lanes, arguments, 0, arguments.first))
    return _soak(arguments)


if __name__ == "__main__":
    sys.exit(main())
