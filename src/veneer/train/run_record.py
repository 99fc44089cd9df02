"""The record of a run in its output folder: with which configuration, data and library versions the
run began, whether it can be resumed, and the results in its files.

The folder of a sweep has the same record, which also holds the section `sweep:` of its YAML file.
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
    """Create or clear the output folder and mark the run as running. Returns the last two lines of
    the log that a resumed run continues; [] for a new run."""
    # called after all checks: a run that cannot begin leaves no files behind
    if resume_point is None and (output / checkpoint.RUN).exists():
        checkpoint.clear(output, checkpoint.ADAPTER, checkpoint.LOG, checkpoint.METRICS, "runs")
    output.mkdir(parents=True, exist_ok=True)
    write_status(output, "running", config, prepared)
    return checkpoint.cut_log(output, resume_point[1] if resume_point is not None else 0)[-2:]


def can_resume(config: TrainConfig, output: Path, sweep: Mapping[str, Any] | None = None) -> bool:
    """Whether `output` holds a run that this run resumes; otherwise this run begins anew. With
    `overwrite`, a run that cannot be resumed is replaced, and one that can is still resumed.

    Args:
        sweep: the section `sweep:`, for a sweep; then only a sweep can be resumed.

    Raises:
        OutputExistsError: `output` holds a finished run, an unfinished one that `resume` excludes,
            or other files.
        ConfigError: there is no run to resume, or it has another configuration.
    """
    kind = "run" if sweep is None else "sweep"
    if output.is_file():
        raise OutputExistsError(
            f"{output} is a file", f"a folder for the {kind}", "choose another output"
        )
    run = checkpoint.read_json(output / checkpoint.RUN)
    is_wrong_kind = run is not None and ("sweep" in run) is (sweep is None)
    if is_wrong_kind or (run is None and checkpoint.has_foreign_files(output)):
        raise OutputExistsError(
            f"{output} is not empty and holds no Veneer {kind}",
            "a new folder",
            "choose another output; Veneer replaces nothing that it did not write",
        )
    if run is None or run["status"] == checkpoint.CLEARED:
        if config.resume:
            raise ConfigError(
                f"no {kind} in {output}", "one to resume", "leave out --resume, or check the path"
            )
        return False
    if run["status"] == "finished" and config.overwrite:
        return False
    if run["status"] == "finished":
        raise OutputExistsError(
            f"{output} holds a finished {kind}",
            "a new folder",
            "choose another output, or pass --overwrite to replace it",
        )
    # a setting that the recorded version of Veneer lacked has the value by which it computed
    implied = {**TrainConfig.defaults(), **IMPLIED_SETTINGS}
    recorded_settings = {**implied, **run["config"], "sweep": run.get("sweep")}
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
    lines = "".join(
        f"\n  {name}: was {recorded_settings.get(name)!r}, is {current_settings.get(name)!r}"
        for name in changed_names
    )
    raise (ConfigError if changed_names else OutputExistsError)(
        f"Found: {output} holds an unfinished"
        f" {kind}{' with another configuration' if changed_names else ''}.{lines}\nExpected: the"
        " same configuration, to resume it exactly, or a new folder. Do: undo the change, choose"
        " another output, or pass --overwrite to start over."
    )


def find_resume_point(
    config: TrainConfig, output: Path, prepared: Prepared, console: Console
) -> tuple[str, int] | None:
    """(folder, step) of the newest checkpoint of the run in `output`; None if there is none, or if
    the data or the initial adapter have changed and `overwrite` is set. Raises `ConfigError` if
    they have changed and `overwrite` is not set."""
    run = checkpoint.read_json(output / checkpoint.RUN)
    if run["data"] == prepared.hashes:
        if (newest := checkpoint.newest(output)) is None:
            return None
        say(console, f"Resuming from step {newest[1]} ({newest[0]}).")
        print_changed_versions(run, console)
        return str(newest[0]), newest[1]
    if config.overwrite:
        return None
    changed_inputs = "the data"
    if config.adapter is not None:
        changed_inputs = "the data, or the adapter that it trains further,"
    kind = "sweep" if "sweep" in run else "run"
    raise ConfigError(
        f"{changed_inputs} have changed since the unfinished {kind} in {output} began",
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
    """Write run.json with the status, configuration, hashes of the data, steps and versions."""
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
    names = ("veneer", "torch", "transformers", "trl", "accelerate")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def print_changed_versions(run: Mapping[str, Any], console: Console) -> None:
    """Print the libraries whose versions differ from those that a resumed run began with."""
    recorded, installed = run.get("versions", {}), versions()
    changed_versions = [
        f"{name} {recorded[name]}, now {current}"
        for name, current in installed.items()
        if recorded.get(name, current) != current
    ]
    if changed_versions:
        say(
            console,
            f"Versions The run was made with {'; '.join(changed_versions)}: its losses may differ"
            " from those of a run that",
        )
        say(
            console,
            "         was not interrupted. Install the versions of before to go on exactly.",
        )


def read_results(output: Path, interrupted: bool) -> dict[str, Any]:
    """Read the results of an ended run from the files in `output`, as JSON values. ``interrupted``:
    whether the run ended before its last step, so that its adapter is in the newest checkpoint."""
    lines = checkpoint.read_log(output)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    tokens = max((line.get("tokens", 0) for line in lines), default=0)
    newest, step = checkpoint.newest(output) or (None, 0)
    folder, steps = (newest, step) if interrupted else (output, len(losses))
    if folder is None:
        raise RuntimeError(f"the run in {output} was stopped, yet wrote no checkpoint")
    return {
        "adapter": str(folder / checkpoint.ADAPTER),
        "losses": losses,
        "eval_losses": evaluations,
        "steps": steps,
        "seconds": lines[-1]["seconds"] if lines else 0.0,
        "tokens": tokens,
        "checkpoint": newest and str(newest),
    }


def prompt_record(prompt: str | list[Any] | None, with_texts: bool) -> dict[str, str]:
    """A record of how the adapter is prompted, derived from a prompt of its data. Its "mode" is
    "chat", or "completion" for a text that the model continues. ``with_texts``: whether to add the
    system prompt ("system") and the prompt itself ("example"), which reveal data."""
    is_chat = isinstance(prompt, list)
    record = {"mode": "chat" if is_chat else "completion"}
    if not with_texts or prompt is None:
        return record
    if not isinstance(prompt, list):
        return {**record, "example": prompt}
    # of several messages of a role, the first remains
    content_by_role = {message["role"]: message.get("content") for message in reversed(prompt)}
    prompt_texts = {"system": content_by_role.get("system"), "example": content_by_role.get("user")}
    return {
        **record,
        **{name: text for name, text in prompt_texts.items() if isinstance(text, str)},
    }


def provenance_of(
    config: TrainConfig, task: Task, prepared: Prepared, model: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """How an adapter was trained, as JSON values for the metadata of a finished run's adapter."""
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
