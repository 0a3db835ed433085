"""The watcher of virtual machines' pods, and what it leaves behind; real virt-handler steps.

    host ── np… ═ veth ═ eth0-nic ── k6t-eth0 ── tap0          pod "virt-launcher-db"

The watcher is a process of its own, started as an ADD starts it; frames are the business of
test_tap_*.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers import virt_handler
from helpers.cleanup import holding
from helpers.commands import PATIENCE, run, wait_until
from helpers.leaks import nothing_left
from helpers.netns import inside, namespace, veth
from nearpath import state
from nearpath.kernel import netns
from nearpath.lanes import vm, vm_state, watch
from nearpath.node import taps
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator


MAIN = Path(__file__).parents[2] / "cni-plugin/main.py"
TAP_LANE = {"state": "on", "reason": "", "mode": "mirror", "checksum": "skip", "insist": False}


class Machine:
    """A virtual machine's pod that the plugin has recorded."""

    def __init__(self, place: Place, path: str, host: str) -> None:
        self.place = place
        self.netns = path
        self.name = Path(path).name
        self.host = host
        self.cookie = netns.cookie(path)

    def record(self, container: str = "c1", ifname: str = "eth0", **lane: object) -> None:
        """What ADD writes."""
        state.save(
            self.place,
            {
                "container_id": container,
                "ifname": ifname,
                "netns": self.netns,
                "netns_cookie": self.cookie,
                "pod": {"namespace": "shop", "name": "virt-launcher-db", "uid": ""},
                "lanes": {
                    "socket": {"state": "off", "reason": "config"},
                    "tap": {**TAP_LANE, **lane},
                },
            },
        )

    def forget(self, container: str = "c1") -> None:
        """What DEL does last."""
        state.remove(self.place, container, "eth0")

    def wires(self) -> list[tuple[str, str]]:
        """Mode and reason of each wire, as the last look has found them."""
        known = vm_state.read(self.place, self.cookie)
        return [(wire["mode"], wire["reason"]) for wire in known["wires"]]

    def await_wires(self, *wires: tuple[str, str]) -> None:
        """Until the watcher has found, and done, that."""
        wait_until(lambda: self.wires() == list(wires), f"wires {wires}", 20)
        with vm_state.lock(self.place):
            pass  # it says first what it then does

    def filters(self, device: str) -> str:
        """``tc filter show`` of a device's ingress."""
        shown = run(["tc", "-n", self.name, "filter", "show", "dev", device, "ingress"])
        return shown.stdout

    def qdiscs(self) -> str:
        """``tc qdisc show`` of the pod."""
        return run(["tc", "-n", self.name, "qdisc", "show"]).stdout

    def offloads(self, device: str) -> dict[str, Any]:
        """``ethtool -k`` of a device of the pod."""
        words = [*inside(self.netns), "ethtool", "--json", "-k", device]
        (shown,) = json.loads(run(words).stdout)
        return {name: value["active"] for name, value in shown.items() if name != "ifname"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A recorded pod whose virtual machine virt-handler has not seen yet; nothing may be left."""
    place = Place(str(tmp_path / "run"), f"/sys/fs/bpf/{tmp_path.name}")
    with nothing_left(), namespace() as path, veth(path, "10.77.0.2/24") as host:
        made = Machine(place, path, host)
        made.record()
        try:
            yield made
        finally:
            for pid in holding(place.run_dir):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            print(Path(place.log_file).read_text() if Path(place.log_file).exists() else "no log")


@contextmanager
def watching(place: Place) -> Iterator[int]:
    """A watcher; yields its process ID."""
    assert watch.ensure(place)
    wait_until(lambda: watch.running(place) > 0, "a watcher", 20)
    pid = watch.running(place)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not watch.running(place), "no watcher", 20)


def test_lane_comes_with_the_tap(machine: Machine) -> None:
    """virt-handler's work is noticed at once; without a watcher nothing happens."""
    bound = virt_handler.bridge_binding(machine.netns)
    time.sleep(0.3)
    assert (machine.filters("tap0"), machine.filters("eth0-nic")) == ("", "")
    virt_handler.tear_down(bound)
    with watching(machine.place):
        virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        assert "Redirect to device eth0-nic" in machine.filters("tap0")
        assert "Redirect to device tap0" in machine.filters("eth0-nic")
    # Stopped, the lane stays.
    assert "Redirect to device tap0" in machine.filters("eth0-nic")


def test_quick_enough(machine: Machine) -> None:
    """A guest is booting meanwhile: the lane is there within half a second of the tap."""
    with watching(machine.place):
        wait_until(lambda: vm_state.known(machine.place), "a first look", 20)
        virt_handler.bridge_binding(machine.netns)
        done = time.monotonic()
        machine.await_wires(("mirror", ""))
        assert time.monotonic() - done < 0.5 * PATIENCE


def test_only_one(machine: Machine) -> None:
    """A second watcher ends at once and says why; ADDs in a row start no more."""
    environ = {**os.environ, "NEARPATH_RUN_DIR": machine.place.run_dir}
    with watching(machine.place) as pid:
        done = run([sys.executable, MAIN, "watch"], env=environ, check=False)
        assert done.returncode == 1
        assert "there is a watcher on this node already" in done.stderr
        assert [watch.ensure(machine.place) for _ in range(5)] == [False] * 5
        assert watch.running(machine.place) == pid


def test_many_at_once(machine: Machine) -> None:
    """Ten ADDs at the same moment: one watcher is left."""
    for _ in range(10):
        # Not ensure(), which might see the first one already.
        environ = {**os.environ, "NEARPATH_RUN_DIR": machine.place.run_dir}
        subprocess.Popen([sys.executable, MAIN, "watch", "--detached"], env=environ)
    wait_until(lambda: len(holding(machine.place.run_dir)) == 1, "one watcher", 30)
    assert watch.running(machine.place) in holding(machine.place.run_dir)


def test_killed_watcher_catches_up(machine: Machine) -> None:
    """What came and went while there was none is found by looking."""
    with watching(machine.place) as pid:
        bound = virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not watch.running(machine.place), "the watcher's end", 20)
        assert Path(machine.place.watcher_file).exists()  # so that any ADD asks for one
        virt_handler.plug_tap(virt_handler.unplug_tap(bound))
        assert machine.filters("tap0") == ""
    with watching(machine.place):
        wait_until(lambda: "eth0-nic" in machine.filters("tap0"), "the new tap's rules", 20)
        assert "Redirect to device tap0" in machine.filters("eth0-nic")


