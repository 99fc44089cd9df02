"""`veneer keygen`: a key for `veneer serve --keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import MANY


def keygen_command(
    name: Annotated[str, typer.Argument(help="Whose key it is: a word for the log.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help=f"Adapters that it may use, by name or pattern; {MANY}."),
    ] = None,
    base: Annotated[bool, typer.Option(help="Whether it may use the base without an adapter.")] = True,
    admin: Annotated[bool, typer.Option("--admin", help="It may load and unload adapters and read metrics.")] = False,
) -> None:
    """Make a key. The key itself is printed once, to stderr; its entry for the file, which holds a hash, to stdout.

    \b
    Examples:
      veneer keygen alice --adapter 'french-*' --no-base >> keys.toml
      veneer keygen operator --adapter '*' --admin >> keys.toml
    """
    from veneer.cli.console import err
    from veneer.serve.access import generate

    key, entry = generate(name, adapters=adapter or (), base=base, admin=admin)
    typer.echo(entry)
    err.print(f"The key of {name}, which is shown this once: {key}", soft_wrap=True)
