"""`veneer push`: put an adapter at a remote place."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def push(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or library:NAME.", show_default=False)],
    place: Annotated[
        str, typer.Argument(help="hf://owner/name, s3://bucket/folder, file:///folder, …", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option(help="Branch of a repository on the hub.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit on the hub.", show_default=False)] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made on the hub.")
    ] = None,
) -> None:
    """Verify an adapter and put it at a remote place. Prints the place with the revision that it has there.

    \b
    Examples:
      veneer push run/adapter hf://owner/name --private
      veneer push library:french s3://bucket/french
    """
    from veneer.store import remote
    from veneer.store.library import resolve

    done = remote.push(resolve(adapter), place, revision=revision, message=message, private=private)
    typer.echo(done)
