"""Our keys of the configuration, the pod's identity, and the choice made from both."""

from __future__ import annotations

from typing import Any

import pytest

from nearpath.cni import identity, netconf
from nearpath.cni.protocol import CniError
from nearpath.datapath import sizes

BASE: dict[str, Any] = {"cniVersion": "1.0.0", "name": "net", "type": "nearpath"}
POD = {"namespace": "shop", "name": "cart", "uid": "u"}


def with_annotations(**given: object) -> dict[str, Any]:
    """A configuration as a runtime passes it with the annotations capability."""
    named = {f"nearpath.io/{key.replace('_', '-')}": value for key, value in given.items()}
    return {**BASE, "runtimeConfig": {identity.ANNOTATIONS_CAPABILITY: named}}


def test_defaults() -> None:
    """Without keys of ours: not required, lane on, default deadlines, nothing to warn of."""
    conf = netconf.parse(BASE)
    assert (conf.required, conf.socket_lane, conf.log_level) == (False, True, "info")
    assert (conf.guards, conf.most_connections) == (True, 0)
    assert conf.exclude_namespaces == frozenset()
    assert (conf.deadline("ADD"), conf.deadline("DEL"), conf.deadline("GC")) == (5, 2, 2)
    assert (conf.problems, conf.warnings) == ([], [])


def test_every_key() -> None:
    """Each documented key arrives."""
    conf = netconf.parse(
        {
            **BASE,
            "required": True,
            "socketLane": "off",
            "guards": "preferred",
            "maxConnections": 2048,
            "excludeNamespaces": ["kube-system", "x"],
            "timeoutSeconds": 0.5,
            "logLevel": "error",
            "capabilities": {identity.ANNOTATIONS_CAPABILITY: True},
        }
    )
    assert (conf.required, conf.socket_lane, conf.log_level) == (True, False, "error")
    assert (conf.guards, conf.most_connections) == (False, 2048)
    assert conf.exclude_namespaces == {"kube-system", "x"}
    assert conf.deadline("ADD") == conf.deadline("STATUS") == 0.5
    assert (conf.problems, conf.warnings) == ([], [])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("required", ["true", 1, None, [], {}]),
        ("socketLane", [True, "ON", "", None, 1, ["on"], {}]),
        ("excludeNamespaces", ["kube-system", None, {}, [1], ["a", None], [["a"]]]),
        ("timeoutSeconds", ["5", True, None, 0, 0.49, 61, -1, 10**400, [5]]),
        ("guards", [True, "Required", "", None, 1, ["required"], {}]),
        ("maxConnections", ["4096", True, None, 0, 1023, (1 << 20) + 1, -1, 4096.0, [4096]]),
        ("logLevel", ["debug", "INFO", None, 0, ["info"]]),
    ],
)
def test_wrong_types(key: str, values: list[object]) -> None:
    """A wrong type or range is a problem that names the key, never its value; error 7."""
    for value in values:
        conf = netconf.parse({**BASE, key: value})
        (problem,) = conf.problems
        assert problem.startswith(f"{key} must be ")
        with pytest.raises(CniError, match=f"invalid nearpath configuration: {key} must be") as e:
            conf.check()
        assert e.value.code == 7
        # The default holds, for commands that go on regardless.
        assert (conf.required, conf.socket_lane, conf.timeout) == (False, True, None)
        assert (conf.guards, conf.most_connections) == (True, 0)


def test_room_is_that_of_the_maps() -> None:
    """The range that ADD checks without importing it."""
    for value in (sizes.LEAST, sizes.MOST):
        assert netconf.parse({**BASE, "maxConnections": value}).most_connections == value
        assert sizes.of_maps(value)["connections"] == value
    for value in (sizes.LEAST - 1, sizes.MOST + 1):
        assert netconf.parse({**BASE, "maxConnections": value}).problems


def test_all_problems_are_named() -> None:
    """Two wrong keys give one error that names both."""
    with pytest.raises(CniError, match=r"required must be .*; logLevel must be"):
        netconf.parse({**BASE, "required": 1, "logLevel": 1}).check()


def test_unknown_keys_warn() -> None:
    """Keys of others are tolerated with a warning, those of CNI without one."""
    known: dict[str, Any] = {
        "ipam": {},
        "dns": {},
        "args": {},
        "prevResult": {},
        "cni.dev/valid-attachments": [],
    }
    assert netconf.parse({**BASE, **known}).warnings == []
    conf = netconf.parse({**BASE, "requird": True, "\x1b[31m": 1})
    assert conf.warnings == [
        "unknown configuration key ignored: 'requird'",
        "unknown configuration key ignored: '\\x1b[31m'",
    ]
    conf.check()


