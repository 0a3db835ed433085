"""The plugin in this process: its real entry, real files, and a fake kernel."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.fake_doors import FakeDoors
from nearpath import state
from nearpath.cni import commands
from nearpath.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "veth7"}, {"name": "eth0", "sandbox": "/run/netns/a"}],
    "ips": [{"address": "10.1.2.3/24", "interface": 1}],
    "dns": {},
}


class Plugin:
    """A node of its own under a temporary directory.

    Attributes:
        doors: the fake kernel.
        place: where the plugin keeps things.
    """

    def __init__(self, directory: Path) -> None:
        self.doors = FakeDoors()
        self.place = Place(str(directory / "run"), str(directory / "pins"))

    def config(self, **keys: object) -> dict[str, Any]:
        """A network configuration as ADD gets it."""
        base = {"cniVersion": "1.1.0", "name": "net", "type": "nearpath", "prevResult": RESULT}
        return {**base, **keys}

    def environ(self, command: str, **changes: str | None) -> dict[str, str]:
        """The environment of a request; None unsets a variable."""
        environ = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": "/run/netns/a",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u1",
            "NEARPATH_RUN_DIR": self.place.run_dir,
            "NEARPATH_PIN_DIR": self.place.pin_dir,
            **changes,
        }
        return {key: value for key, value in environ.items() if value is not None}

    def call(
        self,
        command: str,
        config: dict[str, Any] | bytes | None = None,
        *,
        read: Callable[[int], bytes] | None = None,
        **changes: str | None,
    ) -> tuple[int, dict[str, Any] | None]:
        """Send a request; exit code and answer (None for empty stdout)."""
        if config is None:
            config = self.config()
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        environ = self.environ(command, **changes)
        code, answer = commands.run(environ, read or io.BytesIO(data).read, self.doors)
        return code, json.loads(answer) if answer else None

    def ok(self, command: str, **keys: object) -> dict[str, Any] | None:
        """Send a request with these keys in the configuration, which must succeed."""
        code, answer = self.call(command, self.config(**keys))
        assert code == 0, answer
        return answer

    def error(self, command: str, **keys: object) -> dict[str, Any]:
        """Send a request with these keys in the configuration, which must fail."""
        code, answer = self.call(command, self.config(**keys))
        assert code == 1
        assert answer is not None
        return answer

    def record(self, container_id: str = "c1", ifname: str = "eth0") -> dict[str, Any] | None:
        """The record of an attachment."""
        return state.load(self.place, container_id, ifname)

    def lane(self, container_id: str = "c1", ifname: str = "eth0") -> tuple[str, str]:
        """State and reason of the socket lane in a record."""
        record = self.record(container_id, ifname)
        assert record is not None
        lane = record["lanes"]["socket"]
        return lane["state"], lane["reason"]

    def log(self) -> str:
        """What the plugin logged."""
        try:
            return Path(self.place.log_file).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def failures(self) -> dict[str, int]:
        """Counted failures."""
        return state.failures(self.place)

    def leftovers(self) -> list[str]:
        """Records and temporary files under the run directory."""
        directories = Path(self.place.run_dir), Path(self.place.attachments_dir)
        names = [
            path for directory in directories if directory.is_dir() for path in directory.iterdir()
        ]
        return [
            path.name
            for path in names
            if path.parent.name == "attachments" or path.name.startswith(".tmp-")
        ]
