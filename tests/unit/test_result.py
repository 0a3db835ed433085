"""prevResult: verified in every version, passed on unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nearpath.cni import protocol, result
from nearpath.cni.protocol import CniError

# What a primary plugin returns, in each shape that the specification has had.
RESULTS: dict[str, dict[str, Any]] = {
    "0.1.0": {"ip4": {"ip": "10.1.2.3/24", "gateway": "10.1.2.1"}, "dns": {}},
    "0.2.0": {"ip4": {"ip": "10.1.2.3/24"}, "ip6": {"ip": "fd00::3/64"}},
    "0.3.0": {
        "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/a"}],
        "ips": [{"version": "4", "interface": 1, "address": "10.1.2.3/24", "gateway": "10.1.2.1"}],
    },
    "0.3.1": {"ips": [{"version": "6", "address": "fd00::3/64"}], "dns": {"nameservers": ["1.1"]}},
    "0.4.0": {"interfaces": [], "ips": [], "routes": [{"dst": "0.0.0.0/0"}]},
    "1.0.0": {
        "interfaces": [{"name": "eth0", "mac": "aa:bb:cc:dd:ee:ff", "sandbox": "/run/netns/a"}],
        "ips": [{"interface": 0, "address": "10.1.2.3/24"}, {"address": "fd00::3/64"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1"}],
        "dns": {},
    },
    "1.1.0": {
        "interfaces": [{"name": "eth0", "mtu": 1500, "socketPath": "", "pciID": ""}],
        "ips": [{"address": "10.1.2.3/24"}],
        "routes": [{"dst": "0.0.0.0/0", "mtu": 9000, "advmss": 1, "priority": 2, "scope": 0}],
    },
}


def refused(previous: object) -> str:
    """Message of the error 7 that this prevResult gives."""
    with pytest.raises(CniError) as error:
        result.previous({"prevResult": previous}, "1.0.0")
    assert error.value.code == 7
    return error.value.message


@pytest.mark.parametrize("version", protocol.SUPPORTED)
def test_passed_on_unchanged(version: str) -> None:
    """In every version the result is the input, and only a missing cniVersion is added."""
    given = {"cniVersion": version, **RESULTS[version], "x-unknown": [1, {"y": None}]}
    before = json.dumps(given)
    assert json.dumps(result.previous({"prevResult": given}, version)) == before
    del given["cniVersion"]
    assert result.previous({"prevResult": given}, version) == {**given, "cniVersion": version}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.1.0", ["10.1.2.3/24"]),
        ("0.2.0", ["10.1.2.3/24", "fd00::3/64"]),
        ("0.3.1", ["fd00::3/64"]),
        ("0.4.0", []),
        ("1.0.0", ["10.1.2.3/24", "fd00::3/64"]),
    ],
)
def test_addresses(version: str, expected: list[str]) -> None:
    """The addresses are found in every version's shape."""
    assert result.addresses(RESULTS[version]) == expected


@pytest.mark.parametrize(
    "address", ["", "x", "10.0.0.1", "10.0.0/8", "10.0.0.1/x", "1::/-1", "\ud800/8", "a\0/1", "/8"]
)
def test_odd_addresses_are_not_recorded(address: str) -> None:
    """An address that does not parse is passed on to the runtime, but not recorded."""
    assert result.addresses({"ips": [{"address": address}]}) == []


def test_null_members() -> None:
    """Null for an optional member is as good as its absence."""
    given = {"ips": None, "interfaces": None, "routes": None, "dns": None, "ip4": None}
    assert result.previous({"prevResult": given}, "1.0.0") == {**given, "cniVersion": "1.0.0"}
    assert result.addresses(given) == []


@pytest.mark.parametrize("config", [{}, {"prevResult": None}])
def test_not_chained(config: dict[str, Any]) -> None:
    """Without a prevResult nearpath is not chained: error 7 says so."""
    with pytest.raises(CniError, match="must be called as a chained plugin") as error:
        result.previous(config, "1.0.0")
    assert error.value.code == 7


@pytest.mark.parametrize(
    ("previous", "message"),
    [
        ([], "prevResult is not an object"),
        ("x", "prevResult is not an object"),
        (False, "prevResult is not an object"),
        ({"cniVersion": 1}, "prevResult.cniVersion is not a string"),
        ({"cniVersion": "9.9.9"}, "prevResult.cniVersion is not a supported version"),
        ({"interfaces": {}}, "prevResult.interfaces is not a list"),
        ({"interfaces": ["eth0"]}, "prevResult.interfaces[0] is not an object"),
        ({"interfaces": [{"name": 1}]}, "prevResult.interfaces[0].name is not a string"),
        ({"ips": {}}, "prevResult.ips is not a list"),
        ({"ips": [None]}, "prevResult.ips[0] is not an object"),
        ({"ips": [{"address": "a"}, {}]}, "prevResult.ips[1].address is not a string"),
        ({"ips": [{"address": 1}]}, "prevResult.ips[0].address is not a string"),
        (
            {"ips": [{"address": "a", "interface": "0"}]},
            "prevResult.ips[0].interface is not a number",
        ),
        (
            {"ips": [{"address": "a", "interface": True}]},
            "prevResult.ips[0].interface is not a number",
        ),
        ({"routes": "x"}, "prevResult.routes is not a list"),
        ({"dns": []}, "prevResult.dns is not an object"),
        ({"ip4": "10.0.0.1/8"}, "prevResult.ip4 is not an object"),
        ({"ip6": {}}, "prevResult.ip6.ip is not a string"),
    ],
)
def test_malformed(previous: object, message: str) -> None:
    """A prevResult that is not of the specification's shape gives error 7, naming the place."""
    assert refused(previous) == message


@pytest.mark.parametrize(
    "number", ["0", "-0.0", "1e22", "0.1", "12345678901234567890123456789", "1E-7", "5e-324"]
)
def test_numbers_survive(number: str) -> None:
    """Numbers come out as the numbers that went in, integers with every digit."""
    data = f'{{"name": "n", "prevResult": {{"x": {number}}}}}'.encode()
    config = protocol.decode(data)
    printed = protocol.encode(result.previous(config, "1.0.0"))
    again = json.loads(printed)["x"]
    assert again == json.loads(number)
    assert isinstance(again, type(json.loads(number)))


def test_text_survives() -> None:
    """Every kind of text comes out as it went in, lone surrogates and controls too."""
    for text in ("é", "\u2028", "\x00\x1f", "😀", "\ud800", "</script>"):
        config = protocol.decode(json.dumps({"prevResult": {"x": text}}).encode())
        printed = protocol.encode(result.previous(config, "1.0.0"))
        assert json.loads(printed.decode("ascii"))["x"] == text
