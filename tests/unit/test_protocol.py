"""The wire protocol in memory: every check of the reference, its codes and its messages."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from nearpath.cni import protocol
from nearpath.cni.protocol import CniError
from nearpath.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from nearpath.cni.protocol import Request

ENVIRON = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "abc123",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
}
CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "nearpath"}
EVERY = ("ADD", "CHECK", "DEL", "GC", "STATUS")


class Seen:
    """A handler for every command that keeps the requests that it gets."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> bytes:
        self.requests.append(request)
        return b"{}\n"


def send(
    stdin: bytes | dict[str, Any] = CONFIG,
    handler: Callable[[Request], bytes] | None = None,
    **changes: str | None,
) -> tuple[int, dict[str, Any] | None]:
    """Dispatch one request with the environment changed (None: unset); code and answer."""
    changed = {**ENVIRON, **changes}
    environ = {key: value for key, value in changed.items() if value is not None}
    data = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode()
    handlers = dict.fromkeys(EVERY, handler or Seen())
    code, answer = protocol.dispatch(environ, io.BytesIO(data).read, handlers)
    assert code in {0, 1}
    return code, json.loads(answer) if answer else None


def refused(
    stdin: bytes | dict[str, Any] = CONFIG,
    handler: Callable[[Request], bytes] | None = None,
    **changes: str | None,
) -> tuple[int, str]:
    """Dispatch a request that must fail; CNI error code and message."""
    code, answer = send(stdin, handler, **changes)
    assert code == 1
    assert answer is not None
    assert set(answer) <= {"cniVersion", "code", "msg", "details"}
    assert isinstance(answer["code"], int)
    assert "Traceback" not in json.dumps(answer)
    return answer["code"], answer["msg"]


@pytest.mark.parametrize("command", EVERY)
def test_handler_gets_the_request(command: str) -> None:
    """A valid request reaches the handler of its command with everything in it."""
    seen = Seen()
    code, _ = send(CONFIG, seen, CNI_COMMAND=command, CNI_ARGS="K=V", CNI_NETNS_OVERRIDE="TRUE")
    assert code == 0
    (request,) = seen.requests
    assert request.command == command
    assert (request.container_id, request.ifname) == ("abc123", "eth0")
    assert (request.netns, request.args) == ("/run/netns/a", "K=V")
    assert request.override
    assert (request.network, request.version, request.config) == ("net", "1.1.0", CONFIG)


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ],
)
def test_missing_variables_are_named(command: str, required: list[str]) -> None:
    """Unset or empty required variables give error 4, which names all of them."""
    for names in (required, *([name] for name in required)):
        unset: dict[str, Any] = dict.fromkeys(names)
        empty: dict[str, Any] = dict.fromkeys(names, "")
        expected = 4, f"required env variables [{','.join(names)}] missing"
        assert refused(CNI_COMMAND=command, **unset) == expected
        assert refused(CNI_COMMAND=command, **empty) == expected


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_node_commands_need_no_attachment(command: str) -> None:
    """GC and STATUS need none of the attachment's variables, and do not validate them."""
    unset: dict[str, Any] = {"CNI_CONTAINERID": None, "CNI_NETNS": None, "CNI_IFNAME": "../x"}
    assert send(CNI_COMMAND=command, **unset)[0] == 0


def test_del_without_netns() -> None:
    """DEL works with CNI_NETNS unset and with it empty, as containerd sends it."""
    assert send(CNI_COMMAND="DEL", CNI_NETNS=None)[0] == 0
    assert send(CNI_COMMAND="DEL", CNI_NETNS="")[0] == 0


def test_cni_path_is_optional() -> None:
    """CNI_PATH is not required: the specification calls it optional."""
    assert send(CNI_PATH=None)[0] == 0


def test_no_command() -> None:
    """Without CNI_COMMAND (main.py then starts the CLI instead) the request is refused."""
    assert refused(CNI_COMMAND=None) == (4, "required env variables [CNI_COMMAND] missing")