@pytest.mark.parametrize(
    "runtime", [None, {}, {identity.ANNOTATIONS_CAPABILITY: None}, {"portMappings": []}]
)
def test_no_annotations(runtime: object) -> None:
    """No runtimeConfig, no annotations, and null for a pod without any are all fine."""
    conf = netconf.parse({**BASE, "runtimeConfig": runtime})
    assert (conf.annotations, conf.warnings) == ({}, [])


@pytest.mark.parametrize(
    "runtime",
    [[], "x", 1, {identity.ANNOTATIONS_CAPABILITY: []}, {identity.ANNOTATIONS_CAPABILITY: "x"}],
)
def test_malformed_annotations(runtime: object) -> None:
    """Annotations of the wrong type are ignored with a warning."""
    conf = netconf.parse({**BASE, "runtimeConfig": runtime})
    assert conf.annotations == {}
    assert len(conf.warnings) == 1
    conf.check()


def test_bad_annotation_values() -> None:
    """A pod's bad or unknown nearpath.io annotation warns; those of others are not ours."""
    values: tuple[object, ...] = ("ON", "", 1, None, [], True)
    for value in values:
        conf = netconf.parse(with_annotations(socket_lane=value))
        assert conf.annotations == {}
        assert len(conf.warnings) == 1
    assert (
        "'nearpath.io/socketlane'" in netconf.parse(with_annotations(socketlane="on")).warnings[0]
    )
    others = {"runtimeConfig": {identity.ANNOTATIONS_CAPABILITY: {"a/b": 1, "nearpath": "x"}}}
    assert netconf.parse({**BASE, **others}).warnings == []


@pytest.mark.parametrize(
    ("key", "annotation", "excluded", "expected"),
    [
        (None, None, False, (True, "")),
        ("off", None, False, (False, "config")),
        ("off", "on", False, (True, "")),
        ("on", "off", False, (False, "annotation")),
        ("off", "off", False, (False, "annotation")),
        ("on", "on", True, (False, "excluded-namespace")),
    ],
)
def test_narrower_wins(
    key: str | None, annotation: str | None, excluded: bool, expected: tuple[bool, str]
) -> None:
    """The annotation overrides the key, and nothing overrides an excluded namespace."""
    config = with_annotations(**({"socket_lane": annotation} if annotation else {}))
    if key:
        config["socketLane"] = key
    config["excludeNamespaces"] = ["shop"] if excluded else ["other", ""]
    assert netconf.socket_lane(netconf.parse(config), POD) == expected


def test_exclusion_is_by_whole_name() -> None:
    """An excluded namespace does not exclude others, nor pods without a namespace."""
    conf = netconf.parse({**BASE, "excludeNamespaces": ["shop", ""]})
    for namespace in ("shop2", "sho", "SHOP", ""):
        assert netconf.socket_lane(conf, {**POD, "namespace": namespace}) == (True, "")


@pytest.mark.parametrize(
    ("text", "pod", "warnings"),
    [
        ("", ("", "", ""), 0),
        ("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u", ("ns", "p", "u"), 0),
        ("K8S_POD_UID=u;K8S_POD_INFRA_CONTAINER_ID=x;FOO=BAR", ("", "", "u"), 0),
        ("K8S_POD_NAME=a;K8S_POD_NAME=b", ("", "b", ""), 0),
        ("K8S_POD_NAME=a;", ("", "a", ""), 1),
        ("K8S_POD_NAME", ("", "", ""), 1),
        ("K8S_POD_NAME=a=b;K8S_POD_NAMESPACE=ns", ("ns", "", ""), 1),
        ("K8S_POD_NAME=../x;K8S_POD_NAMESPACE=\x1b", ("", "", ""), 2),
        ("K8S_POD_NAME=\udcff", ("", "", ""), 1),
        ("K8S_POD_NAME=" + "a" * 254, ("", "", ""), 1),
        (";" * 1000, ("", "", ""), 1),
    ],
)
def test_cni_args(text: str, pod: tuple[str, str, str], warnings: int) -> None:
    """CNI_ARGS gives the pod's names; what is malformed is passed over with a warning."""
    said: list[str] = []
    found = identity.parse_args(text, said.append)
    assert (found["namespace"], found["name"], found["uid"]) == pod
    assert len(said) == warnings
    assert all(line.isprintable() and line.isascii() for line in said)
