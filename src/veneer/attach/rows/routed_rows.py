"""The rows of a batch in the inputs of a module of experts, where rows and time are one axis.

    hidden [rows, time, n] --block--> [rows · time, n]
                                      [rows · time, k], the experts of each token

A mixture-of-experts block flattens its input before it routes, so the module of experts below it
sees tokens instead of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def tokens_a_row(module: nn.Module, inputs: Any, count: int) -> int | None:
    """The number of tokens of each of ``count`` rows; None if the inputs do not show it.

    They do if the module holds a stack of matrices and its inputs are routed tokens: floats
    [tokens, n], integers that choose a matrix of the stack for each token, and no tensor of another
    length. If the floats are a view of a tensor with more axes, its first axis must be the rows.
    """
    stacks = {len(p) for p in module._parameters.values() if p is not None and p.dim() == 3}
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
    """The indices of the tokens of rows, given the indices of the rows."""
    return rows if tokens == 1 else (rows[:, None] * tokens + torch.arange(tokens)).flatten()
