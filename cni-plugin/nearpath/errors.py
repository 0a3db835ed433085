"""The errors of nearpath.

Every error is wrapped once, with the noun that failed and the remedy, and turned into
wire format (CNI error object, CLI message) only at the edge.
"""

from __future__ import annotations


class NearpathError(Exception):
    """An operation on a named thing failed.

    Args:
        message: one line that names what failed, e.g. ``cannot open pinned map pods``.
        remedy: what the reader can do about it; may be empty.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class Unavailable(NearpathError):
    """This node lacks something that the operation needs (a kernel feature, a mount).

    Args:
        reason: short stable identifier, counted and shown to users, e.g. ``no-btf``.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.reason = reason


class BpfError(NearpathError):
    """A bpf(2) operation failed; ``errno`` is the positive error number (0: unknown)."""

    def __init__(self, message: str, errno: int = 0, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.errno = errno


class StateError(NearpathError):
    """A file under the run directory cannot be read, written or trusted."""


class DeadlineExceeded(NearpathError):
    """The command's own deadline passed (CNI: a hung plugin blocks the whole runtime)."""
