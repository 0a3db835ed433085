"""The socket lane on the kernel that runs this, between two pods.

Runs as root in a machine of its own (see vm.py): it loads the datapath into the root of the
cgroup hierarchy. Wherever it says something, each check does the same on the kernel path,
with the lane switched off for both pods ("control").

Prints one JSON object: {"kernel", "checks": {name: {"ok", "error", "seconds", "facts"}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from kernels.guest_lab import (
    BLOCKED,
    CHECK,
    WAYS,
    CheckError,
    Lab,
    buffer_size,
    charged,
    child,
    expect,
    limit_blocking,
    receive,
    receive_all,
    slab,
    tcp_pages,
    tcp_statistics,
    warm_up,
)
from nearpath.datapath import bundle, libbpf, loader, tables
from nearpath.errors import NearpathError, Unavailable
from nearpath.lanes import socket as lane

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Facts = dict[str, Any]

TOTAL = 110  # seconds for all checks; those that are left then do not run


def load(lab: Lab, facts: Facts) -> None:
    """The verifier takes the programs; loading mounts bpffs itself and happens once."""
    started = time.monotonic()
    try:
        first = loader.ensure(lab.place)
    except NearpathError as error:
        raise CheckError(f"{error}\n{verifier_log()}") from error
    took = time.monotonic() - started
    expect(first, "the first ensure() loads")
    expect(not loader.ensure(lab.place), "the second ensure() finds it loaded")
    described = loader.describe(lab.place)
    expect(described["loaded"] and not described["paused"], "it is loaded and not paused")
    facts.update(seconds=round(took, 2), cgroup=described["cgroup"])


def verifier_log() -> str:
    """Everything that libbpf says while it loads the object by itself."""
    program = (
        "import ctypes, sys; lib = ctypes.CDLL('libbpf.so.1')\n"
        "lib.bpf_object__open_file.restype = ctypes.c_void_p\n"
        f"it = ctypes.c_void_p(lib.bpf_object__open_file({bundle.object_path('socket_lane')!r}"
        ".encode(), None))\nlib.bpf_object__load(it)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    return said.stderr[-20000:]


def request_response(lab: Lab, facts: Facts, way: str, messages: int = 200) -> None:
    """Requests and answers arrive intact, by redirect with the lane and without it not."""
    for name, enabled in (("lane", True), ("control", False)):
        generator = random.Random(7)
        lab.lane(enabled)
        total = 0
        with lab.counted() as risen, lab.pair(way) as (client, server):
            started = time.monotonic()
            for _ in range(messages):
                for sender, receiver in ((client, server), (server, client)):
                    data = generator.randbytes(generator.choice((1, 64, 1000, 4096, 20000)))
                    sender.sendall(data)
                    expect(receive(receiver, len(data)) == data, f"{name}: bytes arrive intact")
                    total += len(data)
            took = time.monotonic() - started
        facts[name] = {**risen, "microseconds": round(took / messages * 1e6)}
        expect(risen.get("joined", 0) == (2 if enabled else 0), f"{name}: joined {risen}")
        if enabled:
            expect(risen["redirected_messages"] == 2 * messages, f"redirected: {risen}")
            expect(risen["redirected_bytes"] == total, f"redirected {total} bytes: {risen}")
        else:
            expect("redirected_messages" not in risen, f"control: not redirected: {risen}")


def _serve_half_closed(lab: Lab, count: int, early: bytes) -> None:
    """Per connection: an echo, then read to the end of the stream, then answer and close."""
    generator = random.Random(11)
    for number in range(count):
        with lab.accept() as server:
            if number % 2:
                server.sendall(receive(server, 4))
            server.sendall(early)
            digest = hashlib.sha256(receive_all(server)).digest()
            answer = digest + generator.randbytes(generator.randrange(40000))
            cut = generator.randrange(len(answer))
            server.sendall(answer[:cut])
            if number % 5 == 0:
                time.sleep(0.003)  # the client is in recv() when its FIN is acknowledged
            server.sendall(answer[cut:])


def _receive_patiently(sock: socket.socket, again: list[str]) -> bytes:
    """Everything up to the end of the stream; goes on after EAGAIN and notes how soon it came."""
    parts: list[bytes] = []
    while True:
        began = time.monotonic()
        try:
            part = sock.recv(1 << 18)
        except BlockingIOError:
            took = time.monotonic() - began
            if took > BLOCKED - 1:
                raise
            again.append(f"{took * 1e3:.0f} ms")
            continue
        if not part:
            return b"".join(parts)
        parts.append(part)


def _half_closing(lab: Lab, count: int, *, calm: float = 0, early: bytes = b"") -> list[str]:
    """Half-close ``count`` connections, check each answer; the calls that got EAGAIN.

    Args:
        calm: seconds between the request and the end of the stream.
        early: sent by the server before it reads the request.
    """
    requests, answers = random.Random(12), random.Random(11)
    again: list[str] = []
    with child(partial(_serve_half_closed, lab, count, early)):
        for number in range(count):
            request = requests.randbytes(requests.choice((1, 100, 5000, 30000)))
            rest = answers.randbytes(answers.randrange(40000))
            expected = early + hashlib.sha256(request).digest() + rest
            answers.randrange(len(rest) + 32)
            with lab.connect() as client:
                if number % 2:
                    client.sendall(b"echo")
                    receive(client, 4)
                client.sendall(request)
                time.sleep(calm)
                client.shutdown(socket.SHUT_WR)
                got = _receive_patiently(client, again)
            expect(got == expected, f"connection {number}: the whole answer: {again}")
    return again


def half_close(
    lab: Lab,
    facts: Facts,
    *,
    count: int = 60,
    calm: float = 0.02,
    early: bytes = b"",
    tolerated: int = 0,
) -> None:
    """shutdown(SHUT_WR), then a blocking read of the whole answer, as on the kernel path.

    A socket cannot leave the lane while redirected bytes are unread or may be on their way.
    If it has to stay, and its reader finds nothing when the FIN is acknowledged, a blocking
    read gets EAGAIN, for tcp_bpf_recvmsg waits only once. No byte is lost in any case.

    Args:
        tolerated: how many reads may see that.
    """
    for name, enabled in (("control", False), ("lane", True)):
        lab.lane(enabled)
        with lab.counted() as risen:
            again = _half_closing(lab, count, calm=calm, early=early)
        facts[name] = {"connections": count, "again": again, **risen}
        most = tolerated if enabled else 0
        expect(len(again) <= most, f"{name}: EAGAIN in {len(again)} blocking reads: {again[:9]}")
    expect(facts["lane"].get("left"), f"sockets do leave the lane: {facts}")


def close_after_write(lab: Lab, facts: Facts, count: int = 60) -> None:
    """A writer that closes at once: the late reader gets all, then the end of the stream."""
    generator = random.Random(13)
    for name, enabled in (("lane", True), ("control", False)):
        lab.lane(enabled)
        with lab.counted() as risen:
            for _ in range(count):
                with lab.pair() as (client, server):
                    warm_up(client, server, 1)
                    data = generator.randbytes(generator.choice((1, 3000, 20000)))
                    client.sendall(data)
                    client.close()
                    expect(receive_all(server) == data, f"{name}: all bytes, then the end")
        facts[name] = risen


@contextmanager
def sending(sender: socket.socket, data: bytes, chunk: int) -> Iterator[int]:
    """Send in the background; yields how much was taken when it stalled for a second.

    The end waits until everything is sent, so read it inside.
    """
    view = memoryview(data)
    sent, problem = [0], []

    def work() -> None:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 20, 0))
        try:
            while sent[0] < len(view):
                sent[0] += sender.send(view[sent[0] : sent[0] + chunk])
        except OSError as error:
            problem.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1:
        if sent[0] != last:
            last, since = sent[0], time.monotonic()
        time.sleep(0.05)
    yield last
    thread.join(BLOCKED)
    expect(not problem and not thread.is_alive(), f"the sender ends: {problem}")


def _read_stream(reader: socket.socket, expected: bytes) -> Facts:
    """Read and compare a whole stream; how long it took, and the longest wait."""
    began = at = time.monotonic()
    longest, have = 0.0, 0
    while have < len(expected):
        part = reader.recv(1 << 16)
        expect(part, f"the stream goes on after {have} bytes")
        longest, at = max(longest, time.monotonic() - at), time.monotonic()
        expect(part == expected[have : have + len(part)], f"bytes are in order after {have}")
        have += len(part)
    return {"seconds_to_drain": round(at - began, 2), "longest_wait": round(longest, 3)}


def slow_reader(lab: Lab, facts: Facts, chunk: int, size: int) -> None:
    """A reader that sleeps stops the sender about where the kernel path does; then all arrives."""
    data = random.Random(chunk).randbytes(size)
    for name, enabled in (("control", False), ("lane", True)):
        lab.lane(enabled)
        with lab.counted() as risen, lab.pair() as (client, server):
            warm_up(client, server)
            with sending(client, data, chunk) as queued:
                facts[name] = {
                    "queued": queued,
                    "rmem_alloc": charged(server),
                    "rcvbuf": buffer_size(server),
                }
                before = tcp_statistics("TCPTimeouts", "PruneCalled", "TCPRcvQDrop")
                facts[name].update(_read_stream(server, data))
                after = tcp_statistics(*before)
                facts[name].update((title, after[title] - before[title]) for title in before)
            warm_up(client, server)
        facts[name].update(risen)
    control, with_lane = facts["control"], facts["lane"]
    expect(control["queued"] < size, f"the control's sender stalls: {facts}")
    limit = control["queued"] + with_lane["rcvbuf"]
    expect(with_lane["queued"] <= limit, f"the lane queues at most {limit} bytes: {facts}")
    limit = 2 * max(control["rmem_alloc"], with_lane["rcvbuf"])
    expect(with_lane["rmem_alloc"] <= limit, f"receive memory is bounded by {limit}: {facts}")
    expect(with_lane["redirected_messages"] > 6, f"the lane was in use: {facts}")
    limit = max(5.0, 3 * control["seconds_to_drain"])
    expect(with_lane["seconds_to_drain"] < limit, f"the transfer goes on in time: {facts}")


def small_messages_memory(lab: Lab, facts: Facts, messages: int = 60000) -> None:
    """One-byte messages to a reader that sleeps: how much kernel memory they take."""
    for name, enabled in (("control", False), ("lane", True)):
        lab.lane(enabled)
        with lab.counted() as risen, lab.pair() as (client, server):
            warm_up(client, server)
            before = slab()
            client.setblocking(False)
            sent = 0
            with suppress(BlockingIOError):
                while sent < messages:
                    sent += client.send(b"x")
            used = slab() - before
            facts[name] = {"bytes": sent, "slab": used, "rcvbuf": buffer_size(server)}
            expect(receive(server, sent) == b"x" * sent, f"{name}: all bytes arrive")
        facts[name].update(risen)
    limit = 4 * facts["lane"]["rcvbuf"] + 2 * max(0, facts["control"]["slab"])
    expect(facts["lane"]["slab"] <= limit, f"at most {limit} bytes of slab: {facts}")


def not_drained(lab: Lab, facts: Facts) -> None:
    """While bytes that went by the kernel path are unread, nothing overtakes them."""
    lab.lane(True)
    with lab.counted() as risen, lab.pair() as (client, server):
        warm_up(client, server)
        for sender, receiver in ((client, server), (server, client)):
            sender.sendall(b"1 redirected ")
            tables.set_paused(lab.place, True)
            sender.sendall(b"2 by the kernel ")
            tables.set_paused(lab.place, False)
            sender.sendall(b"3 undrained ")
            time.sleep(0.05)
            sender.sendall(b"4 undrained ")
            expected = b"1 redirected 2 by the kernel 3 undrained 4 undrained "
            expect(receive(receiver, 20) == expected[:20], "the first part is in order")
            sender.sendall(b"5 half read ")
            expected += b"5 half read "
            rest = receive(receiver, len(expected) - 20)
            expect(rest == expected[20:], f"the rest is in order: {rest!r}")
            sender.sendall(b"6 redirected again")
            expect(receive(receiver, 18) == b"6 redirected again", "the last arrives")
    expect(risen["not_drained"] == 6, f"3 messages each way were held back: {risen}")
    expect(risen["paused"] == 2, f"1 message each way was sent while paused: {risen}")
    expect(risen["redirected_messages"] == 6 + 4, f"the others were redirected: {risen}")
    facts["lane"] = risen


def random_order(lab: Lab, facts: Facts, steps: int = 3000) -> None:
    """Writes, reads and pauses at random on both sides: every stream stays in order."""
    lab.lane(True)
    generator = random.Random(17)
    with lab.counted() as risen, lab.pair() as ends:
        warm_up(*ends)
        for sock in ends:
            sock.setblocking(False)
        sent, read = [b"", b""], [b"", b""]
        counter = 0
        for _ in range(steps):
            side = generator.randrange(2)
            kind = generator.random()
            if kind < 0.02:
                tables.set_paused(lab.place, generator.random() < 0.4)
            elif kind < 0.5:
                counter += 1
                data = struct.pack("=I", counter) * generator.choice((1, 10, 100, 2000))
                with suppress(BlockingIOError):
                    sent[side] += data[: ends[side].send(data)]
            else:
                with suppress(BlockingIOError):
                    size = generator.choice((1, 50, 3000, 100000))
                    read[1 - side] += ends[side].recv(size)
        tables.set_paused(lab.place, False)
        for side in (0, 1):
            ends[1 - side].setblocking(True)
            limit_blocking(ends[1 - side])
            read[side] += receive(ends[1 - side], len(sent[side]) - len(read[side]))
            expect(read[side] == sent[side], f"direction {side} is in order")
    expect(risen["redirected_messages"] > 100 < risen["kernel_messages"], f"both paths: {risen}")
    facts["lane"] = risen


def _duplex(sock: socket.socket, seed: int, size: int) -> None:
    """Stream both ways at once: send noise of ``seed``, receive and compare that of -seed."""
    mine, theirs = random.Random(seed).randbytes(size), random.Random(-seed + 99).randbytes(size)
    sizes = random.Random(seed)
    problem = []

    def write() -> None:
        view = memoryview(mine)
        try:
            while view:
                cut = sizes.choice((1, 200, 1400, 9000, 60000))
                sock.sendall(view[:cut])
                view = view[cut:]
                if sizes.random() < 0.02:
                    time.sleep(0.002)
        except OSError as error:
            problem.append(error)

    # Not a blocking read beside a blocking write: in the lane that may see EAGAIN (a limit).
    sock.settimeout(BLOCKED)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    got = receive(sock, size)
    thread.join(BLOCKED)
    expect(not problem and not thread.is_alive(), f"the writer ends: {problem}")
    if got != theirs:
        at = next((i for i, (x, y) in enumerate(zip(got, theirs, strict=False)) if x != y), -1)
        raise CheckError(f"bytes differ from {at} on, {len(got)} of {size} arrived")


def duplex(lab: Lab, facts: Facts, size: int = 4 << 20) -> None:
    """Two processes stream to each other at once, while somebody pauses and resumes."""
    for name, enabled in (("lane", True), ("control", False)):
        lab.lane(enabled)
        stop = threading.Event()

        def flicker(stop: threading.Event = stop) -> None:
            while not stop.wait(0.05):
                tables.set_paused(lab.place, True)
                time.sleep(0.005)
                tables.set_paused(lab.place, False)

        with lab.counted() as risen, lab.pair() as (client, server):
            started = time.monotonic()
            with child(partial(_duplex, server, 99 - 5, size)):
                thread = threading.Thread(target=flicker, daemon=True)
                thread.start()
                try:
                    _duplex(client, 5, size)
                finally:
                    stop.set()
                    thread.join(5)
            took = time.monotonic() - started
        facts[name] = {**risen, "seconds": round(took, 2)}
    expect(facts["lane"]["redirected_messages"] > 0, f"the lane was in use: {facts}")


def receive_memory(lab: Lab, facts: Facts) -> None:
    """Redirected bytes are charged to the reader's sk_rmem_alloc, and given back."""
    for name, enabled in (("lane", True), ("control", False)):
        lab.lane(enabled)
        with lab.pair() as (client, server):
            warm_up(client, server)
            before = charged(server)
            with lab.counted() as risen:
                for _ in range(10):
                    client.sendall(b"m" * 1000)
                time.sleep(0.05)
            unread = charged(server)
            receive(server, 10000)
            after = charged(server)
        facts[name] = {"before": before, "unread": unread, "after": after, **risen}
    got = facts["lane"]
    expect(got["redirected_bytes"] == 10000, f"all were redirected: {facts}")
    expect(got["unread"] - got["before"] >= 10000, f"10000 bytes are charged: {facts}")
    expect(got["before"] == got["after"] == 0, f"nothing else is: {facts}")


