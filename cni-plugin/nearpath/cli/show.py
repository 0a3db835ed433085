"""``nearpath version``, ``status`` and ``pods``: look, touch nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearpath import VERSION
from nearpath.cli import output
from nearpath.place import LAYOUT

if TYPE_CHECKING:
    import argparse

# No message is this large: a limit beyond it is none.
_LARGE = 1 << 30

# How people read the names in the counters.
REASONS = {
    "joined": "sockets joined the lane",
    "waived": "readers that proved fit before: no probation",
    "left_streaming": "sockets left it to stream by TCP",
    "left_unhelped": "sockets left it: so much in a row took the kernel path (unhelped_kib)",
    "left_duplex": "sockets left it: a task reads while another writes",
    "left_zerocopy": "sockets left it: they send with MSG_ZEROCOPY",
    "left_ioctl": "sockets left it: they ask how much there is to read (FIONREAD)",
    "left": "sockets left it with their FIN",
    "stayed": "sockets stayed then: redirected data unread or on its way",
    "seen_splice": "readers found unfit: splice(2)",
    "seen_flags": "readers found unfit: MSG_WAITALL, MSG_TRUNC or MSG_OOB",
    "seen_ioctl": "readers found unfit: FIONREAD",
    "paused": "messages by kernel: paused",
    "redirect_off": "messages by kernel: the setting redirect is off",
    "peer_not_joined": "messages by kernel: the peer is not in the lane",
    "closing": "messages by kernel: sent after shutdown",
    "streaming": "messages by kernel: a stream that TCP carries faster",
    "unhelped": "messages by kernel: a stream that the lane does not help",
    "duplex": "messages by kernel: a task reads while another writes",
    "zerocopy": "messages by kernel, sockets not joined: MSG_ZEROCOPY",
    "ioctl": "messages by kernel: the sender asks how much there is to read (FIONREAD)",
    "not_fit": "messages by kernel: the reader uses splice(2), MSG_WAITALL or the like",
    "reader_unknown": "messages by kernel: nobody has been seen to wait for them yet",
    "careful": "messages by kernel: the reader may take a short read for all there is",
    "urgent": "messages by kernel: the sender uses urgent data (MSG_OOB)",
    "ulp_set": "messages by kernel: kernel TLS or another ULP was switched on",
    "low_water": "messages by kernel: the reader has set SO_RCVLOWAT",
    "probation": "messages by kernel: the first ones, while the reader is looked at",
    "revalidate": "messages by kernel: now and then, so that policy and conntrack see the flow",
    "not_drained": "messages by kernel: bytes sent by TCP still unread",
    "receiver_behind": "messages by kernel: the receiver is behind",
    "peer_left": "messages by kernel: the peer is closing or has left the lane",
    "redirect_failed": "messages by kernel: redirect failed",
    "peer_elsewhere": "sockets not joined: the peer is not a pod of this node",
    "ulp": "sockets not joined: kernel TLS or another ULP",
    "mptcp": "sockets not joined: MPTCP",
    "socket_busy": "sockets not joined: another sockmap has them",
    "map_full": "sockets not joined: map full",
    "join_failed": "sockets not joined: refused by the kernel",
}


def add(commands: output.Commands) -> None:
    """Add the commands of this module."""
    parser = output.add_command(
        commands,
        "version",
        "version of this program",
        "Print the version of this program and of the layout of its pinned maps.",
        "example:\n  nearpath version --json",
    )
    output.add_json(parser)
    parser.set_defaults(run=_version)

    parser = output.add_command(
        commands,
        "status",
        "is it loaded, and how much goes through it",
        "Show whether the datapath is loaded and with what (guards, room for connections,\n"
        "sizes of streams that stay in the lane), what it has done since, and failures so far.",
        "examples:\n"
        "  nearpath status\n"
        "  nearpath status --json | jq .lanes.socket.redirected_bytes\n\n"
        "A message is one send(2) of a socket in the lane. Messages by kernel took the\n"
        "ordinary path although their socket is in the lane; the reasons say why.\n\n"
        "exit status: 0 whether loaded or not; 1 it cannot be told.",
    )
    output.add_json(parser)
    parser.set_defaults(run=_status)

    parser = output.add_command(
        commands,
        "pods",
        "which pods are accelerated, and why others are not",
        "List the attachments that the plugin has recorded, with state and reason.",
        "examples:\n"
        "  nearpath pods\n"
        "  nearpath pods --json | jq '.[] | select(.lanes.socket.state == \"off\")'\n\n"
        "reasons:\n"
        '  annotation            the pod has nearpath.io/socket-lane: "off"\n'
        "  config                socketLane is off in the conflist\n"
        "  excluded-namespace    its namespace is in excludeNamespaces\n"
        "  no-guards             the kernel refuses the guards that keep readers safe, and\n"
        "                        neither the pod nor the conflist says to go without; see\n"
        "                        `nearpath doctor`\n"
        "  other-attachment, own-netns   not a namespace of this attachment alone\n"
        "  not-loaded            the datapath is not loaded; the next ADD or `load` does it\n"
        "  unloaded-by-operator  somebody ran `nearpath unload`\n"
        "  paused                `nearpath pause`: every message takes the kernel path\n"
        "  not-registered        the programs do not know it; `nearpath load` repairs that\n"
        "  others                ADD failed: see the log, /run/nearpath/nearpath.log\n\n"
        "Virtual machines (KubeVirt) have a second table, that of `nearpath tap-lane`, which\n"
        "explains it.",
    )
    output.add_json(parser)
    parser.set_defaults(run=_pods)


def _version(arguments: argparse.Namespace) -> int:
    if arguments.json:
        output.print_json({"version": VERSION, "layout": LAYOUT})
    else:
        print(f"nearpath {VERSION} (map layout {LAYOUT})")
    return output.EXIT_DONE


def _status(arguments: argparse.Namespace) -> int:
    from nearpath.node import status

    shown = status.node_status(output.root_place())
    if arguments.json:
        output.print_json(shown)
    else:
        _print_status(shown)
    return output.EXIT_DONE


def _datapath(shown: dict[str, Any]) -> str:
    if not shown["loaded"]:
        if shown["unloaded_by_operator"]:
            return "unloaded by an operator; `nearpath load` loads it"
        return "not loaded; the first pod's ADD or `nearpath load` loads it"
    paused = ", paused: every message takes the kernel path; `nearpath resume`"
    paused = paused if shown["paused"] else ""
    return f"loaded (layout {shown['layout']}){paused}"


def _guards(guards: dict[str, Any]) -> str:
    if guards["attached"]:
        return "attached"
    because = output.plain(guards["because"]).partition(" (libbpf:")[0]
    return f"not attached: {because or 'unknown'}; see `nearpath doctor`"


def kept_streams(first: int, end: int) -> str:
    """Which streams stay in the lane, by the settings stream_from and stream_to."""
    if first >= end:
        return "of any message size leave the lane"
    if end > _LARGE:
        return f"of messages from {first} B stay in the lane"
    return f"of messages from {first} to {end - 1} B stay in the lane"


def _streams(shown: dict[str, Any]) -> str:
    """Which streams stay in the lane, and who says so."""
    streams, stored = shown["streams"], shown["calibration"]
    text = kept_streams(streams["from"], streams["to"])
    if streams["source"] == "calibrated":
        when = output.plain((stored or {}).get("measured_at", "at an unknown time"))
        return f"{text} (calibrated {when})"
    if streams["source"] == "default":
        return f"{text} (defaults; `nearpath calibrate` measures this node)"
    return f"{text} (set by `nearpath settings`)"


def _print_status(shown: dict[str, Any]) -> None:
    lane = shown["lanes"]["socket"]
    room = f", of at most {shown['maps']['connections']:,}" if shown["maps"] else ""
    rows = [
        ("nearpath", shown["version"]),
        ("datapath", _datapath(shown)),
        ("cgroup", shown["cgroup"] or "none"),
        *((("guards", _guards(shown["guards"])),) if shown["loaded"] else ()),
        *((("streams", _streams(shown)),) if shown["loaded"] else ()),
        ("pods", f"{shown['pods']}, {shown['pods_on_lane']} of them on the socket lane"),
        ("connections", f"{lane['connections']:,} in the socket lane now{room}"),
        (
            "redirected",
            f"{lane['redirected_messages']:,} messages, {size(lane['redirected_bytes'])}",
        ),
        ("by kernel", f"{lane['kernel_messages']:,} messages, {size(lane['kernel_bytes'])}"),
    ]
    rows += _machines(shown["lanes"]["tap"])
    if shown["draining"]:
        rows.append(("draining", f"{shown['draining']} sockets of an unloaded datapath"))
    for name, value in rows:
        print(f"{name:<12} {value}")
    if lane["reasons"]:
        print("\nreasons")
        for name, count in lane["reasons"].items():
            print(f"  {count:>12,}  {name:<18} {REASONS.get(name, '')}".rstrip())
    if shown["failures"]:
        print("\nfailures since boot (pods that stayed on the kernel path, and the like)")
        for name, count in sorted(shown["failures"].items()):
            print(f"  {count:>12,}  {output.plain(name)}")


def _machines(tap: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the status about virtual machines; none if there are none."""
    if not tap["pods"]:
        return []
    text = f"{tap['pods']} pods, {tap['taps_on_lane']} of {tap['taps']} taps on the tap lane"
    if tap["paused"]:
        text += " (paused; `nearpath resume`)"
    watcher = f"process {tap['watcher']}" if tap["watcher"] > 0 else "starting"
    if not tap["watcher"]:
        watcher = "none: the next ADD starts one, or `nearpath watch`"
    return [("machines", text), ("watcher", watcher)]


