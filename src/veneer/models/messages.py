"""transformers kept quiet while it loads, and its errors in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from veneer.errors import ConfigError

log = logging.getLogger("veneer.models")


def explained(name: str, error: Exception) -> Exception:
    """A readable error for what transformers raises when it cannot load; an unknown one is passed on as it is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        return error
    if not Path(_expanded(name)).exists() and not name.startswith("package:"):
        return ConfigError(
            f"Found: no folder {name} here, and the hub gives no such model ({first_line(error)}). "
            "Expected: a model folder, a .gguf file, or the id of a model on the Hugging Face hub that can be reached "
            "from here. Do: check the spelling and the network; for a private model log in with `hf auth login`."
        )
    if isinstance(error, (OSError, ValueError, KeyError)) or type(error).__name__ == "SafetensorError":
        return ConfigError(_unusable(name, error))
    return error


def _expanded(name: str) -> str:
    return str(Path(name).expanduser())


def _unusable(name: str, error: Exception) -> str:
    return (
        f"Found: the model in {name} cannot be loaded ({first_line(error)}). Expected: a complete causal language "
        "model that this transformers version knows. Do: check that the files are complete, or upgrade transformers."
    )


def first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= 200 else line[:199] + "…"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notes of transformers, and without the hub client's line for each retry."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as noise

    level, bars, retries = noise.get_verbosity(), noise.is_progress_bar_enabled(), hub.get_verbosity()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        hub.set_verbosity(retries)
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()
