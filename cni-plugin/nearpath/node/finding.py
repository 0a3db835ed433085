"""What doctor finds: answers, each with what is lost and the remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

OK, WARN, FAIL = "ok", "warn", "fail"
VERDICTS = {OK: "usable", WARN: "degraded", FAIL: "unusable"}
EXITS = {OK: 0, WARN: 1, FAIL: 2}


@dataclass(frozen=True)
class Finding:
    """Answer to one question.

    Attributes:
        name: stable identifier, e.g. ``kernel-version``.
        state: ``ok``, ``warn`` (something does not work) or ``fail`` (nothing does).
        found: what there is.
        lost: what does not work because of it; empty when ok.
        remedy: what to do; empty when ok.
    """

    name: str
    state: str
    found: str
    lost: str = ""
    remedy: str = ""


def verdict(findings: Sequence[Finding]) -> str:
    """The worst state among the findings."""
    states = {finding.state for finding in findings}
    return FAIL if FAIL in states else WARN if WARN in states else OK


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for machines: ``{"verdict", "exit_code", "checks": [...]}``."""
    worst = verdict(findings)
    return {
        "verdict": VERDICTS[worst],
        "exit_code": EXITS[worst],
        "checks": [asdict(finding) for finding in findings],
    }
