"""Full maps: what does not fit takes the kernel path, is counted, and room is used again."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import select
import socket
import struct
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.commands import run, wait_until
from helpers.netns import inside
from nearpath import state
from nearpath.cni import commands
from nearpath.datapath import loader, settings, sizes, tables
from nearpath.datapath.maps import Descriptor, Map
from nearpath.errors import BpfError
from nearpath.kernel import netns
from nearpath.lanes import socket as lane
from nearpath.node import register

from .conftest import PORT, TIMEOUT, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from nearpath.place import Place

    from .conftest import Pod

    Pair = tuple[socket.socket, socket.socket]
    Limited = Callable[..., Lab]

SERVER = "10.77.0.2"


@pytest.fixture
def limited(place: Place, pods: tuple[Pod, Pod], monkeypatch: pytest.MonkeyPatch) -> Limited:
    """Load the datapath with maps of these sizes; pods and settings as in the fixture lab."""

    def load(**most: int) -> Lab:
        monkeypatch.setattr(sizes, "of_maps", lambda _: most)
        monkeypatch.setattr(sizes, "_NAMES", tuple(most))
        loader.ensure(place)
        settings.write(place, revalidate_ms=0, probation=0, careful=0)
        lab = Lab(place, *pods)
        lab.register()
        return lab

    return load


def entries(place: Place, name: str) -> int:
    """Entries of a map."""
    with Map.pinned_unknown(f"{place.layout_dir}/{name}") as table:
        return len(list(table.keys()))


def most_entries(place: Place, name: str) -> int:
    """Entries that a map has room for."""
    with Map.pinned_unknown(f"{place.layout_dir}/{name}") as table:
        return table.most_entries()


def assert_talks(pair: Pair) -> None:
    """A question, an answer."""
    client, server = pair
    for sender, reader in ((client, server), (server, client)):
        word = struct.pack("=QQ", id(pair), sender.fileno())
        sender.sendall(word)
        assert reader.recv(100) == word


def connect(lab: Lab, count: int, stack: ExitStack) -> list[Pair]:
    """Connections from left to right that last as long as the stack."""
    pairs = []
    with lab.right.listen() as listener:
        for _ in range(count):
            client = stack.enter_context(lab.left.connect(SERVER))
            server, _ = listener.accept()
            server.settimeout(TIMEOUT)
            pairs.append((client, stack.enter_context(server)))
    return pairs


def close(pairs: list[Pair]) -> None:
    for client, server in pairs:
        client.close()
        server.close()


# -- connections, sockets --------------------------------------------------------------------


def test_connections_beyond_the_limit(place: Place, pods: tuple[Pod, Pod]) -> None:
    """The smallest node that can be configured, with more connections than it has room for."""
    loader.ensure(place, sizes.LEAST)
    settings.write(place, revalidate_ms=0, probation=0, careful=0)
    lab = Lab(place, *pods)
    lab.register()
    with ExitStack() as stack:
        pairs = connect(lab, sizes.LEAST + 40, stack)
        assert lab.connections == sizes.LEAST
        assert lab.reason("map_full") == 40
        for pair in pairs:
            assert_talks(pair)
        assert (lab.redirected, lab.kernel) == (2 * sizes.LEAST, 0)
        close(pairs[:30])
        wait_until(lambda: lab.connections == sizes.LEAST - 30, "room in the map")
        for pair in connect(lab, 31, stack):
            assert_talks(pair)
        assert lab.reason("map_full") == 41
        assert lab.connections == sizes.LEAST
        assert lab.redirected == 2 * sizes.LEAST + 60
    wait_until(lambda: entries(place, "connections") == 0, "all connections to be forgotten")
    assert entries(place, "sockets") == 0


def test_sockets_beyond_the_limit(limited: Limited) -> None:
    """The last client fits and its server does not: neither may wait for the other."""
    lab = limited(half_open=64, sockets=11, connections=64)
    with ExitStack() as stack:
        pairs = connect(lab, 8, stack)
        assert lab.connections == 5
        # The sixth server and the clients after it.
        assert lab.reason("map_full") == 3
        for pair in pairs:
            assert_talks(pair)
        assert lab.redirected == 10
        assert (lab.kernel, lab.reason("peer_not_joined")) == (1, 1)
        close(pairs[:1])
        wait_until(lambda: lab.connections == 4, "room in the map")
        (pair,) = connect(lab, 1, stack)
        assert_talks(pair)
        assert lab.redirected == 12
    wait_until(lambda: entries(lab.place, "sockets") == 0, "all sockets to be gone")
    assert entries(lab.place, "connections") == 0


# -- half_open -------------------------------------------------------------------------------


# A client that never sees the SYN-ACK.
_HOLD = """
add table inet hold
add chain inet hold input { type filter hook input priority 0; }
add rule inet hold input tcp flags & (syn | ack) == (syn | ack) drop
"""


def test_more_handshakes_than_entries(limited: Limited) -> None:
    """Those whose entry was overwritten stay on the kernel path; the next ones pair."""
    room, handshakes = 64, 300
    lab = limited(half_open=room, sockets=4096, connections=2048)
    run([*inside(lab.left.netns), "nft", _HOLD])
    run([*inside(lab.right.netns), "sysctl", "-qw", "net.ipv4.tcp_max_syn_backlog=1024"])
    with ExitStack() as stack:
        listener = stack.enter_context(lab.right.listen())
        listener.listen(1024)
        clients = {}
        for client in (stack.enter_context(_calling(lab)) for _ in range(handshakes)):
            clients[client.getsockname()] = client
        wait_until(lambda: entries(lab.place, "half_open") >= room // 2, "the map to fill up")
        run([*inside(lab.left.netns), "nft", "delete table inet hold"])
        pairs = []
        for _ in range(handshakes):
            server, address = listener.accept()
            server.settimeout(TIMEOUT)
            client = clients.pop(address)
            client.settimeout(TIMEOUT)
            pairs.append((client, stack.enter_context(server)))
        listener.close()
        for pair in pairs:
            assert select.select([], [pair[0]], [], TIMEOUT)[1]
            assert_talks(pair)
        paired = lab.connections
        print(f"{paired} of {handshakes} paired")
        assert paired <= room
        assert lab.redirected == 2 * paired
        assert lab.reason("joined") == 2 * paired
        # Client and server.
        assert lab.reason("peer_elsewhere") == 2 * (handshakes - paired)
        for pair in connect(lab, 20, stack):
            assert_talks(pair)
        assert lab.connections == paired + 20
    wait_until(lambda: entries(lab.place, "connections") == 0, "all connections to be forgotten")


def _calling(lab: Lab) -> socket.socket:
    """A client whose handshake is under way."""
    with netns.entered(lab.left.netns):
        client = socket.socket()
    client.setblocking(False)
    assert client.connect_ex((SERVER, PORT)) == errno.EINPROGRESS
    return client


# -- pods, counters --------------------------------------------------------------------------

FIRST_STRANGER = 1 << 40  # cookies that no namespace here has
MOST_PODS = 4096


def _fill_pods(place: Place, count: int) -> None:
    with Map.pinned(f"{place.layout_dir}/pods", 8, 4) as table:
        for number in range(count):
            table.update(struct.pack("=Q", FIRST_STRANGER + number), bytes(4))


def _plugin(place: Place, command: str, pod: Pod, **keys: object) -> dict[str, Any] | None:
    """A request to the plugin, here and with the real kernel; its answer."""
    config = {"cniVersion": "1.1.0", "name": "net", "type": "nearpath", "guards": "preferred"}
    if command == "ADD":
        config["prevResult"] = {"cniVersion": "1.1.0", "interfaces": [], "ips": []}  # type: ignore[assignment]
    environ = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.name,
        "CNI_NETNS": pod.netns,
        "CNI_IFNAME": "eth0",
        "NEARPATH_RUN_DIR": place.run_dir,
        "NEARPATH_PIN_DIR": place.pin_dir,
        "NEARPATH_CGROUP": place.cgroup,
    }
    read = io.BytesIO(json.dumps({**config, **keys}).encode()).read
    code, answer = commands.run(environ, read)
    assert code == 0, answer
    shown: dict[str, Any] | None = json.loads(answer) if answer else None
    return shown


def test_a_pod_that_does_not_fit_starts_on_the_kernel_path(
    place: Place, pods: tuple[Pod, Pod]
) -> None:
    """ADD prints prevResult, the record says why, and `load` takes the pod in later."""
    loader.ensure(place)
    _fill_pods(place, MOST_PODS - 1)
    lane.register(place, pods[0].cookie)
    with pytest.raises(BpfError, match="pods is full"):
        lane.register(place, pods[1].cookie)
    lane.register(place, pods[0].cookie)
    shown = _plugin(place, "ADD", pods[1])
    assert shown is not None
    assert shown["cniVersion"] == "1.1.0"
    record = state.load(place, pods[1].name, "eth0")
    assert record is not None
    assert state.lane_of(record) == ("off", "bpf")
    assert state.failures(place) == {"bpf": 1}
    assert "pods is full" in Path(place.log_file).read_text()
    assert not lane.is_registered(place, pods[1].cookie)
    lane.unregister(place, FIRST_STRANGER)
    assert register.recorded(place) == 1
    assert lane.is_registered(place, pods[1].cookie)
    _plugin(place, "DEL", pods[1])
    assert not lane.is_registered(place, pods[1].cookie)


def _update(table: Map, key: bytes) -> bool:
    """Add an entry; False if the kernel has to fetch memory for it first (not preallocated)."""
    try:
        table.update(key, bytes(table.value_size))
    except BpfError as error:
        if error.errno == errno.ENOMEM:
            return False
        raise
    return True


def test_without_room_for_counters_the_lane_works(lab: Lab) -> None:
    """What it does is not counted, but for the connection's own books."""
    path = f"{lab.place.layout_dir}/counters"
    strangers = [struct.pack("=Q", FIRST_STRANGER + number) for number in range(MOST_PODS + 1)]
    with Map.pinned(path, 8, 8 * len(tables.COUNTERS), per_cpu=True) as table:
        for key in strangers:
            wait_until(functools.partial(_update, table, key), "memory for values of all CPUs")
        with pytest.raises(BpfError, match="counters is full"):
            _update(table, bytes(8))
    pair = lab.pair()
    with pair[0], pair[1]:
        for _ in range(10):
            assert_talks(pair)
        (connection,) = tables.paired(lab.place)
        assert connection.redirected_messages == (10, 10)
        assert lab.redirected == 0
        # The counts of the pods that are gone need an entry too; deleting makes room first.
        for number in range(3):
            lane.unregister(lab.place, FIRST_STRANGER + number)
    pair = lab.pair()
    with pair[0], pair[1]:
        assert_talks(pair)
    assert lab.redirected == 2


