"""Quantise a base while it is loaded, and record from which weights its packed ones were made.

    base = load_base("folder", quantize="nf4")      bitsandbytes' Linear4bit or Linear8bitLt, except
                                                    the head
    sources_of(base.model)                          {fingerprint of a packed weight: fingerprint of
                                                    the file's weight that it was made from}

An adapter's record names its base by fingerprints of the weights. Fingerprints are hashes of values
rounded to bfloat16, so the float32 and the bfloat16 files of a base have equal fingerprints. A base
that is quantised on loading should also count as the same base. So each packed weight is identified
by the fingerprint of the weight in the files from which it was made. An adapter that was trained on
nf4 can therefore be verified against the 16-bit files (``veneer merge``), or against the same files
packed as nf4 or int8.

``sources_of`` maps the fingerprint of the packed weight itself to that of the file's weight. So a
packed weight into which an adapter was merged is not mistaken for the file's. Two other designs
were rejected: a record with both fingerprints, because each reader would have to choose one; and
reading the weights as they pass through transformers' quantiser, because the quantiser has no
interface for that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from veneer.attach import ModelIndex
from veneer.errors import CheckpointError, ConfigError, listing
from veneer.fileio.hashing import fingerprint

__all__ = ["Quantize", "quantization_in", "sources_of"]

Quantize = Literal["nf4", "fp4", "int8"]

#: how many weights of a 4-bit tensor share a scale
WEIGHTS_PER_SCALE = 64
#: the attribute of a model that holds the result of ``sources_of``
_SOURCES_ATTRIBUTE = "veneer_quantized_from"


def quantizer(kind: Quantize, dtype: Any) -> Any:
    """The ``quantization_config`` for ``from_pretrained``. With "nf4" and "fp4", blocks of 64
    weights share a scale, the scales are quantised too (QLoRA, arXiv:2305.14314), and layers
    compute in ``dtype``. "int8" is LLM.int8() (arXiv:2208.07339).

    Raises:
        ConfigError: ``kind`` is unknown, or bitsandbytes or accelerate is not installed.
    """
    if kind not in ("nf4", "fp4", "int8"):
        raise ConfigError(f"quantize={kind!r}", "nf4, fp4 or int8", "choose one, or leave it out")
    missing_packages = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing_packages:
        raise ConfigError(
            f"a base to be quantised to {kind}, and no {' nor '.join(missing_packages)}",
            "bitsandbytes, which keeps it so",
            f"pip install {' '.join(missing_packages)}",
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        # bitsandbytes would warn in each call of each layer that x is rounded to float16 first
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prevent_repacking(model: nn.Module) -> None:
    """Make bitsandbytes keep 4-bit weights in their original layout. On a CPU with AVX512-BF16, it
    would repack them in the first call in eval mode. Repacking rounds the scales of the weights, so
    it would change the base."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False


def copy_out_of_files(model: nn.Module) -> None:
    """Copy each weight on the CPU that is not quantised out of the memory-mapped file, in place. If
    a weight refers to the file, the pages that were read for quantising stay in memory, in addition
    to the packed weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def must_have_whole_blocks(model: nn.Module, name: str) -> None:
    """Raise a ``ConfigError`` for 4-bit weights on a CPU if the length of their rows is no multiple
    of 64: bitsandbytes (0.50) multiplies rows of other lengths with the scales of wrong blocks.
    ``name``: the user's name of the base, for errors."""
    misread_weights = [
        f"{path} ({module.in_features})"
        for path, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
        and module.weight.device.type == "cpu"
        and int(module.in_features) % WEIGHTS_PER_SCALE  # pyright: ignore[reportArgumentType]
    ]
    if misread_weights:
        raise ConfigError(
            f"{name} in 4 bits on a CPU, where the rows of {listing(misread_weights, 2)} are no"
            f" multiples of {WEIGHTS_PER_SCALE}",
            "whole blocks, as bitsandbytes misreads others on a CPU",
            "take int8, or a GPU",
        )


def record_sources(model: nn.Module, folder: str | Path) -> None:
    """Store in ``model`` what ``sources_of`` returns: for each packed weight, the fingerprint of
    the weight in the files at ``folder`` that it was made from. Reads the files once more, tensor
    by tensor.

    A packed weight gets no entry, and is later identified by its own fingerprint, if the files are
    not safetensors, if the model has the weight in another layout (GPT-2), or if transformers lacks
    the model's class."""
    from veneer.models.base_weights import folder_weights, list_weights
    from veneer.models.meta import meta_model

    try:
        file_weights = folder_weights(meta_model(folder, type(model).__name__), folder)
    except (CheckpointError, ConfigError):
        return
    fingerprints: dict[str, str] = {}
    for module_weight in list_weights(ModelIndex(model)):
        weight, storage = module_weight.weight, module_weight.storage
        file_weight = file_weights.find(module_weight.names)
        if (
            storage is None
            or storage.name == "plain"
            or file_weight is None
            or file_weight.shape != storage.shape(weight)
        ):
            continue
        storage.prepare(module_weight.module)
        dense_weight = storage.decode(
            weight, storage.after_first_call(weight, storage.stored_tensors(weight))
        )
        fingerprints[fingerprint(dense_weight)] = file_weight.fingerprint()
        storage.release(module_weight.module)
    setattr(model, _SOURCES_ATTRIBUTE, fingerprints)


def sources_of(model: nn.Module) -> Mapping[str, str]:
    """{fingerprint of a packed weight: fingerprint of the file's weight that it was made from};
    empty for a model that ``load_base`` did not quantise."""
    return model.__dict__.get(_SOURCES_ATTRIBUTE, {})


def quantization_in(model: nn.Module) -> dict[str, Any] | None:
    """The quantisation of a model, as an adapter's record describes it: {"by": "bitsandbytes",
    "as": "nf4"}, with "original": True if ``sources_of`` is not empty: fingerprints in the record
    can then be those of the files' weights. None if the model is not quantised."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    format_name = (
        fields.get("bnb_4bit_quant_type")
        if fields.get("load_in_4bit")
        else "int8"
        if fields.get("load_in_8bit")
        else None
    )
    description = {
        "by": str(method),
        "as": str(format_name) if format_name else None,
        "original": True if sources_of(model) else None,
    }
    return {name: value for name, value in description.items() if value is not None}
