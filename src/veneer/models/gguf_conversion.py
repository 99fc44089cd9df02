"""Convert a GGUF file to a folder that transformers loads in seconds.

transformers reads a GGUF file slowly (25 s for 135 M parameters) and marks the model as quantised,
so that it can be neither saved nor trained. Each file is therefore converted once: its weights are
dequantised exactly to fp32, put into the architecture's class without quantisation, and stored
under `$XDG_CACHE_HOME/veneer` (or `~/.cache/veneer`), from where the model loads in 2 s.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError, ConfigError, first_line
from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.formats import gguf_claims
from veneer.models.messages import log, quiet
from veneer.models.remote_code import code_options


def cache_dir() -> Path:
    """Veneer's cache folder: `$XDG_CACHE_HOME/veneer`, or `~/.cache/veneer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def convert_gguf(file: Path) -> Path:
    """The folder with the converted model of a GGUF file. If the cache has no conversion of a file
    with this path, size and modification time, the file is converted now.

    Raises:
        ConfigError: the package gguf is missing, or the file is damaged or of an architecture that
            transformers cannot convert.
    """
    file = file.resolve()
    file_stat = file.stat()
    file_key = hashlib.sha256(
        f"{file}\0{file_stat.st_size}\0{file_stat.st_mtime_ns}".encode()
    ).hexdigest()[:16]
    converted_folder = cache_dir() / "models" / f"{file.stem}-{file_key}"
    if (converted_folder / "config.json").is_file():
        return converted_folder
    if find_spec("gguf") is None:
        raise ConfigError(
            f"Found: {file.name} is a GGUF file and the package gguf is missing. Do: pip install"
            " 'veneer[train]'."
        )
    log.info(
        "Converting %s once (about half a minute for 100 MB); kept in %s",
        file.name,
        converted_folder,
    )
    # keep transformers' progress bar out of log files
    progress_stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        gguf_claims.check(file, gguf_claims.MAX_MODEL_COUNT)
    except AdapterError as error:
        raise ConfigError(str(error)) from error
    with quiet(), contextlib.redirect_stderr(progress_stream):
        model, tokenizer = _read_gguf(file)
    with (
        new_folder(converted_folder, overwrite=True, replaces=[EVERYTHING]) as new_model_folder,
        quiet(),
    ):
        model.save_pretrained(new_model_folder)
        tokenizer.save_pretrained(new_model_folder)
    return converted_folder


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file. The model has the architecture's class without
    quantisation, and weights in fp32. ``ConfigError``: the file is damaged, or of an architecture
    that transformers cannot convert."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file_options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    try:
        quantized_model = AutoModelForCausalLM.from_pretrained(
            **file_options, **code_options(), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**file_options, **code_options())
    except OSError:
        raise
    # gguf and transformers raise many kinds of errors for damaged or unknown files
    except Exception as error:
        raise ConfigError(
            f"{file} cannot be read as GGUF ({first_line(error)})",
            "a complete GGUF file of an architecture that transformers converts",
            "fetch the file again, or use the model's safetensors",
        ) from error
    config = type(quantized_model.config)(**quantized_model.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    model: Any = type(quantized_model)(config)
    model = model.to(torch.float32)
    model.load_state_dict(quantized_model.state_dict())
    model.tie_weights()
    model.generation_config = quantized_model.generation_config
    return model, tokenizer
