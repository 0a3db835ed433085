"""JSON with the C half of the standard json package only.

``import json`` compiles regular expressions and so brings re, enum and collections: 6 ms,
more than half of what an ADD may cost. The C scanner and encoder below it do all the work
for the formats that we read and write.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"
_INFINITE = (float("inf"), float("-inf"))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in _INFINITE:
        raise ValueError("a number is too large")
    return value


class _Settings:
    """What the C scanner reads from its context object (Modules/_json.c, scanner_new)."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = staticmethod(_finite)
    parse_int = int
    parse_constant = staticmethod(_no_constant)


_scan = make_scanner(_Settings())  # type: ignore[arg-type]  # typeshed knows no context


def loads(text: str | bytes) -> Any:
    """Parse one JSON document; bytes are UTF-8 (RFC 8259).

    Raises:
        ValueError: not JSON (NaN, Infinity and 1e999 are not either), or not UTF-8.
        RecursionError: nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode()
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = _scan(text, start)
    except StopIteration as error:
        raise ValueError(f"no JSON value at character {error.value}") from None
    except SystemError:
        # Python 3.11's scanner has no exception to raise until this module is there.
        import json.decoder  # noqa: F401

        value, end = _scan(text, start)
    if text[end:].strip(_SPACE):
        raise ValueError(f"more than one JSON value: extra data at character {end}")
    return value


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} is not a JSON type")


def dumps(value: Any) -> str:
    """One line of ASCII JSON, keys in the order of the dictionaries.

    Raises:
        ValueError: a float that JSON cannot express, or a value that contains itself.
        TypeError: a value of another type than JSON's.
    """
    seen: dict[int, object] = {}  # finds values that contain themselves
    return "".join(
        make_encoder(seen, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)(
            value, 0
        )
    )
