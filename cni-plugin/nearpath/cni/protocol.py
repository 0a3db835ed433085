"""The CNI wire protocol, and nothing of what nearpath does.

A request is environment variables plus one JSON object on stdin; the answer is one JSON
object or nothing on stdout, and the exit code. Checks, codes and messages are those of
the reference implementation's `pkg/skel`, with three exceptions: CNI_PATH is not required
(the specification calls it optional), an unknown command is refused before stdin is read,
and the check that CNI_NETNS is not the plugin's own namespace belongs to the handlers,
for it must come before ADD touches anything.
"""

from __future__ import annotations

import os

from nearpath import quickjson
from nearpath.errors import DeadlineExceeded, NearpathError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Error codes: SPEC.md "Error" and pkg/types/types.go.
INCOMPATIBLE_VERSION = 1
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
INVALID_NETNS = 8
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
INTERNAL = 999

SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = SUPPORTED[-1]

# What each command requires, and the specification version that introduced it.
_ATTACHMENT = ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ADD": (_ATTACHMENT, (0, 1, 0)),
    "CHECK": (_ATTACHMENT, (0, 4, 0)),
    "DEL": (("CNI_CONTAINERID", "CNI_IFNAME"), (0, 1, 0)),
    "GC": ((), (1, 1, 0)),
    "STATUS": ((), (1, 1, 0)),
    "VERSION": ((), (0, 1, 0)),
}

# Annotations are at most 256 KiB per pod and may grow sixfold in JSON escapes.
STDIN_LIMIT = 4 * 1024 * 1024
_TEXT_LIMIT = 1000
_IFNAME_LIMIT = 15  # IFNAMSIZ - 1

