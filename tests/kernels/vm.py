"""Stock Debian kernels in emulated machines: fetch one, boot it, run a script in it as root.

A kernel comes as a plain package through apt-get and is only unpacked, never installed. The
guest is one initramfs: busybox, this machine's /usr/bin/python3 with its standard library,
``ip``, libbpf, ``cni-plugin/`` and ``bpf/build/`` under /nearpath, and the script. The console
is the first serial port (ttyS0); what the script prints goes to the second one (ttyS1), so
that no kernel message can fall between its lines.

Emulated (TCG), for these kernels do not boot under every host's KVM, and no KVM is needed.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import secrets
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from helpers.commands import CommandError, require, run

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"

# Series to the package's name; the group is what newer packages have more of.
SERIES = {
    "6.1": r"linux-image-6\.1\.0-([0-9]+)-cloud-amd64",
    "6.12": r"linux-image-6\.12\.([0-9]+)\+deb12-cloud-amd64",
}

_MEMORY = 1024  # MiB
_END = "exit status of the script:"
_SHOWN = 6000  # characters of the console's end in an error
# Parts of the standard library that no script in a guest wants; they are three quarters of it.
_UNWANTED = re.compile(
    r"(config-|dist-packages|test|unittest|idlelib|lib2to3|tkinter|turtle|ensurepip|distutils"
    r"|pydoc|asyncio|xml|email|http|html|wsgiref|multiprocessing|concurrent|venv|sqlite3|curses"
    r"|zoneinfo|_pydecimal|__phello__)"
)
_UNWANTED_CODECS = re.compile(r"(cp\d|iso|mac|koi|big5|euc|gb|shift|johab|hz|tis|ptcp|kz|palmos)")

_ASK_PYTHON = """\
import json, sys, sysconfig
print(json.dumps({"stdlib": sysconfig.get_path("stdlib"),
                  "pyc": f".{sys.implementation.cache_tag}.pyc"}))
