"""`nearpath connections`: from entries of the map to what people and programs read."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from nearpath import state
from nearpath.cli import output
from nearpath.cli.main import main
from nearpath.datapath import settings, tables
from nearpath.datapath.tables import COUNTERS, Connection
from nearpath.node import connections
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIENT, SERVER = 7, 8  # cookies
REDIRECTED = "redirected_messages"


def packed(ip: str) -> bytes:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return socket.inet_pton(family, ip)


def entry(
    number: int = 1,
    *,
    client: tuple[str, int, str, int] = ("10.0.0.1", 41000, "10.96.0.10", 80),
    server: tuple[str, int, str, int] = ("10.0.0.2", 8080, "10.0.0.1", 41000),
    cookies: tuple[int, int] = (CLIENT, SERVER),
    paths: tuple[str, str] = (REDIRECTED, REDIRECTED),
    messages: int = 10,
    **changes: Any,
) -> Connection:
    """An entry as the programs write it: packed and unpacked by the real format."""
    fields: list[Any] = [0] * 52
    now = time.monotonic_ns()
    fields[2:4] = cookies
    fields[4:6] = (now - 2_000_000_000, now - 3_000_000_000)
    fields[8:10] = (messages, messages)
    fields[10:12] = (messages * 100, messages * 200)
    fields[12:14] = (1, 2) if messages else (0, 0)
    fields[14:16] = (100, 400) if messages else (0, 0)
    fields[20] = tables.BOTH
    fields[29:31] = (COUNTERS.index(path) for path in paths)
    for start, (local, local_port, remote, remote_port) in ((36, client), (42, server)):
        family = socket.AF_INET6 if ":" in local else socket.AF_INET
        fields[start : start + 6] = (
            *(packed(local), packed(remote)),
            *(local_port, remote_port, family, 0),
        )
    value = tables._CONNECTION.pack(*fields)
    made = Connection((number, 1), tables._CONNECTION.unpack(value))
    for name, content in changes.items():
        setattr(made, name, content)
    return made


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The map of a loaded datapath; two pods are recorded."""
    place = Place(f"{tmp_path}/run", f"{tmp_path}/pins")
    monkeypatch.setenv("NEARPATH_RUN_DIR", place.run_dir)
    monkeypatch.setenv("NEARPATH_PIN_DIR", place.pin_dir)
    monkeypatch.setattr(output, "geteuid", lambda: 0)
    found: list[Connection] = []

    def paired(_: Place) -> Iterator[Connection]:
        yield from found

    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: True)
    monkeypatch.setattr(settings, "read", lambda _: dict(settings.DEFAULTS))
    monkeypatch.setattr(tables, "paired", paired)
    for container, cookie, name in (("c", CLIENT, "cart"), ("s", SERVER, "\x1b[31mdb")):
        record = {
            "container_id": container,
            "ifname": "eth0",
            "netns_cookie": cookie,
            "pod": {"namespace": "shop", "name": name},
        }
        state.save(place, record)
    state.save(place, {"container_id": "x", "ifname": "eth0", "netns_cookie": 9, "pod": "none"})
    return found


def described(**changes: Any) -> dict[str, Any]:
    describer = connections.Describer({CLIENT: ("shop", "cart")}, dict(settings.DEFAULTS))
    return describer.describe(entry(**changes))


def test_addresses_as_each_side_sees_them() -> None:
    """They differ behind a ClusterIP."""
    shown = described()
    client, server = shown["client"], shown["server"]
    assert (client["local"], client["remote"]) == (
        {"ip": "10.0.0.1", "port": 41000},
        {"ip": "10.96.0.10", "port": 80},
    )
    assert (server["local"], server["remote"]) == (
        {"ip": "10.0.0.2", "port": 8080},
        {"ip": "10.0.0.1", "port": 41000},
    )
    assert (client["namespace"], client["name"], client["netns_cookie"]) == ("shop", "cart", CLIENT)
    assert (server["namespace"], server["name"], server["netns_cookie"]) == ("", "", SERVER)


@pytest.mark.parametrize(
    "ip", ["10.0.0.1", "fd00::1", "::1", "::ffff:10.0.0.1", "fd00:1:2:3:4:5:6:7", "0.0.0.1"]
)
def test_address(ip: str) -> None:
    """IPv4, IPv6, and v4-mapped ones as `ip` shows them."""
    assert connections.address(packed(ip)) == ip


def test_counts_are_of_what_a_side_sends() -> None:
    """By path, and since when it has sent nothing."""
    client = described()["client"]
    assert (client["redirected_messages"], client["redirected_bytes"]) == (10, 1000)
    assert (client["kernel_messages"], client["kernel_bytes"]) == (1, 100)
    assert 2.0 <= client["idle_seconds"] < 60
    assert described()["server"]["idle_seconds"] > client["idle_seconds"]


