"""The chain runner calls plugins as libcni does; here the plugins are scripts that note it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import wait_until
from nearpath.node import chain
from nearpath.node.chain import Attachment, Chain, ChainError

# Notes its call in $DIR/calls and answers ADD with its own name added to the result.
NOTING = """\
import json, os, sys
config = json.load(sys.stdin)
call = {"command": os.environ["CNI_COMMAND"], "config": config,
        "environ": {k: v for k, v in os.environ.items() if k.startswith("CNI_")}}
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls"), "a") as calls:
    calls.write(json.dumps(call) + "\\n")
if os.environ["CNI_COMMAND"] == "ADD":
    result = config.get("prevResult", {"ips": [{"address": "10.0.0.5/24"}], "by": []})
    result["by"].append(config["type"])
    print(json.dumps(result))
"""


def plugin(directory: Path, kind: str, code: str = NOTING) -> None:
    """Install a plugin written in Python."""
    path = directory / kind
    path.write_text(f"#!/usr/bin/python3 -I\n{code}")
    path.chmod(0o755)


def calls(directory: Path) -> list[dict[str, Any]]:
    """What the plugins noted, in order."""
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def make(directory: Path, version: str = "0.4.0", **second: object) -> Chain:
    """A chain of the plugins first and second."""
    plugins = [{"type": "first"}, {"type": "second", **second}]
    conflist = {"cniVersion": version, "name": "net", "plugins": plugins}
    return Chain(conflist, [str(directory)], timeout=10)


def ended(pid: int) -> bool:
    """True if a process is gone, or waits for init to note that it is."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def attachment(**capabilities: object) -> Attachment:
    """An attachment with the identity of a pod."""
    return Attachment("c1", "/run/netns/a", args={"A": "1", "B": "2"}, capabilities=capabilities)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory of plugins with first and second."""
    for kind in ("first", "second"):
        plugin(tmp_path, kind)
    return tmp_path


def test_add_hands_results_on_and_del_goes_back(directory: Path) -> None:
    """ADD in order with prevResult; DEL in reverse with the final result."""
    runner, pod = make(directory), attachment()
    result = runner.add(pod)
    assert result["by"] == ["first", "second"]
    assert result["cniVersion"] == "0.4.0"
    runner.delete(pod)
    shown = [(call["command"], call["config"]["type"]) for call in calls(directory)]
    assert shown == [("ADD", "first"), ("ADD", "second"), ("DEL", "second"), ("DEL", "first")]
    first, second, *deleted = (call["config"] for call in calls(directory))
    assert "prevResult" not in first
    assert second["prevResult"]["by"] == ["first"]
    assert [config["prevResult"]["by"] for config in deleted] == [["first", "second"]] * 2
    assert {call["config"]["name"] for call in calls(directory)} == {"net"}


def test_environment_of_a_plugin(directory: Path) -> None:
    """Everything that the specification names, and CNI_ARGS in its own form."""
    make(directory).add(attachment())
    assert calls(directory)[0]["environ"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/a",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "A=1;B=2",
        "CNI_PATH": str(directory),
    }


def test_del_has_no_previous_result_before_0_4_0(directory: Path) -> None:
    """As with Calico's, Flannel's and Kube-OVN's lists, which say 0.3.1."""
    runner, pod = make(directory, "0.3.1"), attachment()
    runner.add(pod)
    runner.delete(pod)
    assert all("prevResult" not in call["config"] for call in calls(directory)[2:])


def test_only_asked_capabilities_arrive(directory: Path) -> None:
    """runtimeConfig is filtered by each entry's capabilities."""
    runner = make(directory, capabilities={"wanted": True, "refused": False, "absent": True})
    runner.add(attachment(wanted={"k": "v"}, refused=1, other=2))
    first, second = (call["config"] for call in calls(directory))
    assert "runtimeConfig" not in first
    assert second["runtimeConfig"] == {"wanted": {"k": "v"}}


def test_check_gets_the_final_result(directory: Path) -> None:
    """CHECK in order, each with the result of the whole ADD."""
    runner, pod = make(directory), attachment()
    runner.add(pod)
    runner.check(pod)
    checked = calls(directory)[2:]
    assert [call["command"] for call in checked] == ["CHECK", "CHECK"]
    assert all(call["config"]["prevResult"]["by"] == ["first", "second"] for call in checked)


