"""The frozen command line on a real datapath: what it says is what is so."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.cni import nearpath_entry
from helpers.commands import run
from helpers.netns import inside, namespace, veth
from nearpath.kernel import netns as kernel_netns
from nearpath.lanes import socket as lane
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.node import Node

ON = ("on", "")


def config(**keys: object) -> dict[str, Any]:
    """Our entry as it reaches the plugin."""
    result = {"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]}
    common = {"cniVersion": "1.0.0", "name": "e2e-cli", "prevResult": result}
    return {**nearpath_entry(), **common, **keys}


@pytest.fixture
def pod(node: Node) -> Iterator[str]:
    """A pod on the lane; the path of its namespace."""
    arguments = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u"
    with namespace() as path, veth(path, "10.9.0.2/24"):
        added = node.plugin("ADD", config(), container_id="pod", netns=path, arguments=arguments)
        assert added.returncode == 0, added.stderr
        yield path
        node.plugin("DEL", config(), container_id="pod", netns=path)


def test_version(node: Node) -> None:
    """The frozen program knows who it is."""
    shown = json.loads(node.cli("version", "--json").stdout)
    assert node.cli("version").stdout.startswith(f"nearpath {shown['version']} ")


def test_status_before_anything(node: Node) -> None:
    """Looking makes nothing: no directory, no pins."""
    shown = node.status()
    assert shown["loaded"] is False
    assert shown["pods"] == 0
    assert shown["lanes"]["socket"] == {
        "connections": 0,
        "redirected_messages": 0,
        "redirected_bytes": 0,
        "kernel_messages": 0,
        "kernel_bytes": 0,
        "reasons": {},
    }
    assert node.cli("pods", "--json").stdout.strip() == "[]"
    assert node.cli("doctor", check=False).returncode in {0, 1}
    assert not node.run_dir.exists()
    assert not node.pin_dir.exists()


def test_pods_and_status_of_a_pod(node: Node, pod: str) -> None:
    """Identity, addresses and state of the pod that ADD has seen."""
    shown = node.pods()["pod"]
    assert (shown["namespace"], shown["name"], shown["ifname"]) == ("shop", "cart", "eth0")
    assert shown["ips"] == ["10.9.0.2/24"]
    assert shown["netns_cookie"] == kernel_netns.cookie(pod)
    assert (shown["lanes"]["socket"]["state"], shown["lanes"]["socket"]["reason"]) == ON
    status = node.status()
    assert (status["loaded"], status["pods"], status["pods_on_lane"]) == (True, 1, 1)
    table = node.cli("pods").stdout
    assert "shop" in table
    assert "cart" in table
    assert "\x1b" not in table


def test_unload_and_load(node: Node, pod: str) -> None:
    """Off for every pod until somebody loads; ADD does not; then everybody is on again."""
    assert node.lanes() == {"pod": ON}
    assert json.loads(node.cli("unload", "--json").stdout) == {"drained": True, "remaining": 0}
    assert node.lanes() == {"pod": ("off", "unloaded-by-operator")}
    assert node.status()["unloaded_by_operator"] is True
    assert node.plugin("ADD", config(), container_id="late", netns=pod).returncode == 0
    assert not list(node.pin_dir.glob("v*"))
    node.plugin("DEL", config(), container_id="late", netns=pod)
    shown = json.loads(node.cli("load", "--json").stdout)
    assert (shown["loaded"], shown["changed"]) == (True, True)
    assert node.lanes() == {"pod": ON}
    assert json.loads(node.cli("load", "--json").stdout)["changed"] is False


def test_load_repairs_a_lost_registration(node: Node, pod: str) -> None:
    """`pods` names it, `doctor` warns of it, `load` mends it."""
    place = Place(str(node.run_dir), str(node.pin_dir))
    lane.unregister(place, kernel_netns.cookie(pod))
    assert node.lanes() == {"pod": ("off", "not-registered")}
    checks = json.loads(node.cli("doctor", "--json", check=False).stdout)["checks"]
    found = {check["name"]: check for check in checks}
    assert "not-registered" in found["pods"]["found"]
    assert found["pods"]["state"] == "warn"
    assert json.loads(node.cli("load", "--json").stdout)["registered"] == 1
    assert node.lanes() == {"pod": ON}


def test_unload_waits_for_open_sockets_and_loses_nothing(node: Node, pod: str) -> None:
    """A connection in the lane, with unread data, lives through unload to its end.

    Both ends are in one pod: the lane does not mind.
    """
    with kernel_netns.entered(pod):
        run([*inside(pod), "ip", "link", "set", "lo", "up"])
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname(), timeout=10)
    server, _ = listener.accept()
    server.settimeout(10)
    # This one process never waits for data, so nobody could tell how it reads.
    node.cli("settings", "--unsafe", "careful=0")
    with listener, client, server:
        for message in (b"one ", b"two ", b"three "):
            client.sendall(message)
        assert node.lane()["redirected_messages"] > 0
        done = node.cli("unload", "--timeout", "0.3")
        assert "2 sockets are still open" in done.stdout
        assert node.status()["draining"] == 2
        client.sendall(b"four")
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := server.recv(100):
            received += data
        assert received == b"one two three four"
    assert json.loads(node.cli("unload", "--json").stdout) == {"drained": True, "remaining": 0}
    assert not node.pin_dir.exists()


def test_doctor(node: Node) -> None:
    """On this kernel the datapath is possible: no check fails, exit status is the verdict."""
    done = node.cli("doctor", "--json", "--conf-dir", "/nonexistent", check=False)
    shown = json.loads(done.stdout)
    assert done.returncode == shown["exit_code"] == 1  # no CNI configuration there
    states = {check["name"]: check["state"] for check in shown["checks"]}
    assert "fail" not in states.values(), shown
    assert states["programs"] == states["helpers"] == "ok"
    assert states["cni-configuration"] == "warn"
    text = node.cli("doctor", "--conf-dir", "/nonexistent", check=False)
    assert text.returncode == 1
    assert "remedy:" in text.stdout
    assert "this node is degraded" in text.stdout


def test_doctor_of_a_well_kept_node(node: Node) -> None:
    """Chained and installed: usable, exit status 0."""
    conf, plugins = node.directory / "net.d", node.directory / "bin"
    conf.mkdir()
    plugins.mkdir()
    (plugins / "nearpath").symlink_to(node.program)
    entries = [{"type": "bridge"}, nearpath_entry()]
    conflist = {"cniVersion": "1.0.0", "name": "n", "plugins": entries}
    (conf / "10-n.conflist").write_text(json.dumps(conflist))
    words = ("doctor", "--conf-dir", str(conf), "--bin-dir", str(plugins), "--json")
    shown = json.loads(node.cli(*words, check=False).stdout)
    # Another user of sock_ops on the machine that runs the tests is not this test's matter.
    bad = {check["name"] for check in shown["checks"] if check["state"] != "ok"}
    # Nor is a kernel that refuses the guards; that it is said is test_guards_are_told.
    assert bad <= {"other-sock-ops", "other-accelerators", "mptcp", "guards"}, shown


def test_guards_are_told(node: Node, pod: str) -> None:
    """status and doctor agree on whether they are attached, and why not."""
    assert pod
    guards = node.status()["guards"]
    checks = json.loads(node.cli("doctor", "--json", check=False).stdout)["checks"]
    found = next(check for check in checks if check["name"] == "guards")
    if guards["attached"]:
        assert (found["state"], guards["because"]) == ("ok", "")
    else:
        assert found["state"] == "warn"
        assert guards["because"]
        assert "annotation" in found["lost"]
    # Our pod says "guards": "preferred"; one that does not has to do without the lane.
    strict = config(guards="required")
    with namespace() as path, veth(path, "10.9.1.2/24"):
        assert node.plugin("ADD", strict, container_id="strict", netns=path).returncode == 0
        expected = ON if guards["attached"] else ("off", "no-guards")
        assert node.lanes() == {"pod": ON, "strict": expected}
        node.cli("load")
        assert node.lanes() == {"pod": ON, "strict": expected}
        node.plugin("DEL", strict, container_id="strict", netns=path)


def test_connections(node: Node, pod: str) -> None:
    """A connection inside the pod, as people and as programs see it, until it is closed."""
    with kernel_netns.entered(pod):
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname(), timeout=10)
    server, _ = listener.accept()
    server.settimeout(10)
    node.cli("settings", "--unsafe", "careful=0")  # see above
    with listener, client, server:
        for _ in range(20):
            client.sendall(b"ping")
            assert server.recv(10) == b"ping"
            server.sendall(b"pong")
            assert client.recv(10) == b"pong"
        (shown,) = json.loads(node.cli("connections", "--json", "--pod", "shop/cart").stdout)
        port = client.getsockname()[1]
        assert shown["client"]["local"] == {"ip": "127.0.0.1", "port": port}
        assert {shown[side]["name"] for side in shown} == {"cart"}
        assert shown["client"]["path"] == "lane"
        table = node.cli("connections").stdout
        assert f"127.0.0.1:{port}" in table
        assert "shop/cart" in table
        assert "\x1b" not in table
    assert "none is paired" in node.cli("connections").stdout
    missing = node.cli("connections", "--pod", "shop/nobody", check=False)
    assert missing.returncode == 1


def test_pause_and_resume(node: Node, pod: str) -> None:
    """Every pod at once, with nothing unloaded; settings are live."""
    assert pod
    assert node.cli("pause").stdout.startswith("paused")
    assert node.lanes() == {"pod": ("off", "paused")}
    assert "paused" in node.cli("status").stdout
    assert node.cli("resume").stdout == "resumed\n"
    assert node.lanes() == {"pod": ON}
    assert node.cli("settings", "revalidate_ms=250").stdout == "revalidate_ms: 1000 → 250\n"
    table = json.loads(node.cli("settings", "--json").stdout)
    assert {each["name"]: each["value"] for each in table}["revalidate_ms"] == 250
    refused = node.cli("settings", "drained=0", check=False)
    assert refused.returncode == 1
    assert "--unsafe" in refused.stderr


def test_room_for_connections(node: Node) -> None:
    """As asked for when it is loaded; later loads keep it."""
    maps = json.loads(node.cli("load", "--json", "--max-connections", "2000").stdout)["maps"]
    assert (maps["connections"], maps["sockets"]) == (2000, 4000)
    assert "of at most 2,000" in node.cli("status").stdout
    assert "room for 2000 connections" in node.cli("load", "--max-connections", "5000").stdout


def test_calibrate(node: Node) -> None:
    """Measured within 20 s, stored, used at once; --reset goes back."""
    node.cli("load")
    done = node.cli("calibrate", "--json")
    shown = json.loads(done.stdout)
    assert (shown["stored"], shown["applied"]) == (True, True)
    assert [each["size"] for each in shown["results"]][:2] == [1, 16]
    limits = shown["thresholds"]
    streams = node.status()["streams"]
    assert (streams["from"], streams["to"]) == (limits["stream_from"], limits["stream_to"])
    # Whatever a busy machine makes of them: both paths carried every size.
    assert all(each["worst"] > 0 for each in shown["results"])
    node.cli("unload")
    node.cli("load")
    assert node.status()["streams"] == {**streams, "source": "calibrated"}
    assert json.loads(node.cli("calibrate", "--json", "--reset").stdout)["applied"] is True
    assert node.status()["streams"]["source"] == "default"


def test_not_root(node: Node) -> None:
    """Clear words instead of a permission error from the depths."""
    ordinary = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    # Where an ordinary user can reach it; the checkout may be below root's home.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        program = Path(shutil.copytree(node.program.parent, f"{directory}/nearpath"), "nearpath")
        commands = ["status", "pods", "connections", "doctor", "load", "unload", "demo"]
        for command in (*commands, "settings", "pause", "resume", "calibrate"):
            done = run([*ordinary, program, command], check=False, env=node.environ)
            assert done.returncode == 1
            assert done.stderr.startswith("nearpath: needs root")
            assert done.stdout == ""


@pytest.mark.parametrize("words", [(), ("fly",), ("unload", "--timeout", "x")])
def test_wrong_usage(node: Node, words: tuple[str, ...]) -> None:
    """Exit status 2 and the usage on stderr."""
    done = node.cli(*words, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: nearpath" in done.stderr


def test_ascii_locale(node: Node) -> None:
    """A serial console without UTF-8 gets escapes, not an exception."""
    node.environ |= {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}
    done = node.cli("doctor", "--conf-dir", "/nonexistent", check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.isascii()