def unregistered(lab: Lab, facts: Facts) -> None:
    """A connection with a pod that nobody registered stays on the kernel path, both ways."""
    for number, name in enumerate(("client", "server")):
        lab.lane(True)
        lane.unregister(lab.place, lab.cookies[number])
        expect(not lane.is_registered(lab.place, lab.cookies[number]), f"{name} is forgotten")
        with lab.counted() as risen, lab.pair() as (client, server):
            warm_up(client, server, 20)
        facts[f"{name}_unregistered"] = risen
        for counter in ("joined", "redirected_messages"):
            expect(counter not in risen, f"{name} unregistered: {risen}")
    lab.lane(True)
    with lab.counted() as risen, lab.pair() as (client, server):
        warm_up(client, server, 20)
    expect(risen["redirected_messages"] == 40, f"registered again: {risen}")


def unload_drains(lab: Lab, facts: Facts) -> None:
    """Unload under a live connection with unread redirected bytes: it loses nothing."""
    lab.lane(True)
    steps: list[str] = []
    with ExitStack() as stack:
        client, server = stack.enter_context(lab.pair())
        warm_up(client, server)
        with lab.counted() as risen:
            client.sendall(b"redirected before ")
            server.sendall(b"answer before ")
        expect(risen["redirected_messages"] == 2, f"both are unread redirects: {risen}")
        first = loader.unload(lab.place, steps.append, 0.5)
        expect(first == {"drained": False, "remaining": 2}, f"two sockets are left: {first}")
        expect(not loader.is_loaded(lab.place), "it counts as not loaded")
        client.sendall(b"sent after")
        server.sendall(b"answer after")
        expect(receive(server, 28) == b"redirected before sent after", "requests are whole")
        expect(receive(client, 26) == b"answer before answer after", "answers are whole")
        warm_up(client, server)
        other, accepted = stack.enter_context(lab.pair())
        warm_up(other, accepted)
        client.close()
        expect(receive_all(server) == b"", "the stream ends")
    second = loader.unload(lab.place, steps.append, BLOCKED)
    expect(second == {"drained": True, "remaining": 0}, f"everything is gone: {second}")
    left = os.listdir("/sys/fs/bpf")
    expect(not left, f"nothing is pinned: {left}")
    programs = libbpf.cgroup_programs("/sys/fs/cgroup")
    expect(not programs, f"nothing is attached: {programs}")
    try:
        loader.ensure(lab.place)
    except Unavailable as error:
        expect(error.reason == "unloaded-by-operator", f"ensure() says why: {error}")
    else:
        raise CheckError("ensure() does not load after unload()")
    facts.update(first=first, second=second, steps=steps)


