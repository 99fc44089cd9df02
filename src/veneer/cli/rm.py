"""`veneer rm`: take adapters out of a library."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Library

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of adapters.", show_default=False)],
    library: Library = None,
) -> None:
    """Take names out of a library. The files go with the next `veneer gc`, an hour later at the earliest.

    \b
    Example:
      veneer rm french german
    """
    from veneer.cli.console import open_library, out

    store = open_library(library)
    for name in names:
        store.entry(name)  # all or none, but for what others do meanwhile
    for name in names:
        out.print(f"removed {store.remove(name).name}", soft_wrap=True)
