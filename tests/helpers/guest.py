"""A virtual machine on a pod's tap: qemu, a stock Debian kernel, virtio-net, busybox.

It runs inside the launcher's network namespace, as libvirt's qemu does, and opens the tap that is
there. What a test wants of it goes over a virtio port, never over its network:

    with guest.started(bound, directory) as vm:
        vm.wait()                                  until it has booted
        vm.dhcp()                                  the lease that the pod's server gives
        vm.run("ip neigh")                         a shell command, as root
        vm.talk("tcp", "10.9.0.3", count=100)      see talk.py; its server runs all the time

Emulated (TCG): stock kernels do not boot under every host's KVM.
"""

from __future__ import annotations

import base64
import functools
import json
import lzma
import socket
import stat
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import talk
from helpers.commands import PATIENCE, CommandError, kill_group, require
from helpers.netns import inside
from kernels.archive import Archive
from kernels.packages import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from helpers.talk import Talk
    from helpers.virt_handler import Bound

# The newer of the kernels that tests/kernels knows.
_SERIES = "6.12"
_MEMORY = 256  # MiB
_SHOWN = 3000  # characters of the console's end in an error
_BOOT = 90  # seconds; a few on an idle machine
# In the order of their dependencies; virtio itself, its PCI bus and ports are built in.
_MODULES = ("net/core/failover.ko", "drivers/net/net_failover.ko", "drivers/net/virtio_net.ko")

_DHCP_SCRIPT = """\
#!/bin/sh
case "$1" in
deconfig) ip link set "$interface" up ;;
bound|renew)
    ip link set "$interface" mtu "${mtu:-1500}"
    ip -4 addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    [ -z "$router" ] || ip route replace default via "$router"
    echo "$ip/$mask ${mtu:-0} ${router:-none} ${lease:-0}" >/tmp/lease ;;
esac
"""

# A command is a number and base64; its answer the number, status, and what it printed in base64.
_INIT = """\
#!/bin/busybox sh
export PATH=/bin HOME=/
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
# Addresses are usable at once.
for which in all default; do echo 0 >"/proc/sys/net/ipv6/conf/$which/accept_dad"; done
for module in {modules}; do insmod "/$module" || poweroff -f; done
ip link set lo up
talk serve {port} >/tmp/serve 2>&1 &
until grep -q ready /tmp/serve; do sleep 0.05; done
exec 3<>/dev/vport{number}p1
echo ready >&3
while read -r number line <&3; do
    echo "$line" | base64 -d >/tmp/command
    sh /tmp/command </dev/null >/tmp/said 2>&1 3<&-
    echo "$number $? $(base64 /tmp/said | tr -d '\\n')" >&3
done
poweroff -f
"""


@dataclass(frozen=True)
class Lease:
    """What the guest got by DHCP: address with prefix length, MTU, router, seconds."""

    address: str
    mtu: int
    router: str
    seconds: int


@functools.cache
def _image() -> tuple[Path, bytes]:
    """The kernel, and the initramfs; asking apt for it takes a second."""
    tree = kernel(_SERIES)
    (home,) = tree.glob("lib/modules/*")
    archive = Archive()
    for name in ("proc", "sys", "dev", "tmp"):
        archive.directory(name)
    archive.add("/bin/busybox", stat.S_IFREG | 0o755, Path("/bin/busybox").resolve())
    archive.add("/bin/talk", stat.S_IFREG | 0o755, talk.build())
    archive.text("/dhcp", _DHCP_SCRIPT, 0o755)
    for module in _MODULES:
        packed = home / "kernel" / f"{module}.xz"
        content = (
            lzma.decompress(packed.read_bytes())
            if packed.exists()
            else (home / "kernel" / module).read_bytes()
        )
        archive.add(Path(module).name, stat.S_IFREG | 0o644, content)
    modules = " ".join(Path(module).name for module in _MODULES)
    archive.text("/init", _INIT.format(modules=modules, port=talk.PORT, number=0), 0o755)
    (vmlinuz,) = tree.glob("boot/vmlinuz-*")
    return vmlinuz, archive.packed()


