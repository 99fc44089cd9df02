"""The rows of a batch in the inputs of a module of experts, where rows and time are one axis.

    hidden [rows, time, n] --block--> [rows · time, n]    n: the width of a token's hidden state
                                      [rows · time, k]    the k experts of each token

A mixture-of-experts block flattens its input before it routes the tokens, so the module of experts
below it gets tokens instead of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def count_tokens_per_row(module: nn.Module, inputs: Any, row_count: int) -> int | None:
    """The number of tokens in each of ``row_count`` rows; None if the inputs do not show it.

    The inputs show it if the module holds a stack of matrices and they are routed tokens: floats
    [tokens, n], integers that choose a matrix of the stack for each token, and no tensor of another
    length. If the floats are a view of a tensor with more axes, the first axis of that tensor must
    be the rows.
    """
    has_stack = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    hidden = next((leaf for leaf in tensors if leaf.is_floating_point()), None)
    has_routes = any(
        leaf.dim() == 2 and leaf.dtype in (torch.int64, torch.int32) for leaf in tensors
    )
    if not has_stack or hidden is None or not has_routes or hidden.dim() != 2:
        return None
    token_count = len(hidden)
    if token_count % row_count or any(
        leaf.dim() == 0 or len(leaf) != token_count for leaf in tensors
    ):
        return None
    viewed_tensor = hidden._base
    if (
        viewed_tensor is not None
        and viewed_tensor.dim() > 2
        and viewed_tensor.numel() == hidden.numel()
        and viewed_tensor.shape[0] != row_count
    ):
        return None
    return token_count // row_count


def token_indices(row_indices: Tensor, tokens_per_row: int) -> Tensor:
    """The indices of the tokens of these rows, if each row has ``tokens_per_row`` tokens."""
    if tokens_per_row == 1:
        return row_indices
    positions = torch.arange(tokens_per_row, device=row_indices.device)
    return (row_indices[:, None] * tokens_per_row + positions).flatten()