def test_failed_add_is_undone(directory: Path) -> None:
    """The error is the plugin's own, and every plugin gets its DEL."""
    answer = {"code": 11, "msg": "not now", "details": "try later"}
    code = f"import os, sys\nif os.environ['CNI_COMMAND'] == 'ADD':\n print('{json.dumps(answer)}')"
    plugin(directory, "second", f"{code}\n sys.exit(1)")
    with pytest.raises(ChainError, match="second: ADD failed: not now: try later") as raised:
        make(directory).add(attachment())
    assert raised.value.code == 11
    assert [call["command"] for call in calls(directory)] == ["ADD", "DEL"]


def test_del_goes_on_after_a_failure(directory: Path) -> None:
    """The primary plugin still releases the address; the failure is reported."""
    plugin(directory, "second", "import sys\nsys.exit('out of luck')")
    with pytest.raises(ChainError, match=r"second: DEL failed \(exit status 1\): out of luck"):
        make(directory).delete(attachment())
    assert [call["command"] for call in calls(directory)] == ["DEL"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("", "did not answer with JSON"),
        ("print('[]')", "did not answer with a result"),
        ("print('{' * 100000)", "did not answer with JSON"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import sys; print('[1]'); sys.exit(3)", "exit status 3"),
        ('import sys; print(\'{"msg": 1, "code": []}\'); sys.exit(3)', "exit status 3"),
    ],
)
def test_bad_answers(directory: Path, code: str, text: str) -> None:
    """Whatever a plugin prints, the error names the plugin and what was wrong."""
    plugin(directory, "second", code)
    with pytest.raises(ChainError, match="CNI plugin second") as raised:
        make(directory).add(attachment())
    assert text in str(raised.value)


def test_a_hung_plugin_is_killed_with_its_children(directory: Path) -> None:
    """Also one whose child keeps the pipes open."""
    plugin(
        directory,
        "second",
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open(os.path.join(os.path.dirname(__file__), 'child'), 'w').write(str(child.pid))\n"
        "time.sleep(60)",
    )
    conflist = {"cniVersion": "0.4.0", "name": "net", "plugins": [{"type": "second"}]}
    start = time.monotonic()
    with pytest.raises(ChainError, match="ADD did not end in 1 s"):
        Chain(conflist, [str(directory)], timeout=1).add(attachment())
    assert time.monotonic() - start < 10
    child = int((directory / "child").read_text())
    wait_until(lambda: ended(child), "the plugin's child has ended")


def test_missing_plugin_names_the_remedy(directory: Path) -> None:
    """Before anything is called."""
    conflist = {"cniVersion": "0.4.0", "name": "net", "plugins": [{"type": "absent"}]}
    with pytest.raises(ChainError, match="absent") as raised:
        Chain(conflist, [str(directory)])
    assert "apt-get install" in raised.value.remedy


@pytest.mark.parametrize("kind", ["", ".", "..", "../first", "/bin/true", "a\0b", "plain", "dir"])
def test_a_type_is_a_name_of_an_executable(directory: Path, kind: str) -> None:
    """No path, no directory, no file without the executable bit."""
    (directory / "plain").write_text("")
    (directory / "dir").mkdir()
    assert chain.find_plugin(kind, [str(directory / "sub"), str(directory)]) is None


def test_plugins_are_found_in_order_and_by_symlink(directory: Path, tmp_path: Path) -> None:
    """The first directory wins; a link to a file is a file."""
    other = tmp_path / "other"
    other.mkdir()
    os.symlink(directory / "first", other / "first")
    found = chain.find_plugin("first", [str(other), str(directory)])
    assert found == str(other / "first")


def test_configurations_as_runtimes_sort_them(tmp_path: Path) -> None:
    """By name, known suffixes only; no directory is no configuration."""
    for name in ("10-b.conflist", "05-a.conf", "20-c.json", "00-readme.txt", "10-b.conflist.tmp"):
        (tmp_path / name).write_text("{}")
    names = [Path(path).name for path in chain.configurations(str(tmp_path))]
    assert names == ["05-a.conf", "10-b.conflist", "20-c.json"]
    assert chain.configurations(str(tmp_path / "absent")) == []


def test_a_single_configuration_becomes_a_list() -> None:
    """Old .conf files hold one plugin."""
    parsed = chain.parse_list('{"cniVersion": "0.3.1", "name": "n", "type": "bridge"}')
    assert [entry["type"] for entry in parsed["plugins"]] == ["bridge"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plugins": {}}', '{"plugins": [{}]}', "["])
def test_no_list(text: str) -> None:
    """Anything else is an error that names the file."""
    with pytest.raises(ChainError, match="here"):
        chain.parse_list(text, "here")
