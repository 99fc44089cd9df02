"""The record of a run in its output folder (run.json): its status, configuration, hashes of the
data and library versions. Reads from it whether a run can be resumed, and reads a run's results.

The folder of a sweep (several runs that share one folder) has the same record, which also holds the
section `sweep:` of the sweep's YAML file.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from veneer.errors import ConfigError, OutputExistsError
from veneer.train import checkpoint
from veneer.train.callbacks import say
from veneer.train.config import FREE_ON_RESUME, IMPLIED_SETTINGS, TrainConfig
from veneer.train.prepare import Prepared
from veneer.train.tasks import Task

#: (checkpoint folder, step) to resume from; None for a run that begins with step 1
ResumePoint = tuple[Path, int] | None


def open_output(
    config: TrainConfig, output: Path, prepared: Prepared, resume_point: ResumePoint
) -> list[dict[str, Any]]:
    """Create the output folder, or remove an earlier run's files from it if the run begins anew,
    and mark the run as running. For a resumed run, drop the log's lines of steps after the
    checkpoint, and return the last two remaining lines; for a new run, return []."""
    # `fit` calls this function after all checks, so that a run that cannot begin changes no files
    if resume_point is None and (output / checkpoint.RUN).exists():
        checkpoint.clear(output, checkpoint.ADAPTER, checkpoint.LOG, checkpoint.METRICS, "runs")
    output.mkdir(parents=True, exist_ok=True)
    write_status(output, "running", config, prepared)
    return checkpoint.cut_log(output, resume_point[1] if resume_point is not None else 0)[-2:]


def can_resume(config: TrainConfig, output: Path, sweep: Mapping[str, Any] | None = None) -> bool:
    """Whether `output` holds an unfinished run with the configuration `config` (settings in
    `FREE_ON_RESUME` may differ), which is then resumed. False: the run begins anew, because there
    is no run, because the old run cannot be resumed and has no checkpoint, or because `overwrite`
    is set. Even with `overwrite`, a run that can be resumed is resumed, unless `resume` is
    False.

    Args:
        sweep: for a sweep, the section `sweep:` of its YAML file; then `output` must hold a sweep.

    Raises:
        OutputExistsError: `output` holds a finished run, a run with checkpoints although `resume`
            is False, or other files.
        ConfigError: `resume` is True and there is no run, or the run has checkpoints and another
            configuration.
    """
    kind_of_run = "run" if sweep is None else "sweep"
    if output.is_file():
        raise OutputExistsError(
            f"{output} is a file", f"a folder for the {kind_of_run}", "choose another output"
        )
    record = checkpoint.read_json(output / checkpoint.RUN)
    is_wrong_kind = record is not None and ("sweep" in record) is (sweep is None)
    if is_wrong_kind or (record is None and checkpoint.has_foreign_files(output)):
        raise OutputExistsError(
            f"{output} is not empty and holds no Veneer {kind_of_run}",
            "a new folder",
            "choose another output; Veneer replaces nothing that it did not write",
        )
    if record is None or record["status"] == checkpoint.CLEARED:
        if config.resume:
            raise ConfigError(
                f"no {kind_of_run} in {output}",
                "one to resume",
                "leave out --resume, or check the path",
            )
        return False
    if record["status"] == "finished" and config.overwrite:
        return False
    if record["status"] == "finished":
        raise OutputExistsError(
            f"{output} holds a finished {kind_of_run}",
            "a new folder",
            "choose another output, or pass --overwrite to replace it",
        )
    # run.json lacks settings that the Veneer that wrote it did not have yet; they count as set to
    # the values that correspond to how it computed
    implied_settings = {**TrainConfig.defaults(), **IMPLIED_SETTINGS}
    recorded_settings = {**implied_settings, **record["config"], "sweep": record.get("sweep")}
    current_settings = {**config.content(), "sweep": sweep}
    changed_names = [
        name
        for name in {**recorded_settings, **current_settings}
        if name not in FREE_ON_RESUME and recorded_settings.get(name) != current_settings.get(name)
    ]
    if not changed_names and config.resume is not False:
        return True
    if config.overwrite or checkpoint.newest(output) is None:  # no work would be lost
        return False
    changes_text = "".join(
        f"\n  {name}: was {recorded_settings.get(name)!r}, is {current_settings.get(name)!r}"
        for name in changed_names
    )
    raise (ConfigError if changed_names else OutputExistsError)(
        f"Found: {output} holds an unfinished"
        f" {kind_of_run}{' with another configuration' if changed_names else ''}.{changes_text}\n"
        "Expected: the same configuration, to resume it exactly, or a new folder. Do: undo the"
        " change, choose another output, or pass --overwrite to start over."
    )


def find_resume_point(
    config: TrainConfig, output: Path, prepared: Prepared, console: Console
) -> tuple[str, int] | None:
    """(folder, step) of the newest checkpoint of the run in `output`, from which it is resumed;
    None to begin anew, because there is no checkpoint, or because `overwrite` is set and an input
    (`Prepared.hashes`) has changed. Raises `ConfigError` if an input has changed and `overwrite` is
    not set."""
    record = checkpoint.read_json(output / checkpoint.RUN)
    if record["data"] == prepared.hashes:
        if (newest_checkpoint := checkpoint.newest(output)) is None:
            return None
        say(console, f"Resuming from step {newest_checkpoint[1]} ({newest_checkpoint[0]}).")
        print_changed_versions(record, console)
        return str(newest_checkpoint[0]), newest_checkpoint[1]
    if config.overwrite:
        return None
    changed_inputs = "the data"
    if config.adapter is not None:
        changed_inputs = "the data, or the adapter that it trains further,"
    kind_of_run = "sweep" if "sweep" in record else "run"
    raise ConfigError(
        f"{changed_inputs} have changed since the unfinished {kind_of_run} in {output} began",
        "the same bytes, to resume it exactly",
        "restore them, choose another output, or pass --overwrite to start over",
    )


def write_status(
    output: Path,
    status: str,
    config: TrainConfig,
    prepared: Prepared,
    sweep: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json: the status ("running", "interrupted" or "finished"), configuration, hashes of
    the data, number of steps, library versions and, for a sweep, its section `sweep:`."""
    record = {
        "status": status,
        "config": config.content(),
        "data": prepared.hashes,
        "steps": prepared.steps,
        "versions": versions(),
        **({} if sweep is None else {"sweep": sweep}),
    }
    checkpoint.write_json(output / checkpoint.RUN, record)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a run's losses depend on, by name."""
    package_names = ("veneer", "torch", "transformers", "trl", "accelerate")
    return {**{name: version(name) for name in package_names}, "python": platform.python_version()}


