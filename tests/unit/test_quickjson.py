"""nearpath.quickjson: the same JSON as the standard package's, and stricter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearpath import quickjson

SOURCES = Path(__file__).resolve().parents[2] / "cni-plugin"


def refuses(text: str | bytes) -> bool:
    """True if the parser raises ValueError, and no other error."""
    try:
        quickjson.loads(text)
    except ValueError:
        return True
    return False


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_agrees_with_json(value: object) -> None:
    text = quickjson.dumps(value)
    assert text == json.dumps(value, separators=(",", ":"))
    assert quickjson.loads(text) == value
    assert quickjson.loads(json.dumps(value, indent=2).encode()) == value


@given(st.text(alphabet='{}[]",:0123456789.eE+-ntrufalse\\ \n') | st.text())
def test_refuses_what_json_refuses(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=pytest.fail)
    except (ValueError, pytest.fail.Exception):
        assert refuses(text)
        return
    if isinstance(expected, float) and math.isinf(expected):
        return
    assert quickjson.loads(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "NaN", "[Infinity]", "-Infinity", "1e999", "[-1e999]", "{} {}", "\ufeff{}", '"\n"'],
)
def test_is_strict(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", ["{", '{"a"}', '["', '"\\u12', "[1,]", "nul"])
def test_refuses_without_the_json_package(text: str) -> None:
    """The plugin has not loaded json when it meets a broken document."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCES)!r})\n"
        "from nearpath import quickjson\n"
        "assert 'json' not in sys.modules\n"
        f"try: quickjson.loads({text!r})\n"
        "except ValueError: sys.exit(42)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, timeout=30)
    assert done.returncode == 42


def test_bytes_are_utf8() -> None:
    assert quickjson.loads('"é"'.encode()) == "é"
    assert refuses(b'"\xff"')
    assert refuses("{}".encode("utf-16"))


def test_depth_is_limited() -> None:
    with pytest.raises(RecursionError):
        quickjson.loads("[" * 100_000)


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_writes_no_constants(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        quickjson.dumps(value)


def test_writes_json_types_only() -> None:
    with pytest.raises(TypeError, match="set is not a JSON type"):
        quickjson.dumps({"a": {1}})
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        quickjson.dumps(loop)
