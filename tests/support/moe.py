"""Small mixture-of-experts models of transformers with random weights, and adapters on them."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn
from torch.func import functional_call

import veneer

_SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TARGETS = r"re:.*\.experts\.(gate_up|down)_proj"


def _qwen3_moe(experts):
    config = transformers.Qwen3MoeConfig(
        **_SHAPE,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral(experts):
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_SHAPE, num_local_experts=experts, num_experts_per_tok=2)
    )


def _deepseek_v3(experts):
    config = transformers.DeepseekV3Config(
        **_SHAPE, moe_intermediate_size=16, n_routed_experts=experts, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def _gpt_oss(experts):
    config = transformers.GptOssConfig(
        **_SHAPE, head_dim=8, num_local_experts=experts, num_experts_per_tok=2, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config)


def _llama4(experts):
    config = transformers.Llama4TextConfig(
        **_SHAPE, intermediate_size_mlp=24, num_local_experts=experts, num_experts_per_tok=1,
        interleave_moe_layer_step=1, head_dim=8,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


MODELS = {
    "qwen3_moe": _qwen3_moe, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}  # fmt: skip


def build(name, dtype, experts=4):
    torch.manual_seed(0)
    model = MODELS[name](experts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def set_way(model, path):
    """Choose one of transformers' implementations of experts, if the model has several."""
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation(path)


def experts_of(model):
    """The first module that holds the weights of experts."""
    return next(
        m for m in model.modules() if "gate_up_proj" in m._parameters and m.gate_up_proj.dim() == 3
    )


def attach_adapter(name, path, dtype, experts=4, rank=2, dropout=0.0):
    model = build(name, dtype, experts)
    set_way(model, path)
    config = veneer.LoraConfig(rank=rank, targets=TARGETS, dropout=dropout)
    handle = veneer.attach(model, config)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, experts_of(model)


def inputs_for(module, dtype, tokens=9):
    """Arguments of the forward of an experts module; one expert gets no token, if possible."""
    generator = torch.Generator().manual_seed(1)
    count, width = (
        len(module.gate_up_proj),
        module.down_proj.shape[-1 if module.gate_up_proj.shape[1] == 16 else 1],
    )
    if type(module).__name__.startswith("Llama4"):
        return [torch.randn(count * tokens, width, generator=generator).to(dtype)]
    index = torch.rand(tokens, count - 1, generator=generator).topk(2).indices
    return [
        torch.randn(tokens, width, generator=generator).to(dtype), index,
        torch.rand(tokens, 2, generator=generator).to(dtype),
    ]  # fmt: skip


def definition(module, args, weights=None):
    """(y, the adapter parameters, x) in float64. y is the output of the module's eager forward on
    W + Σ weight · ΔW; ``weights``: the weight of each adapter by name."""
    base_module = copy.deepcopy(module)
    base_module.__class__ = type(module).veneer_base
    states = base_module._modules.pop("veneer")
    leaves, values = [], {}
    for adapter, weight in (weights or {"default": 1.0}).items():
        for name, change in states.get(adapter).changes.items():
            tensors = {
                key: value.detach().double().requires_grad_()
                for key, value in change._parameters.items()
            }
            leaves += tensors.values()
            weight_value = values.get(name, base_module._parameters[name].detach().double())
            values[name] = weight_value + weight * change.scale * tensors["B"] @ tensors["A"]
    base_module = base_module.double()
    if hasattr(base_module, "config"):
        base_module.config = copy.copy(base_module.config)
        base_module.config._experts_implementation = "eager"
    x = args[0].detach().double().requires_grad_()
    other_args = [arg.double() if arg.is_floating_point() else arg for arg in args[1:]]
    return functional_call(base_module, values, (x, *other_args)), leaves, x
