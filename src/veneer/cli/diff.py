"""`veneer diff`: compare two adapters layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Exit, Option

from veneer.cli.console import echo_json, limit_rows, out, table_of
from veneer.cli.options import ADAPTER_HELP, AsJson


def diff_command(
    a: Annotated[str, Argument(metavar="A", help=ADAPTER_HELP)],
    b: Annotated[str, Argument(metavar="B", help=ADAPTER_HELP)],
    layers: Annotated[
        int, Option(help="Show the so many layers that differ most; 0 shows all.", min=0)
    ] = 12,
    as_json: AsJson = False,
    exit_code: Annotated[
        bool, Option("--exit-code", help="End with code 1 if they differ.")
    ] = False,
) -> None:
    """Show in which layers two adapters change a model, by how much, and how much the directions of
    their changes differ.

    φ is the similarity of the subspaces that the two changes read from (φ in) and write to (φ out):
    1 if one subspace contains the other, 0 if they share no direction.

    \b
    Examples:
      veneer diff run/adapter other/adapter
      veneer diff run/adapter other/adapter --json
    """
    from veneer.store.library import resolve
    from veneer.tools.compare import compare

    comparison = compare(resolve(a), resolve(b))
    if as_json:
        facts = {
            "a": str(comparison.a),
            "b": str(comparison.b),
            "identical": comparison.identical,
            "same_change": comparison.same_change,
            "difference": comparison.relative,
            "cosine": comparison.cosine,
        }
        echo_json(asdict(comparison) | facts)
    else:
        out.print(str(comparison), soft_wrap=True)
        if comparison.layers and not comparison.same_change:
            out.print(_layer_table(comparison.layers, layers))
    if exit_code and not comparison.identical:
        raise Exit(1)


def _layer_table(layers: Any, layer_count: int) -> Any:
    """The table of the ``layer_count`` layers that differ most; 0 means all. ``layers``: the
    ``LayerDifference`` of each layer."""
    ordered_layers = sorted(
        layers, key=lambda layer: layer.difference * max(layer.norms), reverse=True
    )
    has_magnitudes = any(
        layer.magnitude is not None for layer in ordered_layers[: layer_count or None]
    )
    columns = ("layer", ">ranks", ">‖A‖", ">‖B‖", ">apart", ">cosine", ">φ in", ">φ out")
    table = table_of(*columns, *([">magnitude"] if has_magnitudes else []))
    for layer in limit_rows(table, ordered_layers, layer_count, "layers that differ less"):
        cells = [
            f"{layer.ranks[0]}, {layer.ranks[1]}",
            *(f"{norm:.4g}" for norm in layer.norms),
            f"{layer.difference:.3g}",
            f"{layer.cosine:.3f}",
            *(
                "–" if overlap is None else f"{overlap.similarity:.3f}"
                for overlap in (layer.rows, layer.columns)
            ),
        ]
        if has_magnitudes:
            magnitude = layer.magnitude
            cells.append("–" if magnitude is None else f"{magnitude:.3g}")
        table.add_row(layer.path, *cells)
    return table