def test_ends_with_the_last_machine(machine: Machine) -> None:
    """By itself, without a trace, when the last record goes."""
    with watching(machine.place) as pid:
        machine.record("c2")
        machine.forget("c1")
        time.sleep(0.3)
        assert watch.running(machine.place) == pid
        machine.forget("c2")
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the watcher's end", 20)
    assert not Path(machine.place.watcher_file).exists()
    assert vm_state.known(machine.place) == set()


def test_does_not_keep_a_namespace_alive(machine: Machine) -> None:
    """A pod that went without a DEL is let go of, and its record is left to GC."""
    with watching(machine.place) as pid:
        with namespace() as path, veth(path, "10.79.0.2/24") as host:
            other = Machine(machine.place, path, host)
            other.record("c2")
            wait_until(lambda: _sockets(pid) == 2, "both watched", 20)
        wait_until(lambda: _sockets(pid) == 1, "the other one let go", 20)
        assert other.cookie in vm_state.by_cookie(machine.place)


def _sockets(pid: int) -> int:
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(path).startswith("socket:")
    return found


def test_replug(machine: Machine) -> None:
    """A new tap has a new ifindex; both directions follow."""
    with watching(machine.place):
        bound = virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        for _ in range(3):
            bound = virt_handler.unplug_tap(bound)
            machine.await_wires(("off", "no-tap"))
            assert machine.filters("eth0-nic") == ""
            bound = virt_handler.plug_tap(bound)
            machine.await_wires(("mirror", ""))
            assert "Redirect to device tap0" in machine.filters("eth0-nic")


def test_second_interface(machine: Machine) -> None:
    """Hot-plugged and unplugged; each interface has a wire of its own."""
    name = virt_handler.secondary("blue")
    with watching(machine.place), veth(machine.netns, "10.78.0.2/24", name):
        virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        second = virt_handler.bridge_binding(machine.netns, name, number=1)
        machine.await_wires(("mirror", ""), ("mirror", ""))
        assert f"device {second.names.nic}" in machine.filters(second.names.tap)
        virt_handler.unplug(second)
        machine.await_wires(("mirror", ""))
        assert machine.filters(second.names.nic) == ""
        assert f"ingress ffff: dev {second.names.nic}" not in machine.qdiscs()


