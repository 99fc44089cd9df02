"""`veneer tag`: tag adapters of a library."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Library

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def tag(
    name: Annotated[str, typer.Argument(help="Name of an adapter.", show_default=False)],
    tags: Annotated[list[str] | None, typer.Argument(help="Tags to add.", show_default=False)] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A tag to take away; may be given several times.")] = None,
    library: Library = None,
) -> None:
    """Add tags to an adapter of a library, or take them away.

    \b
    Examples:
      veneer tag french good
      veneer tag french --remove good
    """
    from veneer.cli.console import open_library, out

    entry = open_library(library).tag(name, *(tags or ()), remove=remove or ())
    out.print(f"{entry.name}: {', '.join(entry.tags) or 'no tags'}", soft_wrap=True)
