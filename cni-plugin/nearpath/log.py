"""The plugin's log: one line per event, to a size-capped file and to stderr.

Not the standard logging package: it costs several milliseconds of every pod's start.
"""

from __future__ import annotations

import os
import sys
import time

from nearpath.errors import StateError
from nearpath.state import secure_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nearpath.place import Place

# The file is rotated once to ``.1`` at this size, so at most twice this is kept.
LIMIT = 512 * 1024
_LEVELS = ("info", "warning", "error")
# Control characters (a hostile pod name could forge lines or drive a terminal).
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]}


def plain(text: str) -> str:
    """A text from outside with control characters made visible."""
    return text.translate(_CONTROL)


class Log:
    """Writes ``<UTC time> <level> [<pid>] <context>: <message>`` lines.

    Args:
        context: what the lines are about, e.g. ``ADD 3f2a…/eth0 shop/cart``.
        level: the least severe level that is written: info, warning or error.
        quiet: no copy on stderr.
        echo: copy info lines there too, for somebody who looks on.
    """

    def __init__(
        self,
        place: Place,
        context: str = "",
        *,
        level: str = "info",
        quiet: bool = False,
        echo: bool = False,
    ) -> None:
        self._place = place
        self.context = context
        self._wanted = _LEVELS[_LEVELS.index(level) :]
        self._quiet = quiet
        self._echo = echo

    def info(self, message: str) -> None:
        """Something that an operator may want to see afterwards."""
        self._write("info", message)

    def warning(self, message: str) -> None:
        """Something that works but is not what was asked for."""
        self._write("warning", message)

    def error(self, message: str) -> None:
        """Something that failed."""
        self._write("error", message)

    def _write(self, level: str, message: str) -> None:
        """Write one line; never raises, for a full disk must not stop a pod."""
        if level not in self._wanted:
            return
        text = f"{self.context}: {message}" if self.context else message
        text = plain(text)[:4000]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"{stamp} {level} [{os.getpid()}] {text}\n".encode("utf-8", "backslashreplace")
        if not self._quiet and (self._echo or level != "info"):
            try:
                sys.stderr.write(f"nearpath: {level}: {text}\n")
                sys.stderr.flush()
            except (OSError, ValueError, AttributeError):  # closed, full, or None
                pass
        try:
            secure_dir(self._place.run_dir)
            path = self._place.log_file
            descriptor = os.open(
                path,
                os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
            )
            try:
                os.write(descriptor, line)
                if os.fstat(descriptor).st_size > LIMIT:
                    os.rename(path, path + ".1")
            finally:
                os.close(descriptor)
        except (OSError, StateError):
            pass
