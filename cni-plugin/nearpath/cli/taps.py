"""``nearpath tap-lane`` and ``watch``: virtual machines, live."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nearpath.cli import output
from nearpath.errors import NearpathError

if TYPE_CHECKING:
    from nearpath.place import Place

_MODES = ("mirror", "redirect", "peer", "off", "default")
_CHECKSUMS = ("skip", "software", "keep", "default")

# What people read for the reasons in the table.
REASONS = """\
reasons of a tap that is not in the lane:
  annotation, config     the pod or the conflist says "off"
  operator               `nearpath tap-lane off`
  excluded-namespace     its namespace is in excludeNamespaces
  paused                 `nearpath pause`; unloaded-by-operator: `nearpath unload`
  no-bridge              no bridge k6t-* yet: virt-handler has not been there, or the
                         binding has none (passt, SR-IOV)
  no-nic                 only the tap is a port: masquerade; nothing to short-circuit
  no-tap, several-taps, several-nics, not-veth, down, vlan-filtering, mtu-differs
                         not laid out as the bridge binding does, or the bridge is needed
  no-watcher             no watcher runs; the next ADD or `nearpath watch` starts one
  failed                 see the log, /run/nearpath/nearpath.log
of a mode other than asked for:
  peer-unavailable       frames cannot go straight to the host's veth; redirect instead
