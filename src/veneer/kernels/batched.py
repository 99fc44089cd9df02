"""Linear layers on a batch whose rows use different adapters: x ΔWᵀ, where ΔW depends on the row.

Sizes: N rows with t tokens each, S groups of n tokens, rank r.

**Few tokens on a CPU** (decoding): rows are grouped by their adapter, each group is padded to the
size of the largest, and two batched products compute all groups:

    h = A xᵀ            A: [S, r, in]   x, grouped: [S, n, in]   h: [S, r, n]
    Δ = hᵀ B            B: [S, r, out]                           Δ: [S, n, out]

On a CPU, A and B are float32 whatever the dtype of the base is, because batched products of thin
matrices take several times as long in 16 bits. A row that blends k adapters is in k groups. Over a
base in bfloat16 or float32, a compiled loop replaces these products where it is faster
(``mixed_rows.py``).

**Many tokens** (prompts): each run of neighbouring rows with the same adapters is multiplied with
the factors of these adapters, one run after the other.

**On a GPU** or similar device, a launch is expensive and copying A and B is cheap. One launch
stacks the factors of each row's adapter, and each row is multiplied with its own copy. The copies
are freed after the call:

    Δ = (x Aᵀ) B        x: [N, t, in]   A: [N, r, in]   B: [N, r, out]

Measured for 16 rows, 8 adapters of rank 8 and a layer of 576 × 576 on one CPU core: the products of
all groups take 15 µs, and the layer itself 246 µs in float32. Rejected: joining all adapters along
the rank, with a mask (48 µs); a product with A and one with B for each adapter (3 to 5 µs each);
gathering the factors of each row, which copies an adapter once for every row that uses it (Chen et
al. 2023, "Punica", arXiv:2310.18547, gathers in a custom kernel).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from veneer.kernels import device, fused
from veneer.kernels.switch import is_on

#: the fewest elements of a weight for which ``mixed_rows.py``, and numba with it, is loaded
LOOP_MIN_WEIGHT = 1 << 16
#: the most multiply-adds of a layer's low-rank products, times the number of torch's threads, up to
#: which the loop of ``mixed_rows.py``, which has one thread, is faster than batched products
LOOP_MAX_WORK = 1 << 22
#: the dtypes of W, A and B that the loop supports
LOOP_DTYPES = {torch.bfloat16, torch.float32}


def load_row_loop(weight: Tensor, factor_dtype: torch.dtype) -> ModuleType | None:
    """The module ``mixed_rows`` if it is enabled and supports a layer, else None. It is imported
    only here, because it imports numba."""
    is_supported = weight.is_cpu and {weight.dtype, factor_dtype} <= LOOP_DTYPES
    if not is_supported or weight.numel() < LOOP_MIN_WEIGHT or not is_on("mixed_rows"):
        return None
    return importlib.import_module("veneer.kernels.mixed_rows")


def compile_row_loop(weight: Tensor) -> None:
    """Load and compile the loop of ``mixed_rows.py`` for a base whose largest weight is ``weight``,
    so that the first batch with several adapters does not wait for it. Does nothing for a base that
    the loop does not support."""
    if (loop := load_row_loop(weight, weight.dtype)) is not None:
        rank = loop.RANKS_TOGETHER
        factor = loop.to_array(torch.zeros(rank, 1, dtype=weight.dtype))
        pairs = loop.make_pairs([[(0, 1.0)]], [(0, rank)], 1)
        loop.multiply_pairs(torch.zeros(1, 1, dtype=weight.dtype), factor, factor, pairs)


@dataclass(frozen=True, eq=False)
class Grouping:
    """How the rows of a call are arranged in groups by adapter, and how results are arranged back.
    Each token counts as a row here, N in all. A group is padded to n positions.

    Fields:
        group_count: S, the number of groups.
        order: [S · n], for each position of each group, the row that it holds; None if the rows are
            in this order already.
        weights: [S, 1, n], the blend weight of each position, 0 for padding; None if all are 1.
        result_rows: pairs of two tensors; the result of a row is the sum over the pairs. The first
            tensor, [N], is the position (in all groups) that holds the result of each row; None if
            results are in the order of the rows already. The second, [N, 1] of bool, marks rows
            without a result in this pair; None if there are none.
    """

    group_count: int
    order: Tensor | None
    weights: Tensor | None
    result_rows: tuple[tuple[Tensor | None, Tensor | None], ...]


def make_grouping(
    rows: Sequence[Sequence[tuple[int, float]]],
    group_count: int,
    tokens_per_row: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Grouping:
    """Group rows by adapter. The grouping is computed on the CPU, so that nothing waits for an
    accelerator.

    Args:
        rows: for each row, (index of the adapter, blend weight) of each of its adapters.
        group_count: the number of adapters, S. Each has a group.
        tokens_per_row: tokens per row, t.
        device, dtype: of the tensors of the result.
    """
    rows_of_group: list[list[tuple[int, float]]] = [[] for _ in range(group_count)]
    groups_of_row: list[list[tuple[int, int]]] = []  # for each row, (group, offset in it)
    for row, blend in enumerate(rows):
        groups_of_row.append([])
        for group, weight in blend:
            groups_of_row[row].append((group, len(rows_of_group[group])))
            rows_of_group[group].append((row, weight))
    group_size = max(map(len, rows_of_group))
    groups = [members + [(0, 0.0)] * (group_size - len(members)) for members in rows_of_group]

    def move_to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def expand_to_tokens(indices: Sequence[int]) -> Tensor | None:
        """The indices of the tokens of rows, or of positions in groups, with these indices. None if
        the result would leave all tokens in their order (0, 1, 2, …)."""
        first_tokens = torch.tensor(indices, device="cpu")[:, None] * tokens_per_row
        token_indices = (first_tokens + torch.arange(tokens_per_row, device="cpu")).flatten()
        count = len(token_indices)
        position_count = group_count * group_size * tokens_per_row
        same_length = count == position_count == len(rows) * tokens_per_row
        if same_length and torch.equal(token_indices, torch.arange(count, device="cpu")):
            return None
        return move_to_device(token_indices)

    order = expand_to_tokens([row for group_rows in groups for row, _ in group_rows])
    group_weights = [[weight for _, weight in group_rows] for group_rows in groups]
    weights = None
    if not all(weight in (0.0, 1.0) for row_weights in group_weights for weight in row_weights):
        weight_tensor = torch.tensor(group_weights, dtype=dtype, device="cpu")
        weights = move_to_device(weight_tensor.repeat_interleave(tokens_per_row, 1)[:, None])
    result_rows = []
    for position in range(max(map(len, groups_of_row))):
        is_present = [len(row_groups) > position for row_groups in groups_of_row]
        group_entries = [
            row_groups[position] if present else (0, 0)
            for row_groups, present in zip(groups_of_row, is_present, strict=True)
        ]
        result_indices = [group * group_size + offset for group, offset in group_entries]
        index = expand_to_tokens(result_indices)
        is_absent = ~torch.tensor(is_present, device="cpu").repeat_interleave(tokens_per_row)
        result_rows.append((index, None if all(is_present) else move_to_device(is_absent[:, None])))
    return Grouping(group_count, order, weights, tuple(result_rows))


def gather_rows(x: Tensor, grouping: Grouping) -> Tensor:
    """Arrange the rows of x [N, in] in groups, [S, n, in]."""
    x = x if grouping.order is None else x.index_select(0, grouping.order)
    return x.view(grouping.group_count, -1, x.shape[1])


def project_down(x: Tensor, A: Tensor, grouping: Grouping) -> Tensor:
    """h = A xᵀ, [S, r, n], for x in groups [S, n, in], times the blend weights."""
    h = torch.bmm(A, x.mT)
    return h if grouping.weights is None else h.mul_(grouping.weights)


def project_up(h: Tensor, B: Tensor, grouping: Grouping, total: Tensor | None = None) -> Tensor:
    """hᵀ B in the order of the rows, [N, out], added in place to ``total`` if that is not None."""
    group_results = torch.bmm(h.mT, B).view(-1, B.shape[2])
    for index, has_no_result in grouping.result_rows:
        rows = group_results if index is None else group_results.index_select(0, index)
        if has_no_result is not None:  # multiplying by 0 would keep a NaN of another row
            rows = rows.masked_fill(has_no_result, 0.0)
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total


def multiply_rows(x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None) -> Tensor:
    """Δ [N · t, out] for x [N · t, in], with A [N, r, in] and B [N, r, out] of each row.
    ``weights`` [N, 1, r] multiply h = x Aᵀ, if not None."""
    h = torch.bmm(x.view(len(A), -1, x.shape[1]), A.mT)
    h = h if weights is None else h.mul_(weights)
    return torch.bmm(h, B).view(len(x), -1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float | Tensor,
    zeros: Tensor,
) -> Tensor:
    """x Wᵀ + scale · (x A_nᵀ) B_nᵀ + bias, [N, *, out], where row n of x has its own factors A_n
    and B_n. Differentiable in all tensors but W. For devices other than the CPU.

    Args:
        x: [N, *, in].
        weight: W, [out, in].
        A, B: for each row, a tensor [r_n, in] and a tensor [out, r_n], all of one dtype. Rows may
            share a tensor.
        scale: a number for all rows, or a tensor [N, 1, 1].
        zeros: a flat tensor of zeros, of the dtype of A and B, with as many elements as the largest
            padding may have: the largest rank times in, or times out.
    """
    is_recorded = torch.is_grad_enabled()
    rows = x.reshape(len(A), -1, x.shape[-1])
    largest_rank = max(map(len, A))
    stacks = []
    for factors in (A, [factor.mT for factor in B]):
        width = factors[0].shape[1]
        padding = zeros[: largest_rank * width].view(largest_rank, width)
        # each factor, followed by zeros up to the largest rank
        padded_factors = [
            block for factor in factors for block in (factor, padding[len(factor) :]) if len(block)
        ]
        stacks.append(torch.cat(padded_factors).view(len(factors), largest_rank, width))
    downs, ups = (
        [factor.to(x.dtype) for factor in stacks]
        if is_recorded
        else cast(Any, device.same_dtype(stacks, x.dtype))
    )
    h = torch.bmm(rows, downs.mT)
    h, alpha = (h * scale, 1) if isinstance(scale, Tensor) else (h, scale)
    delta = torch.baddbmm(h.detach().view(-1)[:1], h, ups, beta=0, alpha=alpha).view(
        -1, weight.shape[0]
    )
    tokens = rows.reshape(-1, x.shape[-1])
    if not is_recorded:
        y = fused.add_product(delta, tokens, weight, bias)
    elif bias is None:
        # out of place, because ``delta`` is a view, which autograd would copy for an in-place sum
        y = torch.addmm(delta, tokens, weight.mT)
    else:
        y = torch.addmm(delta + bias, tokens, weight.mT)
    return y.view(*x.shape[:-1], weight.shape[0])


#: a run of neighbouring rows with the same adapters: (first row, row after the last, and for each
#: adapter (A [r, in], B [r, out], blend weight))
Run = tuple[int, int, Sequence[tuple[Tensor, Tensor, float]]]


def multiply_runs(x: Tensor, out: int, runs: Sequence[Run], tokens_per_row: int) -> Tensor:
    """Δ [N · t, out] for x [N · t, in], run by run. ``tokens_per_row``: t."""
    delta = x.new_empty(x.shape[0], out)
    for first, after, factors in runs:
        tokens_of_run = slice(first * tokens_per_row, after * tokens_per_row)
        x_rows, delta_rows = x[tokens_of_run], delta[tokens_of_run]
        if not factors:
            delta_rows.zero_()
        for index, (A, B, weight) in enumerate(factors):
            h = fused.thin_product(A, x_rows)  # [r, tokens of the run]
            if weight != 1:
                h *= weight
            if index:
                delta_rows.addmm_(h.mT, B)
            else:
                torch.mm(h.mT, B, out=delta_rows)
    return delta
