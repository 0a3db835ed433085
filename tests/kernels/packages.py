"""Debian's stock kernels: the newest package of a series, fetched and unpacked, never installed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from helpers.commands import CommandError, require, run

# Series to the package's name; the group is what newer packages have more of.
SERIES = {
    "6.1": r"linux-image-6\.1\.0-([0-9]+)-cloud-amd64",
    "6.12": r"linux-image-6\.12\.([0-9]+)\+deb12-cloud-amd64",
}


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
