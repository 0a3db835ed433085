"""`connections` against sockets whose addresses and path the tests know, and the live switches."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from helpers.commands import run, wait_until
from helpers.netns import inside
from nearpath import state
from nearpath.cli.main import main
from nearpath.datapath import settings
from nearpath.node import connections

if TYPE_CHECKING:
    from .conftest import Lab, Pod


def exchange(client: socket.socket, server: socket.socket, times: int = 1) -> None:
    """A request and an answer, of 100 and 200 bytes."""
    for _ in range(times):
        client.sendall(bytes(100))
        assert len(server.recv(200, socket.MSG_PEEK)) == len(server.recv(200)) == 100
        server.sendall(bytes(200))
        assert len(client.recv(400)) == 200


def only(lab: Lab) -> dict[str, Any]:
    """The one connection that there is."""
    (found,) = connections.live(lab.place)
    return found


def record(lab: Lab, pod: Pod, name: str) -> None:
    """A record of a pod as ADD writes it."""
    identity = {"namespace": "shop", "name": name, "uid": "u"}
    attachment = {"container_id": name, "ifname": "eth0", "netns_cookie": pod.cookie}
    lanes = {"socket": {"state": "on", "reason": "", "unguarded": True}}
    state.save(lab.place, {**attachment, "pod": identity, "lanes": lanes})


@pytest.mark.parametrize("kind", ["IPv4", "IPv6", "v4-mapped"])
def test_addresses(lab: Lab, kind: str) -> None:
    """What getsockname(2) and getpeername(2) say on both sides, and the pods' names."""
    record(lab, lab.left, "cart")
    with ExitStack() as stack:
        if kind == "v4-mapped":
            listener = stack.enter_context(lab.right.listen(socket.AF_INET6))
            client = stack.enter_context(lab.left.connect("10.77.0.2"))
            server = stack.enter_context(listener.accept()[0])
        else:
            ends = lab.pair("fd77::2" if kind == "IPv6" else "10.77.0.2")
            client, server = (stack.enter_context(end) for end in ends)
        exchange(client, server)
        shown = only(lab)
        for side, end in (("client", client), ("server", server)):
            for name, (ip, port, *_) in (
                ("local", end.getsockname()),
                ("remote", end.getpeername()),
            ):
                assert shown[side][name] == {"ip": ip, "port": port}
    assert (shown["client"]["namespace"], shown["client"]["name"]) == ("shop", "cart")
    assert shown["client"]["netns_cookie"] == lab.left.cookie
    assert (shown["server"]["name"], shown["server"]["netns_cookie"]) == ("", lab.right.cookie)
    wait_until(lambda: not list(connections.live(lab.place)), "closed connections are gone")


def test_translated_addresses(lab: Lab) -> None:
    """Behind a DNAT in the client's pod, each side has its own truth."""
    rules = "table ip np { chain out { type nat hook output priority -100; "
    rules += "ip daddr 10.96.0.10 tcp dport 80 dnat to 10.77.0.2:5000; }\n}\n"
    run([*inside(lab.left.netns), "ip", "route", "add", "10.96.0.0/16", "via", "10.77.0.2"])
    run([*inside(lab.left.netns), "nft", "-f", "-"], text=rules)
    with lab.right.listen() as listener, lab.left.connect("10.96.0.10", 80) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            exchange(client, server)
            shown = only(lab)
    assert shown["client"]["remote"] == {"ip": "10.96.0.10", "port": 80}
    assert shown["server"]["local"] == {"ip": "10.77.0.2", "port": 5000}
    assert shown["client"]["local"] == shown["server"]["remote"]
    assert shown["client"]["path"] == "lane"


def test_paths_and_counts(lab: Lab) -> None:
    """Path and reason as the rules have them, bytes and messages by path, idle time."""
    settings.write(lab.place, probation=2)
    client, server = lab.pair()
    with client, server:
        assert only(lab)["client"]["path"] == ""
        exchange(client, server)
        shown = only(lab)["client"]
        assert (shown["path"], shown["reason"]) == ("kernel", "probation")
        exchange(client, server, 4)
        shown = only(lab)
        for side, size in (("client", 100), ("server", 200)):
            assert (shown[side]["path"], shown[side]["reason"]) == ("lane", "")
            assert shown[side]["kernel_messages"] == 2
            assert shown[side]["kernel_bytes"] == 2 * size
            assert shown[side]["redirected_messages"] == 3
            assert shown[side]["redirected_bytes"] == 3 * size
            assert 0 <= shown[side]["idle_seconds"] < 20
        settings.write(lab.place, paused=1)
        assert only(lab)["server"]["reason"] == "paused"
        exchange(client, server)
        assert only(lab)["client"]["kernel_messages"] == 3
        settings.write(lab.place, paused=0)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(10) == b""
        shown = only(lab)
        assert (shown["client"]["path"], shown["client"]["reason"]) == ("native", "left")
        assert shown["client"]["idle_seconds"] is None
        assert (shown["server"]["path"], shown["server"]["reason"]) == ("kernel", "peer_left")


