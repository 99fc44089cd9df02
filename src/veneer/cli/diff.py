"""`veneer diff`: compare two adapters layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Exit, Option

from veneer.cli.options import ADAPTER_HELP, AsJson

ShownLayers = Annotated[
    int, Option(help="Show the so many layers that differ most; 0 shows all.", min=0)
]
ExitCode = Annotated[bool, Option("--exit-code", help="End with code 1 if they differ.")]


def diff_command(
    a: Annotated[str, Argument(metavar="A", help=ADAPTER_HELP)],
    b: Annotated[str, Argument(metavar="B", help=ADAPTER_HELP)],
    layers: ShownLayers = 12,
    as_json: AsJson = False,
    exit_code: ExitCode = False,
) -> None:
    """Show in which layers two adapters change a model, how much, and how far their directions lie
    apart.

    φ is the similarity of the subspaces that they read from and write to: 1 if one contains the
    other, 0 if they share no direction.

    \b
    Examples:
      veneer diff run/adapter other/adapter
      veneer diff run/adapter other/adapter --json
    """
    from veneer.cli.console import echo_json, out
    from veneer.store.library import resolve
    from veneer.tools.compare import compare

    comparison = compare(resolve(a), resolve(b))
    if as_json:
        facts = asdict(comparison) | {
            "a": str(comparison.a),
            "b": str(comparison.b),
            "identical": comparison.identical,
        }
        facts |= {
            "same_change": comparison.same_change,
            "difference": comparison.relative,
            "cosine": comparison.cosine,
        }
        echo_json(facts)
    else:
        out.print(str(comparison), soft_wrap=True)
        if comparison.layers and not comparison.same_change:
            out.print(_layer_table(comparison.layers, layers))
    if exit_code and not comparison.identical:
        raise Exit(1)


def _layer_table(entries: Any, count: int) -> Any:
    from veneer.cli.console import limit_rows, table_of

    ordered = sorted(entries, key=lambda entry: entry.difference * max(entry.norms), reverse=True)
    gains = (
        [">magnitude"]
        if any(entry.magnitude is not None for entry in ordered[: count or None])
        else []
    )
    table = table_of(
        "layer", ">ranks", ">‖A‖", ">‖B‖", ">apart", ">cosine", ">φ in", ">φ out", *gains
    )
    for entry in limit_rows(table, ordered, count, "layers that differ less"):
        numbers = [f"{entry.ranks[0]}, {entry.ranks[1]}", *(f"{norm:.4g}" for norm in entry.norms)]
        numbers += [f"{entry.difference:.3g}", f"{entry.cosine:.3f}"]
        numbers += [
            "–" if space is None else f"{space.similarity:.3f}"
            for space in (entry.rows, entry.columns)
        ]
        numbers += (
            (["–"] if entry.magnitude is None else [f"{entry.magnitude:.3g}"]) if gains else []
        )
        table.add_row(entry.path, *numbers)
    return table
