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
    adapters: Annotated[list[str], Argument(metavar="ADAPTER[=WEIGHT]…", help="Adapter folders; weight 1 if none.")],
    method: Annotated[
        Literal["sum", "svd", "ties", "dare", "dare_ties", "prune"] | None,
        Option(help="How to combine them; svd if a rank or an energy is given, else sum."),
    ] = None,
    rank: Annotated[int | None, Option(help="Rank of the result.", min=1)] = None,
    energy: Annotated[float | None, Option(help="Instead of a rank: the share of ‖ΔW‖² to keep.")] = None,
    density: Annotated[float | None, Option(help="Share of entries that ties, dare, dare_ties and prune keep.")] = None,
    base: Annotated[str | None, Option(help="Base model, for DoRA and for what is trained in full.")] = None,
    layer: Annotated[
        list[str] | None, Option(metavar="PATTERN=FACTOR", help="Weigh some layers otherwise; can be repeated.")
    ] = None,
    seed: Annotated[int, Option(help="Of the entries that dare keeps.")] = 0,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the weighted sum, or a mixture, of adapters of one base as a new adapter.

    A sum is exact, and its rank the sum of the ranks; --rank or --energy makes it smaller, and the report says what
    that leaves out. A negative weight takes an adapter away.

    \b
    Examples:
      veneer compose both french=0.7 legal=0.3
      veneer compose small french legal --rank 16
      veneer compose forget run/adapter=-1
    """
    from veneer.cli.console import echo_json, err, out, split_weight
    from veneer.tools.compose import compose as combine

    paths, weights = zip(*map(split_weight, adapters), strict=True)
    factors = dict(_factor(text) for text in layer or ())
    with err.status("Composing …"):
        report = combine(
            paths, output, weights=weights, method=method, rank=rank, energy=energy, density=density, layers=factors,
            seed=seed, overwrite=overwrite, **({} if base is None else _base(base, paths[0])),
        )  # fmt: skip
    if as_json:
        facts = asdict(report) | {"path": str(report.path), "error": report.error}
        echo_json(facts | {"layers": {layer.pop("path"): layer for layer in facts["layers"]}})
    else:
        out.print(str(report), soft_wrap=True)
        out.print(f"written to {output}", soft_wrap=True)


def _factor(text: str) -> tuple[str, float]:
    from veneer.cli.console import number_in

    pattern, equals, factor = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(f"--layer {text!r}", "PATTERN=FACTOR", "write, for instance, --layer 'q_proj=0.5'")
    return pattern, number_in(factor, text)


def _base(base: str, adapter: str) -> dict[str, Any]:
    """What ``compose`` asks for of a base. Of a folder it reads the weights that it needs; what is packed in the files,
    or no safetensors, only the model itself can tell."""
    from veneer import models
    from veneer.adapter_files.folder import read
    from veneer.cli.console import setup_logging
    from veneer.fileio.untrusted import read_json
    from veneer.models.named_weights import of_folder

    setup_logging()
    folder = models.folder_of(base)
    if read_json(folder / "config.json").get("quantization_config") or not any(folder.glob("*.safetensors")):
        return {"base": models.load_base(base, precision="stored", device="cpu").model}
    structure = models.meta_model(folder, read(adapter).metadata.get("base", {}).get("architecture"))
    values = of_folder(structure, folder).values
    return {"base": lambda path: values[path].read(None), "model": structure}
