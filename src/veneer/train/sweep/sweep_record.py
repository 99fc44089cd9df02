"""The record of a sweep (`State`): the losses of every candidate, which is one of the compared
configurations, and the progress of the sweep. Each checkpoint holds the record.

output/
  run.json               the record of a run (``train/run_record.py``), with the section `sweep:`
  checkpoint-120/        state.json: the record; for each running candidate, such as c03:
                         c03/adapter, and c03/state.pt with its optimiser, schedule and random
                         numbers
  best/                  the best candidate: adapter/, train.yaml, log.jsonl, metrics.json, run.json
  sweep.json             at the end: the record, the settings, and conclusions about the best one
  report.html            the same as a page

A checkpoint gets its name only when it is complete, so a killed sweep leaves no partial one.
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
BEST, REPORT, RESULT, STATE_FILE, TRAIN_CONFIG = (
    "best",
    "report.html",
    "sweep.json",
    "state.json",
    "train.yaml",
)
#: the statuses of a candidate: not begun; training; trained for all steps; ended early at a rung or
#: by a pruner; unable to begin, or dropped for a loss or gradient that is not finite
WAITING, RUNNING, FINISHED, ENDED, FAILED = "waiting", "running", "finished", "ended", "failed"


@dataclass
class Candidate:
    """The record of a candidate: one of the configurations that a sweep compares.

    Fields:
        name: "c" and a number from 1, such as "c03".
        cohort: the index of its cohort (the candidates that train at the same time), from 0.
        changes: the candidate's values of the settings that the sweep varies, by setting.
        status: WAITING, RUNNING, FINISHED, ENDED or FAILED.
        note: the reason why the candidate failed; else empty.
        parameters: number of trainable parameters.
        losses: the training loss of each step, from step 1.
        evaluations: (step, {measure: mean over the held-out rows}); one measure is "loss".
        judged: (step, mean training loss) at each rung (a step after which weaker candidates end),
            if rungs compare training losses; else empty.
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
        """(step, loss on the held-out rows), in the order of the steps. At a rung (a step after
        which weaker candidates end) that compares training losses, the mean training loss takes
        the place of the loss on the held-out rows."""
        held_out_losses = {step: measures["loss"] for step, measures in self.evaluations}
        return sorted((held_out_losses | dict(self.judged)).items())

    @property
    def loss(self) -> float | None:
        """The last loss of `loss_history`; None before the first one."""
        return self.loss_history[-1][1] if self.loss_history else None


@dataclass
class State:
    """The state of a sweep.

    Fields:
        cohort, step: index of the cohort that trains, and the number of its completed steps.
        seconds, cpu_seconds: wall-clock and CPU time of the sweep so far, in all processes that ran
            or resumed it.
        best: name of the candidate whose adapter is in the folder `best/`; None until one has
            finished.
        candidates: all candidates proposed so far, in the order of their names.
    """

    cohort: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: str | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def __getitem__(self, name: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def in_cohort(self, cohort_index: int) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.cohort == cohort_index]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> State:
        state_fields = json.loads(path.read_text(encoding="utf-8"))
        candidates = [
            Candidate(**candidate_fields) for candidate_fields in state_fields.pop("candidates")
        ]
        for candidate in candidates:  # JSON turned the tuples into lists
            candidate.evaluations = [(step, measures) for step, measures in candidate.evaluations]
            candidate.judged = [(step, loss) for step, loss in candidate.judged]
        return cls(**state_fields, candidates=candidates)

    def losses_by_step(self, cohort_index: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, {candidate's name: loss}) for each step in the ``loss_history`` of at least
        one candidate of the cohort, in the order of the steps."""
        losses_by_step: dict[int, dict[str, float]] = {}
        for candidate in self.in_cohort(cohort_index):
            for step, loss in candidate.loss_history:
                losses_by_step.setdefault(step, {})[candidate.name] = loss
        yield from sorted(losses_by_step.items())

    def finished_candidates(self) -> list[Candidate]:
        """The candidates that trained for all steps, by rising loss."""
        return sorted(
            (candidate for candidate in self.candidates if candidate.status == FINISHED),
            key=lambda candidate: float("inf") if candidate.loss is None else candidate.loss,
        )

    def spread(self) -> list[dict[str, Any]]:
        """For each group of at least two finished candidates that differ only in their seeds, the
        mean and the standard deviation of their losses, with the candidates and settings."""
        candidates_by_settings: dict[str, list[Candidate]] = {}
        # candidates with equal settings, which a sampler may draw twice, count once
        distinct_changes: list[dict[str, Any]] = []
        for candidate in self.finished_candidates():
            if candidate.changes in distinct_changes:
                continue
            distinct_changes.append(candidate.changes)
            settings = {
                name: value for name, value in candidate.changes.items() if name not in SEED_AXES
            }
            candidates_by_settings.setdefault(json.dumps(settings), []).append(candidate)
        spreads = []
        for settings_json, group in candidates_by_settings.items():
            losses = [candidate.loss for candidate in group if candidate.loss is not None]
            if len(losses) > 1:
                spreads.append(
                    {
                        "changes": json.loads(settings_json),
                        "candidates": [candidate.name for candidate in group],
                        "losses": losses,
                        "mean": mean(losses),
                        "deviation": stdev(losses),
                    }
                )
        return spreads

    def facts(self) -> dict[str, Any]:
        """The record as JSON values. Each candidate also gets its last loss, under "loss", and its
        `loss_history`, under "measured"."""
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
    """Settings and their values as text, such as "rank 4, targets q_proj+v_proj"."""
    return ", ".join(f"{name} {_format_value(value)}" for name, value in changes.items())


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_format_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def remove_checkpoints(output: Path, except_for: Path | None = None) -> None:
    for path in output.glob("checkpoint-*"):
        if path != except_for:
            shutil.rmtree(path)
