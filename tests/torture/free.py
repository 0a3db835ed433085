"""Random programs that run freely: several connections at once, nobody waits for anybody.

Only what must come out whatever the timing is told: the content, how it ended, and errors. All
the connections of a program do the same, for which of them a server's thread accepts is chance.
"""

from __future__ import annotations

import random
from typing import Any

from torture.programs import THREADS, WAYS, Program, Step

_SETTINGS: tuple[dict[str, int], ...] = (
    {},
    {},
    {"revalidate_ms": 1},
    {"probation": 3},
    {"unread_messages": 2},
    {"unhelped_kib": 1},
    {"stream_messages": 2, "stream_from": 1 << 20, "stream_gap_us": 1000000},
)
_WRITES = ("send_all", "send_all", "sendfile", "splice_in")


class _Script:
    """The steps of both ends of one connection."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"free {seed}")
        self.steps: dict[str, list[tuple[str, dict[str, Any]]]] = {"c": [], "s": []}

    def add(self, side: str, do: str, **args: Any) -> None:
        self.steps[side].append((do, args))

    def write(self, side: str, size: int) -> None:
        """Send from one end and read all of it at the other."""
        kind = self.random.choice(_WRITES)
        if size > 30000:  # more than a pipe holds
            kind = "send_all"
        if kind == "send_all":
            piece = max(self.random.choice([1, 100, 1000, 65536]), size // 200)
            self.add(side, kind, n=size, piece=piece)
        else:
            self.add(side, kind, n=size, all=True)
        other = "s" if side == "c" else "c"
        self.add(other, "recv_exact", n=size, piece=self.random.choice([100, 4096, 1 << 18]))

    def end(self) -> None:
        """Any orderly end that loses nothing."""
        first, second = self.random.sample(["c", "s"], 2)
        draw = self.random.random()
        tail = self.random.choice([0, 1, 500, 30000])
        if draw < 0.4:
            # Half-close, a late answer, close.
            self.add(first, "shutdown", how="WR")
            self.add(second, "recv_eof")
            if tail:
                self.add(second, "send_all", n=tail)
            self.add(second, self.random.choice(["close", "shutdown"]), how="WR")
            self.add(first, "recv_eof")
        elif draw < 0.7:
            self.add(first, "send_all", n=tail)
            self.add(first, "close")
            self.add(second, "recv_eof")
            self.add(second, "send", n=1)
        else:
            # Both at once; a reader of what is unread then may see EAGAIN (a known limit).
            for side in (first, second):
                self.add(side, "shutdown", how="WR")
            for side in (first, second):
                self.add(side, "recv_eof")

    def begin(self) -> None:
        """Make the connection."""
        self.add("c", "socket")
        self.add("s", "accept")
        for side in "cs":
            # Without it a small message may wait for a delayed acknowledgement, 40 ms each.
            self.add(side, "option", name="TCP_NODELAY", value=1)
        if self.random.random() < 0.3:
            size = self.random.randint(1, 3000)
            self.add("c", "connect_send", n=size)
            self.add("s", "recv_exact", n=size)
        else:
            self.add("c", "connect")
        if self.random.random() < 0.3:
            for side in "cs":
                self.add(side, "blocking", on=0)


def make(seed: int) -> Program:
    """A free-running program."""
    script = _Script(seed)
    script.begin()
    for _ in range(script.random.randint(0, 6)):
        script.write(script.random.choice("cs"), script.random.choice([1, 300, 5000, 200000]))
    script.end()
    steps = tuple(
        Step(side + name, do, {**args, "slot": int(name)})
        for name in THREADS
        for side in "cs"
        for do, args in script.steps[side]
    )
    settings = dict(script.random.choice(_SETTINGS))
    if script.random.random() < 0.5:
        settings["careful"] = 0
    where = script.random.choice(WAYS)
    return Program(seed, steps, free=True, where=where, settings=settings)
