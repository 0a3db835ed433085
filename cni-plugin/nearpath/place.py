"""Where nearpath keeps things on this node.

The defaults can be moved by environment variables, which only the runtime's or the
operator's own environment can set; pods have no way to reach them.
"""

from __future__ import annotations

import os

from nearpath.errors import StateError

TYPE_CHECKING = False  # typing costs start-up time; mypy knows this name
if TYPE_CHECKING:
    from collections.abc import Mapping

# Version of the layout of maps and pins: bumped when a map's key or value changes.
LAYOUT = 4
_RUN_DIR = "/run/nearpath"


class Place:
    """Directories of one nearpath installation on one node.

    Attributes:
        run_dir: records, lock, log and failure counts; root-only (default /run/nearpath).
        pin_dir: bpffs directory that holds one ``v<LAYOUT>`` directory per layout
            (default /sys/fs/bpf/nearpath).
        cgroup: cgroup v2 directory that the sock_ops program is attached to; empty means
            the root of the hierarchy, found in mountinfo.
    """

    __slots__ = ("cgroup", "pin_dir", "run_dir")

    def __init__(
        self,
        run_dir: str = _RUN_DIR,
        pin_dir: str = "/sys/fs/bpf/nearpath",
        cgroup: str = "",
    ) -> None:
        self.run_dir = run_dir
        self.pin_dir = pin_dir
        self.cgroup = cgroup

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Place:
        """Read NEARPATH_RUN_DIR, NEARPATH_PIN_DIR and NEARPATH_CGROUP.

        Raises:
            StateError: a value is not an absolute, normalised path.
        """
        place = cls()
        for name, attribute in (
            ("NEARPATH_RUN_DIR", "run_dir"),
            ("NEARPATH_PIN_DIR", "pin_dir"),
            ("NEARPATH_CGROUP", "cgroup"),
        ):
            value = environ.get(name, "")
            if not value:
                continue
            if not os.path.isabs(value) or os.path.normpath(value) != value or "\0" in value:
                raise StateError(f"{name} is not an absolute, normalised path: {value!r}")
            setattr(place, attribute, value)
        return place

    @property
    def layout_dir(self) -> str:
        """bpffs directory of the layout that this executable knows."""
        return f"{self.pin_dir}/v{LAYOUT}"

    @property
    def attachments_dir(self) -> str:
        """Directory with one record per CNI attachment."""
        return f"{self.run_dir}/attachments"

    @property
    def lock_file(self) -> str:
        """flock(2) target: load, unload, registration and removal of pods."""
        return f"{self.run_dir}/lock"

    @property
    def vms_dir(self) -> str:
        """Directory with what is known of each virtual machine's pod; see lanes/vm_state.py."""
        return f"{self.run_dir}/vms"

    @property
    def vms_lock_file(self) -> str:
        """flock(2) target: changing anything in the namespaces of virtual machines' pods."""
        return f"{self.run_dir}/vms.lock"

    @property
    def watcher_file(self) -> str:
        """flock(2) target of the one watcher of this node; holds its process ID.

        There is none while there are no virtual machines' pods.
        """
        return f"{self.run_dir}/watcher"

    @property
    def taps_paused_file(self) -> str:
        """Marker: an operator paused nearpath, so no tap takes the tap lane."""
        return f"{self.run_dir}/taps-paused"

    @property
    def log_file(self) -> str:
        """The plugin's log; see nearpath.log."""
        return f"{self.run_dir}/nearpath.log"

    @property
    def failures_file(self) -> str:
        """Counts of failures by reason (JSON object, reason to integer)."""
        return f"{self.run_dir}/failures.json"

    @property
    def unloaded_file(self) -> str:
        """Marker: an operator unloaded the datapath, so ADD must not load it again."""
        return f"{self.run_dir}/unloaded"

    @property
    def changes_file(self) -> str:
        """Settings that an operator has changed; see datapath/changes.py."""
        return f"{self.run_dir}/settings.json"

    @property
    def guards_file(self) -> str:
        """Why the guards of the loaded datapath are not attached; empty if they are."""
        return f"{self.run_dir}/guards"

    @property
    def calibration_file(self) -> str:
        """What `nearpath calibrate` has found; survives a reboot unless run_dir was moved."""
        if self.run_dir == _RUN_DIR:
            return "/var/lib/nearpath/calibration.json"
        return f"{self.run_dir}/calibration.json"

    @property
    def digest_file(self) -> str:
        """Digest of the BPF objects whose programs are loaded."""
        return f"{self.run_dir}/loaded"
