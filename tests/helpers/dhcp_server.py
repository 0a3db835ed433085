"""A DHCP server for one client, as virt-launcher runs it; by itself inside a pod (no packages).

    dhcp_server.py '{"device": "k6t-eth0", "mac": "0a:…", "address": "10.9.0.2/24", "mtu": 1500,
                     "router": "10.9.0.1", "server": "169.254.75.10"}'

It answers DISCOVER and REQUEST of that MAC with that address, whatever is asked for, and hears
nothing but what reaches the bridge itself (KubeVirt's SingleClientDHCPServer, network/dhcp). Each
message that it hears is a JSON object on a line: its type, its MAC and where it came from.
"""

from __future__ import annotations

import json
import socket
import struct
import sys

_SERVER_PORT = 67
_COOKIE = b"\x63\x82\x53\x63"
# struct of BOOTP up to the options: op htype hlen hops xid secs flags ciaddr yiaddr siaddr giaddr
# chaddr[16] sname[64] file[128]
_FIXED = struct.Struct("!4BIHH4s4s4s4s16s64s128s")
_BROADCAST = 0x8000
_LEASE = 999 * 86400  # seconds: for ever
_DISCOVER, _OFFER, _REQUEST, _ACK = 1, 2, 3, 5
_MASK, _ROUTER, _HOST_NAME, _MTU, _LEASE_TIME, _TYPE, _SERVER_ID = 1, 3, 12, 26, 51, 53, 54
_END = 255


def _message_type(options: bytes) -> int:
    """Value of option 53; 0 if it is not there."""
    position = 0
    while position + 2 < len(options) and options[position] != _END:
        code = options[position]
        if code == 0:
            position += 1
            continue
        if code == _TYPE:
            return options[position + 2]
        position += 2 + options[position + 1]
    return 0


def _answer(request: bytes, kind: int, wanted: dict[str, str | int]) -> bytes:
    (_, htype, hlen, _, xid, _, flags, ciaddr, *_, giaddr, chaddr, _, _) = _FIXED.unpack_from(
        request
    )
    address, _, length = str(wanted["address"]).partition("/")
    mask = (0xFFFFFFFF << (32 - int(length))) & 0xFFFFFFFF
    server = socket.inet_aton(str(wanted["server"]))
    head = _FIXED.pack(
        *(2, htype, hlen, 0, xid, 0, flags, ciaddr, socket.inet_aton(address), server, giaddr),
        *(chaddr, b"", b""),
    )
    options = [
        (_TYPE, bytes([kind])),
        (_SERVER_ID, server),
        (_LEASE_TIME, struct.pack("!I", _LEASE)),
        (_MASK, struct.pack("!I", mask)),
        (_MTU, struct.pack("!H", int(wanted["mtu"]))),
        (_HOST_NAME, socket.gethostname().encode()),
    ]
    if wanted["router"]:
        options.append((_ROUTER, socket.inet_aton(str(wanted["router"]))))
    packed = b"".join(bytes([code, len(value)]) + value for code, value in options)
    return head + _COOKIE + packed + bytes([_END])


def serve(wanted: dict[str, str | int]) -> None:
    """Answer until killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        device = str(wanted["device"]).encode()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        server.bind(("", _SERVER_PORT))
        print(json.dumps({"type": "ready"}), flush=True)
        while True:
            request, (address, port) = server.recvfrom(4096)
            if len(request) < _FIXED.size + len(_COOKIE):
                continue
            fields = _FIXED.unpack_from(request)
            flags, mac = fields[6], fields[11][:6].hex(":")
            kind = _message_type(request[_FIXED.size + len(_COOKIE) :])
            print(json.dumps({"type": kind, "mac": mac, "from": address}), flush=True)
            answer = {_DISCOVER: _OFFER, _REQUEST: _ACK}.get(kind)
            if mac != wanted["mac"] or answer is None:
                continue
            if address == "0.0.0.0" or flags & _BROADCAST:  # noqa: S104 - of who has none yet
                address = "255.255.255.255"
            server.sendto(_answer(request, answer, wanted), (address, port))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
