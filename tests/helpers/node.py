"""One installation of nearpath for one test: its own run directory and pins."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import cni
from helpers.cleanup import empty_directory, kill_holding
from helpers.commands import CommandError, run, wait_until
from helpers.leaks import Bpf

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping

# Characters of the log in the report of a failed test.
_SHOWN = 4000
_BPFFS = Path("/sys/fs/bpf")
_FROZEN = Path(__file__).parent.parent.parent / "dist" / "nearpath" / "nearpath"
# Files of the run directory that outlive all pods; the second line is the datapath's.
_LASTING = {"lock", "nearpath.log", "nearpath.log.1", "failures.json"}
_LASTING |= {"loaded", "unloaded", "guards", "calibration.json", "settings.json"}
_LASTING |= {"vms.lock", "taps-paused"}


def frozen_program() -> Path:
    """The plugin under test: ``NEARPATH_BINARY``, else what `make build` made."""
    program = Path(os.environ.get("NEARPATH_BINARY", _FROZEN)).absolute()
    if not os.access(program, os.X_OK):
        raise CommandError(f"{program} is not there; run `make build`")
    return program


class Node:
    """nearpath on this machine, with everything it keeps moved to where no other looks.

    Attributes:
        program: the executable, plugin and CLI.
        directory: for whatever else the test keeps.
        run_dir, pin_dir: what NEARPATH_RUN_DIR and NEARPATH_PIN_DIR say.
        environ: environment of the runtime; plugins inherit it.
    """

    def __init__(self, program: Path, directory: Path) -> None:
        self.program = program
        self.directory = directory
        self.run_dir = directory / "run"
        self.pin_dir = _BPFFS / f"np-e2e-{secrets.token_hex(4)}"
        kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
        self.environ = {
            **kept,
            "NEARPATH_RUN_DIR": str(self.run_dir),
            "NEARPATH_PIN_DIR": str(self.pin_dir),
        }

    # --- the CLI ------------------------------------------------------------

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the CLI."""
        return run([self.program, *words], env=self.environ, check=check, timeout=60)

    def status(self) -> dict[str, Any]:
        """``nearpath status --json``."""
        shown: dict[str, Any] = json.loads(self.cli("status", "--json").stdout)
        return shown

    def lane(self) -> dict[str, Any]:
        """The socket lane's part of the status: totals of the node."""
        shown: dict[str, Any] = self.status()["lanes"]["socket"]
        return shown

    def pods(self) -> dict[str, dict[str, Any]]:
        """``nearpath pods --json`` by container ID."""
        shown: list[dict[str, Any]] = json.loads(self.cli("pods", "--json").stdout)
        return {pod["container_id"]: pod for pod in shown}

    def lanes(self) -> dict[str, tuple[str, str]]:
        """State ("on", "off") and reason of every pod's socket lane, by container ID."""
        lanes = {name: pod["lanes"]["socket"] for name, pod in self.pods().items()}
        return {name: (lane["state"], lane["reason"]) for name, lane in lanes.items()}

    # --- the plugin ---------------------------------------------------------

    def plugin(
        self,
        command: str,
        config: Mapping[str, Any] | str,
        **call: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Call the plugin directly; see `cni.call`."""
        return cni.call(self.program, command, config, environ=self.environ, **call)

    # --- what is there ------------------------------------------------------

    def files(self) -> set[str]:
        """Files below the run directory that belong to attachments or are unfinished."""
        if not self.run_dir.exists():
            return set()
        found = {path for path in self.run_dir.rglob("*") if not path.is_dir()}
        return {str(path.relative_to(self.run_dir)) for path in found} - _LASTING

    def log(self) -> str:
        """The plugin's log."""
        log = self.run_dir / "nearpath.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def programs(self) -> dict[int, str]:
        """The programs that work on our pinned maps, ID to name; the datapath is loaded."""
        return Bpf().programs_of(self.pin_dir.glob("v*/*"))

    def registered(self) -> list[bytes]:
        """Namespace cookies that the datapath takes for pods; it is loaded."""
        (pinned,) = self.pin_dir.glob("v*/pods")
        return Bpf().entries(pinned, key_size=8)

    def assert_loaded_once(self) -> None:
        """There is one program of each name; a killed loader's take a moment to go."""
        wait_until(
            lambda: len(found := list(self.programs().values())) == len(set(found)) > 0,
            "each program loaded exactly once",
        )

    def forget(self) -> None:
        """Take everything away as a reboot would: no unload, just no pins and no /run."""
        empty_directory(self.pin_dir)
        empty_directory(self.run_dir)

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        kill_holding(str(self.run_dir))
        self.forget()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def node(program: Path) -> Iterator[Node]:
    """A place for one test; prints the plugin's log, which pytest shows on failure."""
    if not (_BPFFS.is_mount()):
        run(["mount", "-t", "bpf", "bpf", _BPFFS])
    made = Node(program, Path(tempfile.mkdtemp(prefix="np-node-", dir="/tmp")))
    try:
        yield made
    finally:
        print(f"--- nearpath log\n{made.log()[-_SHOWN:]}")
        made.close()