@pytest.mark.parametrize("command", ["BOGUS", "add", "ADD ", "\udcff"])
def test_unknown_command(command: str) -> None:
    """An unknown command gives error 4, and stdin is not even read."""

    def never(_size: int) -> bytes:
        raise AssertionError

    environ = {**ENVIRON, "CNI_COMMAND": command}
    code, answer = protocol.dispatch(environ, never, {})
    error = json.loads(answer)
    assert (code, error["code"]) == (1, 4)
    assert error["msg"].startswith("unknown CNI_COMMAND: ")


@pytest.mark.parametrize(
    "container_id",
    ["../../etc", "a/b", "-a", ".a", "_a", "a b", "a\n", "é", "\udcff", "a:b", "a\0"],
)
def test_container_id_characters(container_id: str) -> None:
    """A containerID that could leave a directory or is no plain name gives error 4."""
    for command in ("ADD", "CHECK", "DEL"):
        assert refused(CNI_COMMAND=command, CNI_CONTAINERID=container_id) == (
            4,
            "invalid characters in containerID",
        )


@pytest.mark.parametrize("container_id", ["a", "0", "a-b_c.d", "A" * 4096])
def test_valid_container_ids(container_id: str) -> None:
    """All that the specification allows passes, of any length."""
    assert send(CNI_CONTAINERID=container_id)[0] == 0


@pytest.mark.parametrize(
    ("ifname", "message"),
    [
        ("a" * 16, "interface name is too long"),
        ("é" * 8, "interface name is too long"),
        (".", "interface name is . or .."),
        ("..", "interface name is . or .."),
        ("a/b", "interface name contains / or : or whitespace characters"),
        ("a:b", "interface name contains / or : or whitespace characters"),
        ("a b", "interface name contains / or : or whitespace characters"),
        ("a\tb", "interface name contains / or : or whitespace characters"),
        ("a\u2003b", "interface name contains / or : or whitespace characters"),
    ],
)
def test_interface_name(ifname: str, message: str) -> None:
    """An interface name that the kernel would refuse gives error 4."""
    for command in ("ADD", "CHECK", "DEL"):
        assert refused(CNI_COMMAND=command, CNI_IFNAME=ifname) == (4, message)


@pytest.mark.parametrize("ifname", ["a", "a" * 15, "é" * 7, "\udcff", "...", "eth0@if3"])
def test_valid_interface_names(ifname: str) -> None:
    """Whatever else the kernel takes for a name passes; the limit is 15 bytes."""
    assert send(CNI_IFNAME=ifname)[0] == 0


def test_invalid_before_missing() -> None:
    """As in the reference, the first invalid variable is reported before missing ones."""
    assert refused(CNI_CONTAINERID="!", CNI_IFNAME=None)[1] == "invalid characters in containerID"


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        b" ",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"1",
        b"{} {}",
        b'{"name": "\xff"}',
        b"\xef\xbb\xbf{}",
        '{"name": "net"}'.encode("utf-16"),
        b'{"name": "net", "x": NaN}',
        b'{"name": "net", "x": -Infinity}',
        b'{"name": "net", "x": 1e999}',
        b'{"name": "net", "x": ' + b"1" * 5000 + b"}",
        b'{"name": "net", "x": ' + b"[" * 200000 + b"]" * 200000 + b"}",
        b'{"name": "net", "x": ' + b'{"a":' * 100000 + b"1" + b"}" * 100000 + b"}",
        b'{"name": 1}',
        b'{"name": ["net"]}',
        b'{"name": "net", "cniVersion": 1.0}',
        b'{"name": "a\nb"}',
    ],
)
def test_undecodable_configuration(stdin: bytes) -> None:
    """What is not one strict JSON object with a string name gives error 6."""
    code, message = refused(stdin)
    assert code == 6
    assert message.startswith("error unmarshall network config: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "missing network name"),
        ("", "missing network name"),
        ("-x", "invalid characters found in network name"),
        ("a/b", "invalid characters found in network name"),
        ("é", "invalid characters found in network name"),
        ("\ud800", "invalid characters found in network name"),
    ],
)
def test_network_name(name: str | None, message: str) -> None:
    """A missing or strange network name gives error 7."""
    assert refused({**CONFIG, "name": name}) == (7, message)
    if name is None:
        assert refused({"cniVersion": "1.0.0"}) == (7, message)


