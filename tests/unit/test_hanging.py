"""The commands' deadlines: whatever hangs, the runtime gets its answer in time.

The kernel is a fake here (helpers/fake_doors.py); records, locks, log and counts are real
files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from pathlib import Path

import pytest

from helpers.plugin import RESULT, Plugin
from nearpath.cni import netconf
from nearpath.errors import BpfError, DeadlineExceeded


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """A node of the test's own."""
    return Plugin(tmp_path)


def _sleep() -> None:
    time.sleep(30)


@pytest.mark.parametrize("method", ["is_own_netns", "inspect", "link_name", "prepare", "register"])
def test_add_has_a_deadline(plugin: Plugin, method: str) -> None:
    """Whichever step of ADD hangs, the pod starts after timeoutSeconds."""
    plugin.doors.broken[method] = _sleep
    start = time.monotonic()
    assert plugin.ok("ADD", timeoutSeconds=0.5) == RESULT
    assert time.monotonic() - start < 1.5
    assert plugin.lane() == ("off", "deadline")
    assert plugin.failures() == {"deadline": 1}


def test_deadline_cannot_be_swallowed(plugin: Plugin) -> None:
    """Code that swallows the error is interrupted again a moment later."""

    def stubborn() -> None:
        for _ in range(2):
            try:
                time.sleep(30)
            except DeadlineExceeded:
                continue
        time.sleep(30)

    plugin.doors.broken["prepare"] = stubborn
    start = time.monotonic()
    assert plugin.ok("ADD", timeoutSeconds=0.5) == RESULT
    assert time.monotonic() - start < 2


def test_required_deadline(plugin: Plugin) -> None:
    """With required a passed deadline is error 11: try again later."""
    plugin.doors.broken["prepare"] = _sleep
    assert plugin.error("ADD", timeoutSeconds=0.5, required=True)["code"] == 11
    assert plugin.leftovers() == []


def test_undo_that_hangs(plugin: Plugin) -> None:
    """An undo that hangs as well is given up after half a second."""
    plugin.doors.broken["register"] = _sleep
    plugin.doors.broken["unregister"] = _sleep
    start = time.monotonic()
    assert plugin.ok("ADD", timeoutSeconds=0.5) == RESULT
    assert time.monotonic() - start < 2.5
    record = plugin.record()
    assert record is not None  # for DEL


def test_held_lock(plugin: Plugin) -> None:
    """A node lock that somebody holds delays the count of a failure, not the pod."""
    plugin.ok("ADD")
    plugin.doors.break_with("register", BpfError("no", errno.EPERM))
    with open(plugin.place.lock_file, "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        assert plugin.ok("ADD") == RESULT
        assert time.monotonic() - start < 1.5
    assert plugin.lane() == ("off", "bpf")


def test_held_lock_and_del(plugin: Plugin) -> None:
    """The same for DEL, which has most of its deadline left then."""
    plugin.ok("ADD")
    plugin.doors.break_with("unregister", BpfError("no", errno.EPERM))
    Path(plugin.place.lock_file).touch()
    with open(plugin.place.lock_file, "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        assert plugin.ok("DEL", timeoutSeconds=20) is None
        assert time.monotonic() - start < 1.5


def test_stderr_that_nobody_reads(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full stderr pipe blocks every line that is logged, but neither pod nor DEL."""

    class Full:
        """Blocks like a write to a full pipe; a signal interrupts it."""

        def write(self, _text: str) -> None:
            time.sleep(30)

        def flush(self) -> None:
            time.sleep(30)

    plugin.doors.break_with("register", BpfError("no", errno.EPERM))
    plugin.doors.break_with("unregister", BpfError("no", errno.EPERM))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        start = time.monotonic()
        assert plugin.ok("ADD", timeoutSeconds=0.5, unknown=1) == RESULT
        assert plugin.ok("DEL", timeoutSeconds=0.5) is None
        assert plugin.ok("CHECK", timeoutSeconds=0.5) is None
        assert time.monotonic() - start < 8


@pytest.mark.parametrize("command", ["DEL", "GC", "STATUS", "ADD"])
def test_stdin_without_end(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Stdin that never ends is error 5, once it had its time."""
    monkeypatch.setattr(netconf, "TIMEOUT_STDIN", 2.0)
    reader, writer = os.pipe()
    os.write(writer, b'{"name": "net"')
    start = time.monotonic()
    try:
        code, answer = plugin.call(command, read=lambda size: os.read(reader, size))
    finally:
        os.close(reader)
        os.close(writer)
    assert 1.9 < time.monotonic() - start < 3
    assert code == 1
    assert answer is not None
    assert answer["code"] == 5


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_slow_stdin_and_a_short_deadline(plugin: Plugin, command: str) -> None:
    """However long the runtime took to write, the command has its whole time."""
    plugin.ok("ADD")
    pieces = [json.dumps(plugin.config(timeoutSeconds=0.5)).encode(), b""]

    def slow(_size: int) -> bytes:
        time.sleep(1.2)
        return pieces.pop(0)

    plugin.doors.broken["register"] = lambda: time.sleep(0.2)
    code, answer = plugin.call(command, read=slow)
    assert code == 0
    assert answer == (RESULT if command == "ADD" else None)
    assert plugin.failures() == {}


def test_timer_is_given_back(plugin: Plugin) -> None:
    """After a request the process's own timer and handler are as before."""
    import signal

    hits: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: hits.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        plugin.ok("ADD")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert hits == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