class _Lines:
    """A line at a time from a qemu that connects to us."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._socket: socket.socket | None = None
        self._unread = b""

    def send(self, line: str) -> None:
        assert self._socket is not None, "nothing has been received yet"
        self._socket.sendall(line.encode() + b"\n")

    def receive(self, timeout: float) -> str:
        """The next line.

        Raises:
            TimeoutError: there is none.
            CommandError: qemu is gone.
        """
        end = time.monotonic() + timeout
        if self._socket is None:
            self._listener.settimeout(timeout)
            self._socket, _ = self._listener.accept()
        while b"\n" not in self._unread:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            data = self._socket.recv(65536)
            if not data:
                raise CommandError("the emulator is gone")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()


class Guest:
    """A virtual machine; made by `started()`."""

    def __init__(self, bound: Bound, directory: Path, stack: ExitStack) -> None:
        self._bound = bound
        self._directory = directory
        self._console = directory / "console"
        self._agent = self._listen("agent", stack)
        self._monitor = self._listen("monitor", stack)
        self._greeted = False
        self._commands = 0
        self._process = self._start()
        stack.callback(kill_group, self._process)

    def _listen(self, name: str, stack: ExitStack) -> _Lines:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._directory / name))
        listener.listen(1)
        lines = _Lines(listener)
        stack.callback(lines.close)
        return lines

    def _start(self) -> subprocess.Popen[str]:
        require("qemu-system-x86_64", "setpriv")
        vmlinuz, archive = _image()
        initrd = self._directory / "initrd"
        initrd.write_bytes(archive)
        bound = self._bound
        arguments = (
            "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable "
            # Self-tests take a fifth of the time to boot.
            "rcupdate.rcu_cpu_stall_timeout=300 cryptomgr.notests"
        )
        command = [
            # A killed test run takes its guests with it.
            *("setpriv", "--pdeathsig", "KILL", *inside(bound.netns)),
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(_MEMORY)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self._console}"),
            *("-chardev", f"socket,id=agent,path={self._directory}/agent"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
            *("-chardev", f"socket,id=monitor,path={self._directory}/monitor"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-netdev", _netdev(bound, 0), "-device", _nic(bound, 0)),
            *("-kernel", str(vmlinuz), "-initrd", str(initrd), "-append", arguments),
        ]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    # --- inside -------------------------------------------------------------

    def wait(self) -> None:
        """Wait until it has booted.

        Raises:
            CommandError: it did not; with the end of its console.
        """
        said = self._receive(_BOOT)
        if said != "ready":
            raise CommandError(f"the guest says {said!r}")

    def _receive(self, timeout: float) -> str:
        try:
            return self._agent.receive(timeout * PATIENCE)
        except (TimeoutError, CommandError) as error:
            console = self._console
            shown = console.read_text(errors="backslashreplace") if console.exists() else ""
            trouble = ""
            if self._process.poll() is not None and self._process.stderr is not None:
                trouble = self._process.stderr.read()
            raise CommandError(f"{error!r}: {trouble}\n{shown[-_SHOWN:]}") from error

    def run(self, command: str, *, timeout: float = 30, check: bool = True) -> str:
        """Run a shell command in it; what it printed on stdout and stderr.

        Raises:
            CommandError: it failed (with ``check``) or took too long.
        """
        self._commands += 1
        self._agent.send(f"{self._commands} {base64.b64encode(command.encode()).decode()}")
        number = 0
        while number != self._commands:  # late answers of those that took too long
            first, status, encoded = self._receive(timeout).split(" ")
            number = int(first)
        said = base64.b64decode(encoded).decode(errors="backslashreplace")
        if check and status != "0":
            raise CommandError(f"`{command}` in the guest ended with status {status}\n{said}")
        return said

    def dhcp(self, interface: str = "eth0") -> Lease:
        """Ask for an address, for the first time or again."""
        self.run(f"rm -f /tmp/lease; ip link set {interface} up")
        self.run(f"udhcpc -i {interface} -n -q -f -t 10 -T 2 -s /dhcp", timeout=40)
        address, mtu, router, seconds = self.run("cat /tmp/lease").split()
        prefix = address.partition("/")[0], _prefix(address.partition("/")[2])
        return Lease(f"{prefix[0]}/{prefix[1]}", int(mtu), router, int(seconds))

    def add_address(self, address: str, interface: str = "eth0") -> None:
        """Give it an IPv6 address with prefix length; bridge binding has no DHCP for that."""
        self.run(f"ip -6 addr add {address} dev {interface}")

    def talk(self, kind: str, address: str, **plan: int) -> Talk:
        """Converse from inside; see `talk.words`."""
        (talked,) = self.talks(talk.words(kind, address, **plan))
        return talked

    def talks(self, *conversations: Sequence[str]) -> list[Talk]:
        """Several conversations one after the other; see `talk.words`."""
        command = "; ".join(" ".join(["talk", *words]) for words in conversations)
        said = self.run(command, timeout=60).splitlines()
        if len(said) != len(conversations):
            raise CommandError(f"`{command}` in the guest said {said}")
        return [talk.parsed(line) for line in said]

    # --- its hardware -------------------------------------------------------

    def command(self, execute: str, **arguments: object) -> dict[str, Any]:
        """A command of qemu's monitor (QMP); events until its answer are passed over."""
        if not self._greeted:
            self._monitor.receive(10 * PATIENCE)
            self._greeted = True
            self.command("qmp_capabilities")
        self._monitor.send(json.dumps({"execute": execute, "arguments": arguments}))
        while True:
            said: dict[str, Any] = json.loads(self._monitor.receive(10 * PATIENCE))
            if "error" in said:
                raise CommandError(f"{execute}: {said['error']}")
            if "return" in said:
                return said

    def unplug(self, number: int = 0) -> None:
        """Take a NIC out, and let go of its tap."""
        self.command("device_del", id=f"nic{number}")
        while json.loads(self._monitor.receive(30 * PATIENCE)).get("event") != "DEVICE_DELETED":
            pass
        self.command("netdev_del", id=f"net{number}")

    def plug(self, bound: Bound, number: int = 0) -> None:
        """Put a NIC in, on the tap that is there now; the guest calls it ``eth<number>``."""
        kind, *options = _netdev(bound, number).split(",")
        self.command("netdev_add", type=kind, **dict(_option(option) for option in options))
        kind, *options = _nic(bound, number).split(",")
        self.command("device_add", driver=kind, **dict(_option(option) for option in options))
        self.run(f"until [ -e /sys/class/net/eth{number} ]; do sleep 0.1; done")


