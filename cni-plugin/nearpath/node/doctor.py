"""Is this node fit for nearpath? One finding per question, with the remedy.

The checks (doctor_kernel, doctor_node) are functions from what a probe found to a finding,
so that tests cover nodes that nobody has at hand; this module puts the probes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath.datapath import loader
from nearpath.errors import NearpathError
from nearpath.kernel import cgroup, features, mounts
from nearpath.node import doctor_kernel as kernel
from nearpath.node import doctor_node as node
from nearpath.node import doctor_taps
from nearpath.node.finding import FAIL, OK, Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nearpath.place import Place


def examine(place: Place, bin_dirs: Sequence[str], conf_dir: str) -> list[Finding]:
    """Ask every question on this node (as root).

    Args:
        bin_dirs: where the runtime looks for CNI plugins.
        conf_dir: where the runtime looks for CNI configurations.
    """
    version = features.version()
    findings = [
        kernel.check_version(version, features.release(), features.has_netns_cookies()),
        kernel.check_btf(features.has_btf()),
        kernel.check_cgroup(lambda: place.cgroup or cgroup.v2_root()),
        kernel.check_bpffs(mounts.bpffs_mounted(), features.has_bpffs()),
        kernel.check_jit(features.sysctl("net.core.bpf_jit_enable")),
    ]
    findings.extend(_bpf_findings())
    findings.append(kernel.check_mptcp(version, features.sysctl("net.mptcp.enabled")))
    root = findings[2].found if findings[2].state == OK else ""
    if root:
        findings.append(kernel.check_exclusive(lambda: features.exclusive_programs(root)))
        findings.append(kernel.check_sock_ops(lambda: features.sock_ops_programs(root)))
    findings.append(_guards(place))
    findings.append(node.check_pins(features.pins()))
    findings.extend(node.check_cni(bin_dirs, conf_dir))
    findings.extend(node.check_place(place))
    findings.extend(doctor_taps.examine(place))
    return findings


def _guards(place: Place) -> Finding:
    """Are the guards attached, or could they be?"""
    try:
        shown = loader.describe(place)
        if not shown["loaded"]:
            return kernel.check_guards(features.refused_programs("guards"), attached=None)
        return kernel.check_guards(shown["no_guards_because"], attached=shown["guards"])
    except NearpathError as error:
        return kernel.check_guards(str(error), attached=False)


def _bpf_findings() -> list[Finding]:
    """What bpf(2) says; one finding if it cannot even be asked."""
    try:
        helpers = [
            f"bpf_{helper} in {kind}"
            for kind, wanted in kernel.HELPERS.items()
            for helper in features.missing_helpers(kind, wanted)
        ]
        return [
            kernel.check_missing(
                "program-types",
                features.missing_prog_types(kernel.PROG_TYPES),
                ", ".join(kernel.PROG_TYPES),
            ),
            kernel.check_missing(
                "map-types",
                features.missing_map_types(kernel.MAP_TYPES),
                ", ".join(kernel.MAP_TYPES),
            ),
            kernel.check_missing(
                "helpers", helpers, f"all {sum(map(len, kernel.HELPERS.values()))} that are needed"
            ),
            kernel.check_programs(features.refused_programs("socket_lane")),
        ]
    except NearpathError as error:
        return [Finding("programs", FAIL, error.message, kernel.EVERYTHING, error.remedy)]
