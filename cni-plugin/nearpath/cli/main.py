"""The command line of nearpath: what an operator types.

One module per group of commands, each with ``add(subparsers)``. A command is a function
from parsed arguments to an exit status; it raises NearpathError for what went wrong, and
``main`` makes one line of it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys

from nearpath.cli import calibrate, connections, demo, doctor, settings, show, switch, taps
from nearpath.cli.output import EXIT_FAILED, EXIT_USAGE
from nearpath.errors import NearpathError
from nearpath.node.interrupt import Interrupted

_DESCRIPTION = """\
Pods and virtual machines of one node, without the detour through the network stack.

Called by a container runtime (CNI_COMMAND is set) this program is the CNI plugin
"nearpath"; called by you it shows and controls what the plugin does on this node.
"""
_EPILOG = """\
examples:
  nearpath doctor                is this node fit, and if not, what to do
  nearpath status                is the datapath loaded, and how much goes through it
  nearpath pods                  which pods are accelerated, and why others are not
  nearpath connections           what is in the lane now, and by which path it goes
  nearpath tap-lane              virtual machines: what has the tap lane, and why others have not
  nearpath pause                 off at once, keeping everything loaded; `resume` reverses
  nearpath unload                switch it off, keeping all connections; `load` reverses
  nearpath calibrate             measure which streams this node carries faster in the lane
  nearpath demo                  measure the gain on this node, between two throwaway pods

exit status:
  0    done; doctor: usable
  1    failed, one line on stderr says why; doctor: degraded
  2    wrong usage; doctor: unusable
  130  interrupted (Ctrl-C); 143 terminated

environment:
  NEARPATH_RUN_DIR   records, lock and log          (default /run/nearpath)
  NEARPATH_PIN_DIR   pins in bpffs                  (default /sys/fs/bpf/nearpath)
  NEARPATH_CGROUP    cgroup v2 directory            (default: root of the hierarchy)
  NEARPATH_DEBUG     1: a traceback with each error
  NO_COLOR           any value: no colours

`nearpath COMMAND --help` says more about a command.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nearpath",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for group in (show, connections, taps, doctor, switch, settings, calibrate, demo):
        group.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit status; see ``nearpath --help``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without our letters
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
        if parsed.command is None:
            parser.print_help(sys.stderr)
            return EXIT_USAGE
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except SystemExit as ended:  # argparse: --help, wrong usage
        return ended.code if isinstance(ended.code, int) else EXIT_FAILED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing more can be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Interrupted, KeyboardInterrupt) as stopped:
        number = stopped.signal if isinstance(stopped, Interrupted) else 2
        return _say(stopped, str(stopped) or "interrupted", 128 + number)
    except NearpathError as error:
        return _say(error, str(error))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _say(error, f"{what}{error.strerror or error}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}; this is a bug, please report it"
        return _say(error, f"{text} with the output under NEARPATH_DEBUG=1")
    return status


def _say(error: BaseException, text: str, status: int = EXIT_FAILED) -> int:
    """One line on stderr, or with NEARPATH_DEBUG=1 the traceback too."""
    if os.environ.get("NEARPATH_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    print(f"nearpath: {' '.join(text.split())}", file=sys.stderr)
    return status
