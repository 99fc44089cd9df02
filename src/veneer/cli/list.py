"""`veneer list`: the adapters of a library."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from veneer.cli.options import AsJson, Library

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def list_adapters(
    library: Library = None,
    tag: Annotated[str | None, typer.Option(help="Only those with this tag.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Only those for this base.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters of a library.

    \b
    Examples:
      veneer list
      veneer list --tag good --json
    """
    from veneer.cli.console import echo_json, err, open_library, out

    store = open_library(library)
    entries = store.list(tag=tag, base=base)
    if as_json:
        echo_json([dataclasses.asdict(entry) for entry in entries])
    elif entries:
        out.print(_table(entries))
    else:
        err.print(f"No such adapters in {store.folder}.", soft_wrap=True)


def _table(entries: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from veneer.attach.summary import size

    table = Table("name", "base", "variant", box=None, header_style="bold")
    for column in ("rank", "size"):
        table.add_column(column, justify="right")
    table.add_column("tags")
    table.add_column("added")
    for entry in entries:
        words = entry.name, entry.base or "?", entry.variant, str(entry.rank), size(entry.size)
        table.add_row(*map(Text, (*words, ", ".join(entry.tags), entry.added[:10])))
    return table
