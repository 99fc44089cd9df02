"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

ADAPTER_HELP = "Adapter: a folder, library:NAME, or a remote place such as hf://owner/name."
MANY = "may be given several times"

BaseModel = Annotated[str, Argument(help="Base model: folder, .gguf file, package:NAME or hub id.")]
Adapter = Annotated[str, Argument(help=ADAPTER_HELP)]
Library = Annotated[
    Path | None, Option(help="Folder of the library (default: $VENEER_LIBRARY, or veneer/adapters in $XDG_DATA_HOME).")
]
Precision = Annotated[Literal["auto", "stored", "fp32", "bf16"], Option(help="Type of the base weights.")]
Verify = Annotated[bool, Option(help="Refuse an adapter of another base.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the folder if it exists.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
