"""The record of a sweep: every candidate's losses and the progress of the sweep. Each checkpoint
holds the record. At the end, `sweep.json` and the report hold it together with the conclusions.

output/
  run.json               the record of a run (``train/run_record.py``), with the section `sweep:`
  checkpoint-120/        state.json; for each running candidate, such as c03: c03/adapter, and
                         c03/state.pt with its optimiser, schedule and random numbers
  best/                  the winner: adapter/, train.yaml, log.jsonl, metrics.json, run.json
  sweep.json  report.html

Checkpoints are written atomically.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from veneer.train.sweep.sweep_settings import SEED_AXES

#: names of files and folders in the output folder of a sweep
BEST, REPORT, RESULT, STATE, TRAIN = "best", "report.html", "sweep.json", "state.json", "train.yaml"
#: the statuses of a candidate
WAITING, RUNNING, FINISHED, ENDED, FAILED = "waiting", "running", "finished", "ended", "failed"


@dataclass
class Candidate:
    """The record of a candidate of a sweep. A rung is a step after which the weaker candidates end.

    Fields:
        cohort: the index of its cohort: the candidates that train at the same time.
        changes: the settings of the candidate that differ from the sweep's configuration.
        status: one of the statuses above.
        note: the reason why the candidate failed; else empty.
        parameters: number of trainable parameters.
        losses: the training loss of each step, from step 1.
        evaluations: (step, {measure: mean over the held-out rows}), with the measure "loss".
        judged: (step, mean training loss) at the rungs, if these compare training losses.
    """

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
    def loss_history(self) -> list[tuple[int, float]]:
        """(step, loss on the held-out rows), in the order of the steps. At rungs that compare
        training losses, the loss is the mean training loss instead."""
        held_out = {step: measures["loss"] for step, measures in self.evaluations}
        return sorted((held_out | dict(self.judged)).items())

    @property
    def loss(self) -> float | None:
        """The last loss of `loss_history`."""
        return self.loss_history[-1][1] if self.loss_history else None


@dataclass
class State:
    """The state of a sweep.

    Fields:
        cohort, step: index of the cohort that trains, and the number of its completed steps.
        seconds, cpu_seconds: time that the sweep took so far, including that before it was resumed.
        best: name of the candidate whose adapter is in the folder `best/`.
    """

    cohort: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: str | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def __getitem__(self, name: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def in_cohort(self, cohort: int) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.cohort == cohort]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> State:
        fields = json.loads(path.read_text(encoding="utf-8"))
        candidates = [Candidate(**values) for values in fields.pop("candidates")]
        for candidate in candidates:  # JSON has lists in place of tuples
            candidate.evaluations = [(step, measures) for step, measures in candidate.evaluations]
            candidate.judged = [(step, loss) for step, loss in candidate.judged]
        return cls(**fields, candidates=candidates)

    def losses_by_step(self, cohort: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, {candidate: loss}) for each step in the ``loss_history`` of a candidate of
        the cohort, in order."""
        losses: dict[int, dict[str, float]] = {}
        for candidate in self.in_cohort(cohort):
            for step, loss in candidate.loss_history:
                losses.setdefault(step, {})[candidate.name] = loss
        yield from sorted(losses.items())

    def finished_candidates(self) -> list[Candidate]:
        """Candidates that ran to their end, the best first."""
        return sorted(
            (candidate for candidate in self.candidates if candidate.status == FINISHED),
            key=lambda candidate: float("inf") if candidate.loss is None else candidate.loss,
        )

    def spread(self) -> list[dict[str, Any]]:
        """For each group of finished candidates that differ only in their seeds, the mean and the
        standard deviation of their losses."""
        groups: dict[str, list[Candidate]] = {}
        distinct_changes: list[dict[str, Any]] = []  # a sampler may draw the same settings again
        for candidate in self.finished_candidates():
            if candidate.changes in distinct_changes:
                continue
            distinct_changes.append(candidate.changes)
            settings = {
                name: value for name, value in candidate.changes.items() if name not in SEED_AXES
            }
            groups.setdefault(json.dumps(settings), []).append(candidate)
        spreads = []
        for settings, group in groups.items():
            losses = [candidate.loss for candidate in group if candidate.loss is not None]
            if len(losses) > 1:
                spreads.append(
                    {
                        "changes": json.loads(settings),
                        "candidates": [candidate.name for candidate in group],
                        "losses": losses,
                        "mean": mean(losses),
                        "deviation": stdev(losses),
                    }
                )
        return spreads

    def facts(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "best": self.best,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "spread": self.spread(),
            "candidates": [
                {
                    **asdict(candidate),
                    "loss": candidate.loss,
                    "measured": candidate.loss_history,
                }
                for candidate in self.candidates
            ],
        }


def format_changes(changes: Mapping[str, Any]) -> str:
    """Settings as text: "rank 4, targets q_proj+v_proj"."""
    return ", ".join(f"{name} {_format_value(value)}" for name, value in changes.items())


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_format_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def remove_checkpoints(output: Path, except_for: Path | None = None) -> None:
    for path in output.glob("checkpoint-*"):
        if path != except_for:
            shutil.rmtree(path)
