"""`veneer diff`: where two adapters differ."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from veneer.cli.options import ADAPTER_HELP, AsJson

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=ADAPTER_HELP, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help=ADAPTER_HELP, show_default=False)],
    layers: Annotated[int, typer.Option(help="Show the so many layers that differ most; 0 shows all.", min=0)] = 12,
    as_json: AsJson = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with code 1 if they differ.")] = False,
) -> None:
    """Show where two adapters change a model, how much, and how far their directions lie apart.

    φ is the similarity of the spaces that they read from and write to: 1 if one lies within the other, 0 if they share
    no direction.

    \b
    Examples:
      veneer diff run/adapter other/adapter
      veneer diff run/adapter other/adapter --json
    """
    from veneer.cli.console import echo_json, out
    from veneer.store.library import resolve
    from veneer.tools.compare import compare

    found = compare(resolve(a), resolve(b))
    if as_json:
        echo_json(_json_values(_facts(found)))
    else:
        out.print(str(found), soft_wrap=True)
        if found.layers and not found.same_change:
            out.print(_table(found.layers, layers))
    if exit_code and not found.identical:
        raise typer.Exit(1)


def _facts(found: Any) -> dict[str, Any]:
    facts = asdict(found)
    return {
        **facts,
        "a": str(found.a),
        "b": str(found.b),
        "identical": found.identical,
        "same_change": found.same_change,
        "difference": found.relative,
        "cosine": found.cosine,
    }


def _json_values(value: Any) -> Any:
    """JSON has no infinity: null stands for what has no number."""
    if isinstance(value, dict):
        return {key: _json_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(entries: Any, count: int) -> Any:
    from rich.table import Table

    ordered = sorted(entries, key=lambda entry: entry.difference * max(entry.norms), reverse=True)
    shown = ordered[: count or None]
    table = Table(box=None, header_style="bold", caption_justify="left")
    table.add_column("layer", overflow="fold")
    gains = any(entry.magnitude is not None for entry in shown)
    for name in ("ranks", "‖A‖", "‖B‖", "apart", "cosine", "φ in", "φ out", *(["magnitude"] if gains else [])):
        table.add_column(name, justify="right")
    for entry in shown:
        numbers = [f"{entry.ranks[0]}, {entry.ranks[1]}", *(f"{norm:.4g}" for norm in entry.norms)]
        numbers += [f"{entry.difference:.3g}", f"{entry.cosine:.3f}"]
        numbers += ["–" if space is None else f"{space.similarity:.3f}" for space in (entry.rows, entry.columns)]
        numbers += (["–"] if entry.magnitude is None else [f"{entry.magnitude:.3g}"]) if gains else []
        table.add_row(entry.path, *numbers)
    if len(ordered) > len(shown):
        table.caption = f"and {len(ordered) - len(shown)} layers that differ less (--layers 0 shows all)"
    return table
