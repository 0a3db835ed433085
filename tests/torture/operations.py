"""What an actor can do with a socket, each with all that it lets a program see.

A result is a list that starts with ``ok`` or with the name of an errno. Bytes are told as
places in the pattern of their direction, so that a result says which bytes came, not only how
many: ``"120+5"`` are five bytes from place 120 on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import select
import signal
import socket
import struct
import termios
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Args = dict[str, Any]
Result = list[Any]

_PERIOD = 1 << 20
_SIOCATMARK = 0x8905  # asm-generic/sockios.h
_CHUNK = 1 << 18
# asm-generic/socket.h and linux/tcp.h, those that Python's socket module lacks.
_OPTIONS = {
    "SO_ZEROCOPY": (socket.SOL_SOCKET, 60),
    "SO_PEEK_OFF": (socket.SOL_SOCKET, 42),
    "SO_BUSY_POLL": (socket.SOL_SOCKET, 46),
    "SO_RCVLOWAT": (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    "SO_RCVBUF": (socket.SOL_SOCKET, socket.SO_RCVBUF),
    "SO_SNDBUF": (socket.SOL_SOCKET, socket.SO_SNDBUF),
    "SO_KEEPALIVE": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "SO_OOBINLINE": (socket.SOL_SOCKET, socket.SO_OOBINLINE),
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "SO_TIMESTAMP": (socket.SOL_SOCKET, 29),
    "TCP_NODELAY": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "TCP_CORK": (socket.IPPROTO_TCP, socket.TCP_CORK),
    "TCP_QUICKACK": (socket.IPPROTO_TCP, socket.TCP_QUICKACK),
    "TCP_KEEPIDLE": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "TCP_KEEPINTVL": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "TCP_DEFER_ACCEPT": (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
    "TCP_FASTOPEN": (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
    "TCP_FASTOPEN_CONNECT": (socket.IPPROTO_TCP, 30),
    "TCP_MAXSEG": (socket.IPPROTO_TCP, socket.TCP_MAXSEG),
    "TCP_NOTSENT_LOWAT": (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT),
    "TCP_USER_TIMEOUT": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "TCP_WINDOW_CLAMP": (socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP),
    "TCP_INQ": (socket.IPPROTO_TCP, 36),
}
_FLAGS = {
    "PEEK": socket.MSG_PEEK,
    "WAITALL": socket.MSG_WAITALL,
    "TRUNC": socket.MSG_TRUNC,
    "DONTWAIT": socket.MSG_DONTWAIT,
    "OOB": socket.MSG_OOB,
    "MORE": socket.MSG_MORE,
    "NOSIGNAL": socket.MSG_NOSIGNAL,
    "ZEROCOPY": 0x4000000,
    "FASTOPEN": socket.MSG_FASTOPEN,
    "ERRQUEUE": socket.MSG_ERRQUEUE,
}
# enum of include/net/tcp_states.h.
STATES = [
    "?",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
]
_POLL = {
    "IN": select.POLLIN,
    "PRI": select.POLLPRI,
    "OUT": select.POLLOUT,
    "RDHUP": select.POLLRDHUP,
    "ERR": select.POLLERR,
    "HUP": select.POLLHUP,
    "NVAL": select.POLLNVAL,
}
_EPOLL = {"ET": select.EPOLLET, "ONESHOT": select.EPOLLONESHOT}

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr of x86-64 and arm64: struct msghdr and msg_len."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


def mask_names(mask: int) -> str:
    """Poll events as text, in a fixed order."""
    return "|".join(name for name, bit in _POLL.items() if mask & bit) or "0"


def _mask(names: list[str]) -> int:
    known = {**_POLL, **_EPOLL}
    mask = 0
    for name in names:
        mask |= known[name]
    return mask


def _flags(args: Args) -> int:
    total = 0
    for name in args.get("flags", ()):
        total |= _FLAGS[name]
    return total


class Stream:
    """How far both directions of one connection have come, as one process sees it."""

    def __init__(self, sent: int = 0, received: int = 0) -> None:
        self.sent = sent
        self.received = received


class Table:
    """The sockets of one process and how far their streams have come.

    Args:
        side: ``c`` or ``s``; what the two sides send differs.
        target: how to reach the listener: family, address and port.
    """

    def __init__(self, side: str) -> None:
        self.side = side
        self.target: tuple[int, str, int] = (socket.AF_INET, "", 0)
        self.listener: socket.socket | None = None
        self.slots: dict[int, socket.socket] = {}
        self.streams: dict[int, Stream] = {}
        self.epoll: select.epoll | None = None
        self.flows: list[list[Any]] = []
        self.progress: dict[str, list[Result]] = {}  # of scripts, by actor
        own, other = ("c", "s") if side == "c" else ("s", "c")
        self._out = random.Random(own).randbytes(_PERIOD) * 2
        self._in = random.Random(other).randbytes(_PERIOD) * 2
        self._file = -1

    def clear(self) -> None:
        """Close everything."""
        if self.epoll:
            self.epoll.close()
            self.epoll = None
        for opened in self.slots.values():
            with suppress(OSError):
                opened.close()
        if self.listener:
            self.listener.close()
            self.listener = None
        self.slots.clear()
        self.streams.clear()
        self.progress.clear()

    def socket(self, args: Args) -> socket.socket:
        """The socket that a step is about.

        Raises:
            OSError: EBADF, there is none in its slot.
        """
        try:
            return self.slots[args.get("slot", 0)]
        except KeyError:
            raise OSError(errno.EBADF, "no socket in this slot") from None

    def stream(self, args: Args) -> Stream:
        """How far the connection in a step's slot has come."""
        return self.streams.setdefault(args.get("slot", 0), Stream())

    def next_bytes(self, args: Args, size: int) -> bytes:
        """What this side sends next."""
        at = self.stream(args).sent % _PERIOD
        if at + size > 2 * _PERIOD:
            return (self._out[at : at + _PERIOD] * (size // _PERIOD + 1))[:size]
        return self._out[at : at + size]

    def has_sent(self, args: Args, size: int) -> None:
        """Count what was taken from us."""
        self.stream(args).sent += size

    def file(self, args: Args) -> tuple[int, int]:
        """A file with the pattern, and the offset of what is sent next."""
        if self._file < 0:
            made = os.memfd_create("pattern")
            os.write(made, self._out)
            self._file = made  # last, for another thread may be here too
        return self._file, self.stream(args).sent % _PERIOD

    def place(self, args: Args, data: bytes, *, keep: bool = False) -> str:
        """Where in the other side's pattern these bytes are; moves on unless ``keep``."""
        stream = self.stream(args)
        at = stream.received
        if not keep:
            stream.received += len(data)
        if not data:
            return "nothing"
        start = at % _PERIOD
        if self._in[start : start + len(data)] == data:
            return f"{at}+{len(data)}"
        found = self._in.find(data) if len(data) < _PERIOD else -1
        if len(data) > 3 and found >= 0:
            return f"instead of {at}: {found}+{len(data)}"
        shown = data[:8].hex() + ("…" if len(data) > 8 else "")
        wanted = self._in[start : start + 8].hex()
        return f"wrong at {at}, {len(data)} bytes {shown} not {wanted}"


OPERATIONS: dict[str, Callable[[Table, Args], Result]] = {}


def _operation(run: Callable[[Table, Args], Result]) -> Callable[[Table, Args], Result]:
    OPERATIONS[run.__name__.rstrip("_")] = run
    return run


def perform(table: Table, name: str, args: Args) -> Result:
    """Do one operation in this thread, which has SIGPIPE blocked."""
    started = time.monotonic()
    try:
        result = OPERATIONS[name](table, args)
    except OSError as error:
        result = [errno.errorcode.get(error.errno or 0, str(error))]
        if "timeout" in args and result == ["EAGAIN"]:
            waited = (time.monotonic() - started) * 1000
            result.append("early" if waited < args["timeout"] * 0.9 else "timely")
    if signal.sigtimedwait([signal.SIGPIPE], 0):
        result.append("SIGPIPE")
    return result


# -- making connections ----------------------------------------------------------------------


@_operation
def socket_(table: Table, args: Args) -> Result:
    slot = args.get("slot", 0)
    if slot in table.slots:
        return ["taken"]
    table.slots[slot] = socket.socket(table.target[0], socket.SOCK_STREAM)
    table.streams[slot] = Stream()
    return ["ok"]


def _note_flow(table: Table, connection: socket.socket) -> None:
    """Remember the addresses, by which the other process watches the connection."""
    with suppress(OSError):
        own = connection.getsockname()[:2]
        table.flows.append([own[0], own[1], table.target[1], table.target[2]])


@_operation
def connect(table: Table, args: Args) -> Result:
    connection = table.socket(args)
    try:
        connection.connect(table.target[1:])
    finally:
        _note_flow(table, connection)
    return ["ok"]


@_operation
def connect_send(table: Table, args: Args) -> Result:
    """Connect and write at once."""
    connection = table.socket(args)
    data = table.next_bytes(args, args["n"])
    try:
        connection.connect(table.target[1:])
        sent = connection.send(data, _flags(args))
    finally:
        _note_flow(table, connection)
    table.has_sent(args, sent)
    return ["ok", sent]


@_operation
def fast_open(table: Table, args: Args) -> Result:
    """TCP Fast Open: data with the SYN, if there is a cookie for it."""
    connection = table.socket(args)
    data = table.next_bytes(args, args["n"])
    try:
        sent = connection.sendto(data, socket.MSG_FASTOPEN, table.target[1:])
    finally:
        _note_flow(table, connection)
    table.has_sent(args, sent)
    return ["ok", sent]


@_operation
def disconnect(table: Table, args: Args) -> Result:
    """connect(2) to AF_UNSPEC: the socket can be used again."""
    connection = table.socket(args)
    address = struct.pack("=H14x", socket.AF_UNSPEC)
    if _libc.connect(connection.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "connect")
    slot = args.get("slot", 0)
    table.streams[slot] = Stream()
    return ["ok"]


@_operation
def bind(table: Table, args: Args) -> Result:
    """A source port that the program has used before or will use again."""
    connection = table.socket(args)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Beside the listener's, which no other program uses at the same time.
    connection.bind(("", table.target[2] + 5000))
    return ["ok"]


@_operation
def accept(table: Table, args: Args) -> Result:
    slot = args.get("slot", 0)
    if slot in table.slots:
        return ["taken"]
    if not table.listener:
        raise OSError(errno.EBADF, "no listener")
    connection, _ = table.listener.accept()
    connection.setblocking(True)
    table.slots[slot] = connection
    table.streams[slot] = Stream()
    return ["ok"]


# -- writing ---------------------------------------------------------------------------------


@_operation
def send(table: Table, args: Args) -> Result:
    sent = table.socket(args).send(table.next_bytes(args, args["n"]), _flags(args))
    table.has_sent(args, sent)
    return ["ok", sent]


@_operation
def write(table: Table, args: Args) -> Result:
    sent = os.write(table.socket(args).fileno(), table.next_bytes(args, args["n"]))
    table.has_sent(args, sent)
    return ["ok", sent]


def _pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return pieces


@_operation
def writev(table: Table, args: Args) -> Result:
    data = _pieces(table.next_bytes(args, sum(args["sizes"])), args["sizes"])
    sent = os.writev(table.socket(args).fileno(), data)
    table.has_sent(args, sent)
    return ["ok", sent]


@_operation
def sendmsg(table: Table, args: Args) -> Result:
    data = _pieces(table.next_bytes(args, sum(args["sizes"])), args["sizes"])
    sent = table.socket(args).sendmsg(data, [], _flags(args))
    table.has_sent(args, sent)
    return ["ok", sent]


@_operation
def sendmmsg(table: Table, args: Args) -> Result:
    """Several messages in one call."""
    pieces = _pieces(table.next_bytes(args, sum(args["sizes"])), args["sizes"])
    messages = (_Mmsghdr * len(pieces))()
    buffers = [ctypes.create_string_buffer(piece, max(len(piece), 1)) for piece in pieces]
    vectors = [
        _Iovec(ctypes.addressof(buffer), len(piece))
        for buffer, piece in zip(buffers, pieces, strict=True)
    ]
    for message, vector in zip(messages, vectors, strict=True):
        message.iov, message.iovlen = ctypes.pointer(vector), 1
    count = _libc.sendmmsg(table.socket(args).fileno(), messages, len(pieces), _flags(args))
    if count < 0:
        raise OSError(ctypes.get_errno(), "sendmmsg")
    lengths = [messages[number].length for number in range(count)]
    table.has_sent(args, sum(lengths))
    return ["ok", lengths]


def _again(connection: socket.socket, error: OSError, events: int) -> bool:
    """Wait and say yes if a call on a non-blocking socket would have had to wait.

    On a blocking socket EAGAIN is something to be seen.
    """
    if error.errno != errno.EAGAIN:
        return False
    if not fcntl.fcntl(connection, fcntl.F_GETFL) & os.O_NONBLOCK:
        return False
    waiting = select.poll()
    waiting.register(connection, events)
    waiting.poll()
    return True


@_operation
def send_all(table: Table, args: Args) -> Result:
    """All of it, as often as it takes."""
    connection, left = table.socket(args), args["n"]
    piece = args.get("piece", 65536)
    while left:
        try:
            sent = connection.send(table.next_bytes(args, min(left, piece)), _flags(args))
        except OSError as error:
            if not _again(connection, error, select.POLLOUT):
                raise
            continue
        table.has_sent(args, sent)
        left -= sent
    return ["ok", args["n"]]


def _all(table: Table, args: Args, put: Callable[[int], int]) -> Result:
    """What ``put`` takes at once, or with ``all`` everything, as often as it takes."""
    left = args["n"]
    while True:
        try:
            sent = put(left)
        except OSError as error:
            if not args.get("all") or not _again(table.socket(args), error, select.POLLOUT):
                raise
            continue
        table.has_sent(args, sent)
        left -= sent
        if not args.get("all") or not left or not sent:
            return ["ok", args["n"] - left]


@_operation
def sendfile(table: Table, args: Args) -> Result:
    def put(left: int) -> int:
        file, offset = table.file(args)
        return os.sendfile(table.socket(args).fileno(), file, offset, left)

    return _all(table, args, put)


@_operation
def splice_in(table: Table, args: Args) -> Result:
    """Bytes from a pipe into the socket."""
    reader, writer = os.pipe()
    try:
        os.write(writer, table.next_bytes(args, args["n"]))
        number = table.socket(args).fileno()
        return _all(table, args, lambda left: os.splice(reader, number, left))
    finally:
        os.close(reader)
        os.close(writer)


# -- reading ---------------------------------------------------------------------------------


@_operation
def recv(table: Table, args: Args) -> Result:
    data = table.socket(args).recv(args["n"], _flags(args))
    keep = bool({"PEEK", "OOB"} & set(args.get("flags", ())))
    return ["ok", table.place(args, data, keep=keep)]


@_operation
def recv_some(table: Table, args: Args) -> Result:
    """recv, and what else is there at once, up to ``n`` bytes in all."""
    connection, data = table.socket(args), b""
    flags = _flags(args)
    with suppress(BlockingIOError):
        while len(data) < args["n"]:
            part = connection.recv(args["n"] - len(data), flags)
            if not part:
                break
            data += part
            flags |= socket.MSG_DONTWAIT
        return ["ok", table.place(args, data)]
    if not data:
        raise BlockingIOError(errno.EAGAIN, "recv")
    return ["ok", table.place(args, data)]


@_operation
def read(table: Table, args: Args) -> Result:
    return ["ok", table.place(args, os.read(table.socket(args).fileno(), args["n"]))]


@_operation
def readv(table: Table, args: Args) -> Result:
    buffers = [bytearray(size) for size in args["sizes"]]
    count = os.readv(table.socket(args).fileno(), buffers)
    return ["ok", table.place(args, b"".join(buffers)[:count])]


@_operation
def recvmsg(table: Table, args: Args) -> Result:
    buffers = [bytearray(size) for size in args["sizes"]]
    count, control, flags, _ = table.socket(args).recvmsg_into(buffers, 512, _flags(args))
    keep = bool({"PEEK", "OOB", "ERRQUEUE"} & set(args.get("flags", ())))
    data = b"".join(buffers)[:count]
    kinds: list[Any] = []
    for level, kind, value in control:
        shown = "time" if (level, kind) == (socket.SOL_SOCKET, 29) else value.hex()
        kinds.append([level, kind, shown])
    return ["ok", table.place(args, data, keep=keep), f"flags {flags:#x}", *kinds]


@_operation
def recv_discard(table: Table, args: Args) -> Result:
    """MSG_TRUNC without a buffer: bytes thrown away unseen."""
    flags = _flags(args) | socket.MSG_TRUNC
    count = _libc.recv(table.socket(args).fileno(), None, args["n"], flags)
    if count < 0:
        raise OSError(ctypes.get_errno(), "recv")
    table.stream(args).received += count
    return ["ok", count]


class _Content:
    """What many reads got together, however it was divided."""

    def __init__(self, table: Table, args: Args) -> None:
        self._table, self._args = table, args
        self._digest = hashlib.blake2b(digest_size=8)
        self._in_place = True

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self._in_place &= self._table.place(self._args, data)[0].isdigit()

    def told(self) -> str:
        """A digest, unless the bytes are simply those that come next."""
        return "in place" if self._in_place else f"content {self._digest.hexdigest()}"


@_operation
def recv_exact(table: Table, args: Args) -> Result:
    """That many bytes, as often as it takes; what is wrong or missing is told."""
    connection, left, content = table.socket(args), args["n"], _Content(table, args)
    while left:
        try:
            data = connection.recv(min(left, args.get("piece", _CHUNK)))
        except OSError as error:
            if not _again(connection, error, select.POLLIN):
                raise
            continue
        if not data:
            return ["ok", f"end of stream {left} early", content.told()]
        content.add(data)
        left -= len(data)
        if "pause" in args:
            time.sleep(args["pause"] / 1000)
    return ["ok", args["n"], content.told()]


@_operation
def recv_eof(table: Table, args: Args) -> Result:
    """Everything up to the end of the stream."""
    connection, total, content = table.socket(args), 0, _Content(table, args)
    while True:
        try:
            data = connection.recv(args.get("piece", _CHUNK))
        except OSError as error:
            if _again(connection, error, select.POLLIN):
                continue
            return [errno.errorcode.get(error.errno or 0, "?"), total, content.told()]
        if not data:
            return ["ok", total, content.told()]
        content.add(data)
        total += len(data)


@_operation
def splice_out(table: Table, args: Args) -> Result:
    """Bytes from the socket into a pipe, as proxies do."""
    reader, writer = os.pipe()
    try:
        flags = 2 if "DONTWAIT" in args.get("flags", ()) else 0  # SPLICE_F_NONBLOCK
        count = os.splice(table.socket(args).fileno(), writer, min(args["n"], 60000), flags=flags)
        data = os.read(reader, count) if count else b""
    finally:
        os.close(reader)
        os.close(writer)
    return ["ok", table.place(args, data)]


# -- looking ---------------------------------------------------------------------------------


def query(connection: socket.socket, request: int) -> int:
    """What an ioctl(2) answers with an int."""
    value = bytearray(4)
    fcntl.ioctl(connection.fileno(), request, value)
    return int.from_bytes(value, "little", signed=True)


@_operation
def fionread(table: Table, args: Args) -> Result:
    return ["ok", query(table.socket(args), termios.FIONREAD)]


@_operation
def at_mark(table: Table, args: Args) -> Result:
    return ["ok", query(table.socket(args), _SIOCATMARK)]


@_operation
def so_error(table: Table, args: Args) -> Result:
    number = table.socket(args).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return ["ok", errno.errorcode.get(number, 0)]


@_operation
def peer_name(table: Table, args: Args) -> Result:
    table.socket(args).getpeername()
    return ["ok"]


@_operation
def tcp_info(table: Table, args: Args) -> Result:
    """What TCP_INFO counts as received."""
    info = table.socket(args).getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return ["ok", int.from_bytes(info[128:136], "little")]  # tcpi_bytes_received


@_operation
def poll(table: Table, args: Args) -> Result:
    watcher = select.poll()
    watcher.register(table.socket(args), _mask(args["events"]))
    events = watcher.poll(args.get("timeout", 0))
    return ["ok", mask_names(events[0][1]) if events else "none"]


@_operation
def select_(table: Table, args: Args) -> Result:
    wanted = [table.socket(args)]
    timeout = args.get("timeout", 0)  # ms; less than 0: for ever
    seconds = None if timeout < 0 else timeout / 1000
    ready = select.select(wanted, wanted if args.get("write") else [], wanted, seconds)
    return ["ok", [len(part) for part in ready]]


@_operation
def epoll_add(table: Table, args: Args) -> Result:
    if table.epoll is None:
        table.epoll = select.epoll()
    table.epoll.register(table.socket(args), _mask(args["events"]))
    return ["ok"]


@_operation
def epoll_modify(table: Table, args: Args) -> Result:
    if table.epoll is None:
        return ["no epoll"]
    table.epoll.modify(table.socket(args), _mask(args["events"]))
    return ["ok"]


@_operation
def epoll_wait(table: Table, args: Args) -> Result:
    if table.epoll is None:
        return ["no epoll"]
    timeout = args.get("timeout", 0)
    events = table.epoll.poll(timeout / 1000 if timeout > 0 else timeout or 0)
    numbers = {opened.fileno(): slot for slot, opened in table.slots.items()}
    return ["ok", sorted([numbers.get(fd, -1), mask_names(mask)] for fd, mask in events)]


# -- changing and ending ---------------------------------------------------------------------


def set_option(opened: socket.socket, name: str, value: int) -> None:
    """Set an option by its name."""
    level, number = _OPTIONS[name]
    opened.setsockopt(level, number, value)


@_operation
def option(table: Table, args: Args) -> Result:
    set_option(table.socket(args), args["name"], args["value"])
    return ["ok"]


@_operation
def get_option(table: Table, args: Args) -> Result:
    level, number = _OPTIONS[args["name"]]
    return ["ok", table.socket(args).getsockopt(level, number)]


@_operation
def timeout(table: Table, args: Args) -> Result:
    """SO_RCVTIMEO or SO_SNDTIMEO in ms."""
    number = {"RCV": socket.SO_RCVTIMEO, "SND": socket.SO_SNDTIMEO}[args["way"]]
    value = struct.pack("@ll", args["ms"] // 1000, args["ms"] % 1000 * 1000)
    table.socket(args).setsockopt(socket.SOL_SOCKET, number, value)
    return ["ok"]


@_operation
def blocking(table: Table, args: Args) -> Result:
    table.socket(args).setblocking(bool(args["on"]))
    return ["ok"]


@_operation
def shutdown(table: Table, args: Args) -> Result:
    how = {"RD": socket.SHUT_RD, "WR": socket.SHUT_WR, "RDWR": socket.SHUT_RDWR}[args["how"]]
    table.socket(args).shutdown(how)
    return ["ok"]


@_operation
def linger(table: Table, args: Args) -> Result:
    value = struct.pack("=ii", 1, args["seconds"])
    table.socket(args).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
    return ["ok"]


@_operation
def close(table: Table, args: Args) -> Result:
    table.socket(args)
    table.slots.pop(args.get("slot", 0)).close()
    return ["ok"]


@_operation
def duplicate(table: Table, args: Args) -> Result:
    """dup(2) into another slot."""
    if args["to"] in table.slots:
        return ["taken"]
    table.slots[args["to"]] = table.socket(args).dup()
    table.streams[args["to"]] = table.stream(args)
    return ["ok"]


@_operation
def fork(table: Table, args: Args) -> Result:
    """A child writes to or reads from the inherited socket and exits, which closes its copy."""
    connection = table.socket(args)
    data = table.next_bytes(args, args["n"])
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = b"?"
        with suppress(BaseException):
            try:
                if args["way"] == "send":
                    status = b"%d" % connection.send(data, socket.MSG_NOSIGNAL)
                else:
                    status = b"=" + connection.recv(args["n"], socket.MSG_DONTWAIT)
            except OSError as error:
                status = errno.errorcode.get(error.errno or 0, "?").encode()
            os.write(writer, status)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if said.isdigit():
        table.has_sent(args, int(said))
        return ["ok", int(said)]
    if said.startswith(b"="):
        return ["ok", table.place(args, said[1:])]
    return [said.decode()]
