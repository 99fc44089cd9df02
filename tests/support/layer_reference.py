"""Compute the output of an adapted layer by its definition."""

from __future__ import annotations

import copy

import torch
from tests.support.toys import cast, definition, flat
from torch.utils import _pytree as pytree

import veneer
from veneer.bases import weight_of

# transformers' Conv1D is a kind of layer only after transformers was imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip


PATHS = [None, "materialised"]


def reference(handle, args):
    """(y, the leaf tensors that need gradients by path, args), all in float64. y is the output of
    the module's own forward on gain ⊙ (W + ΔW)."""
    module = copy.deepcopy(handle.model)
    veneer.detach(module)
    module = module.double()
    args = pytree.tree_map(lambda x: x.double().requires_grad_() if _float(x) else x, args)
    leaves, values = {}, {}
    for path, change in handle.changes.items():
        parameters = {
            name: p.detach().double().requires_grad_() for name, p in change.named_parameters()
        }
        leaves |= {f"{path}.{name}": p for name, p in parameters.items()}
        tensors = {**{name: b.double() for name, b in change.named_buffers()}, **parameters}
        base = change.storage.dense(weight_at(module, path))
        if (
            change.frozen_input is not None and "A" in tensors
        ):  # ΔW has no column for an input that never changes
            tensors["A"] = tensors["A"] * (torch.arange(change.dims.in_) != change.frozen_input)
        low_rank, gain = change.variant.resolve(
            tensors, change.scale, lambda base=base, c=change: c.layer.unfold(base, c.dims)
        )
        low_rank = (
            low_rank if change.frozen_input is None else low_rank.zero_input(change.frozen_input)
        )
        weight = base.detach() + change.layer.fold(
            torch.einsum("gor,gri->goi", low_rank.B, low_rank.A) * low_rank.scale, base.shape
        )
        if gain is not None:
            weight = weight * change.layer.spread(gain, change.dims, base.shape)
        values[path] = weight
    for path, layer_state in handle.layers.items():
        for name, parameter in layer_state.full.named_parameters():
            key = f"{path}.{name}".lstrip(".")
            leaves[key] = values[key] = parameter.detach().double().requires_grad_()
        values |= {
            f"{path}.{name}".lstrip("."): cast(buffer.clone(), torch.float64)
            for name, buffer in layer_state.full.named_buffers()
        }
    return flat(definition(module, values, cast(args, torch.float64))), leaves, args


def weight_at(module, path):
    module_path, _, name = path.rpartition(".")
    return weight_of(module.get_submodule(module_path), name)


def _float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()
