"""Quantise a base while it is loaded, and record from which weights its packed ones were made.

    base = load_base("folder", quantize="nf4")      bitsandbytes' Linear4bit or Linear8bitLt, except
                                                    the head
    sources_of(base.model)                          {fingerprint of a packed weight: of the file's
                                                    weight}

**The same base in another precision.** Fingerprints are of values rounded to bfloat16, so a base in
float32 and in bfloat16 has the same ones. A base that is quantised on loading is the same base too,
and its files are available, so each packed weight is identified by the fingerprint of the weight in
the file. An adapter that was trained on nf4 is therefore verified against the 16-bit files
(``veneer merge``), against the same files in nf4, and in int8. A packed weight is looked up by its
own fingerprint, so a weight with a merged adapter is no longer taken for the file's. Rejected: a
record with both fingerprints, because each reader would have to choose; reading the weights as they
pass through transformers' quantiser, because it has no interface for that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from veneer.attach import Names
from veneer.errors import CheckpointError, ConfigError, listing
from veneer.fileio.hashing import fingerprint

__all__ = ["Quantize", "quantization_in", "sources_of"]

Quantize = Literal["nf4", "fp4", "int8"]

#: how many numbers share a scale
BLOCK = 64
#: the attribute of a model that holds the result of ``sources_of``
_SOURCES = "veneer_quantized_from"


def quantizer(kind: Quantize, dtype: Any) -> Any:
    """The quantization_config for ``from_pretrained``. 4 bits: blocks of 64 with doubly quantised
    scales (QLoRA, arXiv:2305.14314), products in ``dtype``. 8 bits: LLM.int8() (arXiv:2208.07339).

    Raises:
        ConfigError: an unknown kind; bitsandbytes or accelerate is not installed.
    """
    if kind not in ("nf4", "fp4", "int8"):
        raise ConfigError(f"quantize={kind!r}", "nf4, fp4 or int8", "choose one, or leave it out")
    missing_packages = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing_packages:
        problem = f"a base to be quantised to {kind}, and no {' nor '.join(missing_packages)}"
        raise ConfigError(
            problem, "bitsandbytes, which keeps it so", f"pip install {' '.join(missing_packages)}"
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        # it would warn in each call of each layer that x is rounded to float16 before 8 bits
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_packed(model: nn.Module) -> None:
    """Keep 4-bit weights in their original layout. On a CPU with AVX512-BF16, bitsandbytes repacks
    them in the first call in evaluation mode and rounds their scales, which would change the
    base."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False


def leave_files(model: nn.Module) -> None:
    """Copy each plain weight on the CPU out of the memory-mapped file. Otherwise the pages that
    were read for packing stay resident beside the packed weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def must_have_whole_blocks(model: nn.Module, name: str) -> None:
    """Refuse 4-bit weights on a CPU whose rows are not multiples of 64 numbers: bitsandbytes (0.50)
    reads them there with the scales of other blocks."""
    partial_blocks = [
        f"{path} ({module.in_features})"
        for path, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
        and module.weight.device.type == "cpu"
        and int(module.in_features) % BLOCK  # pyright: ignore[reportArgumentType]
    ]
    if partial_blocks:
        problem = (
            f"{name} in 4 bits on a CPU, where the rows of {listing(partial_blocks, 2)} are no"
            f" multiples of {BLOCK}"
        )
        raise ConfigError(
            problem, "whole blocks, as bitsandbytes misreads others on a CPU", "take int8, or a GPU"
        )


def note_sources(model: nn.Module, folder: str | Path) -> None:
    """Record, for each packed weight of ``model``, the fingerprint of its source in the files at
    ``folder``. Reads these files once more, tensor by tensor. Weights that are not in safetensors,
    have another layout in the model (GPT-2) or belong to a class that transformers lacks are
    identified by their packed values alone."""
    from veneer.models.base_weights import folder_weights, list_weights
    from veneer.models.meta import meta_model

    try:
        files = folder_weights(meta_model(folder, type(model).__name__), folder)
    except (CheckpointError, ConfigError):
        return
    fingerprints: dict[str, str] = {}
    for entry in list_weights(Names(model)):
        weight, storage = entry.weight, entry.storage
        value = files.find(entry.names)
        if (
            storage is None
            or storage.name == "plain"
            or value is None
            or value.shape != storage.shape(weight)
        ):
            continue
        storage.prepare(entry.module)
        settled = storage.decode(
            weight, storage.after_first_call(weight, storage.stored_tensors(weight))
        )
        fingerprints[fingerprint(settled)] = value.fingerprint()
        storage.release(entry.module)
    setattr(model, _SOURCES, fingerprints)


def sources_of(model: nn.Module) -> Mapping[str, str]:
    """The fingerprint of the file's weight by that of the packed one; empty for a model that
    ``load_base`` did not quantise."""
    return model.__dict__.get(_SOURCES, {})


def quantization_in(model: nn.Module) -> dict[str, Any] | None:
    """The quantisation of a model for the record: {"by": "bitsandbytes", "as": "nf4"}, with
    "original": true if its weights are identified by the fingerprints of their sources. None: not
    quantised."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    kind = (
        fields.get("bnb_4bit_quant_type")
        if fields.get("load_in_4bit")
        else "int8"
        if fields.get("load_in_8bit")
        else None
    )
    description = {
        "by": str(method),
        "as": str(kind) if kind else None,
        "original": True if sources_of(model) else None,
    }
    return {name: value for name, value in description.items() if value is not None}