"""

_INIT = """\
#!/usr/bin/busybox sh
export PATH=/usr/bin:/usr/sbin:/busybox HOME=/ PYTHONPATH=/nearpath/cni-plugin
export PYTHONDONTWRITEBYTECODE=1
/usr/bin/busybox --install -s /busybox
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in /modules/*; do [ ! -e "$module" ] || insmod "$module"; done
ip link set lo up
stty -F /dev/ttyS1 raw -echo
# Open all the time: the last close of a serial port throws away what it has not sent yet.
exec 3>/dev/ttyS1
python3 -u /nearpath/script.py </dev/null >&3
echo "{end} $?" >&3
sleep 0.1
poweroff -f
"""


@dataclass(frozen=True)
class Outcome:
    """What a script did in a guest.

    Attributes:
        stdout: what it printed.
        status: its exit status.
        console: path of the console's log: kernel messages and the script's stderr.
        seconds: from the start of the emulator to its end.
    """

    stdout: str
    status: int
    console: Path
    seconds: float


def cache() -> Path:
    """Where unpacked kernels are kept: $NEARPATH_CACHE, or ~/.cache/nearpath."""
    return Path(os.environ.get("NEARPATH_CACHE") or Path.home() / ".cache/nearpath")


def _offered(pattern: re.Pattern[str]) -> list[str]:
    """Names of the packages of a series that apt can fetch."""
    found = run(["apt-cache", "search", "--names-only", f"^{pattern.pattern}$"])
    names = [line.split()[0] for line in found.stdout.splitlines() if line]
    return [name for name in names if pattern.fullmatch(name)]


def kernel(series: str) -> Path:
    """Directory of the newest unpacked kernel of a series (a key of SERIES).

    Without a source of packages the newest that was fetched earlier serves.

    Raises:
        CommandError: there is none, and none can be fetched.
    """
    require("apt-cache", "apt-get", "dpkg")
    pattern = re.compile(SERIES[series])
    names = _offered(pattern)
    if not names:  # perhaps only the lists are missing, as in images of containers
        run(["apt-get", "--quiet", "update"], timeout=180, check=False)
        names = _offered(pattern)
    problem = f"no configured source of packages has {pattern.pattern}"
    if names:
        try:
            return _fetch(max(names, key=lambda name: _age(pattern, name)))
        except CommandError as error:
            problem = str(error)
    earlier = [path for path in cache().glob("linux-image-*_*") if _age(pattern, path.name)]
    if not earlier:
        raise CommandError(f"{problem}; run `apt-get update`, or use Debian 12's sources")
    return max(earlier, key=lambda path: _age(pattern, path.name))


def _age(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.match(name)
    return int(match[1]) if match else 0


def _fetch(package: str) -> Path:
    """Download and unpack a package, unless this version of it is there already."""
    shown = run(["apt-cache", "show", "--no-all-versions", package]).stdout
    version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
    if version is None:
        raise CommandError(f"apt-cache names no version of {package}")
    target = cache() / f"{package}_{version[1].replace(':', '%3a')}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Aside and then renamed, for a run may be killed, and two may fetch at once.
    aside = target.with_name(f".{secrets.token_hex(4)}")
    try:
        aside.mkdir()
        download = ["apt-get", "--quiet", "download", f"{package}={version[1]}"]
        run(["env", f"--chdir={aside}", *download], timeout=180)
        (archive,) = aside.glob("*.deb")
        run(["dpkg", "-x", str(archive), str(aside / "tree")], timeout=120)
        try:
            (aside / "tree").rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


class _Initramfs:
    """A cpio archive in the format that the kernel unpacks (newc), in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", modified: int = 0) -> None:
        """Add an entry with its parent directories; a second one of the same name is ignored.

        Args:
            name: absolute path in the guest.
            mode: kind and permissions, as in ``st_mode``.
            data: content, or the target of a symbolic link.
            modified: seconds since the epoch; Python trusts its .pyc files by it.
        """
        name = name.strip("/")
        if name in self._names:
            return
        self._names.add(name)
        if "/" in name:
            self.add(name.rpartition("/")[0], stat.S_IFDIR | 0o755)
        self._write(name, mode, data, modified)

    def _write(self, name: str, mode: int, data: bytes, modified: int) -> None:
        path = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize dev(2) rdev(2) namesize check
        numbers = (len(self._parts) + 1, mode, 0, 0, 1, modified, len(data), 0, 0, 0, 0)
        header = "070701" + "".join(f"{number:08x}" for number in (*numbers, len(path), 0))
        for part in (header.encode() + path, data):
            self._parts.append(part + bytes(-len(part) % 4))

    def directory(self, name: str) -> None:
        """Add an empty directory."""
        self.add(name, stat.S_IFDIR | 0o755)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def file(self, source: str | Path, name: str = "") -> None:
        """Add a copy of a file of this machine; ``name``: its path if it is another there."""
        source = Path(source)
        info = source.stat()
        name = name or str(source)
        if re.match(r"/(bin|sbin|lib|lib64)/", name):
            name = f"/usr{name}"
        self.add(name, info.st_mode, source.read_bytes(), int(info.st_mtime))

    def program(self, path: str) -> None:
        """Add a program or library of this machine with the libraries that it needs."""
        self.file(path)
        for library in re.findall(r"(/\S+) \(0x", run(["ldd", path], check=False).stdout):
            self.file(library)

    def packed(self) -> bytes:
        """The whole archive, compressed."""
        self._write("TRAILER!!!", 0, b"", 0)
        return gzip.compress(b"".join(self._parts), compresslevel=1)


def _add_python(archive: _Initramfs) -> None:
    """Add the interpreter and what of its standard library a script may want."""
    asked = run([PYTHON, "-I", "-S", "-c", _ASK_PYTHON]).stdout
    facts = json.loads(asked)
    archive.program(PYTHON)
    library = Path(facts["stdlib"])
    for path in library.rglob("*"):
        inside = path.relative_to(library)
        codec = "encodings" in inside.parts and _UNWANTED_CODECS.match(path.name)
        if codec or any(_UNWANTED.match(part) for part in inside.parts):
            continue
        if "__pycache__" in path.parts and not path.name.endswith(facts["pyc"]):
            continue
        if path.suffix == ".so":
            archive.program(str(path))
        elif path.is_file():
            archive.file(path)


def _library(name: str) -> str:
    """Path of a shared library in the loader's cache."""
    shown = run(["env", "PATH=/usr/sbin:/sbin", "ldconfig", "-p"]).stdout
    for line in shown.splitlines():
        if line.strip().startswith(f"{name} ") and "x86-64" in line:
            return line.rpartition(" => ")[2]
    raise CommandError(f"{name} is not installed; run `make setup`")


def _modules(tree: Path, wanted: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """(name, content) of kernel modules with what they depend on, in the order to load them."""
    files = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for path in tree.glob("lib/modules/*/kernel/**/*.ko*")
    }
    ordered: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name not in files:
            raise CommandError(f"{tree} has no kernel module {name}")
        path = files[name]
        depends = run(["modinfo", "-F", "depends", str(path)]).stdout.strip()
        for other in filter(None, depends.split(",")):
            visit(other.replace("-", "_"))
        content = path.read_bytes()
        ordered[name] = lzma.decompress(content) if path.suffix == ".xz" else content

    for name in wanted:
        visit(name)
    return list(ordered.items())