def _netdev(bound: Bound, number: int) -> str:
    """The host's side of a NIC, as qemu's command line wants it."""
    several = f",queues={bound.queues}" if bound.queues > 1 else ""
    tap = f"tap,id=net{number},ifname={bound.names.tap},script=no,downscript=no"
    return f"{tap},vhost=off{several}"


def _nic(bound: Bound, number: int) -> str:
    """The guest's side of a NIC."""
    several = f",mq=on,vectors={2 * bound.queues + 2}" if bound.queues > 1 else ""
    device = f"virtio-net-pci,id=nic{number},netdev=net{number},mac={bound.mac}"
    return f"{device},romfile={several}"


def _option(text: str) -> tuple[str, object]:
    """An option of qemu's command line, as its monitor wants it."""
    name, _, value = text.partition("=")
    if name in {"queues", "vectors"}:
        return name, int(value)
    if name in {"vhost", "mq"}:
        return name, value == "on"
    return name, value


def _prefix(mask: str) -> int:
    """Prefix length of a mask, or the prefix length itself."""
    if "." not in mask:
        return int(mask)
    return int.from_bytes(socket.inet_aton(mask), "big").bit_count()


@contextmanager
def started(bound: Bound, directory: Path) -> Iterator[Guest]:
    """A guest that boots, on the tap of a pod; killed when the block ends.

    Call it from the main thread, for it dies with the thread that has started it.

    Args:
        bound: its tap is there.
        directory: to put a directory for it into, whose name must be short (Unix sockets).
    """
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-", dir=directory))
        yield Guest(bound, Path(work), stack)
