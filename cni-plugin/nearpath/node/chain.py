"""Run a CNI network configuration list the way container runtimes do.

ADD calls the plugins in order and hands each the result of the one before; DEL calls them
in reverse. A plugin sees the runtime's capabilities only if its entry asks for them.
Specification: containernetworking/cni SPEC.md, sections 3 (execution) and 4 (delegation).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nearpath.errors import NearpathError
from nearpath.kernel import children

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Where distributions and Kubernetes keep CNI plugins.
PLUGIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
CONF_DIR = "/etc/cni/net.d"
_CONF_SUFFIXES = (".conflist", ".conf", ".json")  # what runtimes look at
_LONGEST_ANSWER = 1 << 20


class ChainError(NearpathError):
    """A plugin failed, or the list is not one.

    Args:
        code: error code of the plugin's answer; 0 if there was no such answer.
    """

    def __init__(self, message: str, remedy: str = "", code: int = 0) -> None:
        super().__init__(message, remedy)
        self.code = code


def find_plugin(kind: str, directories: Sequence[str]) -> str | None:
    """Path of the executable of a plugin type, or None.

    The type is a name, never a path: a list must not make a runtime run just any program.
    """
    if not kind or "/" in kind or "\0" in kind or kind in {".", ".."}:
        return None
    for directory in directories:
        path = os.path.join(directory, kind)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def configurations(directory: str) -> list[str]:
    """Paths of the configurations in a directory, first the one that runtimes use."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [os.path.join(directory, name) for name in names if name.endswith(_CONF_SUFFIXES)]