def test_mtu(machine: Machine) -> None:
    """While the MTUs differ the bridge, which enforces the smaller one, has the frames."""
    with watching(machine.place):
        virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        run(["ip", "-n", machine.name, "link", "set", "tap0", "mtu", "1400"])
        machine.await_wires(("off", "mtu-differs"))
        assert machine.filters("tap0") == ""
        run(["ip", "-n", machine.name, "link", "set", "eth0-nic", "mtu", "1400"])
        machine.await_wires(("mirror", ""))


def test_repairs_what_others_remove(machine: Machine) -> None:
    """Somebody deletes our qdisc: it is noticed and made again."""
    with watching(machine.place):
        virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        run(["tc", "-n", machine.name, "qdisc", "del", "dev", "tap0", "ingress"])
        wait_until(lambda: "eth0-nic" in machine.filters("tap0"), "our rules again", 20)


def test_masquerade_is_left_alone(machine: Machine) -> None:
    """NAT lies between bridge and pod interface: nothing to short-circuit, nothing touched."""
    virt_handler.masquerade_binding(machine.netns)
    before = machine.qdiscs(), machine.offloads("eth0"), machine.offloads("tap0")
    with watching(machine.place):
        machine.await_wires(("off", "no-nic"))
        found = taps.describe(machine.place, vm_state.by_cookie(machine.place)[machine.cookie])
        assert (found["state"], found["reason"]) == ("off", "no-nic")
    assert (machine.qdiscs(), machine.offloads("eth0"), machine.offloads("tap0")) == before


def test_a_pod_that_only_claims_to_be_one(machine: Machine) -> None:
    """No bridge of KubeVirt's, no wire: it keeps everything as it is."""
    before = machine.qdiscs(), machine.offloads("eth0")
    with watching(machine.place):
        wait_until(lambda: vm_state.known(machine.place), "a first look", 20)
        found = taps.describe(machine.place, vm_state.by_cookie(machine.place)[machine.cookie])
        assert (found["wires"], found["reason"]) == ([], "no-bridge")
    assert (machine.qdiscs(), machine.offloads("eth0")) == before


@pytest.mark.parametrize("mode", ["mirror", "redirect", "peer"])
@pytest.mark.parametrize("checksum", ["skip", "software"])
def test_withdraw_restores(machine: Machine, mode: str, checksum: str) -> None:
    """After DEL everything is as virt-handler left it, whatever the modes were."""
    virt_handler.bridge_binding(machine.netns)

    def facts() -> tuple[Any, ...]:
        host = json.loads(run(["ethtool", "--json", "-k", machine.host]).stdout)
        devices = ("tap0", "eth0-nic", "k6t-eth0")
        return machine.qdiscs(), host, *(machine.offloads(device) for device in devices)

    before = facts()
    machine.record(mode=mode, checksum=checksum, insist=True)
    assert taps.attend_all(machine.place) == {}
    expected = "redirect" if (mode, checksum) == ("peer", "software") else mode
    assert [wire[0] for wire in machine.wires()] == [expected]
    assert facts() != before
    with vm_state.lock(machine.place):
        vm.withdraw(machine.place, machine.cookie, machine.netns)
        vm.withdraw(machine.place, machine.cookie, machine.netns)
    assert facts() == before
    assert vm_state.known(machine.place) == set()


def test_modes_in_turn(machine: Machine) -> None:
    """Each live switch takes effect at once; checksum modes undo each other."""
    virt_handler.bridge_binding(machine.netns)
    before = machine.offloads("eth0-nic")
    for mode, checksum in (
        ("mirror", "software"),
        ("peer", "skip"),
        ("off", "skip"),
        ("redirect", "keep"),
        ("mirror", "keep"),
    ):
        vm_state.choose(machine.place, machine.cookie, {"mode": mode, "checksum": checksum})
        assert taps.attend_all(machine.place) == {}
        reason = "operator" if mode == "off" else ""
        assert machine.wires() == [(mode, reason)]
        now = machine.offloads("eth0-nic")
        assert now["tx-checksum-ip-generic"] == (checksum != "software")
        if checksum != "software":
            assert now == before
        # Looking again changes nothing.
        known = vm_state.read(machine.place, machine.cookie)
        taps.attend_all(machine.place)
        assert vm_state.read(machine.place, machine.cookie) == known