def initramfs(tree: Path, script: Path, modules: tuple[str, ...]) -> bytes:
    """The guest's whole file system.

    Args:
        tree: an unpacked kernel; see kernel().
        script: the one to run.
        modules: kernel modules to load before it.
    """
    require("ldd", "ip", "busybox", "modinfo")
    archive = _Initramfs()
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.link(f"/{name}", f"usr/{name}")
    for name in ("proc", "sys", "dev", "run", "tmp", "busybox", "usr/bin", "usr/sbin"):
        archive.directory(name)
    archive.add("/init", stat.S_IFREG | 0o755, _INIT.replace("{end}", _END).encode())
    for number, (name, content) in enumerate(_modules(tree, modules)):
        archive.add(f"/modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, content)
    archive.file(shutil.which("busybox") or "", "/usr/bin/busybox")
    archive.program(shutil.which("ip") or "")
    archive.program(_library("libbpf.so.1"))
    _add_python(archive)
    objects = [*ROOT.glob("bpf/build/*.bpf.o")]
    if not objects:
        raise CommandError("there are no BPF objects; run `make bpf`")
    for path in [*(ROOT / "cni-plugin").rglob("*.py"), *objects]:
        archive.file(path, f"/nearpath/{path.relative_to(ROOT)}")
    for path in Path(__file__).parent.glob("guest_*.py"):
        archive.file(path, f"/nearpath/kernels/{path.name}")
    archive.file(script, "/nearpath/script.py")
    return archive.packed()


def run_script(
    tree: Path,
    script: Path,
    work: Path,
    *,
    modules: tuple[str, ...] = (),
    timeout: float = 120,
) -> Outcome:
    """Boot a kernel, run a Python script in it as root, and power it off.

    Args:
        tree: an unpacked kernel; see kernel().
        script: runs alone in the guest, with /proc, /sys, /dev, /run, /tmp and cgroup v2
            mounted, the loopback up, and ``nearpath`` and ``kernels.guest_*`` importable.
        work: directory for the console's log and the initramfs; the log stays there.
        modules: kernel modules to load, without suffix; their dependencies come along.
        timeout: seconds for all of it; the emulator is killed then.

    Raises:
        CommandError: the guest did not get to the script's end; the text has the end of
            the console's log.
    """
    require("qemu-system-x86_64", "timeout")
    (image,) = tree.glob("boot/vmlinuz-*")
    initrd, console, output = (work / name for name in ("initrd.gz", "console.log", "stdout.log"))
    initrd.write_bytes(initramfs(tree, script, modules))
    started = time.monotonic()
    problem = ""
    try:
        # timeout(1) also ends the guest when this process is killed and cannot do it.
        limit = ("timeout", "--kill-after=5", f"{timeout + 5:g}")
        run([*limit, *_emulator(image, initrd, console, output)], timeout=timeout)
    except CommandError as error:
        problem = str(error)
    finally:
        initrd.unlink()
    seconds = time.monotonic() - started
    printed = output.read_text(errors="backslashreplace") if output.exists() else ""
    stdout, marker, status = printed.rpartition(_END)
    if not marker or not status.strip().isdecimal():
        said = console.read_text(errors="backslashreplace") if console.exists() else ""
        raise CommandError(
            f"{image.name} did not run {script.name} to its end in {seconds:.0f} s: "
            f"{problem or 'the guest stopped'}\nstdout: {printed[-_SHOWN:]}\n"
            f"end of the console's log {console}:\n{said[-_SHOWN:]}"
        )
    return Outcome(stdout, int(status), console, seconds)


def _emulator(image: Path, initrd: Path, console: Path, output: Path) -> list[str]:
    # panic=-1 with -no-reboot: a kernel that dies ends the emulator at once.
    arguments = "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off random.trust_cpu=on"
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(_MEMORY)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-serial", f"file:{output}"),
        *("-kernel", str(image), "-initrd", str(initrd), "-append", arguments),
    ]
