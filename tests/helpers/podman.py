"""A private podman that uses CNI (libcni), with its own storage, state and networks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.cleanup import kill_holding, remove_cgroups, unmount_below
from helpers.cni import PLUGINS
from helpers.commands import require, run

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping

_SECONDS = 60


@dataclass(frozen=True)
class Container:
    """A running container.

    Attributes:
        id: podman's, which is the CNI container ID.
        netns: path of its network namespace.
        ips: its addresses without prefix length.
        inside: words to put before a command that shall run in the container, with its
            cgroup and its files.
    """

    id: str
    name: str
    netns: str
    ips: tuple[str, ...]
    inside: tuple[str, ...]


class Podman:
    """podman with everything it keeps below one directory; made by `podman()`."""

    def __init__(self, directory: Path, network: str, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self._network = network
        self._environ = {
            **environ,
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "XDG_RUNTIME_DIR": str(directory),
        }
        self._command = (
            *("podman", "--cgroup-manager", "cgroupfs", "--storage-driver", "vfs"),
            *("--root", str(directory / "root"), "--runroot", str(directory / "runroot")),
            *("--tmpdir", str(directory / "libpod"), "--network-config-dir"),
            *(str(directory / "net.d"), "--log-level", "warn"),
            # crun refuses hybrid cgroups.
            *("--runtime", "runc"),
        )

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One podman command."""
        return run([*self._command, *words], env=self._environ, timeout=_SECONDS, check=check)

    def run_container(self, name: str) -> Container:
        """Start a container that sleeps, with the machine's /usr and so its Python."""
        root = self.directory / f"rootfs-{name}"
        for folder in ("usr", "proc", "sys", "dev", "etc", "run", "tmp"):
            (root / folder).mkdir(parents=True)
        for folder in ("bin", "sbin", "lib", "lib64"):
            (root / folder).symlink_to(f"usr/{folder}")
        self.command(
            *("run", "--detach", "--name", name, "--network", self._network),
            *("--cgroup-parent", f"/{self.directory.name}"),
            # The default limits want CAP_SYS_RESOURCE.
            *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
            *("--volume", "/usr:/usr:ro", "--rootfs", str(root), "/bin/sleep", "86400"),
        )
        shown = json.loads(self.command("container", "inspect", name).stdout)[0]
        settings = shown["NetworkSettings"]
        ips = [entry["IPAddress"] for entry in settings["Networks"].values()]
        environ = ("env", *(f"{name}={value}" for name, value in self._environ.items()))
        return Container(
            id=shown["Id"],
            name=name,
            netns=settings["SandboxKey"],
            ips=tuple(ips),
            inside=(*environ, *self._command, "exec", name),
        )

    def remove(self, name: str) -> None:
        """Kill and remove a container: runs DEL."""
        self.command("rm", "--force", "--time", "0", name)

    def close(self) -> None:
        """Remove all containers, and everything that belongs to them."""
        with ExitStack() as steps:
            # Run in reverse order, each also after a failure of another.
            steps.callback(shutil.rmtree, self.directory, ignore_errors=True)
            steps.callback(remove_cgroups, self.directory.name)
            steps.callback(unmount_below, self.directory)
            steps.callback(kill_holding, str(self.directory))
            self.command("rm", "--force", "--all", "--time", "0")


@contextmanager
def podman(
    conflist: Mapping[str, Any], plugin: Path, environ: Mapping[str, str]
) -> Iterator[Podman]:
    """A podman whose containers get this network.

    Args:
        conflist: the CNI network configuration list.
        plugin: our executable, called from a plugin directory of its own.
        environ: of every podman command; what is nearpath's goes to the plugin only.
    """
    require("podman", "runc", "conmon")
    directory = Path(tempfile.mkdtemp(prefix="np-podman-", dir="/tmp"))
    made = Podman(directory, conflist["name"], environ)
    try:
        (directory / "bin").mkdir()
        # conmon starts podman's clean-up, and so DEL, with hardly any environment.
        places = " ".join(f"{key}={environ[key]}" for key in environ if key.startswith("NEARPATH_"))
        wrapper = directory / "bin" / "nearpath"
        wrapper.write_text(f'#!/bin/sh\nexec env {places} {plugin} "$@"\n')
        wrapper.chmod(0o755)
        (directory / "net.d").mkdir()
        (directory / "net.d" / "e2e.conflist").write_text(json.dumps(conflist))
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/root"\n'
            f'runroot = "{directory}/runroot"\n'
        )
        folders = json.dumps([str(directory / "bin"), os.fspath(PLUGINS)])
        (directory / "containers.conf").write_text(
            f'[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = {folders}\n'
        )
        yield made
    finally:
        made.close()