def test_last_of_equal_keys_counts() -> None:
    """Of equal keys the last one counts, as for Go's decoder."""
    seen = Seen()
    assert send(b'{"name": "one", "name": "two"}', seen)[0] == 0
    assert seen.requests[0].network == "two"


@pytest.mark.parametrize("version", protocol.SUPPORTED)
def test_supported_versions(version: str) -> None:
    """Every supported cniVersion is accepted by ADD and DEL, and known to the handler."""
    for command in ("ADD", "DEL"):
        seen = Seen()
        assert send({**CONFIG, "cniVersion": version}, seen, CNI_COMMAND=command)[0] == 0
        assert seen.requests[0].version == version


def test_missing_version_is_the_first_one() -> None:
    """A configuration without cniVersion is one of version 0.1.0."""
    for config in ({"name": "net"}, {"name": "net", "cniVersion": ""}):
        seen = Seen()
        assert send(config, seen)[0] == 0
        assert seen.requests[0].version == "0.1.0"


@pytest.mark.parametrize("version", ["9.9.9", "1.1", "v1.0.0", "x", "1.0.0 ", "٣.0.0", "1.0.0.0"])
def test_unsupported_version(version: str) -> None:
    """A version that is unknown or none at all gives error 1 with the supported ones."""
    for command in ("ADD", "DEL"):
        code, answer = send({**CONFIG, "cniVersion": version}, CNI_COMMAND=command)
        assert code == 1
        assert answer is not None
        assert (answer["code"], answer["msg"]) == (1, "incompatible CNI versions")
        assert '"0.3.1"' in answer["details"]
        assert answer["cniVersion"] == "1.1.0"


@pytest.mark.parametrize(
    ("command", "too_old", "oldest"),
    [("CHECK", "0.3.1", "0.4.0"), ("GC", "1.0.0", "1.1.0"), ("STATUS", "1.0.0", "1.1.0")],
)
def test_commands_have_a_first_version(command: str, too_old: str, oldest: str) -> None:
    """CHECK needs a configuration of 0.4.0, GC and STATUS one of 1.1.0."""
    assert refused({**CONFIG, "cniVersion": too_old}, CNI_COMMAND=command) == (
        1,
        f"config version does not allow {command}",
    )
    assert refused({"name": "net"}, CNI_COMMAND=command)[0] == 1
    assert send({**CONFIG, "cniVersion": oldest}, CNI_COMMAND=command)[0] == 0
    assert refused({**CONFIG, "cniVersion": "2.0.0"}, CNI_COMMAND=command) == (
        1,
        f"plugin version does not allow {command}",
    )
    assert refused({**CONFIG, "cniVersion": "x"}, CNI_COMMAND=command)[0] == 1


@pytest.mark.parametrize("stdin", [b"", b"garbage", b'{"cniVersion": "9.9.9"}', b"\xff" * 100])
def test_version_tolerates_everything(stdin: bytes) -> None:
    """VERSION answers whatever the environment and stdin hold."""
    code, answer = send(
        stdin, CNI_COMMAND="VERSION", CNI_CONTAINERID="../x", CNI_NETNS="dummy", CNI_IFNAME=None
    )
    assert code == 0
    assert answer == {"cniVersion": "1.1.0", "supportedVersions": list(protocol.SUPPORTED)}


