"""The result of the plugins before us: verified, not trusted, and passed on unchanged."""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_pton

from nearpath.cni.protocol import INVALID_CONFIG, SUPPORTED, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CniError(INVALID_CONFIG, f"{name} is not an object")
    return value


def _text(holder: dict[str, Any], key: str, name: str, *, needed: bool) -> None:
    value = holder.get(key)
    if isinstance(value, str) or (value is None and not needed):
        return
    raise CniError(INVALID_CONFIG, f"{name}.{key} is not a string")


def _objects(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = result.get(key)
    if values is None:
        return []
    if not isinstance(values, list):
        raise CniError(INVALID_CONFIG, f"prevResult.{key} is not a list")
    return [_object(value, f"prevResult.{key}[{n}]") for n, value in enumerate(values)]


def previous(config: dict[str, Any], version: str) -> dict[str, Any]:
    """The ``prevResult`` of a request, as it is to be printed.

    Verifies the shape that the specification gives it, in every version: 0.3.0 and later
    ``interfaces``, ``ips``, ``routes``, before that ``ip4`` and ``ip6``. Only a missing
    cniVersion is added, as libcni does.

    Raises:
        CniError: INVALID_CONFIG; there is none, or it is malformed.
    """
    result = config.get("prevResult")
    if result is None:
        raise CniError(
            INVALID_CONFIG,
            "nearpath must be called as a chained plugin",
            "there is no prevResult: put nearpath after the plugin that makes the interface",
        )
    result = _object(result, "prevResult")
    _text(result, "cniVersion", "prevResult", needed=False)
    given = result.get("cniVersion")
    if given and given not in SUPPORTED:
        raise CniError(INVALID_CONFIG, "prevResult.cniVersion is not a supported version")
    for number, interface in enumerate(_objects(result, "interfaces")):
        for key in ("name", "mac", "sandbox"):
            _text(interface, key, f"prevResult.interfaces[{number}]", needed=False)
    for number, address in enumerate(_objects(result, "ips")):
        _text(address, "address", f"prevResult.ips[{number}]", needed=True)
        index = address.get("interface")
        if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
            raise CniError(INVALID_CONFIG, f"prevResult.ips[{number}].interface is not a number")
    _objects(result, "routes")
    for key in ("ip4", "ip6"):
        if result.get(key) is not None:
            _text(_object(result[key], f"prevResult.{key}"), "ip", f"prevResult.{key}", needed=True)
    if result.get("dns") is not None:
        _object(result["dns"], "prevResult.dns")
    return result if given else {**result, "cniVersion": version}


def addresses(result: dict[str, Any]) -> list[str]:
    """The IP addresses of a verified result, each as ``address/prefix length``.

    What does not parse as an address is passed over.
    """
    found = [entry["address"] for entry in result.get("ips") or ()]
    found += [result[key]["ip"] for key in ("ip4", "ip6") if result.get(key)]
    return [text for text in found if _is_address(text)]


def _is_address(text: str) -> bool:
    host, _, length = text.partition("/")
    family = AF_INET6 if ":" in host else AF_INET
    try:
        inet_pton(family, host)
    except (OSError, ValueError):
        return False
    return length.isascii() and length.isdigit() and len(length) <= 3
