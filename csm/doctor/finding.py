"""What a check found, and how findings are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OK, WARNING, ERROR = "ok", "warning", "error"
EXIT_CODES = {OK: 0, WARNING: 1, ERROR: 2}
COLORS = {OK: "\x1b[32m", WARNING: "\x1b[33m", ERROR: "\x1b[31m"}
RESET = "\x1b[0m"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``advice`` says what to do about a warning or an error."""

    check: str
    status: str
    message: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.status in EXIT_CODES
        assert self.status == OK or self.advice, "a warning or an error says what to do"


def worst(findings: Sequence[Finding]) -> str:
    """The status that decides the exit code."""
    return max((finding.status for finding in findings), key=EXIT_CODES.__getitem__, default=OK)


def as_text(findings: Sequence[Finding], colored: bool) -> str:
    """One line for each finding, advice below it, and a closing line."""
    lines = []
    for finding in findings:
        status = f"{finding.status:<8}"
        if colored:
            status = f"{COLORS[finding.status]}{status}{RESET}"
        lines.append(f"{status}{finding.check:<12} {finding.message}")
        if finding.advice:
            lines.append(f"{'':<21}-> {finding.advice}")
    number = {status: sum(finding.status == status for finding in findings) for status in EXIT_CODES}
    lines.append(f"{number[OK]} ok, {number[WARNING]} warnings, {number[ERROR]} errors")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """``{"status": the worst, "findings": [...]}``."""
    return json.dumps({"status": worst(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def short(path: Path) -> str:
    """A path with ``~`` for the home folder."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