def print_changed_versions(record: Mapping[str, Any], console: Console) -> None:
    """Print the libraries whose installed versions differ from those in `record`, the content of
    the run.json of the run to resume. With other versions, its losses may differ."""
    recorded_versions, installed_versions = record.get("versions", {}), versions()
    changed_versions = [
        f"{name} {recorded_versions[name]}, now {installed_version}"
        for name, installed_version in installed_versions.items()
        if recorded_versions.get(name, installed_version) != installed_version
    ]
    if changed_versions:
        say(
            console,
            f"Versions The run was made with {'; '.join(changed_versions)}: its losses may differ"
            " from those of a run that\n         was not interrupted. Install the versions of"
            " before to go on exactly.",
        )


def read_results(output: Path, interrupted: bool) -> dict[str, Any]:
    """Read the results of an ended run from the files in `output`, as JSON values by the fields of
    `run.Result`. ``interrupted``: whether the run ended before its last step; its adapter is then
    in the newest checkpoint. Raises `RuntimeError` if it is interrupted without a checkpoint."""
    log_lines = checkpoint.read_log(output)
    losses = [line["loss"] for line in log_lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in log_lines if "eval_loss" in line]
    token_count = max((line.get("tokens", 0) for line in log_lines), default=0)
    newest_checkpoint, checkpoint_step = checkpoint.newest(output) or (None, 0)
    result_folder, step_count = (
        (newest_checkpoint, checkpoint_step) if interrupted else (output, len(losses))
    )
    if result_folder is None:
        raise RuntimeError(f"the run in {output} was stopped, yet wrote no checkpoint")
    return {
        "adapter": str(result_folder / checkpoint.ADAPTER),
        "losses": losses,
        "eval_losses": evaluations,
        "steps": step_count,
        "seconds": log_lines[-1]["seconds"] if log_lines else 0.0,
        "tokens": token_count,
        "checkpoint": newest_checkpoint and str(newest_checkpoint),
    }


def prompt_record(prompt: str | list[Any] | None, with_texts: bool) -> dict[str, str]:
    """How to prompt the adapter, as JSON values, derived from a prompt of its training data. "mode"
    is "chat", or "completion" for a text that the model continues. ``with_texts``: whether to add
    the system prompt ("system") and the user's prompt ("example"), which reveal training data."""
    is_chat = isinstance(prompt, list)
    record = {"mode": "chat" if is_chat else "completion"}
    if not with_texts or prompt is None:
        return record
    if not isinstance(prompt, list):
        return {**record, "example": prompt}
    # keeps the first message of each role: in the reversed order, an earlier one replaces a later
    content_by_role = {message["role"]: message.get("content") for message in reversed(prompt)}
    prompt_texts = {"system": content_by_role.get("system"), "example": content_by_role.get("user")}
    return {
        **record,
        **{name: text for name, text in prompt_texts.items() if isinstance(text, str)},
    }


def provenance_of(
    config: TrainConfig, task: Task, prepared: Prepared, model: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """How an adapter was trained, as JSON values for the metadata of a finished run's adapter.

    Args:
        model: the base; its dtype is recorded.
        metrics: the content of metrics.json. Time and peak memory are left out, because they differ
            from run to run.
    """
    prompt = (
        {"prompt": prompt_record(prepared.prompt, config.record_example)}
        if task.generates_text()
        else {}
    )
    return {
        "config": config.content(),
        "task": task.record(),
        **prompt,
        "data": prepared.hashes,
        "base_dtype": str(model.dtype).removeprefix("torch."),
        "metrics": {
            name: metrics[name] for name in metrics if name not in ("seconds", "peak_memory_bytes")
        },
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
