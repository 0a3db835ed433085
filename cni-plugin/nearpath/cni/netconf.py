"""Our entry in the network configuration list, and the choice made from it.

From coarse to fine: conflist keys, then the pod's annotations. The narrower wins, but a
pod cannot override ``required`` or ``excludeNamespaces``. conf/README.md documents keys and
annotations for operators.
"""

from __future__ import annotations

from nearpath.cni.identity import CHECKSUM, SOCKET_LANE, TAP_LANE, own_annotations
from nearpath.cni.protocol import INVALID_CONFIG, CniError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TIMEOUT_STDIN = 10.0  # seconds until the runtime has written all of the configuration
TIMEOUT_ADD = 5.0  # seconds from then on
TIMEOUT = 2.0  # seconds, every other command
_TIMEOUT_RANGE = (0.5, 60.0)
# Those of datapath/sizes.py, which an ADD need not import.
_CONNECTIONS_RANGE = (1024, 1 << 20)
_LEVELS = ("info", "warning", "error")
# How a virtual machine's frames pass its pod (lanes/tap.py), and what happens to checksums
# (lanes/checksum.py); the first is the default.
TAP_MODES = ("mirror", "redirect", "peer", "off")
CHECKSUM_MODES = ("skip", "software", "keep")

# Keys that the specification and libcni put beside ours; everything under cni.dev/ too.
_CNI_KEYS = frozenset(
    {
        "args",
        "capabilities",
        "cniVersion",
        "dns",
        "ipam",
        "name",
        "prevResult",
        "runtimeConfig",
        "type",
    }
)
_TYPES = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "a string",
    type(None): "null",
}


class NetConf:
    """Our keys of one network configuration, checked.

    Attributes:
        required: an internal failure fails ADD instead of leaving the pod on the kernel path.
        socket_lane: the default for pods that say nothing.
        tap_lane, checksum: likewise for virtual machines' pods, of TAP_MODES and CHECKSUM_MODES;
            checksum is empty if the configuration says nothing.
        guards: pods take the lane only under guard, unless they ask for it themselves.
        most_connections: that the maps are to hold when they are made; 0: by memory.
        exclude_namespaces: Kubernetes namespaces whose pods are left alone.
        timeout: deadline of the command in seconds, or None for the default.
        log_level: the least severe level that is logged.
        annotations: the pod's nearpath.io/ annotations.
        problems: keys of ours with an unusable value, each as one line of text.
        warnings: other things that an operator should know, each as one line of text.
    """

    __slots__ = (
        "annotations",
        "checksum",
        "exclude_namespaces",
        "guards",
        "log_level",
        "most_connections",
        "problems",
        "required",
        "socket_lane",
        "tap_lane",
        "timeout",
        "warnings",
    )

    def __init__(self) -> None:
        self.required = False
        self.socket_lane = True
        self.tap_lane = TAP_MODES[0]
        self.checksum = ""
        self.guards = True
        self.most_connections = 0
        self.exclude_namespaces: frozenset[str] = frozenset()
        self.timeout: float | None = None
        self.log_level = "info"
        self.annotations: dict[str, str] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def deadline(self, command: str) -> float:
        """Seconds that the command may take."""
        if self.timeout is not None:
            return self.timeout
        return TIMEOUT_ADD if command == "ADD" else TIMEOUT

    def check(self) -> None:
        """Refuse a configuration with problems.

        Raises:
            CniError: INVALID_CONFIG, naming every problem.
        """
        if self.problems:
            raise CniError(
                INVALID_CONFIG, f"invalid nearpath configuration: {'; '.join(self.problems)}"
            )


def _type(value: object) -> str:
    return _TYPES.get(type(value), "something else")


def _required(conf: NetConf, value: object) -> str:
    if not isinstance(value, bool):
        return f"must be true or false, not {_type(value)}"
    conf.required = value
    return ""


def _socket_lane(conf: NetConf, value: object) -> str:
    if value not in {"on", "off"} if isinstance(value, str) else True:
        return 'must be "on" or "off"'
    conf.socket_lane = value == "on"
    return ""


def _one_of(values: tuple[str, ...]) -> str:
    return f"must be one of {', '.join(values)}"


def _tap_lane(conf: NetConf, value: object) -> str:
    if not isinstance(value, str) or value not in TAP_MODES:
        return _one_of(TAP_MODES)
    conf.tap_lane = value
    return ""


def _checksum(conf: NetConf, value: object) -> str:
    if not isinstance(value, str) or value not in CHECKSUM_MODES:
        return _one_of(CHECKSUM_MODES)
    conf.checksum = value
    return ""


