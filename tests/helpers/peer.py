"""One end of a TCP conversation; runs by itself inside a pod (standard library only).

    peer.py serve '{"address": "::", "port": 0}'
    peer.py ask '{"address": "10.9.0.2", "port": 5000, "messages": 100, "size": 64}'
    peer.py pour '{"address": "10.9.0.2", "port": 5000, "bytes": 1000000, "size": 4096}'

``serve`` prints its port on a line of its own, serves one connection until its end of
stream, and answers each request with as many bytes as it asked for: a request is a
16-byte header (size of the request's body, size of the answer) and the body. The answer
is the BLAKE2 stream of the body, so that neither side can be right by accident. ``ask``
checks every answer. ``pour`` sends all its bytes as bodies without answers, ends its
stream (half-close) and then reads the server's digest of all that arrived.
All print one JSON object at the end.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_HEADER = struct.Struct("!QQ")
_SECONDS = 30


def _stretch(seed: bytes, size: int) -> bytes:
    """``size`` bytes that depend on all of ``seed``."""
    return hashlib.shake_128(seed).digest(size)


def _read(connection: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes, or fewer at the end of the stream."""
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 18))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(address: str, port: int = 0) -> dict[str, Any]:
    """Serve one connection to its end; report what arrived."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server(
        (address, port), family=family, dualstack_ipv6=address == "::"
    ) as listener:
        listener.settimeout(_SECONDS)
        print(listener.getsockname()[1], flush=True)
        connection, peer = listener.accept()
    digest = hashlib.sha256()
    messages = received = 0
    with connection:
        connection.settimeout(_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := _read(connection, _HEADER.size):
            size, wanted = _HEADER.unpack(head)
            body = _read(connection, size)
            digest.update(body)
            messages += 1
            received += len(body)
            if wanted:
                connection.sendall(_stretch(body, wanted))
        connection.sendall(digest.digest())
    return {"messages": messages, "bytes": received, "peer": peer[0], "sha256": digest.hexdigest()}


def _connect(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(address: str, port: int, messages: int, size: int) -> dict[str, Any]:
    """Send requests of ``size`` bytes (with header) one after the other; check each answer."""
    digest = hashlib.sha256()
    wrong = 0
    with _connect(address, port) as connection:
        start = time.monotonic()
        for number in range(messages):
            body = _stretch(struct.pack("!Q", number), max(size - _HEADER.size, 1))
            digest.update(body)
            connection.sendall(_HEADER.pack(len(body), size) + body)
            wrong += _read(connection, size) != _stretch(body, size)
        seconds = time.monotonic() - start
        connection.shutdown(socket.SHUT_WR)
        intact = _read(connection, digest.digest_size) == digest.digest() and not wrong
        extra = len(connection.recv(1))
    return {"intact": intact and not extra, "wrong": wrong, "seconds": seconds}


def pour(address: str, port: int, bytes: int, size: int) -> dict[str, Any]:  # noqa: A002 - JSON key
    """Send ``bytes`` bytes one way in writes of ``size``; compare the server's digest."""
    digest = hashlib.sha256()
    with _connect(address, port) as connection:
        start = time.monotonic()
        left = bytes
        while left:
            body = _stretch(struct.pack("!Q", left), min(size, left))
            digest.update(body)
            connection.sendall(_HEADER.pack(len(body), 0) + body)
            left -= len(body)
        connection.shutdown(socket.SHUT_WR)
        intact = _read(connection, digest.digest_size) == digest.digest()
        extra = len(connection.recv(1))
        seconds = time.monotonic() - start
    return {"intact": intact and not extra, "wrong": int(not intact), "seconds": seconds}


if __name__ == "__main__":
    verbs: dict[str, Callable[..., dict[str, Any]]] = {"serve": serve, "ask": ask, "pour": pour}
    print(json.dumps(verbs[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