def test_pause(machine: Machine) -> None:
    """Frames pass the bridge until further notice, watcher or not."""
    with watching(machine.place):
        virt_handler.bridge_binding(machine.netns)
        machine.await_wires(("mirror", ""))
        assert taps.pause(machine.place, paused=True) == {}
        assert machine.wires() == [("off", "paused")]
        assert machine.filters("tap0") == ""
        time.sleep(0.3)
        assert machine.filters("tap0") == ""
        assert taps.pause(machine.place, paused=False) == {}
        assert machine.wires() == [("mirror", "")]


def test_another_namespace_at_the_path(machine: Machine) -> None:
    """A path that leads elsewhere by now: that namespace is not touched."""
    machine.cookie += 1
    machine.record()
    virt_handler.bridge_binding(machine.netns)
    assert taps.attend_all(machine.place) == {}
    assert machine.filters("tap0") == ""
    with vm_state.lock(machine.place):
        vm.withdraw(machine.place, machine.cookie, machine.netns)


@pytest.mark.parametrize("damage", ["", "{", '{"made": [1, "x"], "changes": [{}, 7], "wires": 3}'])
def test_damaged_state(machine: Machine, damage: str) -> None:
    """A state file that cannot be read costs nothing but what was in it."""
    virt_handler.bridge_binding(machine.netns)
    taps.attend_all(machine.place)
    Path(machine.place.vms_dir, f"{machine.cookie}.json").write_text(damage)
    assert taps.attend_all(machine.place) == {}
    assert machine.wires() == [("mirror", "")]


def test_busy_pod_does_not_keep_the_watcher_busy(machine: Machine) -> None:
    """A pod whose links change all the time costs a few looks a second, and the others theirs."""
    with watching(machine.place) as pid, namespace() as path, veth(path, "10.79.0.2/24") as host:
        other = Machine(machine.place, path, host)
        other.record("c2")
        wait_until(lambda: len(vm_state.known(machine.place)) == 2, "first looks", 20)
        flap = "while :; do ip link set lo mtu 65535; ip link set lo mtu 65536; done"
        noisy = subprocess.Popen([*inside(machine.netns), "sh", "-c", flap], start_new_session=True)
        try:
            time.sleep(3)
            before, start = _cpu(pid), time.monotonic()
            time.sleep(3)
            share = (_cpu(pid) - before) / (time.monotonic() - start)
            virt_handler.bridge_binding(path)
            other.await_wires(("mirror", ""))
        finally:
            os.killpg(noisy.pid, signal.SIGKILL)
            noisy.wait()
        assert share < min(0.15 * PATIENCE, 0.9), f"{share:.0%} of a CPU"


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_unload_and_load(machine: Machine) -> None:
    """Off with all that was changed, watcher included, and on again."""
    virt_handler.bridge_binding(machine.netns)
    before = machine.offloads("eth0-nic")
    machine.record(checksum="software", insist=True)
    environ = {
        **os.environ,
        "NEARPATH_RUN_DIR": machine.place.run_dir,
        "NEARPATH_PIN_DIR": machine.place.pin_dir,
    }

    def cli(*words: str) -> None:
        run([sys.executable, MAIN, *words], env=environ, timeout=60)

    try:
        cli("load")
        wait_until(lambda: watch.running(machine.place) > 0, "a watcher", 20)
        machine.await_wires(("mirror", ""))
        first = watch.running(machine.place)
        cli("load")  # as after an upgrade
        wait_until(lambda: watch.running(machine.place) not in {0, -1, first}, "another one", 20)
        cli("unload")
        assert machine.wires() == [("off", "unloaded-by-operator")]
        assert machine.filters("tap0") == ""
        assert machine.offloads("eth0-nic") == before
        assert not watch.running(machine.place)
        cli("load")
        machine.await_wires(("mirror", ""))
    finally:
        cli("unload")