of a checksum mode other than asked for:
  switched-off           somebody has switched offload off; ask for "skip" by name
  userspace-switch       a switch in user space, or a capture, reads the host's veth
  not-negotiated         the guest does not take packets without checksum"""


def add(commands: output.Commands) -> None:
    """Add the commands of this module."""
    parser = output.add_command(
        commands,
        "tap-lane",
        "virtual machines: show or change how their frames pass the pod",
        "Without MODE and --checksum, list the taps of virtual machines (KubeVirt), how their\n"
        "frames pass the virt-launcher pod, and how many took the lane. With them, change the\n"
        "pods that are named, or all: at once, without a frame lost, and until their DEL.\n\n"
        "  mirror     tc mirred between tap and pod NIC, in place of the bridge\n"
        "  redirect   a BPF program in place of mirred\n"
        "  peer       frames of the machine straight to the host's veth\n"
        "  off        by the bridge, as KubeVirt made it\n"
        "  default    as conflist and annotation say",
        "examples:\n"
        "  nearpath tap-lane\n"
        "  nearpath tap-lane redirect --pod shop/virt-launcher-db-x7k2p\n"
        "  nearpath tap-lane --checksum software --pod shop/virt-launcher-old-9qj4d\n"
        "  nearpath tap-lane default --checksum default\n\n" + REASONS,
    )
    output.add_json(parser)
    parser.add_argument("mode", nargs="?", choices=_MODES, metavar="MODE", help="see above")
    parser.add_argument(
        "--checksum",
        choices=_CHECKSUMS,
        metavar="MODE",
        help="skip: nobody on this node computes checksums; software: they are always computed; "
        "keep: as it is; default: as conflist and annotation say",
    )
    parser.add_argument(
        "--pod",
        action="append",
        default=[],
        metavar="NAMESPACE/NAME",
        help="which pod (or its container ID); may be repeated; default: all virtual machines",
    )
    parser.set_defaults(run=_tap_lane)

    parser = output.add_command(
        commands,
        "watch",
        "be the watcher that gives virtual machines their lane",
        "Watch the pods of virtual machines and give each tap its lane when it comes. An ADD\n"
        "starts this by itself; run it to see what it does, or when it was killed and no pod\n"
        "is due. There is one on a node: a second one ends at once. It ends with the last\n"
        "virtual machine's pod; the lanes stay when it is stopped.",
        "example:\n  nearpath watch\n\n"
        "exit status: 0 no virtual machine left, or stopped; 1 there is a watcher already.",
    )
    parser.add_argument("--detached", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_watch)


def _select(
    recorded: dict[int, list[dict[str, Any]]], wanted: list[str]
) -> dict[int, list[dict[str, Any]]]:
    """The virtual machines' pods that were named on the command line; none named: all.

    Raises:
        NearpathError: there is none of that name.
    """
    if not wanted:
        return recorded
    chosen = {}
    for name in wanted:
        found = {
            cookie: records
            for cookie, records in recorded.items()
            if any(name in {_name(record), record["container_id"]} for record in records)
        }
        if not found:
            raise NearpathError(
                f"no virtual machine's pod {output.plain(name)} on this node", "nearpath tap-lane"
            )
        chosen.update(found)
    return chosen


def _name(record: dict[str, Any]) -> str:
    pod = record.get("pod")
    pod = pod if isinstance(pod, dict) else {}
    return f"{pod.get('namespace', '')}/{pod.get('name', '')}"


def _tap_lane(arguments: argparse.Namespace) -> int:
    from nearpath.lanes import vm_state

    place = output.root_place()
    chosen = _select(vm_state.by_cookie(place), arguments.pod)
    if arguments.mode or arguments.checksum:
        _change(place, set(chosen), arguments.mode, arguments.checksum)
    return _show(place, chosen, as_json=arguments.json)


def _change(place: Place, cookies: set[int], mode: str | None, checksum: str | None) -> None:
    """Keep what an operator chose and bring it about.

    Raises:
        NearpathError: not everywhere; the watcher goes on trying.
    """
    from nearpath.lanes import vm_state
    from nearpath.node import taps

    with vm_state.lock(place):
        for cookie in cookies:
            choice = vm_state.choice(place, cookie)
            for name, value in (("mode", mode), ("checksum", checksum)):
                if value == "default":
                    choice.pop(name, None)
                elif value:
                    choice[name] = value
            vm_state.choose(place, cookie, choice)
    failed = taps.attend_all(place, cookies)
    if failed:
        raise NearpathError(
            f"{len(failed)} of {len(cookies)} not changed yet: {next(iter(failed.values()))}"
        )


def _show(place: Place, chosen: dict[int, list[dict[str, Any]]], *, as_json: bool) -> int:
    from nearpath.node import taps

    pods = [
        {"pod": _name(records[0]), "container_id": records[0]["container_id"]}
        | taps.describe(place, records)
        for records in chosen.values()
    ]
    if as_json:
        output.print_json(pods)
    elif not pods:
        print("no virtual machines: the plugin has recorded no virt-launcher pod on this node")
    else:
        print_taps(pods)
    return output.EXIT_DONE


def print_taps(pods: list[dict[str, Any]]) -> None:
    """One line per tap of these pods.

    Args:
        pods: ``pod``, and what taps.describe says.
    """
    from nearpath.cli.show import size

    shown = output.table(
        "virtual machine", "tap", "lane", "checksum", "from it", "to it", "reason",
        right=("from it", "to it"),
    )  # fmt: skip
    for pod in pods:
        for wire in pod["wires"] or [None]:
            if wire is None:
                shown.add_row(
                    output.plain(pod["pod"]), "-", "off", "-", "-", "-",
                    output.plain(pod["reason"]), style="yellow",
                )  # fmt: skip
                continue
            reasons = dict.fromkeys(filter(None, (wire["reason"], wire["checksum_reason"])))
            shown.add_row(
                output.plain(pod["pod"]),
                output.plain(f"{wire['bridge']} {wire['tap']}"),
                output.plain(wire["mode"]),
                output.plain(wire["checksum"]),
                *(
                    f"{wire[way]['packets']:,} / {size(wire[way]['bytes'])}"
                    for way in ("from_vm", "to_vm")
                ),
                output.plain(" ".join(reasons)),
                style="yellow" if wire["mode"] == "off" else "",
            )
        if pod["error"]:
            shown.add_row("", "", "", "", "", "", output.plain(pod["error"]), style="red")
    output.console().print(shown)


def _watch(arguments: argparse.Namespace) -> int:
    from nearpath.log import Log
    from nearpath.node import watcher
    from nearpath.node.interrupt import Interrupted, Interrupts

    place = output.root_place()
    log = Log(place, "watcher", quiet=arguments.detached, echo=not arguments.detached)

    with Interrupts() as interrupts:

        def stopped() -> bool:
            try:
                interrupts.check()
            except Interrupted:
                return True
            return False

        if watcher.watch(place, log, stopped):
            return output.EXIT_DONE
    raise NearpathError("there is a watcher on this node already", "see `nearpath status`")