def parse_list(text: str | bytes, where: str = "the list") -> dict[str, Any]:
    """A configuration list; a single plugin's configuration becomes a list of one.

    Raises:
        ChainError: not JSON, or not such a thing.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"{where} is not JSON ({error})") from error
    if isinstance(parsed, dict) and "plugins" not in parsed and "type" in parsed:
        parsed = {
            "cniVersion": parsed.get("cniVersion", "0.1.0"),
            "name": parsed.get("name", ""),
            "plugins": [parsed],
        }
    plugins = parsed.get("plugins") if isinstance(parsed, dict) else None
    if not isinstance(plugins, list) or not all(
        isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in plugins
    ):
        raise ChainError(f"{where} is not a CNI configuration list")
    result: dict[str, Any] = parsed
    return result


class Attachment:
    """What a runtime knows of one attachment.

    Args:
        netns: path of the network namespace.
        args: CNI_ARGS, e.g. the pod's name.
        capabilities: runtimeConfig by capability, before it is filtered for a plugin.
    """

    def __init__(
        self,
        container_id: str,
        netns: str,
        ifname: str = "eth0",
        args: Mapping[str, str] | None = None,
        capabilities: Mapping[str, Any] | None = None,
    ) -> None:
        self.container_id = container_id
        self.netns = netns
        self.ifname = ifname
        self.args = dict(args or {})
        self.capabilities = dict(capabilities or {})
        self.result: dict[str, Any] | None = None


class Chain:
    """A configuration list and where its plugins are.

    Args:
        directories: searched in order for each plugin's executable.
        timeout: seconds for each call of a plugin.

    Raises:
        ChainError: a plugin is not installed.
    """

    def __init__(
        self, conflist: Mapping[str, Any], directories: Sequence[str], timeout: float = 20.0
    ) -> None:
        self._version: str = conflist.get("cniVersion", "0.1.0")
        self._name: str = conflist["name"]
        self._plugins: list[dict[str, Any]] = conflist["plugins"]
        self._directories = list(directories)
        self._timeout = timeout
        self._paths: list[str] = []
        for plugin in self._plugins:
            path = find_plugin(plugin["type"], directories)
            if path is None:
                raise ChainError(
                    f"CNI plugin {plugin['type']} is not in {', '.join(directories)}",
                    "apt-get install containernetworking-plugins",
                )
            self._paths.append(path)

    def add(self, attachment: Attachment) -> dict[str, Any]:
        """Attach; the result of the last plugin, also kept in the attachment.

        Raises:
            ChainError: a plugin failed; what was done is undone, as runtimes do.
        """
        result: dict[str, Any] | None = None
        try:
            for plugin, path in zip(self._plugins, self._paths, strict=True):
                answer = self._call("ADD", plugin, path, attachment, result)
                # A result may come without its version.
                result = {"cniVersion": self._version, **_result(plugin["type"], answer)}
        except ChainError:
            with suppress(ChainError):
                self.delete(attachment)
            raise
        attachment.result = result
        return result or {}

    def check(self, attachment: Attachment) -> None:
        """Ask each plugin whether the attachment is as it should be.

        Raises:
            ChainError: it is not.
        """
        for plugin, path in zip(self._plugins, self._paths, strict=True):
            self._call("CHECK", plugin, path, attachment, attachment.result)

    def delete(self, attachment: Attachment) -> None:
        """Detach; every plugin is called, also after another's failure.

        Runtimes stop at the first failure and try again later; there is no later here.

        Raises:
            ChainError: the first failure.
        """
        failed: ChainError | None = None
        for plugin, path in reversed(list(zip(self._plugins, self._paths, strict=True))):
            try:
                self._call("DEL", plugin, path, attachment, attachment.result)
            except ChainError as error:
                failed = failed or error
        attachment.result = None
        if failed:
            raise failed

    def _config(
        self,
        command: str,
        plugin: Mapping[str, Any],
        attachment: Attachment,
        previous: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """What a plugin reads from its standard input."""
        config = {**plugin, "cniVersion": self._version, "name": self._name}
        asked = plugin.get("capabilities") or {}
        runtime = {
            name: value for name, value in attachment.capabilities.items() if asked.get(name)
        }
        if runtime:
            config["runtimeConfig"] = runtime
        # DEL has a previous result since version 0.4.0 only.
        if previous is not None and (command != "DEL" or self._version_tuple() >= (0, 4)):
            config["prevResult"] = previous
        return config

    def _version_tuple(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self._version.split(".") if part.isdigit())

    def _call(
        self,
        command: str,
        plugin: Mapping[str, Any],
        path: str,
        attachment: Attachment,
        previous: dict[str, Any] | None,
    ) -> str:
        """Run one plugin; what it printed."""
        kind = plugin["type"]
        environ = {
            **children.clean_environ(),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.ifname,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in attachment.args.items()),
            "CNI_PATH": ":".join(self._directories),
        }
        config = json.dumps(self._config(command, plugin, attachment, previous))
        status, stdout, stderr = run_plugin(path, config, environ, self._timeout)
        if status is None:
            raise ChainError(f"CNI plugin {kind}: {command} did not end in {self._timeout:g} s")
        if status != 0:
            raise _failure(f"CNI plugin {kind}: {command}", status, stdout, stderr)
        return stdout


def _result(kind: str, stdout: str) -> dict[str, Any]:
    """The result that a plugin printed on ADD."""
    try:
        answer = json.loads(stdout)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"CNI plugin {kind}: ADD did not answer with JSON") from error
    if not isinstance(answer, dict):
        raise ChainError(f"CNI plugin {kind}: ADD did not answer with a result")
    return answer


def run_plugin(
    path: str, config: str, environ: Mapping[str, str], timeout: float
) -> tuple[int | None, str, str]:
    """Run an executable in a session of its own: (exit status, stdout, stderr).

    The session keeps the terminal's Ctrl-C away from it: a plugin that is killed half way
    leaves things behind. After ``timeout`` seconds the whole session is killed, and the
    exit status is None.
    """
    try:
        process = subprocess.Popen(
            [path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
        )
    except OSError as error:
        raise ChainError(f"cannot run {path}: {error.strerror}") from error
    status: int | None = None
    stdout = stderr = b""
    try:
        stdout, stderr = process.communicate(config.encode(), timeout)
        status = process.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        if status is None:
            # Also what it may have started in the background with our pipes open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
    return status, stdout[:_LONGEST_ANSWER].decode("utf-8", "replace"), _last_lines(stderr)


def _last_lines(stderr: bytes) -> str:
    return " | ".join(stderr.decode("utf-8", "replace").strip().splitlines()[-3:])[:500]


def _failure(what: str, status: int, stdout: str, stderr: str) -> ChainError:
    """The error that a plugin answered with; runtimes read it from standard output."""
    try:
        answer = json.loads(stdout)
        parts = [str(answer["msg"]), str(answer.get("details", ""))]
        code = int(answer.get("code", 0))
    except (ValueError, KeyError, TypeError, AttributeError):
        text = stderr or stdout.strip()[:200] or "it said nothing"
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ChainError(f"{what} failed ({ended}): {text}")
    return ChainError(f"{what} failed: {': '.join(part for part in parts if part)}", code=code)
