"""``nearpath doctor``: is this node fit?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath.cli import output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from nearpath.node.finding import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add(commands: output.Commands) -> None:
    """Add the command of this module."""
    parser = output.add_command(
        commands,
        "doctor",
        "is this node fit, and if not, what to do",
        "Check kernel, BPF, other accelerators, the CNI configuration and nearpath's own\n"
        "state. For each finding that is not ok: what does not work without it, and the\n"
        "remedy. Changes nothing; programs are loaded for a moment to see whether the\n"
        "kernel takes them.",
        "examples:\n"
        "  nearpath doctor\n"
        "  nearpath doctor --json | jq '.checks[] | select(.state != \"ok\")'\n"
        "  nearpath doctor --conf-dir /etc/rancher/cni/net.d --bin-dir /var/lib/cni/bin\n\n"
        "exit status: 0 usable, 1 degraded (some pods or features are not accelerated),\n"
        "2 unusable.",
    )
    output.add_json(parser)
    parser.add_argument("--conf-dir", metavar="DIR", help="CNI configurations (/etc/cni/net.d)")
    parser.add_argument("--bin-dir", metavar="DIR", help="CNI plugins (/opt/cni/bin and others)")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from nearpath.node import chain, doctor, finding

    place = output.root_place()
    bin_dirs = (arguments.bin_dir,) if arguments.bin_dir else chain.PLUGIN_DIRS
    findings = doctor.examine(place, bin_dirs, arguments.conf_dir or chain.CONF_DIR)
    shown = finding.report(findings)
    if arguments.json:
        output.print_json(shown)
    else:
        _print(findings, shown["verdict"])
    status: int = shown["exit_code"]
    return status


def _print(findings: Sequence[Finding], verdict: str) -> None:
    from rich.text import Text

    target = output.console()
    for each in findings:
        line = Text(f"{each.state:<5}", style=_STYLES[each.state])
        line.append(f"{each.name:<20}", style="bold")
        line.append(output.plain(each.found), style="default")
        target.print(line, soft_wrap=True)
        for label, text in (("lost without it", each.lost), ("remedy", each.remedy)):
            if text:
                target.print(Text(f"     {label}: {output.plain(text)}"), soft_wrap=True)
    worst = {"usable": "ok", "degraded": "warn", "unusable": "fail"}[verdict]
    target.print(Text(f"this node is {verdict}", style=_STYLES[worst]))
