"""The result of ``verify``: one ``Finding`` for each check, collected into a ``Report``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from veneer.errors import AdapterError, escape_controls

T = TypeVar("T")
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check of an adapter folder.

    Fields:
        level: "error", "warning" or "ok". Only errors make ``Report.ok`` false.
        check: the name of the group of checks, such as "tensors".
    """

    level: Level
    check: str
    message: str

    def __str__(self) -> str:
        """One line, or several if the message has several: the further lines are indented. Control
        characters are escaped, since a tensor's name could otherwise imitate another finding or
        control the terminal."""
        return f"{self.level:<8} {self.check:<8} {escape_controls(self.message)}".replace(
            "\n", "\n" + " " * 18
        )


@dataclass(frozen=True)
class Report:
    """All findings about one adapter folder. ``str(report)`` has a line for each finding."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def ok(self) -> bool:
        """Whether no finding is an error. Warnings do not count."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can express."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        counts = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return "\n".join(
            [
                *map(str, self.findings),
                f"{self.path}: {'good' if self.ok else 'refused'} ({counts})",
            ]
        )


class FindingLog:
    """Collects the findings of a verification while it runs."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, level: Level, check: str, message: str) -> None:
        self.findings.append(Finding(level, check, message))

    def add_problems(self, check: str, problems: Iterable[str], success: str) -> None:
        """Add each problem as a finding "error"; if there is no problem, add the message
        ``success`` as a finding "ok"."""
        problems = list(problems)
        for problem in problems:
            self.add("error", check, problem)
        if not problems:
            self.add("ok", check, success)

    def try_step(self, check: str, step: Callable[..., T], *args: Any) -> T | None:
        """Call ``step(*args)`` and return its result. If it raises an AdapterError, add the error
        as a finding of ``check`` and return None."""
        try:
            return step(*args)
        except AdapterError as error:
            self.add("error", check, str(error))
            return None
