"""Who a pod is, without asking the API server: CNI_ARGS and the annotations capability."""

from __future__ import annotations

from nearpath.cni.protocol import NAME, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# containerd (internal/cri/annotations) and CRI-O (ocicni) use the same key.
ANNOTATIONS_CAPABILITY = "io.kubernetes.cri.pod-annotations"
ANNOTATION_PREFIX = "nearpath.io/"
SOCKET_LANE = ANNOTATION_PREFIX + "socket-lane"
TAP_LANE = ANNOTATION_PREFIX + "tap-lane"
CHECKSUM = ANNOTATION_PREFIX + "checksum"
_KNOWN_ANNOTATIONS = frozenset({SOCKET_LANE, TAP_LANE, CHECKSUM})

# KubeVirt puts the annotation on every virt-launcher pod and begins its name with this
# (virt-controller/services/template.go).
_VM_ANNOTATION = "kubevirt.io/domain"
_VM_NAME = "virt-launcher-"

_ARGUMENTS = {"K8S_POD_NAMESPACE": "namespace", "K8S_POD_NAME": "name", "K8S_POD_UID": "uid"}
_LONGEST = 253  # a DNS subdomain, the longest Kubernetes name


def parse_args(text: str, warn: Callable[[str], None]) -> dict[str, str]:
    """The pod's ``namespace``, ``name`` and ``uid`` from CNI_ARGS (``K=V;K=V``).

    Never fails: the names only label the pod and match excludeNamespaces. What is not of
    the form of a name is passed over with a warning, and is then empty.
    """
    pod = {"namespace": "", "name": "", "uid": ""}
    malformed = 0
    for pair in text.split(";") if text else ():
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            malformed += 1
            continue
        field = _ARGUMENTS.get(key)
        if field is None:
            continue
        if len(value) > _LONGEST or not NAME.issuperset(value):
            warn(f"CNI_ARGS: {key} is not a name, ignored: {quote(value)}")
            continue
        pod[field] = value
    if malformed:
        warn(f"CNI_ARGS: {malformed} part(s) not of the form KEY=VALUE ignored")
    return pod


def _annotations(config: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """The pod's annotations, if the runtime passed any; values are not checked.

    They come as ``runtimeConfig["io.kubernetes.cri.pod-annotations"]``, a flat object, or
    null for a pod without any. Never fails: a pod must not be able to break its own start.
    """
    runtime = config.get("runtimeConfig")
    if runtime is None:
        return {}
    if not isinstance(runtime, dict):
        warn("runtimeConfig is not an object, ignored")
        return {}
    given = runtime.get(ANNOTATIONS_CAPABILITY)
    if given is None:
        return {}
    if not isinstance(given, dict):
        warn("the pod's annotations are not an object, ignored")
        return {}
    return given


def is_vm(config: dict[str, Any], pod: dict[str, str]) -> bool:
    """True if the pod says that it is a virt-launcher pod of KubeVirt.

    By its annotation, or by its name where the runtime passes no annotations (Multus'
    delegates). Harmless if it is none: only devices laid out as KubeVirt does are touched.

    Args:
        pod: see parse_args.
    """
    if pod["name"].startswith(_VM_NAME):
        return True
    return isinstance(_annotations(config, lambda _: None).get(_VM_ANNOTATION), str)


def own_annotations(config: dict[str, Any], warn: Callable[[str], None]) -> dict[str, str]:
    """The pod's own ``nearpath.io/...`` annotations, if the runtime passed any."""
    ours = {}
    for key, value in _annotations(config, warn).items():
        if not key.startswith(ANNOTATION_PREFIX):
            continue
        if key not in _KNOWN_ANNOTATIONS:
            warn(f"unknown annotation ignored: {quote(key)}")
        elif not isinstance(value, str):
            warn(f"annotation {key} is not a string, ignored")
        else:
            ours[key] = value
    return ours
