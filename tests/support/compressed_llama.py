"""Write a tiny Llama quantised by the library compressed-tensors, if it is installed."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.support.tiny import tiny_config


def save_quantised(folder: Path, preset: str) -> None:
    """Save a checkpoint quantised by one of the library's presets, such as W4A16. The largest
    value of each group or row determines its scale."""
    from compressed_tensors.compressors import ModelCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import (  # pyright: ignore[reportMissingImports]
        calculate_qparams,
        generate_gparam,
    )
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    model, scheme = LlamaForCausalLM(config).bfloat16(), preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    args.group_size = min(args.group_size, 32) if args.group_size else None
    settings = {
        "config_groups": {"all": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "frozen",
    }
    apply_quantization_config(model, QuantizationConfig(**settings))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight, global_scale = module.weight.detach(), getattr(module, "weight_global_scale", None)
        if global_scale is not None:
            global_scale.data = generate_gparam(weight.min().view(1), weight.max().view(1))
        groups = weight.view(*module.weight_scale.shape, -1)
        scale, _ = calculate_qparams(
            groups.amin(-1), groups.amax(-1), args, global_scale=global_scale
        )
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