def _half_close_late(lab: Lab, facts: Facts, count: int, before: Callable[[], object]) -> None:
    """Half-close connections that were in the lane when ``before`` was called."""
    again: list[str] = []
    with ExitStack() as stack:
        pairs = [stack.enter_context(lab.pair()) for _ in range(count)]
        for client, server in pairs:
            warm_up(client, server, 1)
        before()
        for client, server in pairs:
            # The answer comes when the client has been in recv() for a while.
            def answer(server: socket.socket = server) -> None:
                receive_all(server)
                time.sleep(0.005)
                server.sendall(b"answer")
                server.close()

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            client.shutdown(socket.SHUT_WR)
            expect(_receive_patiently(client, again) == b"answer", "the answer arrives")
            thread.join(BLOCKED)
    facts.update(connections=count, again=len(again))
    expect(not again, f"EAGAIN in a blocking read: {len(again)} of {count}: {again[:5]}")


def half_close_while_paused(lab: Lab, facts: Facts, count: int = 60) -> None:
    """Connections in the lane half-close as on the kernel path, also while it is paused."""
    lab.lane(True)
    try:
        _half_close_late(lab, facts, count, lambda: tables.set_paused(lab.place, True))
    finally:
        tables.set_paused(lab.place, False)


def half_close_while_draining(lab: Lab, facts: Facts, count: int = 60) -> None:
    """And those that outlive an unload."""
    expect(loader.load(lab.place), "load() loads again")
    lab.lane(True)
    try:
        _half_close_late(lab, facts, count, lambda: loader.unload(lab.place, lambda _: None, 0))
    finally:
        facts["unload"] = loader.unload(lab.place, lambda _: None, BLOCKED)
    expect(facts["unload"]["drained"], f"drained: {facts}")


