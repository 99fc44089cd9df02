"""`veneer verify`: run every check of an adapter folder, and compare it with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from veneer.cli.options import Adapter, AsJson


def verify_command(
    adapter: Adapter,
    base: Annotated[
        str | None, Argument(help="The base: a folder, a .gguf file, package:NAME or a hub id.")
    ] = None,
    as_json: AsJson = False,
    strict: Annotated[
        bool, Option("--strict", help="Refuse an adapter with warnings too.")
    ] = False,
) -> None:
    """Check an adapter's files, header, hashes, config, values and norms, and whether it was
    trained on the given base.

    No code in the folder is run, and no pickle is opened. The base is read one weight at a time.
    The exit code is 0 for a valid adapter and 2 for a refused one.

    \b
    Examples:
      veneer verify run/adapter
      veneer verify run/adapter path/to/base --strict
    """
    from veneer.adapter_files.verify import verify
    from veneer.cli.console import echo_json, out
    from veneer.models.locate import folder_of
    from veneer.models.safetensors_dir import ENDING
    from veneer.store.library import resolve

    adapter_folder = resolve(adapter)
    base_folder = None if base is None or not adapter_folder.is_dir() else Path(base).expanduser()
    # a folder with safetensors files is used as it is; ``folder_of`` would need a config.json
    if base is not None and base_folder is not None and not any(base_folder.glob(f"*{ENDING}")):
        base_folder = folder_of(base)
    report = verify(adapter_folder, base_folder)
    if as_json:
        echo_json(report.to_dict())
    else:
        out.print(str(report), soft_wrap=True)
    if not report.ok or (strict and report.warnings):
        raise Exit(2)
