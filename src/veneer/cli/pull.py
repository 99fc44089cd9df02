"""`veneer pull`: fetch an adapter from a remote place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def pull(
    place: Annotated[str, typer.Argument(help="hf://owner/name[@revision], s3://bucket/folder, …", show_default=False)],
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="New folder (default: the cache).", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub; else what push printed after the @.")
    ] = None,
) -> None:
    """Fetch an adapter, verify it, and print its folder. Other commands take a remote place for ADAPTER too.

    \b
    Examples:
      veneer pull hf://owner/name
      veneer pull s3://bucket/french french
    """
    from veneer.fileio.atomic import must_not_exist
    from veneer.store import remote

    if output is not None:
        must_not_exist(output, overwrite=False)  # before the download
    found = remote.pull(place, revision=revision)
    typer.echo(found if output is None else remote.push(found, str(output)))
