"""Random programs from a seed.

Each program draws a few features and uses those alone (so that their combinations differ from
program to program), plus at most one whose behaviour in the lane is a known limit, for after a
known difference nothing more can be compared.

A rough model of what is unread and who sleeps keeps programs from being all errors; it need
not be right.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from torture.programs import Program, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# Bytes that a program leaves unread with default buffers: well below what either path takes.
_MOST_UNREAD = 24000
_OPTIONS: dict[str, tuple[int, ...]] = {
    "SO_KEEPALIVE": (1,),
    "TCP_KEEPIDLE": (1, 30),
    "TCP_NODELAY": (0, 1),
    "TCP_QUICKACK": (0, 1),
    "TCP_NOTSENT_LOWAT": (1, 16384),
    "TCP_USER_TIMEOUT": (5000,),
    "TCP_MAXSEG": (536, 1200),
    "SO_RCVBUF": (1 << 16, 1 << 20, 8 << 20),
    "SO_SNDBUF": (4608, 1 << 16, 8 << 20),
    "SO_BUSY_POLL": (50,),
    "SO_TIMESTAMP": (1,),
}
# What programs draw from: names of the Maker's methods, and …
VERBS = [
    "vectors",
    "files",
    "peek",
    "look",
    "polling",
    "epoll",
    "nonblocking",
    "threads",
    "timeouts",
    "options",
    "more",
    "bulk",
    "duplex",
    "passing",
    "forking",
    "duplicates",
    "half_close",
    "shut_reading",
    "switching",
    "second",
    "again",
]
# … of what only changes how a program begins or ends.
_MARKS = ["single_reads", "buffers", "inline", "fast_open", "defer", "killing", "resetting"]
FEATURES = (*VERBS, *_MARKS)
# Of these the lane is known to do something else, or does so without guards (limits.py).
LIMITED = [
    "splice",
    "waitall",
    "discard",
    "low_water",
    "urgent",
    "zero_copy",
    "information",
    "peek_offset",
    "unread_hint",
    "close_unread",
    "reuse_socket",
]
_SETTINGS: tuple[dict[str, int], ...] = (
    {},
    {},
    {},
    {"revalidate_ms": 1},
    {"probation": 1},
    {"probation": 2, "proven": 1},
    {"unread_messages": 1},
    {"unread_messages": 3},
    {"receiver_percent": 1},
    {"unhelped_kib": 1},
    {"stream_messages": 2, "stream_from": 1 << 20, "stream_gap_us": 1000000},
)


class Maker:
    """One program in the making.

    Args:
        seed: whatever is drawn comes from it.
        without: features that must not be used.
        only: features to draw from; empty: all.
    """

    def __init__(
        self, seed: int, without: Collection[str] = (), only: Collection[str] = ()
    ) -> None:
        self.random = random.Random(seed)
        self._seed = seed
        self._steps: list[Step] = []
        self._unread = {"c": 0, "s": 0}  # at each side
        self._over: set[str] = set()  # sides that have ended their stream
        self._gone: set[str] = set()  # sides that have closed
        self._asleep: dict[str, str] = {}
        self._threads: tuple[str, ...] = ("0",)
        self._most_unread = _MOST_UNREAD
        self._listener: dict[str, int] = {}
        self._epoll: set[str] = set()
        self._moved = False  # a process has given its socket away
        self._timeouts: dict[str, int] = {}

        def allowed(names: Collection[str]) -> list[str]:
            return [n for n in names if n not in without and (not only or n in only)]

        known = allowed(FEATURES)
        count = min(len(known), self.random.randint(3, 9))
        self.features = set(self.random.sample(known, count))
        limited = allowed(LIMITED)
        self.limited = ""
        if limited and (self.random.random() < 0.3 or not known):
            self.limited = self.random.choice(limited)

    # -- building blocks -----------------------------------------------------------------

    def add(
        self,
        by: str,
        do: str,
        some: dict[str, Any] | None = None,
        *,
        loose: bool = False,
        wait: bool = False,
        **args: Any,
    ) -> None:
        """Append a step; a call that the model expects to sleep may have a timeout."""
        args.update(some or {})
        if by in self._asleep and by[0] in self._timeouts and do in {"recv", "read", "recv_some"}:
            del self._asleep[by]
            args["timeout"], wait = self._timeouts[by[0]], True
        self._steps.append(Step(by, do, args, loose, wait))

    def side(self) -> str:
        return self.random.choice("cs")

    def other(self, side: str) -> str:
        return "s" if side == "c" else "c"

    def actor(self, side: str) -> str:
        """An actor of this side that is not asleep, or an empty string."""
        names = [side + name for name in self._threads if side + name not in self._asleep]
        return self.random.choice(names) if names else ""

    def reader_asleep(self, side: str) -> bool:
        """Somebody sleeps in a read there: how much he gets depends on how it comes."""
        return any(name[0] == side and call == "recv" for name, call in self._asleep.items())

    def size(self, most: int = 20000) -> int:
        draw = self.random.random()
        if draw < 0.05:
            return 0
        if draw < 0.75:
            return self.random.randint(1, min(300, most))
        return self.random.randint(1, most)

    def room(self, side: str) -> int:
        """Bytes that this side may still send; to a sleeping reader one segment."""
        if self.reader_asleep(self.other(side)):
            return 500
        return self._most_unread - self._unread[self.other(side)]

    def sent(self, side: str, size: int) -> None:
        """Bytes were sent: whoever sleeps for them wakes."""
        other = self.other(side)
        if side in self._over:
            return
        sleeper = next((name for name in self._asleep if name[0] == other), "")
        if sleeper and size:
            del self._asleep[sleeper]
            return
        self._unread[other] += size

    def drain(self, side: str) -> None:
        """Read what is unread."""
        by = self.actor(side)
        if by and self._unread[side]:
            self.add(by, "recv_exact", n=self._unread[side])
            self._unread[side] = 0

    def ended(self, side: str) -> None:
        """A side's stream is over: readers on the other wake."""
        self._over.add(side)
        for name in [name for name in self._asleep if name[0] == self.other(side)]:
            del self._asleep[name]

    # -- features ------------------------------------------------------------------------

    def send(self) -> None:
        side = self.side()
        by, size = self.actor(side), self.size(max(self.room(side), 1))
        if not by or size > self.room(side):
            return
        self.sent(side, size)
        flags = ["NOSIGNAL"] if self.random.random() < 0.2 else []
        if self.random.random() < 0.1:
            flags.append("DONTWAIT")
        kind = self.random.choice(["send", "send", "write"])
        self.add(by, kind, {"flags": flags} if flags and kind == "send" else {}, n=size)

    def recv(self) -> None:
        side = self.side()
        by, unread = self.actor(side), self._unread[side]
        if not by or self.reader_asleep(side):
            return
        size = self.random.choice([1, max(unread // 2, 1), unread + 1, 100000])
        flags: list[str] = []
        if not unread and self.other(side) not in self._over:
            if self.random.random() < 0.5:
                flags = ["DONTWAIT"]
            else:
                self._asleep[by] = "recv"
        plain = "single_reads" in self.features
        if (
            plain
            and "peek" in self.features
            and self.random.random() < 0.3
            and by not in self._asleep
        ):
            self.add(by, "recv", n=size, flags=["PEEK", *flags])
            return
        self._unread[side] = max(0, unread - size)
        kind = "recv" if plain else "recv_some"
        if plain and not flags:
            kind = self.random.choice(["recv", "recv", "read"])
        if self.random.random() < 0.05:
            self.add(by, "recv", n=0, flags=["DONTWAIT"])
        self.add(by, kind, {"flags": flags} if flags else {}, n=size)

    def vectors(self) -> None:
        side = self.side()
        by = self.actor(side)
        if not by:
            return
        if self.random.random() < 0.6:
            sizes = [self.size(2000) for _ in range(self.random.randint(1, 20))]
            if sum(sizes) > self.room(side):
                return
            kinds = ["writev", "sendmsg"]
            if not self.reader_asleep(self.other(side)):
                kinds.append("sendmmsg")
            kind = self.random.choice(kinds)
            self.sent(side, sum(sizes))
            self.add(by, kind, sizes=sizes)
        elif self._unread[side]:
            sizes = [self.size(2000) for _ in range(self.random.randint(1, 5))]
            self._unread[side] = max(0, self._unread[side] - sum(sizes))
            if "single_reads" in self.features:
                self.add(by, self.random.choice(["readv", "recvmsg"]), sizes=sizes)
            else:
                self.add(by, "recv_some", n=sum(sizes) or 1)

    def files(self) -> None:
        side = self.side()
        by, size = self.actor(side), self.size(30000)
        if not by or not 0 < size <= self.room(side):
            return
        self.sent(side, size)
        self.add(by, self.random.choice(["sendfile", "splice_in"]), n=size)

    def peek(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by and self._unread[side] and "single_reads" in self.features:
            self.add(by, "recv", n=self.size() or 1, flags=["PEEK"])

    def look(self) -> None:
        by = self.actor(self.side())
        if by:
            self.add(by, self.random.choice(["fionread", "so_error", "peer_name", "at_mark"]))

    def polling(self) -> None:
        side = self.side()
        by = self.actor(side)
        if not by:
            return
        events = self.random.sample(["IN", "OUT", "PRI", "RDHUP"], self.random.randint(1, 4))
        timeout = 0
        if self.random.random() < 0.3 and events == ["IN"]:
            timeout = -1
            if not self._unread[side] and self.other(side) not in self._over:
                self._asleep[by] = "poll"
        if self.random.random() < 0.7:
            self.add(by, "poll", events=events, timeout=timeout)
        else:
            self.add(by, "select", write=self.random.random() < 0.5)

    def epoll(self) -> None:
        side = self.side()
        by = self.actor(side)
        if not by:
            return
        if side not in self._epoll or self.random.random() < 0.1:
            events = self.random.sample(["IN", "OUT", "PRI", "RDHUP"], self.random.randint(1, 4))
            events += [name for name in ("ET", "ONESHOT") if self.random.random() < 0.4]
            self.add(by, "epoll_modify" if side in self._epoll else "epoll_add", events=events)
            self._epoll.add(side)
        else:
            self.add(by, "epoll_wait")

    def nonblocking(self) -> None:
        by = self.actor(self.side())
        if by:
            self.add(by, "blocking", on=self.random.randint(0, 1))

    def threads(self) -> None:
        self._threads = ("0", "1", "2")
        self.recv()

    def timeouts(self) -> None:
        side = self.side()
        by = self.actor(side)
        if not by:
            return
        if side not in self._timeouts:
            self._timeouts[side] = self.random.choice([20, 40, 80])
            self.add(by, "timeout", way="RCV", ms=self._timeouts[side])
            self.add(by, "timeout", way="SND", ms=self._timeouts[side])
        elif not self._unread[side]:
            self.add(by, "recv", n=10, timeout=self._timeouts[side], wait=True)

    def options(self) -> None:
        by = self.actor(self.side())
        if by:
            name = self.random.choice(list(_OPTIONS))
            self.add(by, "option", name=name, value=self.random.choice(_OPTIONS[name]))

    def more(self) -> None:
        """Bytes that TCP may hold back for a while."""
        side = self.side()
        by, size = self.actor(side), self.size(3000)
        if not by or size > self.room(side):
            return
        if self.random.random() < 0.5:
            self.sent(side, size)
            self.add(by, "send", n=size, flags=["MORE"])
        else:
            self.add(by, "option", name="TCP_CORK", value=self.random.randint(0, 1))

    def bulk(self) -> None:
        side = self.side()
        other = self.other(side)
        by, to = self.actor(side), self.actor(other)
        if not by or not to or self._over or self._unread[other] or self._timeouts:
            return
        if self.reader_asleep(other) or self._moved:
            return
        size = self.random.choice([70000, 300000, 1000000, 3000000])
        piece = self.random.choice([200, 1000, 16384, 65536, 1 << 20])
        if size // piece > 3000:
            size = piece * 1000
        self.add(by, "send_all", n=size, piece=piece, loose=True)
        slow = {"pause": 1} if size < 100000 and self.random.random() < 0.3 else {}
        self.add(to, "recv_exact", slow, n=size, piece=self.random.choice([5000, 65536, 1 << 20]))

    def duplex(self) -> None:
        """Both directions at once, each end with one thread that writes and one that reads."""
        if self._over or self._asleep or self._timeouts or self._moved or self._gone:
            return
        if self._unread["c"] or self._unread["s"]:
            return
        self._threads = ("0", "1", "2")
        sizes = {side: self.random.choice([5000, 100000, 1000000]) for side in "cs"}
        for side in "cs":
            piece = max(self.random.choice([100, 1000, 16384, 65536]), sizes[side] // 1000)
            self.add(f"{side}0", "send_all", n=sizes[side], piece=piece, loose=True)
        self.add("c1", "recv_exact", n=sizes["s"], loose=True)
        self.add("s1", "recv_exact", n=sizes["c"])

    def passing(self) -> None:
        """Another process of the same pod takes the socket over, or shares it."""
        side = self.side()
        by = self.actor(side)
        if not by or self._unread[side]:
            return
        self.add(by, "pass")
        self.add(f"{side}9", "take")
        if self.random.random() < 0.4:
            self.add(by, "close")
            self._moved = True
        size = self.size(1000) or 1
        self.add(f"{side}9", self.random.choice(["send", "write"]), n=size)
        self.drain_exact(self.other(side), size)
        if self.random.random() < 0.7:
            self.add(f"{side}9", "close")

    def drain_exact(self, side: str, size: int) -> None:
        by = self.actor(side)
        if by:
            self.add(by, "recv_some", n=self._unread[side] + size)
            self._unread[side] = 0

    def forking(self) -> None:
        side = self.side()
        by, size = self.actor(side), self.size(1000) or 1
        if not by or size > self.room(side):
            return
        if self.random.random() < 0.5:
            self.sent(side, size)
            self.add(by, "fork", way="send", n=size)
        else:
            self._unread[side] = max(0, self._unread[side] - size)
            self.add(by, "fork", way="recv", n=size)

    def duplicates(self) -> None:
        by = self.actor(self.side())
        if by:
            self.add(by, "duplicate", to=1)
            if self.random.random() < 0.3:
                self.add(by, "close")
                self.add(by, "duplicate", slot=1, to=0)
            if self.random.random() < 0.7:
                self.add(by, "close", slot=1)

    def half_close(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by and side not in self._over:
            self.add(by, "shutdown", how="WR")
            self.ended(side)

    def shut_reading(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by:
            self.drain(side)
            self.add(by, "shutdown", how="RD")
            self._over.add(self.other(side))  # for its readers

    def switching(self) -> None:
        """The operator changes the settings of the lane."""
        name = self.random.choice(["paused", "paused", "redirect"])
        self.add("lane", "set", {name: self.random.randint(0, 1)})

    def second(self) -> None:
        """Another connection beside this one, to the same port."""
        client, server = self.actor("c"), self.actor("s")
        if not client or not server or self._gone:
            return
        self.add(client, "socket", slot=2)
        self.add(client, "connect", slot=2)
        self.add(server, "accept", slot=2)
        size = self.size(1000) or 1
        for by, to in ((client, server), (server, client)):
            self.add(by, "send", slot=2, n=size)
            self.add(to, "recv", slot=2, n=size + 1)
        for by in self.random.sample([client, server], 2):
            self.add(by, "close", slot=2)

    def again(self) -> None:
        """From the same port once more, soon after the connection has gone."""
        client, server = self.actor("c"), self.actor("s")
        if not client or not server or self._gone:
            return
        self.add(client, "socket", slot=2)
        self.add(client, "bind", slot=2)
        self.add(client, "connect", slot=2)
        self.add(server, "accept", slot=2)
        size = self.size(1000) or 1
        self.add(client, "send", slot=2, n=size)
        self.add(server, "recv", slot=2, n=size + 1)
        if self.random.random() < 0.7:
            self.add(server, "close", slot=2)
            self.add(client, "close", slot=2)
        else:
            self.add(client, "linger", slot=2, seconds=0)
            self.add(client, "close", slot=2)
            self.add(server, "close", slot=2)

    # -- features that are limits ----------------------------------------------------------

    def splice(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by and self._unread[side]:
            self._unread[side] = 0
            self.add(by, "splice_out", n=60000, flags=["DONTWAIT"])

    def waitall(self) -> None:
        side = self.side()
        by, unread = self.actor(side), self._unread[side]
        if by and self.other(side) not in self._over and not self.reader_asleep(side):
            size = unread + self.random.choice([0, 1, 100])
            if size > unread:
                self._asleep[by] = "recv"
            self._unread[side] = 0
            self.add(by, "recv", n=max(size, 1), flags=["WAITALL"])

    def discard(self) -> None:
        side = self.side()
        by, unread = self.actor(side), self._unread[side]
        if by and unread:
            size = self.random.choice([1, unread])
            self._unread[side] = unread - size
            self.add(by, "recv_discard", n=size, flags=["DONTWAIT"])

    def low_water(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by:
            value = self.random.choice([1, 10, 500])
            self.add(by, "option", name="SO_RCVLOWAT", value=value)

    def urgent(self) -> None:
        side = self.side()
        by, to = self.actor(side), self.actor(self.other(side))
        if not by or not to:
            return
        size = self.size(100) or 1
        self.sent(side, size)
        self.add(by, "send", n=size, flags=["OOB"])
        self.add(to, "at_mark")
        self.add(to, "recv", n=1, flags=["OOB"])

    def zero_copy(self) -> None:
        side = self.side()
        by, size = self.actor(side), self.size(20000) or 1
        if by and size <= self.room(side):
            self.sent(side, size)
            self.add(by, "option", name="SO_ZEROCOPY", value=1)
            self.add(by, "send", n=size, flags=["ZEROCOPY"])
            self.drain(self.other(side))
            self.add(by, "recvmsg", sizes=[1], flags=["ERRQUEUE", "DONTWAIT"])

    def information(self) -> None:
        by = self.actor(self.side())
        if by:
            self.add(by, "tcp_info")

    def peek_offset(self) -> None:
        side = self.side()
        by = self.actor(side)
        if by and self._unread[side]:
            self.add(by, "option", name="SO_PEEK_OFF", value=self.random.randint(0, 3))
            self.add(by, "recv", n=self.size() or 1, flags=["PEEK"])

    def unread_hint(self) -> None:
        """TCP_INQ: recvmsg tells how much more there is."""
        side = self.side()
        by = self.actor(side)
        if by and self._unread[side]:
            self.add(by, "option", name="TCP_INQ", value=1)
            self._unread[side] = max(0, self._unread[side] - 10)
            self.add(by, "recvmsg", sizes=[10])

    def close_unread(self) -> None:
        """Close with bytes unread; ends the program."""

    def reuse_socket(self) -> None:
        """Disconnect the client's socket and connect it again."""
        client, server = self.actor("c"), self.actor("s")
        if not client or not server or self._asleep or self._gone:
            return
        self.drain("c")
        self.drain("s")
        self.add(client, "disconnect")
        self.add(server, "recv_eof")
        self.add(server, "close")
        self.add(client, "connect")
        self.add(server, "accept")
        self._over.clear()
        for by, to in ((client, server), (server, client)):
            self.add(by, "send", n=50)
            self.add(to, "recv", n=100)

    # -- the whole -------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the connection."""
        draw = self.random.random()
        if "buffers" in self.features:
            value = self.random.choice([1, 4096, 1 << 20])
            self._listener["SO_RCVBUF"] = value
            self.add("c0", "socket")
            self.add("c0", "option", name="SO_RCVBUF", value=value)
            # What a buffer of the least size takes for certain.
            self._most_unread = 600 if value < 10000 else _MOST_UNREAD
        else:
            self.add("c0", "socket")
        if self.random.random() < 0.75:
            self.add("c0", "option", name="TCP_NODELAY", value=1)
            self._listener["TCP_NODELAY"] = 1
        if "inline" in self.features:
            self._listener["SO_OOBINLINE"] = 1
        size = self.size(min(4000, self._most_unread))
        if "fast_open" in self.features:
            self._listener["TCP_FASTOPEN"] = 16
            self.add("c0", "fast_open", n=size)
            self._unread["s"] += size
        elif "defer" in self.features and size:
            self._listener["TCP_DEFER_ACCEPT"] = 2
            self.add("c0", "connect_send", n=size)
            self._unread["s"] += size
        elif draw < 0.3:
            self.add("c0", "connect_send", n=size)
            self._unread["s"] += size
        else:
            self.add("c0", "connect")
            if draw < 0.4 and size:
                self.add("c0", "send", n=size)
                self._unread["s"] += size
        self.add("s0", "accept")

    def end(self) -> None:
        """End the connection one way or other, and look at it a little longer."""
        if self.limited != "close_unread":
            for side in "cs":
                self.drain(side)
        first = self.side()
        for side in (first, self.other(first)):
            self._end_of(side)
            for _ in range(self.random.randint(0, 3)):
                self.random.choice([self.send, self.recv, self.look, self.polling])()

    def _end_of(self, side: str) -> None:
        by = self.actor(side) or f"{side}0"
        draw = self.random.random()
        if draw < 0.1 and "killing" in self.features:
            self.add("kill", side)
        elif draw < 0.2 and "resetting" in self.features:
            self.add(by, "linger", seconds=0)
            self.add(by, "close")
        elif draw < 0.3:
            self.add(by, "linger", seconds=1)
            self.add(by, "close")
        elif draw < 0.45:
            self.add(by, "shutdown", how="RDWR")
        elif draw < 0.75:
            self.add(by, "shutdown", how="WR")
            self.ended(side)
            if self.other(side) in self._over:
                self.add(by, "recv_eof")
            return
        else:
            self.add(by, "close")
        self._gone.add(side)
        self.ended(side)

    def make(self) -> Program:
        """The program."""
        where = self.random.choice(["v4", "v4", "v4", *(["v6", "mapped_server", "mapped_client"])])
        if self.random.random() < 0.1:
            where = "loopback"
        settings = {**self.random.choice(_SETTINGS)}
        if self.random.random() < 0.7:
            settings["careful"] = 0  # or hardly anybody here were known well enough
        self.begin()
        verbs: list[Callable[[], None]] = [self.send, self.recv]
        names = [name for name in sorted(self.features) if name not in _MARKS]
        if self.limited:
            names += [self.limited] * 2
        verbs += [getattr(self, name) for name in names]
        for _ in range(self.random.randint(2, 24)):
            self.random.choice(verbs)()
        self.end()
        return Program(
            self._seed,
            tuple(self._steps),
            where=where,
            listener=self._listener,
            settings=settings,
        )
