"""conf/: what the primary CNIs install, and our entry last."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nearpath import state
from nearpath.cni import identity, netconf
from nearpath.cni.context import CODE_CHECK, CODE_DATAPATH, CODE_STATE, CODE_UNAVAILABLE

CONF = Path(__file__).parents[2] / "conf"
OUR_ENTRY = {"type": "nearpath", "capabilities": {identity.ANNOTATIONS_CAPABILITY: True}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}

# What each project's own files hold, see conf/README.md for where.
UPSTREAM: dict[str, dict[str, Any]] = {
    "10-calico.conflist": {
        "name": "k8s-pod-network",
        "cniVersion": "0.3.1",
        "plugins": [
            {
                "type": "calico",
                "log_level": "info",
                "log_file_path": "/var/log/calico/cni/cni.log",
                "datastore_type": "kubernetes",
                "nodename": "__KUBERNETES_NODE_NAME__",
                "mtu": 0,
                "ipam": {"type": "calico-ipam"},
                "policy": {"type": "k8s"},
                "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"},
            },
            {**PORTMAP, "snat": True},
        ],
    },
    "10-flannel.conflist": {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            PORTMAP,
        ],
    },
    "01-kube-ovn.conflist": {
        "name": "kube-ovn",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "kube-ovn", "server_socket": "/run/openvswitch/kube-ovn-daemon.sock"},
            PORTMAP,
        ],
    },
}


def test_every_list_is_known() -> None:
    """Each list in conf/ has its upstream counterpart here."""
    assert {path.name for path in CONF.glob("*.conflist")} == set(UPSTREAM)


@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_upstream_plus_our_entry(name: str) -> None:
    """Our entry is the last plugin, and without it the list is what upstream installs."""
    given = json.loads((CONF / name).read_text(encoding="utf-8"))
    assert given["plugins"].pop() == OUR_ENTRY
    assert given == UPSTREAM[name]


@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_our_entry_is_accepted(name: str) -> None:
    """As a runtime would pass it on, our entry has neither problems nor warnings."""
    given = json.loads((CONF / name).read_text(encoding="utf-8"))
    entry = {**given["plugins"][-1], "name": given["name"], "cniVersion": given["cniVersion"]}
    conf = netconf.parse(entry)
    assert (conf.problems, conf.warnings) == ([], [])


def test_every_key_is_documented() -> None:
    """conf/README.md has a line for each key, annotation and error code, and no others."""
    text = (CONF / "README.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([\w./-]+)` \|", text, re.MULTILINE))
    keys = set(netconf.KEYS) | {"capabilities"}
    annotations = {identity.SOCKET_LANE, identity.TAP_LANE, identity.CHECKSUM}
    assert documented - set(UPSTREAM) == keys | annotations
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    ours = {CODE_UNAVAILABLE, CODE_DATAPATH, CODE_STATE, CODE_CHECK}
    assert codes == ours | {8, 11, 50}
    for reason in state.CHOSEN:
        assert f"`{reason}`" in text
