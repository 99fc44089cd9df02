"""What is known of a sweep: every candidate's losses, and where the sweep stands. It goes into each
checkpoint, and at the end, with what follows from it, into `sweep.json` and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from veneer.train.sweep.settings import CHANCE

#: what becomes of a candidate
WAITING, RUNNING, FINISHED, ENDED, FAILED = "waiting", "running", "finished", "ended", "failed"


@dataclass
class Candidate:
    """`changes`: of the run's configuration. `losses[i]`: of step i + 1; `evaluations`: of (step,
    what was measured on the rows held out, the loss among it); `judged`: of (step, the mean loss in
    training), at rungs that judge by that. `note`: why it failed. `parameters`: how many it
    trains."""

    name: str
    cohort: int
    changes: dict[str, Any]
    status: str = WAITING
    note: str = ""
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)

    @property
    def measured(self) -> list[tuple[int, float]]:
        """(step, the loss on the rows held out), in order: at rungs that by which it was judged, be
        it in training."""
        return sorted(
            ({step: told["loss"] for step, told in self.evaluations} | dict(self.judged)).items()
        )

    @property
    def loss(self) -> float | None:
        """The last one that was measured."""
        return self.measured[-1][1] if self.measured else None


@dataclass
class State:
    """After `step` steps of the cohort of that number. `best`: whose folder is `best/`."""

    cohort: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: str | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def __getitem__(self, name: str) -> Candidate:
        return next(one for one in self.candidates if one.name == name)

    def of(self, cohort: int) -> list[Candidate]:
        return [one for one in self.candidates if one.cohort == cohort]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> State:
        found = json.loads(path.read_text(encoding="utf-8"))
        candidates = [Candidate(**one) for one in found.pop("candidates")]
        for one in candidates:
            one.evaluations = [(step, measured) for step, measured in one.evaluations]
            one.judged = [(step, loss) for step, loss in one.judged]
        return cls(**found, candidates=candidates)

    def judged(self, cohort: int) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, the loss of each that was evaluated or judged there), in order."""
        found: dict[int, dict[str, float]] = {}
        for one in self.of(cohort):
            for step, loss in one.measured:
                found.setdefault(step, {})[one.name] = loss
        yield from sorted(found.items())

    def finished(self) -> list[Candidate]:
        """Those that ran to their end, the best one first."""
        found = [one for one in self.candidates if one.status == FINISHED]
        return sorted(found, key=lambda one: one.loss if one.loss is not None else float("inf"))

    def spread(self) -> list[dict[str, Any]]:
        """Settings of which several candidates ran to their end, with other seeds: their losses."""
        groups: dict[str, list[Candidate]] = {}
        seen: list[dict[str, Any]] = []  # a sampler may draw one again
        for one in self.finished():
            if one.changes in seen:
                continue
            seen.append(one.changes)
            settings = {name: value for name, value in one.changes.items() if name not in CHANCE}
            groups.setdefault(json.dumps(settings), []).append(one)
        return [
            {
                "changes": json.loads(settings), "candidates": [one.name for one in own], "losses": losses,
                "mean": mean(losses), "deviation": stdev(losses),
            }
            for settings, own in groups.items()
            if len(losses := [one.loss for one in own if one.loss is not None]) > 1
        ]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "best": self.best, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "spread": self.spread(),
            "candidates": [{**asdict(one), "loss": one.loss, "measured": one.measured} for one in self.candidates],
        }  # fmt: skip


def words(changes: Mapping[str, Any]) -> str:
    """Settings as one reads them."""
    return ", ".join(f"{name} {_word(value)}" for name, value in changes.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
