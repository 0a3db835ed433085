"""A private containerd, driven through CRI as kubelet drives it.

It has its own root, state, socket, CNI configuration and plugin directory below one
directory. Pods are sandboxes without containers: the pause program alone, in a real
network namespace that the CNI chain has set up.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc  # type: ignore[import-untyped]

from helpers.cleanup import kill_holding, remove_cgroups, unmount_below
from helpers.cni import PLUGINS
from helpers.commands import CommandError, require, run, wait_until
from helpers.netns import inside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TESTDATA = Path(__file__).parent.parent / "testdata"
_BUSYBOX = "/bin/busybox"
_SERVICE = "runtime.v1.RuntimeService"
_SECONDS = 30


@dataclass(frozen=True)
class Sandbox:
    """A running pod sandbox.

    Attributes:
        id: containerd's, which is the CNI container ID.
        netns: path of its network namespace.
        ips: its addresses without prefix length, in the order of the CNI result.
    """

    id: str
    namespace: str
    name: str
    netns: str
    ips: tuple[str, ...]

    @property
    def inside(self) -> tuple[str, ...]:
        """Words to put before a command that shall run in the pod's network."""
        return inside(self.netns)


def _messages() -> dict[str, Any]:
    """Message classes of cri.proto by full name."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "cri.pb")
        arguments = ["protoc", f"-I{_TESTDATA}", f"--descriptor_set_out={compiled}", "cri.proto"]
        if protoc.main(arguments) != 0:
            raise CommandError("tests/testdata/cri.proto does not compile")
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClassesForFiles(["cri.proto"], pool)


def _pause_image() -> bytes:
    """A docker-archive of one image whose only program is a static busybox."""

    def add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), mode
        archive.addfile(entry, io.BytesIO(data))

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        add(archive, "busybox", Path(_BUSYBOX).read_bytes(), 0o755)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Entrypoint": ["/busybox", "sleep", "86400"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [
        {"Config": "config.json", "RepoTags": ["localhost/pause:1"], "Layers": ["layer.tar"]}
    ]
    image = io.BytesIO()
    with tarfile.open(fileobj=image, mode="w") as archive:
        add(archive, "layer.tar", layer.getvalue())
        add(archive, "config.json", json.dumps(config).encode())
        add(archive, "manifest.json", json.dumps(manifest).encode())
    return image.getvalue()


class Containerd:
    """A containerd with its sandboxes; made by `containerd()`."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self.log = directory / "containerd.log"
        self._environ = dict(environ)
        self._classes = _messages()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    # --- the daemon ---------------------------------------------------------

    def start(self) -> None:
        """Start the daemon and wait until its network is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # A killed test run takes its containerd with it.
                (
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("containerd", "--config", str(self.directory / "config.toml")),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        self._channel = grpc.insecure_channel(f"unix:{self.directory}/containerd.sock")
        wait_until(self._ready, f"containerd ready; {self.log_tail()}", timeout=20)

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise CommandError(f"containerd ended: {self.log_tail()}")
        try:
            status = self._call("Status", "StatusRequest", "StatusResponse")
        except CommandError:
            return False
        return all(condition.status for condition in status.status.conditions)

    def kill(self) -> None:
        """kill -9, as the OOM killer would; sandboxes go on living."""
        self._close(signal.SIGKILL)

    def _close(self, how: signal.Signals) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(timeout=10)
            finally:
                self._process.kill()
                self._process.wait(timeout=10)
            self._process = None

    def log_tail(self) -> str:
        """The end of the daemon's log, for error texts."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "(no log)"

    def import_pause_image(self) -> None:
        """Give it the image of the sandboxes: nothing is pulled from anywhere."""
        image = self.directory / "pause.tar"
        image.write_bytes(_pause_image())
        socket = self.directory / "containerd.sock"
        run(["ctr", "-a", socket, "-n", "k8s.io", "images", "import", image])

    # --- sandboxes ----------------------------------------------------------

    def _call(self, method: str, request: str, response: str, **fields: Any) -> Any:
        """One CRI call; raises CommandError with the end of the log."""
        assert self._channel is not None, "containerd is not running"
        reply = self._classes[f"runtime.v1.{response}"]
        call: grpc.UnaryUnaryMultiCallable[Any, Any] = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        try:
            return call(self._classes[f"runtime.v1.{request}"](**fields), timeout=_SECONDS)
        except grpc.RpcError as error:
            raise CommandError(f"{method}: {error}\n{self.log_tail()}") from error

    def run_sandbox(
        self,
        name: str,
        *,
        namespace: str = "default",
        annotations: Mapping[str, str] | None = None,
        host_port: int = 0,
        container_port: int = 0,
    ) -> Sandbox:
        """RunPodSandbox, and where its network is.

        Args:
            host_port: TCP port of the node that is mapped to the pod's ``container_port``.
        """
        mappings = [{"container_port": container_port, "host_port": host_port}] if host_port else []
        config = {
            "metadata": {"name": name, "uid": f"uid-{name}", "namespace": namespace},
            "hostname": name,
            "log_directory": str(self.directory / "logs"),
            "annotations": dict(annotations or {}),
            "port_mappings": mappings,
            "linux": {"cgroup_parent": self.cgroup},
        }
        created = self._call(
            "RunPodSandbox", "RunPodSandboxRequest", "RunPodSandboxResponse", config=config
        )
        shown = self._call(
            "PodSandboxStatus",
            "PodSandboxStatusRequest",
            "PodSandboxStatusResponse",
            pod_sandbox_id=created.pod_sandbox_id,
            verbose=True,
        )
        runtime = json.loads(shown.info["info"])["runtimeSpec"]
        paths = {entry["type"]: entry.get("path") for entry in runtime["linux"]["namespaces"]}
        network = shown.status.network
        ips = (network.ip, *(address.ip for address in network.additional_ips))
        return Sandbox(created.pod_sandbox_id, namespace, name, paths["network"], ips)

    @property
    def cgroup(self) -> str:
        """Parent of the sandboxes' cgroups, e.g. ``/np-e2e-abc``."""
        return f"/{self.directory.name}"

    def stop_sandbox(self, sandbox_id: str) -> None:
        """StopPodSandbox: kills it and runs DEL."""
        self._call("StopPodSandbox", "PodSandboxId", "Empty", pod_sandbox_id=sandbox_id)

    def remove_sandbox(self, sandbox_id: str) -> None:
        """RemovePodSandbox of a running or stopped sandbox: stops it first, if need be."""
        self._call("RemovePodSandbox", "PodSandboxId", "Empty", pod_sandbox_id=sandbox_id)

    def sandboxes(self) -> list[str]:
        """IDs of all sandboxes, running or not."""
        return [
            item.id
            for item in self._call("ListPodSandbox", "Empty", "ListPodSandboxResponse").items
        ]

    # --- the end ------------------------------------------------------------

    def close(self) -> None:
        """Remove all sandboxes, end the daemon and everything that belongs to it."""
        with ExitStack() as steps:
            # Run in reverse order, each also after a failure of another.
            steps.callback(shutil.rmtree, self.directory, ignore_errors=True)
            # pytest shows it only if the test fails.
            steps.callback(lambda: print(f"--- containerd log\n{self.log_tail()}"))
            steps.callback(remove_cgroups, self.directory.name)
            steps.callback(unmount_below, self.directory)
            # Shims, pause programs and plugins that outlived the daemon.
            steps.callback(kill_holding, str(self.directory))
            steps.callback(self._close, signal.SIGTERM)
            if self._process is not None and self._process.poll() is None:
                for sandbox_id in self.sandboxes():
                    self.stop_sandbox(sandbox_id)
                    self.remove_sandbox(sandbox_id)


@contextmanager
def containerd(
    conflist: Mapping[str, Any], plugin: Path, environ: Mapping[str, str]
) -> Iterator[Containerd]:
    """A running containerd whose pods get this network.

    Args:
        conflist: the CNI network configuration list.
        plugin: our executable, linked into the plugin directory beside Debian's.
        environ: given to the daemon and so to all plugins (NEARPATH_RUN_DIR and so on).
    """
    require("containerd", "ctr", "containerd-shim-runc-v2", "runc", "setpriv", _BUSYBOX)
    # A short path: the names of Unix sockets are limited to 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="np-e2e-", dir="/tmp"))
    daemon = Containerd(directory, environ)
    try:
        (directory / "bin").mkdir()
        for program in PLUGINS.iterdir():
            (directory / "bin" / program.name).symlink_to(program)
        (directory / "bin" / "nearpath").symlink_to(plugin)
        (directory / "net.d").mkdir()
        (directory / "net.d" / "10-e2e.conflist").write_text(json.dumps(conflist, indent=1))
        template = (_TESTDATA / "containerd.toml").read_text()
        (directory / "config.toml").write_text(template.replace("@DIR@", str(directory)))
        daemon.start()
        daemon.import_pause_image()
        yield daemon
    finally:
        daemon.close()