def test_error_carries_the_version_of_the_request() -> None:
    """An error object has the request's cniVersion once that is known to be supported."""

    def fail(_request: Request) -> bytes:
        raise CniError(42, "message", "details")

    code, answer = send({**CONFIG, "cniVersion": "0.4.0"}, fail)
    assert code == 1
    assert answer == {"cniVersion": "0.4.0", "code": 42, "msg": "message", "details": "details"}
    code, answer = send({"cniVersion": "0.4.0", "name": "/"})
    assert answer is not None
    assert answer["cniVersion"] == "0.4.0"
    code, answer = send(b"")
    assert answer is not None
    assert answer["cniVersion"] == "1.1.0"


@pytest.mark.parametrize(
    "error", [RuntimeError("password=hunter2"), KeyboardInterrupt(), MemoryError(), SystemExit(3)]
)
def test_bug_in_a_handler(error: BaseException) -> None:
    """Whatever escapes a handler becomes error 999 that says its type and no more."""

    def fail(_request: Request) -> bytes:
        raise error

    assert refused(CONFIG, fail) == (999, f"internal error ({type(error).__name__})")


def test_deadline_in_a_handler() -> None:
    """A deadline that the handler does not deal with is error 11, try again later."""

    def fail(_request: Request) -> bytes:
        raise DeadlineExceeded("the command's deadline of 5 s passed")

    assert refused(CONFIG, fail) == (11, "the command's deadline of 5 s passed")


def test_stdin_that_fails() -> None:
    """Errors of reading stdin, and its end not coming, are error 5."""

    def broken(_size: int) -> bytes:
        raise OSError(5, os.strerror(5))

    def endless(_size: int) -> bytes:
        raise DeadlineExceeded("the command's deadline of 5 s passed")

    for read, text in ((broken, os.strerror(5)), (endless, "no end of input in time")):
        code, answer = protocol.dispatch(ENVIRON, read, {})
        error = json.loads(answer)
        assert (code, error["code"]) == (1, 5)
        assert error["msg"] == f"error reading from stdin: {text}"


def test_stdin_has_a_limit() -> None:
    """More than 4 MiB on stdin is refused before all of it is in memory."""
    read = 0

    def flood(size: int) -> bytes:
        nonlocal read
        read += size
        return b" " * size

    code, answer = protocol.dispatch(ENVIRON, flood, {})
    assert (code, json.loads(answer)["code"]) == (1, 5)
    assert read < protocol.STDIN_LIMIT + 2 * 65536


def test_stdin_in_small_pieces() -> None:
    """A request that arrives byte by byte is read whole."""
    source = io.BytesIO(json.dumps(CONFIG).encode())
    seen = Seen()
    code, _ = protocol.dispatch(ENVIRON, lambda _size: source.read(1), {"ADD": seen})
    assert code == 0
    assert seen.requests[0].config == CONFIG


@pytest.mark.parametrize(
    ("value", "allowed"),
    [("TRUE", True), ("true", True), ("1", True), ("0", False), ("yes", False), ("", False)],
)
def test_netns_override(value: str, allowed: bool) -> None:
    """CNI_NETNS_OVERRIDE is read as the reference does."""
    seen = Seen()
    send(CONFIG, seen, CNI_NETNS_OVERRIDE=value)
    assert seen.requests[0].override is allowed


def test_answers_are_ascii() -> None:
    """Foreign text, invalid UTF-8 of the environment too, comes out as valid ASCII JSON."""
    environ = {**ENVIRON, "CNI_CONTAINERID": "\udcff\u2028<\x1b[31m"}
    _, answer = protocol.dispatch(environ, io.BytesIO(b"").read, {})
    assert json.loads(answer.decode("ascii"))["code"] == 4
    assert b"\x1b" not in answer


def test_long_texts_are_cut() -> None:
    """Foreign text in an error is cut: nobody can make the runtime log megabytes."""
    _, answer = protocol.dispatch(
        {**ENVIRON, "CNI_CONTAINERID": "/" * 100_000}, io.BytesIO(b"").read, {}
    )
    assert len(answer) < 500
