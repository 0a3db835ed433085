"""A socket program: who does what in which order, as data.

Actors do the steps. ``c0``-``c2`` are threads of one process on the client's side, ``c9`` is a
second process there that takes sockets over (``pass``, ``take``); ``s…`` likewise on the
server's side. ``lane`` stands for the operator: its steps change the settings of the datapath,
on the kernel path they do nothing. ``kill`` is kill -9 of a side's process.

Sockets live in numbered slots, one table per process. The server's listener is there before
the first step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

THREADS = ("0", "1", "2")
HELPER = "9"
# How the client addresses the server, and the families of the two sockets.
WAYS = ("v4", "v6", "mapped_server", "mapped_client", "loopback")


@dataclass(frozen=True)
class Step:
    """One call of one actor.

    Attributes:
        by: the actor, e.g. ``c0``; ``lane``; ``kill``.
        do: name of the operation (operations.py); of ``lane`` and ``kill`` the target.
        args: JSON values; a missing one has the operation's default.
        loose: go on at once, without waiting until nothing moves any more.
        wait: it ends by itself (a timeout), so wait for that.
    """

    by: str
    do: str
    args: dict[str, Any] = field(default_factory=dict)
    loose: bool = False
    wait: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.args.items()]
        marks = [name for name in ("loose", "wait") if getattr(self, name)]
        return " ".join([f"{self.by:4} {self.do}", *words, *(f"[{mark}]" for mark in marks)])


@dataclass(frozen=True)
class Program:
    """What both runs do.

    Attributes:
        seed: that the generator made it from.
        free: actors run their steps without waiting for each other; only what must come out
            whatever the timing is compared.
        where: one of WAYS.
        listener: options of the listener, which accepted sockets inherit.
        settings: of the datapath (``revalidate_ms``, …) for the run in the lane.
    """

    seed: int
    steps: tuple[Step, ...]
    free: bool = False
    where: str = "v4"
    listener: dict[str, int] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"program of seed {self.seed}: {self.where}{', free-running' if self.free else ''}"
        lines = [head, f"  listener {self.listener}, lane {self.settings}"]
        lines += [f"  {number:2}  {step}" for number, step in enumerate(self.steps)]
        return "\n".join(lines)

    def uses(self, operation: str, **args: object) -> bool:
        """True if a step does this with these arguments among its own."""
        return any(
            step.do == operation and all(step.args.get(key) == args[key] for key in args)
            for step in self.steps
        )

    @property
    def fit(self) -> bool:
        """It makes no call for which the guards keep the lane from a reader."""
        unfit = {"splice_out", "recv_discard", "fionread"}
        return not self.flags() & {"WAITALL", "TRUNC", "OOB"} and not any(
            step.do in unfit for step in self.steps
        )

    def flags(self) -> set[str]:
        """All MSG_ flags that any step uses."""
        return {flag for step in self.steps for flag in step.args.get("flags", ())}

    def options(self) -> set[str]:
        """All socket options that any step or the listener sets."""
        return {step.args["name"] for step in self.steps if step.do == "option"} | set(
            self.listener
        )

    def to_json(self) -> str:
        """As text; from_json reads it back."""
        steps = [
            [step.by, step.do, step.args, *(["loose"] if step.loose else [])]
            + (["wait"] if step.wait else [])
            for step in self.steps
        ]
        head = {
            "seed": self.seed,
            "free": self.free,
            "where": self.where,
            "listener": self.listener,
            "settings": self.settings,
        }
        body = ",\n  ".join(json.dumps(step) for step in steps)
        return f'{json.dumps(head)[:-1]}, "steps": [\n  {body}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Read what to_json wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            value = json.loads(text)
            steps = tuple(
                Step(step[0], step[1], step[2], "loose" in step[3:], "wait" in step[3:])
                for step in value.pop("steps")
            )
            return cls(steps=steps, **value)
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"not a program: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write to_json to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="ascii")
