"""Looking at one TCP socket of a namespace from outside, by its addresses (sock_diag(7)).

Unlike a descriptor of our own this neither keeps the socket open nor touches what is in it.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import NamedTuple

from nearpath.kernel import netns
from torture.operations import STATES

_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY, linux/sock_diag.h
_REQUEST, _ERROR = 1, 2  # NLM_F_REQUEST, NLMSG_ERROR
_INFO = 2  # INET_DIAG_INFO, linux/inet_diag.h
_HEADER = struct.Struct("=IHHII")
_MESSAGE = 72  # struct inet_diag_msg
_NO_COOKIE = b"\xff" * 8


class Seen(NamedTuple):
    """One socket.

    Attributes:
        state: one of STATES.
        not_sent: bytes written that TCP has not sent yet.
        unacknowledged: segments sent and not acknowledged yet.
        sent, received: bytes so far (an end of stream counts as one received); None of a
            socket that is no full one any more or yet.
    """

    state: str
    not_sent: int
    unacknowledged: int
    sent: int | None
    received: int | None


class Diag:
    """Questions about the sockets of one network namespace.

    Args:
        path: of the namespace.
    """

    def __init__(self, path: str) -> None:
        with netns.entered(path):
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)

    def close(self) -> None:
        """Close the netlink socket."""
        self._netlink.close()

    def look(self, own: tuple[str, int], other: tuple[str, int]) -> Seen | None:
        """The connected socket with these addresses, or None if there is none.

        Raises:
            OSError: the kernel has no tcp_diag (``modprobe tcp_diag``).
        """
        family, ours, theirs = socket.AF_INET, _packed(own[0]), _packed(other[0])
        if len(ours) > 4:
            family = socket.AF_INET6
        request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0xFFFFFFFF)
        request += struct.pack("!HH16s16sI", own[1], other[1], ours, theirs, 0) + _NO_COOKIE
        head = _HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, _REQUEST, 1, 0)
        self._netlink.send(head + request)
        answer = self._netlink.recv(4096)
        if _HEADER.unpack_from(answer)[1] == _ERROR:
            number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            if number != 2:  # ENOENT: no such socket, or no tcp_diag
                raise OSError(number, "sock_diag")
            return None
        seen = _seen(answer)
        # With no connected socket the look-up goes on to the listener.
        return None if seen.state == "LISTEN" else seen


def _packed(address: str) -> bytes:
    """In network order, v4-mapped ones as the IPv4 address that the socket is found by."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        return parsed.ipv4_mapped.packed
    return parsed.packed


def _seen(answer: bytes) -> Seen:
    state = STATES[answer[_HEADER.size + 1]]
    at = _HEADER.size + _MESSAGE
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _INFO and length >= 4 + 216:
            info = answer[at + 4 : at + length]
            # Of struct tcp_info: unacked, bytes_received, notsent_bytes, bytes_sent, bytes_retrans.
            (unacknowledged,) = struct.unpack_from("=I", info, 24)
            (received,) = struct.unpack_from("=Q", info, 128)
            (not_sent,) = struct.unpack_from("=I", info, 144)
            sent, again = struct.unpack_from("=QQ", info, 200)
            return Seen(state, not_sent, unacknowledged, sent - again, received)
        at += max((length + 3) // 4 * 4, 4)
    return Seen(state, 0, 0, None, None)


_ENDING = {"FIN_WAIT1", "LAST_ACK", "CLOSING", "SYN_SENT"}
_AFTER_END = {"CLOSE_WAIT", "LAST_ACK", "CLOSING", "TIME_WAIT", "CLOSE"}
_HAS_ENDED = {"FIN_WAIT1", "FIN_WAIT2", "CLOSING", "TIME_WAIT", "LAST_ACK"}


def at_rest(one: Seen | None, other: Seen | None) -> bool:
    """True if everything that one socket has sent has come to the other."""
    if one is None or one.sent is None:
        return True  # gone, or what remains of a closed one; its last word is the other's matter
    if one.not_sent or one.state in _ENDING:
        return False
    if other is None:
        return one.state == "CLOSE"  # else a reset is on its way, or an ACK to the listener
    if one.state == "ESTABLISHED" and other.state == "SYN_RECV":
        return False  # the last ACK of the handshake is on its way
    if one.state in _HAS_ENDED and other.state not in _AFTER_END:
        return False
    return other.sent is None or other.received is None or other.received >= one.sent
