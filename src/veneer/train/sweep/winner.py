"""The folder of a sweep's winner (its best candidate), with the files that `veneer train` writes
for a single run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.train import checkpoint
from veneer.train.config import TrainConfig
from veneer.train.prepare import Prepared
from veneer.train.run import provenance_of, write_status
from veneer.train.sweep.cohort import Cohort
from veneer.train.sweep.sweep_record import BEST, TRAIN_CONFIG, Candidate
from veneer.train.tasks import Task


def single_run_config(config: TrainConfig, output: Path, eval_steps: int) -> TrainConfig:
    """The configuration with which `veneer train` trains a candidate alone. Its output folder is
    `output`/again.

    Args:
        config: the configuration of the candidate.
        output: the output folder of the sweep.
        eval_steps: number of steps between two evaluations.
    """
    return config.model_copy(
        update={
            "output": output / "again",
            "eval_every": eval_steps,
            "overwrite": False,
            "resume": None,
        }
    )


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of `config` that differ from their defaults, or that have none. A YAML file with
    these settings alone gives the same configuration."""
    default_values: Mapping[str, Any] = TrainConfig.defaults()
    return {
        name: value
        for name, value in config.content().items()
        if name not in default_values or value != default_values[name]
    }


def write_winner(
    output: Path, config: TrainConfig, candidate: Candidate, task: Task, cohort: Cohort
) -> None:
    """Write the folder of the best candidate, in place of the one that an earlier cohort wrote.

    Args:
        output: the output folder of the sweep.
        config: the result of `single_run_config` for the candidate.
        task: the task of the candidate.
        cohort: the cohort of the candidate. The candidate's adapter must still be attached.
    """
    adapter_handle, prepared = cohort.runs[candidate.name], cohort.prepared
    metrics = _winner_metrics(candidate, adapter_handle.summary(), prepared)
    provenance = provenance_of(config, task, prepared, cohort.model, metrics)
    with new_folder(output / BEST, overwrite=True, replaces=[checkpoint.RUN, EVERYTHING]) as folder:
        adapter_handle.save(
            folder / checkpoint.ADAPTER, base_name=config.base, provenance=provenance
        )
        (folder / checkpoint.LOG).write_text(_log_lines(candidate))
        (folder / TRAIN_CONFIG).write_text(
            yaml.safe_dump(changed_settings(config), sort_keys=False, allow_unicode=True)
        )
        checkpoint.write_json(folder / checkpoint.METRICS, metrics)
        write_status(folder, "finished", config, prepared)


def _winner_metrics(candidate: Candidate, summary: Any, prepared: Prepared) -> dict[str, Any]:
    """The content of the winner's metrics.json. `summary`: the `Summary` of its adapter, which
    counts the trainable parameters and all parameters."""
    _, last_evaluation = candidate.evaluations[-1]
    return {
        "steps": prepared.steps,
        "first_loss": candidate.losses[0],
        "last_loss": candidate.losses[-1],
        "trainable_parameters": summary.trainable,
        "total_parameters": summary.total,
        **{f"eval_{name}": value for name, value in last_evaluation.items()},
    }


def _log_lines(candidate: Candidate) -> str:
    """The training losses and the evaluations of a candidate as JSON lines, in the order of the
    steps. At a step with both, the loss comes first."""
    log_records = [{"step": step, "loss": loss} for step, loss in enumerate(candidate.losses, 1)]
    log_records += [
        {"step": step, **{f"eval_{name}": value for name, value in measures.items()}}
        for step, measures in candidate.evaluations
    ]
    log_records.sort(key=lambda log_record: (log_record["step"], "loss" not in log_record))
    return "".join(json.dumps(log_record) + "\n" for log_record in log_records)
