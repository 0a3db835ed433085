"""Hostile requests, and what every answer to them must be like.

Shared by the fuzz tests of the plugin in process and of the frozen one.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_TRAVERSAL = ("..", "../../x", "/etc/passwd", "a/../../b", "..%2f..", "a\n", "-", ".x", "\\", "~x")
_NETNS = (
    "",
    "/",
    "/nonexistent",
    "/proc/self/ns/net",
    "/proc/self/ns/mnt",
    "/dev/null",
    "relative",
)

# Everything that the kernel lets into an environment, invalid UTF-8 too; short more often.
_env_text = (
    st.binary(min_size=0, max_size=40)
    .map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
    .filter(lambda text: "\0" not in text)
)
_any_text = st.text(st.characters(), max_size=20)  # lone surrogates too
_leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()  # NaN and infinities come out as invalid JSON
    | _any_text
    | st.sampled_from(("on", "off", "true", "", "kube-system", "1.0.0", "error"))
)
_anything = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_any_text, inner, max_size=4),
    max_leaves=12,
)


_address = st.sampled_from(("10.1.2.3/24", "fd00::1/64", "10.1.2.3", "x", "::/0")) | _any_text
_annotations = st.dictionaries(
    st.sampled_from(("nearpath.io/socket-lane", "nearpath.io/", "nearpath.io/x", "a/b"))
    | _any_text,
    st.sampled_from(("on", "off")) | _leaf,
    max_size=4,
)
# For each key: good values, and values of about the right shape. Anything else comes too.
_KEYS: dict[str, SearchStrategy[Any]] = {
    "cniVersion": st.sampled_from((*_VERSIONS, "9.9.9", "1", "")),
    "name": st.sampled_from(("k8s-pod-network", "-", "a/b", "")),
    "type": _any_text,
    "required": st.booleans(),
    "socketLane": st.sampled_from(("on", "off", "ON")),
    "excludeNamespaces": st.lists(st.sampled_from(("shop", "kube-system", "")) | _leaf, max_size=3),
    # At least the shortest default: a slow machine must not look like a bug.
    "timeoutSeconds": st.integers(5, 60),
    "logLevel": st.sampled_from(("info", "warning", "error", "debug")),
    "runtimeConfig": st.fixed_dictionaries(
        {}, optional={"io.kubernetes.cri.pod-annotations": _annotations | _leaf}
    ),
    "cni.dev/valid-attachments": st.lists(
        st.fixed_dictionaries(
            {}, optional={"containerID": st.just("c1") | _leaf, "ifname": st.just("eth0") | _leaf}
        ),
        max_size=3,
    ),
    "capabilities": _anything,
    "unknown": _anything,
}
_RESULT_KEYS: dict[str, SearchStrategy[Any]] = {
    "cniVersion": st.sampled_from((*_VERSIONS, "9.9.9", "")),
    "interfaces": st.lists(
        st.fixed_dictionaries(
            {}, optional={"name": st.just("eth0") | _leaf, "sandbox": _leaf, "mtu": _leaf}
        ),
        max_size=3,
    ),
    "ips": st.lists(
        st.fixed_dictionaries({"address": _address}, optional={"interface": _leaf}), max_size=3
    ),
    "routes": st.lists(st.dictionaries(_any_text, _leaf, max_size=2), max_size=2),
    "dns": st.dictionaries(_any_text, _leaf, max_size=2),
    "ip4": st.fixed_dictionaries({"ip": _address}),
    "x-else": _anything,
}
_VARIABLES: dict[str, SearchStrategy[str]] = {
    "CNI_COMMAND": st.sampled_from((*COMMANDS, "BOGUS")),
    "CNI_CONTAINERID": st.sampled_from(("c2", "a" * 300, "c.json", *_TRAVERSAL)),
    "CNI_IFNAME": st.sampled_from(("net1", "a" * 16, "é" * 7, "@", *_TRAVERSAL)),
    "CNI_NETNS": st.sampled_from(_NETNS),
    "CNI_ARGS": st.sampled_from(("", ";", "=", "K8S_POD_NAME=../x", "K8S_POD_NAME=\x1b[31m\n")),
    "CNI_PATH": st.just("/opt/cni/bin"),
    "CNI_NETNS_OVERRIDE": st.sampled_from(("1", "0", "TRUE", "x")),
}
_BOMBS = (b"[" * 100_000, b'{"a":' * 50_000, b"", b"\0", b"{}", b"9" * 10_000)


class Hostile:
    """One request.

    Attributes:
        environ: CNI variables.
        stdin: what the plugin reads.
    """

    def __init__(self, environ: dict[str, str], stdin: bytes) -> None:
        self.environ = environ
        self.stdin = stdin

    def __repr__(self) -> str:
        return f"Hostile({self.environ!r}, {self.stdin[:2000]!r})"


def _spoil(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut a piece out of some bytes, or overwrite it."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 20)))
    return data[:start] + draw(st.binary(max_size=8)) + data[end:]


def _attack_environment(draw: st.DrawFn, environ: dict[str, str]) -> None:
    name = draw(st.sampled_from(sorted(_VARIABLES)))
    if name != "CNI_COMMAND" and draw(st.integers(0, 3)) == 0:
        environ.pop(name, None)
    elif name != "CNI_COMMAND" and draw(st.booleans()):
        environ[name] = draw(_env_text)
    else:
        environ[name] = draw(_VARIABLES[name])


def _attack_object(
    draw: st.DrawFn, target: dict[str, Any], keys: dict[str, SearchStrategy[Any]]
) -> None:
    name = draw(st.sampled_from(sorted(keys)))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        target.pop(name, None)
    elif kind == 1 and name != "timeoutSeconds":
        target[name] = draw(_anything)
    else:
        target[name] = draw(keys[name])


@st.composite
def requests(draw: st.DrawFn, netns: str) -> Hostile:
    """A valid request with up to four things changed; ``netns`` is a namespace that exists.

    One spoilt thing at a time gets past the checks before it: entirely random requests
    would all fail at the first.
    """
    environ = {
        "CNI_COMMAND": draw(st.sampled_from(("ADD", "ADD", "ADD", *COMMANDS))),
        "CNI_CONTAINERID": "c1",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": netns,
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u",
    }
    config: dict[str, Any] = {
        "cniVersion": "1.1.0",
        "name": "net",
        "type": "nearpath",
        "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.2.3/24"}]},
    }
    stdin = b""
    for attack in draw(
        st.lists(st.sampled_from(("env", "key", "key", "result", "bytes")), max_size=4)
    ):
        if attack == "env":
            _attack_environment(draw, environ)
        elif attack == "key":
            _attack_object(draw, config, {**_KEYS, "prevResult": _anything})
        elif attack == "result" and isinstance(config.get("prevResult"), dict):
            _attack_object(draw, config["prevResult"], _RESULT_KEYS)
        elif attack == "bytes" and not stdin:
            kind = draw(st.integers(0, 3))
            stdin = (
                draw(st.binary(max_size=200) | st.sampled_from(_BOMBS))
                if kind == 0
                else _spoil(draw, json.dumps(config).encode())
            )
    return Hostile(environ, stdin or json.dumps(config).encode())


def _strict(text: str) -> Any:
    """JSON, without the NaN that Python would take."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def check_answer(request: Hostile, code: int, stdout: bytes) -> None:
    """Hold what is true of every answer.

    Exit code 0 or 1. With 1 stdout is one CNI error object. With 0 stdout is prevResult
    after ADD, the versions after VERSION, and empty after anything else.
    """
    assert code in {0, 1}
    text = stdout.decode("ascii")
    assert "Traceback" not in text
    command = request.environ["CNI_COMMAND"]
    if code == 1:
        answer = _strict(text)
        assert set(answer) <= {"cniVersion", "code", "msg", "details"}
        assert isinstance(answer["code"], int)
        assert 0 < answer["code"] < 2**31
        assert answer["cniVersion"] in _VERSIONS
        assert isinstance(answer["msg"], str)
        assert answer["msg"]
        assert text.count("\n") == 1
        assert len(text) < 12_000
    elif command == "ADD":
        config = _strict(request.stdin.decode())
        expected = config["prevResult"]
        if not expected.get("cniVersion"):
            expected["cniVersion"] = config.get("cniVersion") or "0.1.0"
        assert _strict(text) == expected
    elif command == "VERSION":
        assert _strict(text)["supportedVersions"] == list(_VERSIONS)
    else:
        assert text == ""
