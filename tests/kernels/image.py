"""What is in a guest: programs, kernel modules, Python with pytest, and the project.

Add to the lists when a test needs more. A program that is not on this machine is left out: the
test that wants it fails and names it, in the guest as here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import os
import re
import secrets
import shlex
import shutil
import sysconfig
import tempfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import CommandError, require, run

from .archive import Archive
from .packages import cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"

# busybox has the rest (sh, mount, ps, ...). Programs of a path or a name; with libraries.
PROGRAMS = (
    *("ip", "ss", "tc", "nft", "nsenter", "unshare", "ethtool", "conntrack", "ipset", "strace"),
    *("iptables", "iptables-save", "iptables-restore"),
    *("ip6tables", "ip6tables-save", "ip6tables-restore"),
    *("modprobe", "haproxy", "setpriv", "tcpdump", "nice", "taskset", "timeout"),
    "libbpf.so.1",
)
# Loaded by other names or by dlopen(3); patterns.
FILES = (
    "/usr/lib/*-linux-gnu/xtables/*.so",
    "/etc/protocols",
    "/etc/services",
    "/etc/iproute2/rt_*s",
)
# Kernel modules below kernel/, which modprobe loads when somebody uses them; dependencies too.
MODULES = (
    "net/netfilter/*",
    "net/ipv4/*",
    "net/ipv6/*",
    "net/bridge/*",
    "net/sched/*",
    "net/tls/*",
    "net/8021q/*",
    "net/802/*",
    "net/mptcp/*",
    "net/unix/*",
    "net/packet/*",
    "crypto/*",
    "arch/x86/crypto/*",
    "drivers/net/dummy.ko*",
    "drivers/net/ifb.ko*",
    "drivers/net/tun.ko*",
    "drivers/net/veth.ko*",
    "drivers/net/macvlan.ko*",
    "drivers/net/vxlan/*",
    "drivers/net/ipvlan/*",
)
# Distributions of our own Python environment.
PACKAGES = (
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest_timeout"),
    *("hypothesis", "sortedcontainers", "rich", "markdown_it_py", "mdurl"),
    *("pyroute2", "scapy"),
)
# Of the project, with what the tests read besides. Compiled modules save seconds.
PROJECT = (
    "pyproject.toml",
    "bpf/*.[ch]",
    "bpf/build/*.bpf.o",
    # Of helpers/streams.py and torture/volume.py; a guest has no compiler.
    "build/streams",
    "build/torture/volume",
    "cni-plugin/**/*.py*",
    "tests/*.py",
    "tests/__pycache__/*",
    "tests/helpers/**/*",
    "tests/integration/**/*",
    "tests/kernels/**/*.py*",
    "tests/torture/**/*",
)
# Parts of the standard library that no test in a guest wants.
_UNWANTED = re.compile(r"(config-|dist-packages|test$|idlelib|lib2to3|tkinter|turtle|ensurepip)")
_KEPT = 86400  # seconds for which an unused image is kept
_ACCOUNTS = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nproxy:x:1337:1337::/:/bin/sh\n"
_GROUPS = "root:x:0:\nnogroup:x:65534:\nproxy:x:1337:\n"

_ASK_PYTHON = """\
import json, sys, sysconfig
print(json.dumps([sysconfig.get_path("stdlib"), f".{sys.implementation.cache_tag}."]))
"""

# bpffs is not mounted: that is nearpath's own work.
_INIT = """\
#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/busybox HOME=/ PYTHONDONTWRITEBYTECODE=1
/usr/bin/busybox --install -s /busybox
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# udev makes it elsewhere; opening it loads the module.
mkdir /dev/net
mknod /dev/net/tun c 10 200
ulimit -n 65536
ip link set lo up
stty -F /dev/ttyS1 raw -echo
# Open all the time: the last close of a serial port throws away what it has not sent yet.
exec 3>/dev/ttyS1
cd /nearpath
{command} </dev/null >&2
sleep 0.1
poweroff -f
"""


def machine(tree: Path) -> Path:
    """The part of this machine and of an unpacked kernel: a file, kept until that changes."""
    require("ldd", "busybox", "depmod", "modprobe")
    archive = Archive()
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.link(f"/{name}", f"usr/{name}")
    for name in ("proc", "sys", "dev", "run", "tmp", "busybox", "usr/bin", "usr/sbin", "var/tmp"):
        archive.directory(name)
    archive.text("/etc/passwd", _ACCOUNTS)
    archive.text("/etc/group", _GROUPS)
    archive.text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
    # These make devices of their own when they are loaded, which look like a test's leftovers.
    archive.text("/etc/modprobe.d/none.conf", "options dummy numdummies=0\noptions ifb numifbs=0\n")
    archive.file(_found("busybox"), "/usr/bin/busybox")
    for pattern in FILES:
        for name in glob.glob(pattern):
            archive.file(name)
    archive.programs(filter(None, map(_found, PROGRAMS)))
    _add_python(archive)
    digest = hashlib.sha256(f"{archive.digest()} {MODULES}".encode()).hexdigest()[:16]
    kept = cache() / f"{tree.name}.{digest}.cpio"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as aside:
            for module in _modules(tree, Path(aside)):
                archive.file(module, f"/{module.relative_to(aside)}")
            written = kept.with_suffix(f".{secrets.token_hex(4)}")
            written.write_bytes(archive.packed())
        written.rename(kept)
    kept.touch()
    for other in cache().glob("linux-image-*.cpio"):
        with suppress(FileNotFoundError):  # somebody else has removed it
            if other.stat().st_mtime < kept.stat().st_mtime - _KEPT:
                other.unlink()
    return kept


def project(command: Sequence[str], environ: Mapping[str, str]) -> bytes:
    """The project's part, and what to run in /nearpath; descriptor 3 is the second serial port.

    Args:
        command: program and arguments.
        environ: variables to set.
    """
    archive = Archive()
    for path in sorted({path for pattern in PROJECT for path in ROOT.glob(pattern)}):
        if path.is_file():
            archive.file(path, f"/nearpath/{path.relative_to(ROOT)}")
    words = ["env", *(f"{name}={value}" for name, value in environ.items()), *command]
    archive.text("/init", _INIT.replace("{command}", shlex.join(words)), 0o755)
    return archive.packed()


def _found(program: str) -> str:
    """Path of a program, or of a library in the loader's cache; empty if it is not there."""
    places = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if ".so" not in program:
        return shutil.which(program, path=places) or ""
    for line in run(["env", f"PATH={places}", "ldconfig", "-p"]).stdout.splitlines():
        if line.strip().startswith(f"{program} ") and "x86-64" in line:
            return line.rpartition(" => ")[2]
    return ""