def test_the_stream_that_left(lab: Lab) -> None:
    """A streaming side is native, with the reason; the other is not."""
    # However slow this machine is, and of whatever size.
    settings.write(lab.place, stream_gap_us=1_000_000, stream_from=settings.ANY_SIZE)
    client, server = lab.pair()
    with client, server:
        exchange(client, server, 3)

        def streamed() -> bool:
            client.sendall(bytes(50))
            server.recv(100)
            return bool(only(lab)["client"]["path"] == "native")

        wait_until(streamed, "the stream has left the lane")
        shown = only(lab)
        assert shown["client"]["reason"] == "streaming"
        assert (shown["server"]["path"], shown["server"]["reason"]) == ("kernel", "peer_left")


def test_kernel_path_connections_are_not_listed(lab: Lab) -> None:
    """The control: pods that are not on the lane have nothing paired."""
    lab.register(enabled=False)
    client, server = lab.pair()
    with client, server:
        exchange(client, server)
        assert list(connections.live(lab.place)) == []
        assert connections.busiest(lab.place, 10) == ([], 0)


def test_busiest_of_many(lab: Lab) -> None:
    """The one that carried most comes first; the pod filter finds either end."""
    record(lab, lab.right, "db")
    with ExitStack() as stack:
        listener = stack.enter_context(lab.right.listen())
        pairs = []
        for _ in range(50):
            client = stack.enter_context(lab.left.connect("10.77.0.2"))
            pairs.append((client, stack.enter_context(listener.accept()[0])))
        for number in (31, 7, 31):
            exchange(*pairs[number])
        shown, count = connections.busiest(lab.place, 2)
        assert count == 50
        ports = [connection["client"]["local"]["port"] for connection in shown]
        assert ports == [pairs[number][0].getsockname()[1] for number in (31, 7)]
        cookies = connections.cookies_of(lab.place, "shop", "db")
        assert cookies == {lab.right.cookie}
        assert len(list(connections.live(lab.place, cookies))) == 50
        assert list(connections.live(lab.place, {1})) == []


def test_pause_resume_and_settings_commands(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a live connection: off at once, no byte lost, on again; status and pods say so."""
    monkeypatch.setenv("NEARPATH_RUN_DIR", lab.place.run_dir)
    monkeypatch.setenv("NEARPATH_PIN_DIR", lab.place.pin_dir)
    monkeypatch.setenv("NEARPATH_CGROUP", lab.place.cgroup)
    record(lab, lab.left, "cart")

    def says(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    client, server = lab.pair()
    with client, server:
        exchange(client, server, 3)
        redirected = lab.redirected
        assert redirected > 0
        client.sendall(b"unread")
        assert says("pause") == {"paused": True, "changed": True, "failed": 0}
        client.sendall(b" twice")
        received = b""
        while len(received) < 12:
            received += server.recv(20)
        assert received == b"unread twice"
        assert lab.redirected == redirected + 1
        exchange(client, server, 3)
        assert lab.redirected == redirected + 1
        assert says("status")["paused"] is True
        lane = says("pods")[0]["lanes"]["socket"]
        assert (lane["state"], lane["reason"]) == ("off", "paused")
        assert says("resume") == {"paused": False, "changed": True, "failed": 0}
        exchange(client, server, 3)
        assert lab.redirected == redirected + 1 + 2 * 3
        assert says("pods")[0]["lanes"]["socket"]["state"] == "on"
        says("settings", "redirect=0")
        exchange(client, server, 3)
        assert lab.redirected == redirected + 1 + 2 * 3
        assert lab.reason("redirect_off") == 2 * 3
    status = says("status")
    assert status["maps"]["sockets"] == 2 * status["maps"]["connections"]
    assert status["guards"]["attached"] or status["guards"]["because"]
    assert status["streams"] == {"from": 1024, "to": settings.ANY_SIZE, "source": "default"}
