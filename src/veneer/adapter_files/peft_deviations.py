"""Where PEFT's change of a module differs from a change of its weight: other code reads the weight
directly, or the module's forward is not linear in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import Names, view, weight_readers
from veneer.bases import storage_of, weight_of
from veneer.distributed import base_class, full_tensor, is_sharded
from veneer.formats import peft, peft_behaviour, peft_tuners
from veneer.layers import Layer, ParamRef, kind_for


def outside_reader(names: Names, ref: ParamRef, nested: str | None = None) -> str | None:
    """The reason, in words, why a change of a module's output is no change of its weight: another
    module reads the weight directly. None if no module does.

    Args:
        nested: the path of the attention that PEFT adapts along with this out-projection, which
            does not count.
    """
    reader_paths = [
        weight_reader.path
        for weight_reader in weight_readers(names, *ref, reachable_only=True)
        if weight_reader.path != nested
    ]
    return (
        f"{reader_paths[0] or 'the model'!r} reads the weight itself, past the module that PEFT"
        " wraps"
        if reader_paths
        else None
    )


def deviation_reason(
    names: Names,
    ref: ParamRef,
    parameter: bool,
    rule: Callable[[str, Any], str | None] = peft_behaviour.deviation_reason,
) -> str | None:
    """Why PEFT's change at a module differs from a change of its weight; None if it does not.

    Args:
        parameter: PEFT changes the parameter, not the module.
        rule: gives the reason for a kind of layer and a module; other tuners than LoRA have rules
            of their own.
    """
    path, name = ref
    module, kind = names.modules[path], kind_for(names.modules[path], name)
    if path == "":
        return "PEFT cannot wrap the model itself"
    if parameter:
        recurrent = isinstance(module, nn.RNNBase)
        return (
            "its kernel reads a list of weights that PEFT leaves as it was" if recurrent else None
        )
    reason = rule(kind.name, module)
    if reason is None and not _plain_forward(kind, module, name):
        reason = (
            f"{base_class(module).__name__} has a forward of its own, which PEFT runs on the old"
            " weight"
        )
    return reason


def deviations(
    names: Names,
    ref: ParamRef,
    layer: peft.PeftLayer,
    parameter: bool,
    tuner: object,
    nested: str | None = None,
) -> tuple[str | None, str | None]:
    """Why PEFT's change differs from a change of the weight: (the reason if other modules read the
    weight directly, the reason in the module itself), each None if there is none. A product of zero
    has no readers. ``tuner``: the source of a folder of another tuner than LoRA, or None; the other
    arguments are those of ``deviation_reason`` and ``outside_reader``."""
    past = (
        None
        if not layer.extras and is_zero(layer.A, layer.B)
        else outside_reader(names, ref, nested)
    )
    return past, deviation_reason(
        names,
        ref,
        parameter,
        peft_behaviour.deviation_reason if tuner is None else peft_tuners.deviation_reason,
    )


def is_zero(A: Tensor, B: Tensor) -> bool:
    """Whether a product changes nothing. PEFT never trains a weight that is only read directly,
    such as the out-projection of an attention, so its B stays zero."""
    return not (A.any() and B.any())


def attention_above(names: Names, ref: ParamRef) -> str | None:
    """The path of the attention whose out-projection's weight this is, or None."""
    above, _, last = ref[0].rpartition(".")
    return (
        above
        if last == "out_proj" and isinstance(names.modules.get(above), nn.MultiheadAttention)
        else None
    )


def _plain_forward(kind: Layer, module: nn.Module, name: str) -> bool:
    """Whether the module computes ``kind.op``: its class has torch's forward, or a forward that
    gives the same on a sample."""
    base, weight = base_class(module), weight_of(module, name)
    storage: Any = storage_of(weight)
    if any(base.forward is stock.forward for stock in (*kind.types(), *storage.modules())):
        return True
    dense, replacement = storage.dense(weight), {}
    if not dense.any():  # a meta model's zeros, with which every forward gives the same
        # values that differ along every axis, in little memory
        strides = range(dense.dim(), 0, -1)
        last = sum(stride * (size - 1) for stride, size in zip(strides, dense.shape, strict=True))
        numbers = torch.arange(last + 1.0, device=dense.device).sin().to(dense.dtype)
        dense = numbers.as_strided(dense.shape, [*strides])
        replacement = {name: dense}
    embeds = kind.name == "embedding"
    x = torch.arange(2 * kind.dims(module, dense.shape).in_, device=dense.device)
    x = x[:2] % len(dense) if embeds else x.view(2, -1).to(dense.dtype).sin()
    sharded = {
        parameter_name: full_tensor(value)
        for parameter_name, value in module._parameters.items()
        if is_sharded(value)
    }
    module = view(module, base, {**sharded, **replacement})
    try:
        y = base.forward(module, x)
        expected = kind.op(module, x, dense, module._parameters.get("bias"))
        # PEFT supports embeddings that scale their output
        expected = expected * getattr(module, "embed_scale", 1) if embeds else expected
        return bool((y - expected).norm() <= 1e-2 * expected.norm())
    except Exception:  # an unknown forward may raise anything
        return False
