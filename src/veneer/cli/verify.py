"""`veneer verify`: every check of an adapter folder, and of the base that it is said to be made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def verify(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    base: Annotated[
        Path | None, typer.Argument(help="Folder of the base model, with its safetensors.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse an adapter with warnings too.")] = False,
) -> None:
    """Check an adapter: its files, header, hashes, config, numbers and norms, and that it was made for a base.

    Nothing in the folder is run, and no pickle is opened. The base is read one weight at a time. The exit code is 0
    for a good adapter and 2 for one that is refused.

    \b
    Examples:
      veneer verify run/adapter
      veneer verify run/adapter path/to/base --strict
    """
    from veneer.cli.console import out
    from veneer.verify import verify as check

    report = check(adapter, base)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        out.print(str(report), soft_wrap=True)
    if not report.ok or (strict and report.warnings):
        raise typer.Exit(2)