# -- readers ---------------------------------------------------------------------------------


def test_more_kinds_of_readers_than_entries(limited: Limited) -> None:
    """What was forgotten is learnt again, by a probation."""
    room, kinds, proven = 16, 60, 2
    lab = limited(half_open=64, sockets=256, connections=64, readers=room)
    settings.write(lab.place, probation=1, proven=proven)

    def ask(port: int, times: int) -> int:
        """Messages that were kept on the kernel path as a probation."""
        before = lab.reason("probation")
        with lab.right.listen(port=port) as listener:
            for _ in range(times):
                client = lab.left.connect(SERVER, port)
                server, _ = listener.accept()
                server.settimeout(TIMEOUT)
                with closing(client), closing(server):
                    for _ in range(3):
                        assert_talks((client, server))
        wait_until(lambda: lab.connections == 0, "the connections to be forgotten")
        return lab.reason("probation") - before

    learnt = 0
    for port in range(7000, 7000 + kinds):
        # Each processor forgets on its own, so one may forget what another has just learnt.
        probations = ask(port, proven + 2)
        learnt += probations == 2 * proven
        assert probations >= 2 * proven
        assert entries(lab.place, "readers") <= room
    assert learnt > kinds // 2
    # The first of them is long forgotten, the last is not.
    assert ask(7000, 1) == 2
    assert ask(7000 + kinds - 1, 1) == 0