def memory_returned(_: Lab, facts: Facts) -> None:
    """With all connections closed, TCP has given its memory back."""
    # Each CPU may keep up to 256 pages for itself (SK_MEMORY_PCPU_RESERVE).
    most = 256 * (os.cpu_count() or 1)
    end = time.monotonic() + 5
    while tcp_pages() > most and time.monotonic() < end:
        time.sleep(0.1)
    facts["pages"] = tcp_pages()
    expect(facts["pages"] <= most, f"{facts['pages']} pages are still charged to TCP")


def kernel_log(_: Lab, facts: Facts) -> None:
    """The kernel has complained about nothing."""
    bad = re.compile(r"WARNING:|BUG:|Oops|refcount_t|Call Trace|use-after-free|rcu.*stall")
    lines = []
    descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while select.select([descriptor], [], [], 0)[0]:
            line = os.read(descriptor, 8192).decode("utf-8", "replace")
            if bad.search(line):
                lines.append(line.splitlines()[0].partition(";")[2])
    os.close(descriptor)
    expect(not lines, f"kernel log: {lines[:10]}")
    facts["complaints"] = len(lines)


CHECKS: dict[str, Callable[[Lab, Facts], None]] = {
    "load": load,
    **{f"request_response_{way}": partial(request_response, way=way) for way in WAYS},
    "receive_memory": receive_memory,
    "not_drained": not_drained,
    "random_order": random_order,
    "half_close": half_close,
    # The server is still reading the request, in parallel, when the FIN comes.
    "half_close_at_once": partial(half_close, count=200, calm=0, tolerated=20),
    # And the answer is on its way already.
    "half_close_in_full_flow": partial(
        half_close, count=100, calm=0, early=b"early" * 2000, tolerated=50
    ),
    "half_close_while_paused": half_close_while_paused,
    "close_after_write": close_after_write,
    "slow_reader": partial(slow_reader, chunk=16384, size=12 << 20),
    "slow_reader_small": partial(slow_reader, chunk=1000, size=6 << 20),
    "small_messages_memory": small_messages_memory,
    "duplex": duplex,
    "unregistered": unregistered,
    "unload_drains": unload_drains,
    "half_close_while_draining": half_close_while_draining,
    "memory_returned": memory_returned,
    "kernel_log": kernel_log,
}


def _alarm(*_: object) -> None:
    raise CheckError(f"not done in {CHECK} s")


def main() -> int:
    """Run every check; 0 if all hold."""
    signal.signal(signal.SIGALRM, _alarm)
    begun = time.monotonic()
    lab = Lab()
    results: dict[str, Facts] = {}
    for name, check in CHECKS.items():
        started = time.monotonic()
        facts: Facts = {}
        problem = ""
        signal.alarm(CHECK)
        try:
            expect(started - begun < TOTAL, "did not run: no time was left")
            lab.reset()
            check(lab, facts)
        except CheckError as error:
            problem = str(error)
        except Exception:
            problem = traceback.format_exc()
        finally:
            signal.alarm(0)
        took = round(time.monotonic() - started, 1)
        results[name] = {"ok": not problem, "error": problem, "seconds": took, "facts": facts}
        print(name, problem or "ok", took, file=sys.stderr)
        if name == "load" and problem:
            break
    print(json.dumps({"kernel": os.uname().release, "checks": results}))
    return int(any(result["error"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
