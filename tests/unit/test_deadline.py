"""The deadline: one real timer signal."""

from __future__ import annotations

import os
import signal
import time

import pytest

from nearpath.cni.deadline import Deadline
from nearpath.errors import DeadlineExceeded


def test_interrupts_a_blocking_read() -> None:
    """A read that never returns is interrupted; after stop nothing comes any more."""
    reader, writer = os.pipe()
    deadline = Deadline(0.1)
    deadline.start()
    try:
        with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.1 s"):
            os.read(reader, 1)
    finally:
        deadline.stop()
        os.close(reader)
        os.close(writer)
    time.sleep(0.4)
    deadline.stop()


def test_restart_counts_from_now() -> None:
    """Every part of the work, and clearing up, gets its own time."""
    deadline = Deadline(0.1)
    deadline.start()
    try:
        with pytest.raises(DeadlineExceeded):
            time.sleep(1)
        deadline.restart(0.5)
        time.sleep(0.3)
        with pytest.raises(DeadlineExceeded):
            time.sleep(1)
    finally:
        deadline.stop()


def test_fires_again() -> None:
    """Somebody who swallows the error is interrupted once more."""
    deadline = Deadline(0.05)
    deadline.start()
    fired = 0
    try:
        for _ in range(3):
            try:
                time.sleep(2)
            except DeadlineExceeded:
                fired += 1
    finally:
        deadline.stop()
    assert fired == 3


def test_gives_the_timer_back() -> None:
    """The handler and the timer of before are there again after stop."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    timer = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        deadline = Deadline(1)
        deadline.start()
        deadline.stop()
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        assert 49 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