def size(count: int) -> str:
    """A number of bytes for people, e.g. ``1.5 GiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _pods(arguments: argparse.Namespace) -> int:
    from nearpath.node import status

    pods = status.pod_list(output.root_place())
    if arguments.json:
        output.print_json(pods)
        return output.EXIT_DONE
    if not pods:
        print("no pods: the plugin has recorded no attachment on this node")
        return output.EXIT_DONE
    shown = output.table(
        "namespace", "pod", "interface", "addresses", "lane", "reason", "redirected",
        right=("redirected",),
    )  # fmt: skip
    for pod in pods:
        lane = pod["lanes"]["socket"]
        shown.add_row(
            output.plain(pod["namespace"] or "-"),
            output.plain(pod["name"] or pod["container_id"][:12]),
            output.plain(pod["ifname"]),
            output.plain(" ".join(pod["ips"])),
            lane["state"],
            output.plain(lane["reason"]),
            size(lane.get("redirected_bytes", 0)),
            style="" if lane["state"] == "on" else "yellow",
        )
    output.console().print(shown)
    _print_machines(pods)
    return output.EXIT_DONE


def _print_machines(pods: list[dict[str, Any]]) -> None:
    """The taps of virtual machines, once for each pod."""
    from nearpath.cli.taps import print_taps

    machines = {
        pod["netns_cookie"]: {"pod": f"{pod['namespace']}/{pod['name']}", **pod["lanes"]["tap"]}
        for pod in pods
        if "tap" in pod["lanes"]
    }
    if machines:
        print()
        print_taps(list(machines.values()))
