"""Real TCP between two pods: starts `peer.py` at both ends and says what they observed."""

from __future__ import annotations

import json
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.commands import CommandError, kill_group, run

if TYPE_CHECKING:
    from collections.abc import Sequence

# Passed with -c, so that it also runs in containers which do not see this file system.
_PEER = Path(__file__).with_name("peer.py").read_text()
# The distribution's: a container that mounts /usr has it too.
_PYTHON = ("/usr/bin/python3", "-I", "-S", "-c", _PEER)
_SECONDS = 40


@dataclass(frozen=True)
class Conversation:
    """What both ends of one TCP connection saw.

    Attributes:
        intact: every byte arrived once and in order, both ways, and the stream ended.
        messages: requests that the server read.
        seconds: from the first request to the last answer.
        port: the server's.
        peer: the address that the server saw as the client's.
    """

    intact: bool
    messages: int
    seconds: float
    port: int
    peer: str


def converse(
    client: Sequence[str],
    server: Sequence[str],
    address: str,
    *,
    messages: int = 200,
    size: int = 64,
    listen: int = 0,
    port: int = 0,
) -> Conversation:
    """Request and answer, ``messages`` times over one connection.

    Args:
        client: words before the command, to run it in its pod (``netns.inside(…)``).
        server: the same for the server.
        address: that the client connects to; with ``:`` it is IPv6.
        size: bytes of each request and of each answer.
        listen: port of the server; 0: any.
        port: that the client connects to, if that is not the server's (port mappings).

    Raises:
        CommandError: an end failed or did not finish.
    """
    what = {"address": address, "port": port, "messages": messages, "size": size}
    return _talk(client, server, "ask", what, listen)


def pour(
    client: Sequence[str],
    server: Sequence[str],
    address: str,
    *,
    total: int,
    size: int,
    listen: int = 0,
    port: int = 0,
) -> Conversation:
    """One way: ``total`` bytes in writes of ``size``, then half-close, then one answer.

    Args:
        listen: port of the server; 0: any.
        port: that the client connects to, if that is not the server's.
    """
    what = {"address": address, "port": port, "bytes": total, "size": size}
    return _talk(client, server, "pour", what, listen)


def _talk(
    client: Sequence[str], server: Sequence[str], verb: str, what: dict[str, Any], listen: int
) -> Conversation:
    """Run both ends; port 0 to connect to is the one that the server listens on."""
    anywhere = "::" if ":" in what["address"] else "0.0.0.0"  # noqa: S104 - only in a pod
    bind = {"address": anywhere, "port": listen}
    serving = subprocess.Popen(
        [*server, *_PYTHON, "serve", json.dumps(bind)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        listening = _first_line(serving)
        target = {**what, "port": what["port"] or listening}
        asked = run([*client, *_PYTHON, verb, json.dumps(target)], timeout=_SECONDS)
        try:
            stdout, stderr = serving.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CommandError("the server did not see the end of the stream") from error
        if serving.returncode != 0:
            raise CommandError(f"the server failed: {stderr}")
    finally:
        if serving.poll() is None:
            kill_group(serving)
    outcome: dict[str, Any] = json.loads(asked.stdout)
    observed: dict[str, Any] = json.loads(stdout)
    return Conversation(
        intact=outcome["intact"],
        messages=observed["messages"],
        seconds=outcome["seconds"],
        port=listening,
        peer=observed["peer"],
    )


def _first_line(process: subprocess.Popen[str]) -> int:
    """The port that the server prints once it listens."""
    assert process.stdout is not None
    assert process.stderr is not None
    ready, _, _ = select.select([process.stdout], [], [], _SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line.strip().isdigit():
        reason = process.stderr.read() if process.poll() is not None else "still starting"
        raise CommandError(f"the server does not listen: {line}{reason}")
    return int(line)
