"""`veneer extract`: the adapter that best approximates a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from veneer.cli.options import AsJson, BaseModel, Overwrite, listed


def extract_command(
    base: BaseModel,
    tuned: Annotated[str, Argument(help="The same model, fine-tuned in full.")],
    output: Annotated[Path, Argument(metavar="OUT", help="New folder for the adapter.")],
    rank: Annotated[int | None, Option(help="Rank of every product.")] = None,
    energy: Annotated[
        float | None, Option(help="Or the share of each change to keep, such as 0.95.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        Option(
            help="Which weights get a product: words or patterns, comma separated (default: all)."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, Option(help="What is left out, however it changed; comma separated.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        Option(
            help=(
                "What is written whole: auto (changed norms, biases and the like), none, lossy"
                " (also weights that "
                "keep too little), or patterns beside them; comma separated (default: auto)."
            )
        ),
    ] = None,
    least: Annotated[
        float, Option(help="The share of its change below which a weight is lossy.")
    ] = 0.5,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    layers: Annotated[
        int, Option(help="Show the so many layers that keep least; 0 shows all.", min=0)
    ] = 12,
) -> None:
    """Write the adapter that turns a base into its full fine-tune, as nearly as its rank allows.

    Both models are read weight by weight, so that neither has to fit into memory. What changed and
    is not in the adapter is named.

    \b
    Examples:
      veneer extract base tuned adapter --rank 16
      veneer extract base tuned adapter --energy 0.95 --targets all-linear --keep none
    """
    import veneer
    from veneer.cli.console import echo_json, err, out, setup_logging, shown, table_of

    setup_logging()
    with err.status("Comparing the models …") as status:

        def progress(layer: Any, done: int, total: int) -> None:
            status.update(f"{done} of {total}  {layer.path}  {layer.kept:.2%} at rank {layer.rank}")

        report = veneer.extract(
            base, tuned, output, rank=rank, energy=energy, targets=_listed(targets or ["all"]),
            exclude=_listed(exclude or []), keep=_listed(keep or ["auto"]), least=least, base_name=base,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if as_json:
        echo_json(report.to_dict())
        return
    table = table_of("weight", ">rank", ">‖ΔW‖/‖W‖", ">kept", ">error", ">seconds", "found")
    for layer in shown(
        table, sorted(report.layers, key=lambda layer: layer.kept), layers, "that keep more"
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


def _listed(values: list[str]) -> list[str]:
    return [part for text in values for part in listed(text)]
