"""Arguments and options of the command line that several commands share, as annotations for
typer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.train.comma_lists import split_commas

ADAPTER_HELP = "Adapter: a folder, library:NAME, or a remote place such as hf://owner/name."
#: words for the help text of an option that can be repeated
REPEATABLE = "may be given several times"
#: the default of `veneer generate --max-new-tokens`
DEFAULT_NEW_TOKENS = 128


def merge_flag_values(values: Sequence[str] | None) -> str | list[str] | None:
    """Combine the values of a flag that can be repeated and takes comma-separated values: a list of
    all values, None if the flag was not given, or the text itself, unsplit, if it was given
    once."""
    if not values or len(values) == 1:
        return values[0] if values else None
    return split_flag_values(values)


def split_flag_values(values: Sequence[str]) -> list[str]:
    """Split each value of a flag at its commas, and return all parts as one list. ``values``: one
    text for each use of the flag."""
    return [entry for flag_value in values for entry in split_commas(flag_value)]


def changed_flags(command: Callable[..., Any], **values: Any) -> list[str]:
    """The flags of a command whose values differ from their defaults. ``values``: parameters of the
    function ``command`` with their values in this call."""
    parameters = signature(command).parameters
    return [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        if value != parameters[name].default
    ]


BaseModel = Annotated[str, Argument(help="Base model: folder, .gguf file, package:NAME or hub id.")]
Adapter = Annotated[str, Argument(help=ADAPTER_HELP)]
Library = Annotated[
    Path | None,
    Option(
        help=(
            "Folder of the library (default: $VENEER_LIBRARY, or veneer/adapters in"
            " $XDG_DATA_HOME)."
        )
    ),
]
Precision = Annotated[
    Literal["auto", "stored", "fp32", "bf16"], Option(help="Type of the base weights.")
]
Quantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    Option(help="Keep the base's linear layers in 4 or 8 bits (bitsandbytes)."),
]
Device = Annotated[
    str | None,
    Option(help="Where to put the base: cpu, cuda:1, … Default: the GPU if there is one."),
]
DeviceMap = Annotated[
    str | None,
    Option(help="Spread the base over several GPUs: auto, balanced, … as transformers takes it."),
]
Attention = Annotated[
    str,
    Option(
        "--attention",
        "--attn",
        help="Attention code: auto, products, eager, sdpa, flash_attention_2, …",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    Option(
        "--trust-remote-code",
        help=(
            "Run code that lies beside the base, if transformers lacks its class. Never an"
            " adapter's."
        ),
    ),
]
MaxNewTokens = Annotated[int, Option(help="Longest answer in tokens.", min=1)]
Temperature = Annotated[
    float | None,
    Option(
        help=(
            "0: the most likely token each time; above: sampling. Default: the base's, if its"
            " generation_config.json samples, else 0."
        ),
        min=0,
    ),
]
TopP = Annotated[
    float | None,
    Option(
        help="Sample from the likeliest tokens of this share. Default: the base's, else 1.",
        min=0.01,
        max=1,
    ),
]
TopK = Annotated[
    int | None,
    Option(
        help="Sample from so many likeliest tokens; 0: from all. Default: the base's, else 0.",
        min=0,
    ),
]
Seed = Annotated[int, Option(help="Seed of the sampling.", min=0)]
Verify = Annotated[bool, Option(help="Refuse an adapter of another base.")]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace what Veneer wrote in the folder; other files stay.")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