@pytest.mark.parametrize(
    ("changes", "rules", "client", "server"),
    [
        ({}, {}, ("lane", ""), ("lane", "")),
        ({"messages": 0}, {}, ("", ""), ("", "")),
        ({"paths": ("probation", REDIRECTED)}, {}, ("kernel", "probation"), ("lane", "")),
        # What is known of the next message counts for more than how the last one went.
        ({"blocked": ("not_fit", "")}, {}, ("kernel", "not_fit"), ("lane", "")),
        ({"blocked": ("not_fit", "")}, {"guards": 0}, ("lane", ""), ("lane", "")),
        ({"wants_out": ("", "streaming")}, {}, ("lane", ""), ("kernel", "streaming")),
        ({}, {"paused": 1}, ("kernel", "paused"), ("kernel", "paused")),
        ({}, {"redirect": 0}, ("kernel", "redirect_off"), ("kernel", "redirect_off")),
        # Out of the map for good; the other side then has nobody to redirect to.
        ({"leaving": 0b01}, {}, ("native", "left"), ("kernel", "peer_left")),
        (
            {"leaving": 0b11, "wants_out": ("streaming", "duplex")},
            {"paused": 1},
            ("native", "streaming"),
            ("native", "duplex"),
        ),
    ],
)
def test_path_now(
    changes: dict[str, Any],
    rules: dict[str, int],
    client: tuple[str, str],
    server: tuple[str, str],
) -> None:
    """By the marks in the entry, the live settings, and the last message."""
    live = {**settings.DEFAULTS, **rules}
    found = [connections.path_now(entry(**changes), side, live) for side in (0, 1)]
    assert found == [client, server]


def test_native_sides_have_no_idle_time() -> None:
    """Nobody counts what they send."""
    assert described(leaving=0b10)["server"]["idle_seconds"] is None


def test_json(table: list[Connection], capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, also thousands and none."""
    for count in (0, 1, 3000):
        table[:] = [entry(number) for number in range(count)]
        assert main(["connections", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert len(shown) == count
    assert shown[0]["server"]["name"] == "\x1b[31mdb"
    assert main(["connections", "--json", "--limit", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_table(
    table: list[Connection],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both pods, both views, paths and reasons in words; nothing drives the terminal."""
    table.append(entry(1, blocked=("not_fit", ""), cookies=(CLIENT, SERVER)))
    table.append(entry(2, cookies=(CLIENT, 4711), leaving=0b10))
    mapped = ("::ffff:10.0.0.2", 8080, "::ffff:10.0.0.1", 41000)
    table.append(entry(3, server=mapped))
    monkeypatch.setattr(output, "_WIDE", 100)
    assert main(["connections"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for text in (
        "shop/cart",
        "\\x1b[31mdb",
        "netns cookie 4711",
        "10.0.0.1:41000 →",
        "10.96.0.10:80",
        "[::ffff:10.0.0.2]:8080",
        "not_fit",
        "the reader uses splice(2)",
        "native",
        "its FIN is sent",
        "the peer is closing or has left the lane",
        "1000 B",
    ):
        assert text in shown, text
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "more" not in shown.splitlines()[-1]


@pytest.mark.parametrize("columns", [100, 80])
def test_the_longest_addresses(
    columns: int,
    table: list[Connection],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of them is lost: in one piece where there is room, else broken."""
    longest = "fd00:1111:2222:3333:4444:5555:6666:7777"
    table.append(entry(1, client=(longest, 65535, longest, 65534)))
    monkeypatch.setattr(output, "_WIDE", columns)
    assert main(["connections"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()[:6]
    assert max(map(len, lines)) <= columns
    assert (f"[{longest}]:65535" in shown) == (columns == 100)
    assert ":65534" in shown


def test_the_busiest_come_first(
    table: list[Connection], capsys: pytest.CaptureFixture[str]
) -> None:
    """And how many more there are."""
    ports = {number: ("10.0.0.1", 40000 + number, "10.0.0.2", 80) for number in range(300)}
    table += [entry(number, client=ports[number], messages=number) for number in range(300)]
    assert main(["connections", "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.index(":40299 ") < shown.index(":40298 ")
    assert ":40297 " not in shown
    assert shown.splitlines()[-1].startswith("298 more")
    assert main(["connections"]) == 0
    assert "100 more" in capsys.readouterr().out


def test_of_one_pod(table: list[Connection], capsys: pytest.CaptureFixture[str]) -> None:
    """At either end; a pod that nobody has recorded is a mistake worth a word."""
    table += [entry(1), entry(2, cookies=(CLIENT, 4711)), entry(3, cookies=(5, 6))]
    for pod, count in (("shop/cart", 2), ("shop/\x1b[31mdb", 1)):
        assert main(["connections", "--json", "--pod", pod]) == 0
        assert len(json.loads(capsys.readouterr().out)) == count
    assert main(["connections", "--pod", "shop/nobody"]) == 1
    assert "no pod shop/nobody is recorded" in capsys.readouterr().err


def test_none(
    table: list[Connection],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Says so, and why if nothing is loaded."""
    assert table == []
    assert main(["connections"]) == 0
    assert capsys.readouterr().out == "no connections: none is paired in the lane now\n"
    monkeypatch.setattr("nearpath.datapath.loader.is_loaded", lambda _: False)
    assert main(["connections"]) == 0
    assert capsys.readouterr().out == "no connections: the datapath is not loaded\n"
    assert main(["connections", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