_ALPHANUMERIC = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
NAME = _ALPHANUMERIC | frozenset("_.-")
# Not in an interface name: the separators, and Unicode's White_Space as Go knows it.
_NOT_IN_IFNAME = frozenset(
    "/:\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)


class CniError(NearpathError):
    """An error to be printed as a CNI error object.

    Args:
        code: one of the constants above, or 100 and more for our own.
        message: short text, ``msg`` on the wire.
        details: longer text, may be empty.
    """

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


class Request:
    """One validated request.

    Attributes:
        command: a key of COMMANDS.
        container_id, netns, ifname, args: CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS;
            empty when not given. May hold surrogate escapes (os.fsencode gives the bytes).
        override: CNI_NETNS_OVERRIDE allows CNI_NETNS to be the plugin's own namespace.
        config: the network configuration.
        network: its name.
        version: its cniVersion, one of SUPPORTED.
    """

    __slots__ = (
        "args",
        "command",
        "config",
        "container_id",
        "ifname",
        "netns",
        "network",
        "override",
        "version",
    )

    def __init__(self, command: str, environ: Mapping[str, str]) -> None:
        self.command = command
        self.container_id = environ.get("CNI_CONTAINERID", "")
        self.netns = environ.get("CNI_NETNS", "")
        self.ifname = environ.get("CNI_IFNAME", "")
        self.args = environ.get("CNI_ARGS", "")
        override = environ.get("CNI_NETNS_OVERRIDE", "")
        self.override = override == "1" or override.upper() == "TRUE"
        self.config: dict[str, Any] = {}
        self.network = ""
        self.version = NEWEST


def quote(text: str) -> str:
    """Foreign text for a message: quoted, printable ASCII, at most about 100 characters."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


def encode(value: object) -> bytes:
    """JSON text in ASCII, so that lone surrogates and odd locales cannot spoil it."""
    return quickjson.dumps(value).encode("ascii") + b"\n"


def encode_error(error: CniError, version: str) -> bytes:
    """The CNI error object."""
    answer = {
        "cniVersion": version if version in SUPPORTED else NEWEST,
        "code": error.code,
        "msg": error.message[:_TEXT_LIMIT],
    }
    if error.details:
        answer["details"] = error.details[:_TEXT_LIMIT]
    return encode(answer)


def _valid_name(text: str) -> bool:
    return text[:1] in _ALPHANUMERIC and NAME.issuperset(text) if text else False


def _check_container_id(text: str) -> None:
    if not _valid_name(text):
        raise CniError(INVALID_ENVIRONMENT, "invalid characters in containerID", quote(text))


def _check_ifname(text: str) -> None:
    problem = ""
    details = ""
    if len(os.fsencode(text)) > _IFNAME_LIMIT:
        problem = "interface name is too long"
        details = f"interface name should be less than {_IFNAME_LIMIT + 1} characters"
    elif text in {".", ".."}:
        problem = "interface name is . or .."
    elif not _NOT_IN_IFNAME.isdisjoint(text):
        problem = "interface name contains / or : or whitespace characters"
    if problem:
        raise CniError(INVALID_ENVIRONMENT, problem, details)


def _check_environment(environ: Mapping[str, str]) -> Request:
    """Check what the command requires.

    Raises:
        CniError: INVALID_ENVIRONMENT.
    """
    command = environ.get("CNI_COMMAND", "")
    if command and command not in COMMANDS:
        raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {quote(command)}")
    required = COMMANDS[command][0] if command else ("CNI_COMMAND",)
    missing = []
    for name in required:
        value = environ.get(name, "")
        if not value:
            missing.append(name)
        elif name == "CNI_CONTAINERID":
            _check_container_id(value)
        elif name == "CNI_IFNAME":
            _check_ifname(value)
    if missing:
        names = ",".join(missing)
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{names}] missing")
    return Request(command, environ)


def _read_all(read: Callable[[int], bytes]) -> bytes:
    """Everything up to end of file.

    Raises:
        CniError: IO_FAILURE; also for more than STDIN_LIMIT, or no end before the deadline.
    """
    chunks = []
    size = 0
    try:
        while chunk := read(65536):
            chunks.append(chunk)
            size += len(chunk)
            if size > STDIN_LIMIT:
                raise CniError(
                    IO_FAILURE, f"error reading from stdin: more than {STDIN_LIMIT} bytes"
                )
    except DeadlineExceeded as error:
        raise CniError(
            IO_FAILURE, "error reading from stdin: no end of input in time", error.message
        ) from error
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else "closed"
        raise CniError(IO_FAILURE, f"error reading from stdin: {text}") from error
    return b"".join(chunks)


def decode(data: bytes) -> dict[str, Any]:
    """One JSON object, strictly: UTF-8, no NaN; of equal keys the last one counts.

    Raises:
        CniError: DECODING_FAILURE.
    """
    try:
        value = quickjson.loads(data)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # the text holds positions, not content
        problem = str(error)
    else:
        if isinstance(value, dict):
            return value
        problem = "not a JSON object"
    raise CniError(DECODING_FAILURE, f"error unmarshall network config: {problem}")


def _string(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CniError(DECODING_FAILURE, f"error unmarshall network config: {key} is not a string")
    return value


def _parse_version(text: str) -> tuple[int, ...] | None:
    """``major.minor.patch`` as numbers; None if it is not of that form."""
    parts = text.split(".")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
        return None
    return tuple(int(part) for part in parts)


def _check_version(command: str, version: str) -> None:
    number = _parse_version(version)
    since = COMMANDS[command][1]
    if number is not None:
        if number < since:
            raise CniError(INCOMPATIBLE_VERSION, f"config version does not allow {command}")
        if since > (0, 1, 0) and number > (_parse_version(NEWEST) or ()):
            raise CniError(INCOMPATIBLE_VERSION, f"plugin version does not allow {command}")
    if version not in SUPPORTED:
        known = " ".join(f'"{supported}"' for supported in SUPPORTED)
        raise CniError(
            INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f"config is {quote(version)}, plugin supports [{known}]",
        )


def _receive(request: Request, read: Callable[[int], bytes]) -> None:
    """Read the network configuration of a request and validate it.

    Raises:
        CniError: it is malformed, or not for this version of the specification.
    """
    config = decode(_read_all(read))
    request.config = config
    request.network = _string(config, "name")
    version = _string(config, "cniVersion") or "0.1.0"
    if version in SUPPORTED:
        request.version = version
    if not request.network:
        raise CniError(INVALID_CONFIG, "missing network name")
    if not _valid_name(request.network):
        raise CniError(
            INVALID_CONFIG, "invalid characters found in network name", quote(request.network)
        )
    _check_version(request.command, version)


def dispatch(
    environ: Mapping[str, str],
    read: Callable[[int], bytes],
    handlers: Mapping[str, Callable[[Request], bytes]],
) -> tuple[int, bytes]:
    """Serve one request; never raises.

    Args:
        environ: the environment variables of the request.
        read: returns up to that many bytes of stdin, and nothing at its end.
        handlers: what to do for each key of COMMANDS but VERSION. Returns what is to be
            printed, may raise anything; a CniError reaches the runtime as it is.

    Returns:
        The exit code, and the bytes for stdout.
    """
    version = NEWEST
    try:
        request = _check_environment(environ)
        if request.command == "VERSION":  # whatever stdin holds
            return 0, encode({"cniVersion": NEWEST, "supportedVersions": list(SUPPORTED)})
        try:
            _receive(request, read)
        finally:
            version = request.version
        return 0, handlers[request.command](request)
    except CniError as error:
        return 1, encode_error(error, version)
    except DeadlineExceeded as error:
        return 1, encode_error(CniError(TRY_AGAIN_LATER, error.message), version)
    except BaseException as error:
        # The edge: whatever it is, stdout stays JSON. It gets the type alone: the text may
        # hold anything, a secret of the configuration too.
        return 1, encode_error(
            CniError(INTERNAL, f"internal error ({type(error).__name__})"), version
        )
