"""How many tokens of each row of a batch a module of experts gets, whose inputs have rows and time
as one axis.

    hidden [rows, time, n] --block--> [rows · time, n], with the experts of each token [rows · time,
    k] beside it

A block of a mixture flattens its input before it routes, so the module of experts below it no
longer sees rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def tokens_a_row(module: nn.Module, inputs: Any, count: int) -> int | None:
    """Tokens of each of ``count`` rows, or None where that cannot be told.

    It can if the module holds a stack of matrices and is given routed tokens: floats [tokens, n],
    integers that choose a matrix of the stack for each token, and nothing of another length. If the
    floats are a view of a tensor with more axes, that must have the rows first.
    """
    stacks = {len(own) for own in module._parameters.values() if own is not None and own.dim() == 3}
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    hidden = next((leaf for leaf in tensors if leaf.is_floating_point()), None)
    routed = any(leaf.dim() == 2 and leaf.dtype in (torch.int64, torch.int32) for leaf in tensors)
    if not stacks or hidden is None or not routed or hidden.dim() != 2:
        return None
    tokens = len(hidden)
    if tokens % count or any(leaf.dim() == 0 or len(leaf) != tokens for leaf in tensors):
        return None
    before = hidden._base
    if (
        before is not None
        and before.dim() > 2
        and before.numel() == hidden.numel()
        and before.shape[0] != count
    ):
        return None
    return tokens // count


def spread(rows: Tensor, tokens: int) -> Tensor:
    """Indices of rows as those of their tokens."""
    return rows if tokens == 1 else (rows[:, None] * tokens + torch.arange(tokens)).flatten()
