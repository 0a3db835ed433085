"""Hostile stdin, environment and annotations against the plugin's real entry, in process.

The kernel is a fake (helpers/fake_doors.py) that may fail at any step; files are real. The
same requests go to the frozen plugin and the real kernel in tests/e2e/test_fuzz_frozen.py.
"""

from __future__ import annotations

import errno
import io
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import fuzz
from helpers.fuzz import Hostile
from helpers.plugin import Plugin
from nearpath import state
from nearpath.cni import commands
from nearpath.errors import BpfError, StateError, Unavailable

_METHODS = ("is_own_netns", "inspect", "link_name", "is_loaded", "prepare", "register")
_ERRORS = (
    BpfError("cannot update map", errno.EPERM),
    Unavailable("no-btf", "this kernel has no BTF"),
    StateError("cannot lock"),
    OSError(errno.EIO, "Input/output error"),
    RuntimeError("bug"),
    RecursionError(),
)
# Random every time: what it finds is a bug whenever it finds it.
_SETTINGS = settings(
    max_examples=500,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _serve(plugin: Plugin, request: Hostile, monkeypatch: pytest.MonkeyPatch) -> int:
    """One request; its answer and what it said on stderr are checked."""
    environ = {
        "NEARPATH_RUN_DIR": plugin.place.run_dir,
        "NEARPATH_PIN_DIR": plugin.place.pin_dir,
        **request.environ,
    }
    with monkeypatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "stderr", said)
        code, stdout = commands.run(environ, io.BytesIO(request.stdin).read, plugin.doors)
    fuzz.check_answer(request, code, stdout)
    assert "Traceback" not in said.getvalue()
    assert "\x1b" not in said.getvalue()
    return code


def _check_files(directory: Path, plugin: Plugin) -> None:
    """Nothing was written outside the run directory, and nothing unexpected in it."""
    assert {path.name for path in directory.iterdir()} <= {"run"}
    if Path(plugin.place.run_dir).exists():
        inside = {path.name for path in Path(plugin.place.run_dir).iterdir()}
        assert inside <= {"attachments", "lock", "nearpath.log", "nearpath.log.1", "failures.json"}


@_SETTINGS
@given(
    requests=st.lists(fuzz.requests("/run/netns/a"), min_size=1, max_size=3),
    broken=st.none() | st.none() | st.tuples(st.sampled_from(_METHODS), st.sampled_from(_ERRORS)),
)
def test_hostile_requests(requests: list[Hostile], broken: tuple[str, Exception] | None) -> None:
    """Whatever comes in: a proper answer, no traceback, and DEL leaves nothing behind."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        # Syncing is what takes the time here, and no machine crashes in this test.
        monkeypatch.setattr("os.fsync", lambda _descriptor: None)
        directory = Path(name)
        plugin = Plugin(directory)
        if broken:
            plugin.doors.break_with(*broken)
        for request in requests:
            before = plugin.leftovers()
            code = _serve(plugin, request, monkeypatch)
            if code == 1 and request.environ["CNI_COMMAND"] == "ADD":
                assert set(plugin.leftovers()) <= set(before)  # an ADD that fails leaves nothing
            _check_files(directory, plugin)
        plugin.doors.broken.clear()
        for record in list(state.records(plugin.place)):
            names = {
                "CNI_CONTAINERID": record["container_id"],
                "CNI_IFNAME": record["ifname"],
            }
            deletion = Hostile({"CNI_COMMAND": "DEL", **names}, b'{"name": "net"}')
            assert _serve(plugin, deletion, monkeypatch) == 0
        assert plugin.leftovers() == []
        assert plugin.doors.pods == set()


@_SETTINGS
@given(request_=fuzz.requests("/run/netns/a"))
def test_every_add_that_succeeds_can_be_deleted(request_: Hostile) -> None:
    """With the same environment and configuration, DEL after ADD succeeds and undoes it."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("os.fsync", lambda _descriptor: None)
        plugin = Plugin(Path(name))
        add, delete = (
            Hostile({**request_.environ, "CNI_COMMAND": command}, request_.stdin)
            for command in ("ADD", "DEL")
        )
        if _serve(plugin, add, monkeypatch) == 0:
            assert len(plugin.leftovers()) == 1
            assert _serve(plugin, delete, monkeypatch) == 0
        assert plugin.leftovers() == []
        assert plugin.doors.pods == set()