def _guards(conf: NetConf, value: object) -> str:
    if value not in {"required", "preferred"} if isinstance(value, str) else True:
        return 'must be "required" or "preferred"'
    conf.guards = value == "required"
    return ""


def _most_connections(conf: NetConf, value: object) -> str:
    least, most = _CONNECTIONS_RANGE
    if isinstance(value, bool) or not isinstance(value, int):
        return f"must be a whole number, not {_type(value)}"
    if not least <= value <= most:
        return f"must be between {least} and {most}"
    conf.most_connections = value
    return ""


def _exclude_namespaces(conf: NetConf, value: object) -> str:
    if not isinstance(value, list):
        return f"must be a list of strings, not {_type(value)}"
    for number, name in enumerate(value):
        if not isinstance(name, str):
            return f"must be a list of strings; entry {number} is {_type(name)}"
    conf.exclude_namespaces = frozenset(value)
    return ""


def _timeout(conf: NetConf, value: object) -> str:
    least, most = _TIMEOUT_RANGE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must be a number of seconds, not {_type(value)}"
    if not least <= value <= most:
        return f"must be between {least:g} and {most:g} seconds"
    conf.timeout = float(value)
    return ""


def _log_level(conf: NetConf, value: object) -> str:
    if not isinstance(value, str) or value not in _LEVELS:
        return _one_of(_LEVELS)
    conf.log_level = value
    return ""


# Each takes the value into the configuration, or returns what is wrong with it.
KEYS: dict[str, Callable[[NetConf, object], str]] = {
    "required": _required,
    "socketLane": _socket_lane,
    "tapLane": _tap_lane,
    "checksum": _checksum,
    "guards": _guards,
    "maxConnections": _most_connections,
    "excludeNamespaces": _exclude_namespaces,
    "timeoutSeconds": _timeout,
    "logLevel": _log_level,
}


_CHOICES = {SOCKET_LANE: ("on", "off"), TAP_LANE: TAP_MODES, CHECKSUM: CHECKSUM_MODES}


def parse(config: dict[str, Any]) -> NetConf:
    """Take our keys out of a network configuration; never fails.

    A key with an unusable value keeps its default and is listed in ``problems``: whether
    that refuses the request is the command's choice (``check``), for DEL must go on.
    """
    conf = NetConf()
    for key, value in config.items():
        take = KEYS.get(key)
        if take is not None:
            problem = take(conf, value)
            if problem:
                conf.problems.append(f"{key} {problem}")
        elif key not in _CNI_KEYS and not key.startswith("cni.dev/"):
            conf.warnings.append(f"unknown configuration key ignored: {quote(key)}")
    conf.annotations = own_annotations(config, conf.warnings.append)
    for name, values in _CHOICES.items():
        choice = conf.annotations.get(name)
        if choice is not None and choice not in values:
            conf.warnings.append(f"annotation {name} is none of {', '.join(values)}; ignored")
            del conf.annotations[name]
    return conf


def asks_for_lane(conf: NetConf) -> bool:
    """True if the pod's own annotation switches the socket lane on."""
    return conf.annotations.get(SOCKET_LANE) == "on"


def socket_lane(conf: NetConf, pod: dict[str, str]) -> tuple[bool, str]:
    """Whether a pod is to use the socket lane, and if not, the reason.

    Args:
        pod: see identity.parse_args.
    """
    if pod["namespace"] and pod["namespace"] in conf.exclude_namespaces:
        return False, "excluded-namespace"
    choice = conf.annotations.get(SOCKET_LANE)
    if choice is not None:
        return choice == "on", "" if choice == "on" else "annotation"
    return conf.socket_lane, "" if conf.socket_lane else "config"


def tap_lane(conf: NetConf, pod: dict[str, str]) -> dict[str, str | bool]:
    """What a virtual machine's pod is to have, as its record keeps it.

    Args:
        pod: see identity.parse_args.

    Returns:
        ``{"state": "on" or "off", "reason", "mode", "checksum", "insist": the checksum mode was
        asked for by name}``; see TAP_MODES and CHECKSUM_MODES.
    """
    mode, reason = conf.annotations.get(TAP_LANE), "annotation"
    if mode is None:
        mode, reason = conf.tap_lane, "config"
    checksum = conf.annotations.get(CHECKSUM, conf.checksum)
    if pod["namespace"] and pod["namespace"] in conf.exclude_namespaces:
        mode, reason, checksum = "off", "excluded-namespace", "keep"
    on = mode != "off"
    return {
        "state": "on" if on else "off",
        "reason": "" if on else reason,
        "mode": mode,
        "checksum": checksum or CHECKSUM_MODES[0],
        "insist": bool(checksum),
    }