# -- sizes -----------------------------------------------------------------------------------


def test_the_first_pod_decides_the_sizes(place: Place, pods: tuple[Pod, Pod]) -> None:
    """`maxConnections` of the ADD that loads; those of loaded maps stay as they are."""
    _plugin(place, "ADD", pods[0], maxConnections=3000)
    expected = {"half_open": 4096, "sockets": 6000, "connections": 3000}
    assert sizes.of_pinned(place) == expected
    _plugin(place, "ADD", pods[1], maxConnections=5000)
    assert sizes.of_pinned(place) == expected
    # An upgrade replaces the programs and keeps the maps.
    Path(place.digest_file).write_text("another build")
    assert loader.load(place, 7000)
    assert sizes.of_pinned(place) == expected
    settings.write(place, revalidate_ms=0, probation=0, careful=0)
    lab = Lab(place, *pods)
    pair = lab.pair()
    with pair[0], pair[1]:
        assert_talks(pair)
    assert lab.redirected == 2
    for pod in pods:
        _plugin(place, "DEL", pod)


def test_the_maps_take_less_than_half_a_percent_of_the_memory(place: Place) -> None:
    """Of which their sizes are derived, when nothing else is said."""
    loader.ensure(place)
    assert most_entries(place, "connections") == sizes.most_connections()
    total = 0
    for path in Path(place.layout_dir).iterdir():
        if path.name.startswith(("prog_", "link_")):
            continue
        with Descriptor.open_pinned(str(path)) as table:
            described = Path(f"/proc/self/fdinfo/{table.number}").read_text(encoding="ascii")
        (line,) = (line for line in described.splitlines() if line.startswith("memlock:"))
        total += int(line.split()[1])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"{total} bytes of {memory}")
    assert total < memory * 0.005
