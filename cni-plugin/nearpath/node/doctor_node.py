"""doctor's questions to the node: other accelerators, CNI configuration, our own records."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from nearpath import state
from nearpath.datapath import loader
from nearpath.errors import NearpathError
from nearpath.node import chain
from nearpath.node.finding import FAIL, OK, WARN, Finding
from nearpath.node.status import pod_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nearpath.place import Place

# Reasons that somebody chose: configuration, annotation, a deliberate unload.
CHOSEN = state.CHOSEN | {"unloaded-by-operator", "paused"}
_KIND = "nearpath"
# Pins in bpffs by which others are known: (part of the path, who, sockets go to a sockmap).
_TRACES = (
    ("map_active_estab", "istio-tcpip-bypass", True),
    ("map_redir", "istio-tcpip-bypass", True),
    ("sock_pair_map", "merbridge", True),
    ("cookie_orig_dst", "merbridge", True),
    ("cookie_original_dst", "merbridge", True),
    ("kmesh", "Kmesh", True),
    ("cilium_sock_ops", "Cilium before 1.14 with sockops", True),
    ("cilium_", "Cilium", False),
)


def check_pins(pins: Iterable[str]) -> Finding:
    """Other accelerators, found by what they pin in bpffs."""
    name = "other-accelerators"
    rivals: set[str] = set()
    neighbours: set[str] = set()
    for pin in pins:
        for part, who, takes_sockets in _TRACES:
            if part in pin:
                (rivals if takes_sockets else neighbours).add(who)
                break
    if rivals:
        return Finding(
            name,
            WARN,
            f"pins of {', '.join(sorted(rivals))}",
            "the lane for sockets that it puts into its sockmap first (counted as socket_busy); "
            "reordered data if it accelerates what nearpath does not",
            "run only one socket accelerator on a node; remove the other",
        )
    if neighbours:
        return Finding(
            name,
            OK,
            f"pins of {', '.join(sorted(neighbours))}, which leave TCP sockets alone; policy "
            "that it enforces per packet does not see redirected data",
        )
    return Finding(name, OK, "no traces in bpffs")


# -- CNI -------------------------------------------------------------------------------------


def check_cni(bin_dirs: Sequence[str], conf_dir: str) -> list[Finding]:
    """Would the runtime call nearpath for the next pod?"""
    return [_check_configuration(conf_dir), _check_plugin(bin_dirs)]


def _check_configuration(conf_dir: str) -> Finding:
    name, lost = "cni-configuration", "new pods: the runtime does not call nearpath for them"
    paths = chain.configurations(conf_dir)
    if not paths:
        remedy = "install a primary CNI first; elsewhere? use --conf-dir"
        return Finding(name, WARN, f"no configuration in {conf_dir}", lost, remedy)
    path = paths[0]
    try:
        content = state.read_file(path) or b""
        conflist = chain.parse_list(content, path)
    except NearpathError as error:
        return Finding(name, WARN, error.message, lost, "repair or remove it")
    kinds = [plugin["type"] for plugin in conflist["plugins"]]
    shown = f"{path}: {' → '.join(kinds)}"
    if _KIND in kinds[1:]:
        return Finding(name, OK, shown)
    if _KIND in kinds:
        return Finding(
            name, WARN, shown, "every new pod: nothing makes a network before it", "chain it last"
        )
    later = [other for other in paths[1:] if _names_us(other)]
    remedy = 'add {"type": "nearpath", …} to its plugins; see conf/ for examples'
    if later:
        remedy = f"{later[0]} has it but sorts after {os.path.basename(path)}: rename one"
    return Finding(name, WARN, f"{shown}: no nearpath", lost, remedy)


def _names_us(path: str) -> bool:
    try:
        conflist = chain.parse_list(state.read_file(path) or b"", path)
    except NearpathError:
        return False
    return any(plugin["type"] == _KIND for plugin in conflist["plugins"])


def _check_plugin(bin_dirs: Sequence[str]) -> Finding:
    name = "cni-plugin"
    path = chain.find_plugin(_KIND, bin_dirs)
    if path:
        target = os.path.realpath(path)
        return Finding(name, OK, path if target == path else f"{path} → {target}")
    broken = [f"{directory}/{_KIND}" for directory in bin_dirs]
    broken = [path for path in broken if os.path.lexists(path)]
    found = f"{broken[0]} is no executable" if broken else f"not in {', '.join(bin_dirs)}"
    return Finding(
        name,
        WARN,
        found,
        "new pods: with nearpath in the conflist and no executable, none of them starts",
        f"ln -s /opt/nearpath/<version>/{_KIND} {bin_dirs[0]}/{_KIND}; elsewhere? use --bin-dir",
    )


# -- our own state ---------------------------------------------------------------------------


def check_place(place: Place) -> list[Finding]:
    """Run directory, datapath, pods and failures so far."""
    findings = [_check_run_dir(place)]
    if findings[0].state == FAIL:
        return findings
    try:
        findings.append(_check_datapath(place))
        findings.append(_check_pods(place))
    except NearpathError as error:
        findings.append(Finding("datapath", WARN, error.message, "this answer", error.remedy))
    findings.append(_check_failures(place))
    return findings


def _check_run_dir(place: Place) -> Finding:
    name, path = "run-directory", place.run_dir
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return Finding(name, OK, f"{path} is not there yet; the first ADD makes it")
    except OSError as error:
        return Finding(name, FAIL, f"{path}: {error.strerror}", "ADD and DEL", "look at it")
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return Finding(
            name,
            FAIL,
            f"{path} is not a directory of root's alone (owner {info.st_uid}, "
            f"mode {stat.S_IMODE(info.st_mode):04o})",
            "ADD: nothing in it can be trusted, so pods stay on the kernel path",
            f"chown root:root {path} && chmod 0700 {path}",
        )
    return Finding(name, OK, path)


def _check_datapath(place: Place) -> Finding:
    name, shown = "datapath", loader.describe(place)
    draining = f"; {shown['draining']} sockets draining" if shown["draining"] else ""
    if shown["loaded"] and not shown["paused"]:
        return Finding(name, OK, f"loaded at {shown['pins']}{draining}")
    lost = "the socket lane for every pod: TCP stays on the kernel path"
    if shown["loaded"]:
        return Finding(name, WARN, f"paused{draining}", lost, "nearpath resume")
    if os.path.exists(place.unloaded_file):
        return Finding(name, WARN, f"unloaded by an operator{draining}", lost, "nearpath load")
    return Finding(name, OK, f"not loaded; the first ADD loads it{draining}")


def _check_pods(place: Place) -> Finding:
    name, pods = "pods", pod_list(place)
    lanes = [pod["lanes"]["socket"] for pod in pods]
    on = sum(lane["state"] == "on" for lane in lanes)
    reasons = {lane["reason"] for lane in lanes if lane["state"] != "on"} - CHOSEN
    found = f"{on} of {len(pods)} on the socket lane"
    if not reasons or not pods:
        return Finding(name, OK, found)
    return Finding(
        name,
        WARN,
        f"{found}; others: {', '.join(sorted(reasons))}",
        "the lane for those pods",
        f"see `nearpath pods` and {place.log_file}; `nearpath load` registers again",
    )


def _check_failures(place: Place) -> Finding:
    name, counts = "failures", state.failures(place)
    if not counts:
        return Finding(name, OK, "none counted")
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return Finding(
        name,
        WARN,
        f"since boot: {listed}",
        "the lane for the pods concerned; they run on the kernel path",
        f"see {place.log_file}; to start counting afresh: rm {place.failures_file}",
    )
