"""Packing and reading of u32 filters, mirred actions and cls_bpf filters (linux/pkt_cls.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nearpath.kernel.netlink import attribute, attributes, number, text

# struct tc_u32_sel {u8 flags, offshift, nkeys, pad; __be16 offmask; u16 off; s16 offoff, hoff;
# __be32 hmask}, followed by struct tc_u32_key {__be32 mask, val; int off, offmask}
_SELECTOR, _KEY = struct.Struct("=BBBxHHhhI"), struct.Struct("=4s4sii")
_TERMINAL = 1  # TC_U32_TERMINAL: the result of a match is final
_U32_SELECTOR, _U32_ACTION = 5, 7
_ACT_KIND, _ACT_OPTIONS, _ACT_STATS = 1, 2, 4
# struct tc_mirred {u32 index, capab; int action, refcnt, bindcnt; int eaction; u32 ifindex}
_MIRRED, _MIRRED_PARAMETERS = struct.Struct("=IIiiiiI"), 2
_STOLEN, _EGRESS_REDIRECT = 4, 1  # TC_ACT_STOLEN, TCA_EGRESS_REDIR
_STATS_BASIC, _STATS_PACKETS = 1, 8  # TCA_STATS_BASIC {u64 bytes, u32 packets}, TCA_STATS_PKT64
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID = 6, 7, 8, 11
_BPF_DIRECT_ACTION = 1
_NESTED = 0x8000

# Where the frame's addresses are, from the network header, whence u32 counts.
_DESTINATION = -14

Key = tuple[int, bytes, bytes]  # offset from the network header, mask and value of four bytes


@dataclass(frozen=True)
class Rule:
    """A u32 filter.

    Attributes:
        keys: all must match; none: every frame does.
        target: ifindex that mirred redirects to; 0: the frame passes, and no filter after this
            one sees it. Of a rule that the kernel shows also if the target is gone.
        redirects: it has a mirred action.
        packets, bytes: that the action has taken; what the kernel shows.
    """

    keys: tuple[Key, ...]
    target: int = 0
    redirects: bool = False
    packets: int = 0
    bytes: int = 0


def to_address(address: bytes) -> tuple[Key, ...]:
    """Keys for frames to this MAC address."""
    return (
        (_DESTINATION, b"\xff\xff\xff\xff", address[:4]),
        (_DESTINATION + 4, b"\xff\xff\0\0", address[4:6] + b"\0\0"),
    )


def address_of(keys: tuple[Key, ...]) -> bytes:
    """The MAC address in the keys of to_address(); of others something meaningless."""
    return b"".join(value for _, _, value in keys)[:6]


def to_one() -> tuple[Key, ...]:
    """Keys for frames to one station: the group bit of the destination is not set."""
    return ((_DESTINATION, b"\x01\0\0\0", b"\0\0\0\0"),)


def pack(rule: Rule) -> bytes:
    """The options of a u32 filter."""
    selector = _SELECTOR.pack(_TERMINAL, 0, len(rule.keys), 0, 0, 0, 0, 0)
    selector += b"".join(_KEY.pack(mask, value, offset, 0) for offset, mask, value in rule.keys)
    options = attribute(_U32_SELECTOR, selector)
    if rule.redirects:
        mirred = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, rule.target)
        action = attribute(_ACT_KIND, b"mirred\0")
        action += attribute(_ACT_OPTIONS | _NESTED, attribute(_MIRRED_PARAMETERS, mirred))
        options += attribute(_U32_ACTION | _NESTED, attribute(1 | _NESTED, action))
    return options


def unpack(options: bytes) -> Rule | None:
    """A u32 filter as the kernel shows it; None: not one of our form."""
    known = attributes(options)
    selector = known.get(_U32_SELECTOR, b"")
    if len(selector) < _SELECTOR.size:
        return None
    flags, _, count, *_ = _SELECTOR.unpack_from(selector)
    if not flags & _TERMINAL or len(selector) < _SELECTOR.size + count * _KEY.size:
        return None
    keys = []
    for position in range(count):
        mask, value, offset, _ = _KEY.unpack_from(selector, _SELECTOR.size + position * _KEY.size)
        keys.append((offset, mask, value))
    action = attributes(attributes(known.get(_U32_ACTION, b"")).get(1, b""))
    if not action:
        return Rule(tuple(keys))
    mirred = attributes(action.get(_ACT_OPTIONS, b"")).get(_MIRRED_PARAMETERS, b"")
    if text(action.get(_ACT_KIND)) != "mirred" or len(mirred) < _MIRRED.size:
        return None
    *_, target = _MIRRED.unpack_from(mirred)
    packets, count_ = _statistics(attributes(action.get(_ACT_STATS, b"")))
    return Rule(tuple(keys), target, True, packets, count_)


def _statistics(found: dict[int, bytes]) -> tuple[int, int]:
    basic = found.get(_STATS_BASIC, b"")
    count, packets = struct.unpack_from("=QI", basic) if len(basic) >= 12 else (0, 0)
    # Since 5.5 beside the 32 bits of old.
    return number(found.get(_STATS_PACKETS)) or packets, count


def pack_bpf(program: int, name: str) -> bytes:
    """The options of a cls_bpf filter with direct action.

    Args:
        program: its descriptor.
        name: at most 255 bytes.
    """
    options = attribute(_BPF_FD, struct.pack("=I", program))
    options += attribute(_BPF_NAME, name.encode() + b"\0")
    return options + attribute(_BPF_FLAGS, struct.pack("=I", _BPF_DIRECT_ACTION))


def unpack_bpf(options: bytes) -> tuple[str, int]:
    """Name and program ID of a cls_bpf filter as the kernel shows it."""
    known = attributes(options)
    return text(known.get(_BPF_NAME)), number(known.get(_BPF_ID))
