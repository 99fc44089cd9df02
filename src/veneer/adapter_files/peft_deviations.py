"""The reasons why PEFT's change of a module's output differs from a change of the module's weight:
other code reads the weight directly, or the module's forward is not linear in the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import ModelIndex, view, weight_readers
from veneer.bases import storage_of, weight_of
from veneer.distributed import base_class, full_tensor, is_sharded
from veneer.formats import peft, peft_behaviour, peft_tuners
from veneer.layers import Layer, ParamRef, kind_for


def outside_reader(
    model_index: ModelIndex, ref: ParamRef, attention_path: str | None = None
) -> str | None:
    """PEFT changes the output of a module. That equals a change of the module's weight only if no
    other module reads the weight directly. Returns an error text that names such a reader, or None
    if there is none.

    Args:
        ref: (path of the changed module, name of its weight).
        attention_path: the path of an attention module of which the out-projection is the changed
            module. PEFT adapts both together, so the attention does not count as a reader.
    """
    reader_paths = [
        weight_reader.path
        for weight_reader in weight_readers(model_index, *ref, reachable_only=True)
        if weight_reader.path != attention_path
    ]
    return (
        f"{reader_paths[0] or 'the model'!r} reads the weight itself, past the module that PEFT"
        " wraps"
        if reader_paths
        else None
    )


def deviation_reason(
    model_index: ModelIndex,
    ref: ParamRef,
    is_parameter: bool,
    rule: Callable[[str, Any], str | None] = peft_behaviour.deviation_reason,
) -> str | None:
    """Why PEFT's change at a module differs from a change of its weight; None if it does not.

    Args:
        ref: (path of the module, name of the weight).
        is_parameter: whether PEFT changes a parameter of the module, rather than its output.
        rule: a function of the name of a layer kind and a module, which returns the reason or None
            for modules of this kind. There is one for LoRA, and one for PEFT's other tuners.
    """
    module_path, parameter_name = ref
    module = model_index.modules[module_path]
    layer_kind = kind_for(module, parameter_name)
    if module_path == "":
        return "PEFT cannot wrap the model itself"
    if is_parameter:
        is_recurrent = isinstance(module, nn.RNNBase)
        return (
            "its kernel reads a list of weights that PEFT leaves as it was"
            if is_recurrent
            else None
        )
    reason = rule(layer_kind.name, module)
    if reason is None and not _is_plain_forward(layer_kind, module, parameter_name):
        reason = (
            f"{base_class(module).__name__} has a forward of its own, which PEFT runs on the old"
            " weight"
        )
    return reason


def deviation_reasons(
    model_index: ModelIndex,
    ref: ParamRef,
    layer: peft.PeftLayer,
    is_parameter: bool,
    tuner: object,
    attention_path: str | None = None,
) -> tuple[str | None, str | None]:
    """The reasons why PEFT would compute another result than a changed weight: (the reason that
    another module reads the weight, a reason in the module itself). Each is None if it does not
    apply. The first is always None for a change of zero, which has no effect on any reader.

    Args:
        is_parameter: whether PEFT changes a parameter of the module, rather than its output.
        tuner: the content of a folder of a PEFT tuner such as LoHa; None for LoRA.
        attention_path: as in ``outside_reader``.
    """
    reader_reason = (
        None
        if not layer.extras and is_zero(layer.A, layer.B)
        else outside_reader(model_index, ref, attention_path)
    )
    return reader_reason, deviation_reason(
        model_index,
        ref,
        is_parameter,
        peft_behaviour.deviation_reason if tuner is None else peft_tuners.deviation_reason,
    )


def is_zero(A: Tensor, B: Tensor) -> bool:
    """Whether A or B is all zeros, so that the change B A is zero. Files of PEFT have such changes
    for modules that the model never calls, but whose weight it reads, such as the out-projection of
    an attention: training does not reach their B, which keeps its initial zeros."""
    return not (A.any() and B.any())


def attention_above(model_index: ModelIndex, ref: ParamRef) -> str | None:
    """The path of the ``nn.MultiheadAttention`` with the weight ``ref`` in its out-projection; None
    if there is none."""
    parent_path, _, last_segment = ref[0].rpartition(".")
    return (
        parent_path
        if last_segment == "out_proj"
        and isinstance(model_index.modules.get(parent_path), nn.MultiheadAttention)
        else None
    )


def _is_plain_forward(layer_kind: Layer, module: nn.Module, parameter_name: str) -> bool:
    """Whether the module computes ``layer_kind.op``: its class has the forward of torch's layer, or
    a forward with the same result on a sample input."""
    module_class, weight = base_class(module), weight_of(module, parameter_name)
    storage: Any = storage_of(weight)
    if any(
        module_class.forward is known_class.forward
        for known_class in (*layer_kind.types(), *storage.modules())
    ):
        return True
    dense, replaced_parameters = storage.dense(weight), {}
    if not dense.any():  # a model whose weights are not loaded: with zeros, most forwards agree
        # use values that differ along every axis; as a strided view they take little memory
        strides = range(dense.dim(), 0, -1)
        last_index = sum(
            stride * (size - 1) for stride, size in zip(strides, dense.shape, strict=True)
        )
        values = torch.arange(last_index + 1.0, device=dense.device).sin().to(dense.dtype)
        dense = values.as_strided(dense.shape, [*strides])
        replaced_parameters = {parameter_name: dense}
    is_embedding = layer_kind.name == "embedding"
    x = torch.arange(2 * layer_kind.dims(module, dense.shape).in_, device=dense.device)
    x = x[:2] % len(dense) if is_embedding else x.view(2, -1).to(dense.dtype).sin()
    gathered_parameters = {
        name: full_tensor(parameter)
        for name, parameter in module._parameters.items()
        if is_sharded(parameter)
    }
    sample_module = view(module, module_class, {**gathered_parameters, **replaced_parameters})
    try:
        output = module_class.forward(sample_module, x)
        expected_output = layer_kind.op(
            sample_module, x, dense, sample_module._parameters.get("bias")
        )
        # embeddings that scale their output count as plain, because PEFT supports them, too
        expected_output = (
            expected_output * getattr(sample_module, "embed_scale", 1)
            if is_embedding
            else expected_output
        )
        return bool((output - expected_output).norm() <= 1e-2 * expected_output.norm())
    except Exception:  # an unknown forward may raise any error
        return False