def _add_python(archive: Archive) -> None:
    """The interpreter, its standard library, and PACKAGES in /nearpath/site."""
    library, tag = json.loads(run([PYTHON, "-I", "-S", "-c", _ASK_PYTHON]).stdout)
    archive.programs([PYTHON])
    extensions = []
    for path in _python_files(Path(library), tag):
        if path.suffix == ".so":
            extensions.append(str(path))
        else:
            archive.file(path)
    archive.programs(extensions)
    site = Path(sysconfig.get_path("purelib"))
    for package in PACKAGES:
        (record,) = site.glob(f"{package}-*.dist-info/RECORD")
        # Lines like "pluggy/_hooks.py,sha256=…,1234", or "pytest_timeout.py,…".
        names = {line.partition(",")[0].split("/")[0] for line in record.open(encoding="utf-8")}
        for name in names - {"..", "__pycache__"}:
            for path in _python_files(site / name, tag):
                archive.file(path, f"/nearpath/site/{path.relative_to(site)}")
                if path.suffix == ".so":
                    archive.programs([str(path)])


def _python_files(top: Path, tag: str) -> Iterator[Path]:
    for path in [top, *top.rglob("*")]:
        inside = path.relative_to(top).parts
        stale = "__pycache__" in inside and tag not in path.name
        if path.is_file() and not stale and not any(_UNWANTED.match(part) for part in inside):
            yield path


def _modules(tree: Path, aside: Path) -> Iterator[Path]:
    """MODULES with what they depend on and what modprobe wants to know, all below ``aside``."""
    (home,) = tree.glob("lib/modules/*")
    version = home.name
    run(["depmod", "-b", str(tree), version], timeout=120)
    depends = {}
    for line in (home / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        depends[name] = others.split()
    wanted = {name for name in depends for pattern in MODULES if fnmatch(name, f"kernel/{pattern}")}
    if not wanted:
        raise CommandError(f"{home} has none of the kernel modules {MODULES}")
    there = aside / "lib/modules" / version
    for name in wanted.union(*(depends[name] for name in wanted)):
        content = (home / name).read_bytes()
        target = there / name.removesuffix(".xz")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(lzma.decompress(content) if name.endswith(".xz") else content)
    for path in home.glob("modules.*"):
        if path.name.startswith(("modules.builtin", "modules.order")):
            shutil.copy(path, there)
    run(["depmod", "-b", str(aside), version], timeout=120)
    yield from (path for path in there.rglob("*") if path.is_file())
