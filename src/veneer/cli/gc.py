"""`veneer gc`: delete what a library no longer needs."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Library

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def gc(
    grace: Annotated[
        float, typer.Option(help="Keep what lost its name less than so many seconds ago: it may be in use.", min=0)
    ] = 3600.0,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First make a damaged index anew, from its copy and the adapters.")
    ] = False,
    library: Library = None,
) -> None:
    """Delete adapters without a name, and what killed commands left behind.

    \b
    Examples:
      veneer gc
      veneer gc --grace 0
    """
    from veneer.attach.summary import size
    from veneer.cli.console import open_library, out
    from veneer.errors import listing

    store = open_library(library)
    if rebuild:
        made = store.rebuild()
        out.print(f"kept {len(made.kept)} names, recovered {listing(made.recovered)}, lost {listing(made.lost)}")
    done = store.gc(grace=grace)
    out.print(f"deleted: adapters {len(done.objects)}, leftovers {done.leftovers}, in all {size(done.freed)}")
