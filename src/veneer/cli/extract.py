"""`veneer extract`: the adapter that best approximates a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from veneer.cli.console import echo_json, err, limit_rows, out, setup_logging, table_of
from veneer.cli.options import AsJson, BaseModel, Overwrite, split_flag_values

TunedModel = Annotated[str, Argument(help="The same model, fine-tuned in full.")]
OutputFolder = Annotated[Path, Argument(metavar="OUT", help="New folder for the adapter.")]
Rank = Annotated[int | None, Option(help="Rank of every product.")]
Energy = Annotated[float | None, Option(help="Or the share of each change to keep, such as 0.95.")]
TargetWeights = Annotated[
    list[str] | None,
    Option(help="Which weights get a product: words or patterns, comma separated (default: all)."),
]
ExcludedWeights = Annotated[
    list[str] | None, Option(help="What is left out, however it changed; comma separated.")
]
FullWeights = Annotated[
    list[str] | None,
    Option(
        help=(
            "What is written whole: auto (changed norms, biases and the like), none, lossy"
            " (also weights that "
            "keep too little), or patterns beside them; comma separated (default: auto)."
        )
    ),
]
MinRetention = Annotated[
    float, Option(help="The share of its change below which a weight is lossy.")
]
ShownLayers = Annotated[
    int, Option(help="Show the so many layers that keep least; 0 shows all.", min=0)
]


def extract_command(
    base: BaseModel,
    tuned: TunedModel,
    output: OutputFolder,
    rank: Rank = None,
    energy: Energy = None,
    targets: TargetWeights = None,
    exclude: ExcludedWeights = None,
    keep: FullWeights = None,
    least: MinRetention = 0.5,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    layers: ShownLayers = 12,
) -> None:
    """Write the adapter that turns a base into its full fine-tune, as nearly as the rank allows.

    Both models are read weight by weight, so neither has to fit into memory. The report names the
    weights that changed but are not in the adapter.

    \b
    Examples:
      veneer extract base tuned adapter --rank 16
      veneer extract base tuned adapter --energy 0.95 --targets all-linear --keep none
    """
    import veneer

    setup_logging()
    with err.status("Comparing the models …") as status:

        def show_progress(layer: Any, done_count: int, total_count: int) -> None:
            counts = f"{done_count} of {total_count}"
            status.update(f"{counts}  {layer.path}  {layer.kept:.2%} at rank {layer.rank}")

        report = veneer.extract(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            targets=split_flag_values(targets or ["all"]),
            exclude=split_flag_values(exclude or []),
            keep=split_flag_values(keep or ["auto"]),
            least=least,
            base_name=base,
            overwrite=overwrite,
            progress=show_progress,
        )
    if as_json:
        echo_json(report.to_dict())
        return
    _print_report(report, layers)


def _print_report(report: Any, layer_count: int) -> None:
    """Print the report, with a table of the ``layer_count`` weights whose product keeps the
    smallest share of ‖ΔW‖²; 0 means all weights."""
    table = table_of("weight", ">rank", ">‖ΔW‖/‖W‖", ">kept", ">error", ">seconds", "found")
    for layer in limit_rows(
        table, sorted(report.layers, key=lambda layer: layer.kept), layer_count, "that keep more"
    ):
        cells = (
            f"{layer.rank}",
            f"{layer.relative:.2e}",
            f"{layer.kept:.2%}",
            f"{layer.error:.2e}",
        )
        table.add_row(layer.path, *cells, f"{layer.seconds:.2f}", layer.method)
    out.print(table)
    out.print(str(report), soft_wrap=True)
