"""A TCP proxy that reads as Envoy does; runs by itself inside a pod (standard library only).

    edge_proxy.py 15001 15006 127.0.0.6

Envoy's ways with a socket (RawBufferSocket::doRead, libevent with EV_ET): edge-triggered epoll
for reading, writing and the peer's end (EPOLLRDHUP); every read is repeated until EAGAIN or the
end of the stream; while the other side takes no more than a megabyte it does not read, and then
reads on without waiting for an event; an end of stream is passed on once all before it is written.

Each connection goes where it wanted to go before REDIRECT (SO_ORIGINAL_DST): from the second port
with the source address given, from the first with any.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys

_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_SLICE = 16_384
_HIGH_WATER = 1 << 20


class _End:
    """One of a connection's two sockets; ``out`` is what is still to be written to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.other = self
        self.out = bytearray()
        self.connected = False
        self.ended = False  # its peer has sent all
        self.shut = False  # all that it had to be told is told

    def read(self) -> None:
        """Until EAGAIN, unless the other end has enough to do."""
        while not self.ended and len(self.other.out) < _HIGH_WATER:
            try:
                part = self.socket.recv(_SLICE)
            except BlockingIOError:
                return
            self.ended = not part
            self.other.out += part

    def write(self) -> None:
        """As much as there is and the socket takes; then the end, if it has come."""
        while self.out:
            try:
                sent = self.socket.send(self.out)
            except BlockingIOError:
                return
            del self.out[:sent]
        if self.other.ended and not self.shut:
            self.shut = True
            self.socket.shutdown(socket.SHUT_WR)


class _Proxy:
    def __init__(self, outbound: int, inbound: int, source: str) -> None:
        self._source = source
        self._epoll = select.epoll()
        self._ends: dict[int, _End] = {}
        self._listeners = {}
        for port in (outbound, inbound):
            listener = socket.create_server(("", port), backlog=128)
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener, port == inbound
            self._epoll.register(listener, select.EPOLLIN)

    def run(self) -> None:
        while True:
            for number, events in self._epoll.poll():
                if number in self._listeners:
                    self._accept(*self._listeners[number])
                elif number in self._ends:
                    self._serve(self._ends[number], events)

    def _accept(self, listener: socket.socket, inbound: bool) -> None:
        client, _ = listener.accept()
        wanted = client.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
        port, address = struct.unpack_from("!2xH4s", wanted)
        upstream = socket.socket()
        if inbound:
            upstream.bind((self._source, 0))
        ends = _End(client), _End(upstream)
        ends[0].other, ends[1].other = ends[1], ends[0]
        ends[0].connected = True
        if upstream.connect_ex((socket.inet_ntoa(address), port)) not in {0, errno.EINPROGRESS}:
            self._close(ends[0])
            return
        for end in ends:
            self._ends[end.socket.fileno()] = end
            self._epoll.register(end.socket, _EVENTS)

    def _serve(self, end: _End, events: int) -> None:
        other = end.other
        try:
            if events & select.EPOLLOUT and not end.connected:
                end.connected = True
                other.read()  # what came before there was somebody to tell
            if events & _READABLE and end.connected and other.connected:
                end.read()
            for each in (end, other):
                full = len(each.out) >= _HIGH_WATER
                if each.connected:
                    each.write()
                if full and len(each.out) < _HIGH_WATER:
                    each.other.read()  # no event will say so, for it has been
                    each.write()
        except OSError:
            self._close(end)
            return
        if end.shut and other.shut and not end.out and not other.out:
            self._close(end)

    def _close(self, end: _End) -> None:
        for each in (end, end.other):
            self._ends.pop(each.socket.fileno(), None)
            each.socket.close()


if __name__ == "__main__":
    _Proxy(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]).run()
