"""Linear layers on a batch whose rows use different adapters: the low-rank term Δ = x ΔWᵀ, where ΔW
depends on the row.

Sizes: N rows with t tokens each, S groups of n tokens, rank r.

**Few tokens on a CPU** (decoding): rows are grouped by their adapter, each group is padded to the
size of the largest, and two batched products compute all groups:

    h = A xᵀ            A: [S, r, in]   x, grouped: [S, n, in]   h: [S, r, n]
    Δ = hᵀ B            B: [S, r, out]                           Δ: [S, n, out]

On a CPU, A and B are float32 whatever the dtype of the base is, because batched products of thin
matrices take several times as long in 16 bits. A row that blends k adapters (adds up their low-rank
terms, each times a weight) is in k groups. Over a base in bfloat16 or float32, a compiled loop
replaces these products where it is faster (``mixed_rows.py``).

**Many tokens on a CPU** (prompts): neighbouring rows with the same adapters are a run. Each run is
multiplied with the factors of its adapters, one run after the other.

**On a GPU** or similar device, a launch is expensive and copying A and B is cheap. One launch
stacks a copy of A for each row, and another one a copy of B. Batched products multiply each row
with its copies, which are freed after the call:

    Δ = (x Aᵀ) B        x: [N, t, in]   A: [N, r, in]   B: [N, r, out]

Measured for 16 rows, 8 adapters of rank 8 and a layer of 576 × 576 on one CPU core: the products of
all groups take 15 µs, and x Wᵀ takes 246 µs in float32. Rejected for the CPU: joining all adapters
along the rank, with a mask (48 µs); a product with A and one with B for each adapter (3 to 5 µs for
each product); gathering the factors of each row, which copies an adapter once for every row that
uses it (Chen et al. 2023, "Punica", arXiv:2310.18547, gathers in a custom kernel).
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
#: the loop of ``mixed_rows.py``, which has one thread, is faster than batched products up to this
#: number of multiply-adds of a layer with A and B, times the number of torch's threads
LOOP_MAX_WORK = 1 << 22
#: the dtypes of W, A and B that the loop supports
LOOP_DTYPES = {torch.bfloat16, torch.float32}


def load_row_loop(weight: Tensor, factor_dtype: torch.dtype) -> ModuleType | None:
    """The module ``mixed_rows`` (the compiled loop), if it is turned on and supports a layer with
    this weight and adapters of ``factor_dtype``; else None. The module is imported only here,
    because it imports numba, which takes half a second."""
    is_supported = weight.is_cpu and {weight.dtype, factor_dtype} <= LOOP_DTYPES
    if not is_supported or weight.numel() < LOOP_MIN_WEIGHT or not is_on("mixed_rows"):
        return None
    return importlib.import_module("veneer.kernels.mixed_rows")


def compile_row_loop(weight: Tensor) -> None:
    """Load and compile the loop of ``mixed_rows.py`` for a base model whose largest weight is
    ``weight``, so that the first batch with several adapters does not wait for the compiler. Does
    nothing if the loop is turned off or does not support this weight."""
    if (loop := load_row_loop(weight, weight.dtype)) is not None:
        rank = loop.RANKS_TOGETHER
        factor = loop.to_array(torch.zeros(rank, 1, dtype=weight.dtype))
        pairs = loop.make_pairs([[(0, 1.0)]], [(0, rank)], 1)
        loop.multiply_pairs(torch.zeros(1, 1, dtype=weight.dtype), factor, factor, pairs)


@dataclass(frozen=True, eq=False)
class Grouping:
    """How the rows of a call are arranged in groups, one for each adapter, and how the results are
    arranged back. Each token counts as a row here, N in all. Each group is padded to n positions,
    as many as the largest group has.

    Fields:
        group_count: S, the number of groups.
        order: [S · n], the index of the row that each position of each group holds; None if that is
            the order of the rows already.
        weights: [S, 1, n], the factor of the result at each position, 0 for padding; None if all
            factors are 0 or 1.
        result_rows: one pair of tensors for each adapter that a row may use at most. The result of
            a row is the sum over the pairs. The first tensor, [N], is the index, among all S · n
            positions, of the position with the result of each row; None if that is the order of the
            positions already. The second, [N, 1] of bool, is True for rows that use fewer adapters
            and so have no result in this pair; None if there are no such rows.
    """

    group_count: int
    order: Tensor | None
    weights: Tensor | None
    result_rows: tuple[tuple[Tensor | None, Tensor | None], ...]


def make_grouping(
    adapters_by_row: Sequence[Sequence[tuple[int, float]]],
    group_count: int,
    tokens_per_row: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Grouping:
    """The ``Grouping`` of a batch by adapter. It is computed on the CPU and copied to ``device``,
    so that the host never waits for an accelerator.

    Args:
        adapters_by_row: for each row of the batch, (index of the adapter, weight of its term) of
            each adapter that the row uses.
        group_count: the number of adapters. Each has a group.
        tokens_per_row: the number of tokens in each row of the batch.
        device: device of the tensors of the result.
        dtype: dtype of ``Grouping.weights``.
    """
    rows_of_group: list[list[tuple[int, float]]] = [[] for _ in range(group_count)]
    # for each row, (group, offset of the row in the group) of each of its adapters
    groups_of_row: list[list[tuple[int, int]]] = []
    for row, adapters_of_row in enumerate(adapters_by_row):
        groups_of_row.append([])
        for group, weight in adapters_of_row:
            groups_of_row[row].append((group, len(rows_of_group[group])))
            rows_of_group[group].append((row, weight))
    group_size = max(map(len, rows_of_group))
    groups = [
        group_rows + [(0, 0.0)] * (group_size - len(group_rows)) for group_rows in rows_of_group
    ]

    def move_to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def token_indices_of(row_indices: Sequence[int]) -> Tensor | None:
        """The indices of all tokens of the rows with these indices, on ``device``: row i has the
        tokens i · tokens_per_row and following. None if the result is 0, 1, 2, … for all tokens, so
        that no gather is needed. Also used for positions in groups instead of rows."""
        first_tokens = torch.tensor(row_indices, device="cpu")[:, None] * tokens_per_row
        token_indices = (first_tokens + torch.arange(tokens_per_row, device="cpu")).flatten()
        count = len(token_indices)
        position_count = group_count * group_size * tokens_per_row
        same_length = count == position_count == len(adapters_by_row) * tokens_per_row
        if same_length and torch.equal(token_indices, torch.arange(count, device="cpu")):
            return None
        return move_to_device(token_indices)

    order = token_indices_of([row for group_rows in groups for row, _ in group_rows])
    group_weights = [[weight for _, weight in group_rows] for group_rows in groups]
    weights = None
    if not all(weight in (0.0, 1.0) for row_weights in group_weights for weight in row_weights):
        weight_tensor = torch.tensor(group_weights, dtype=dtype, device="cpu")
        weights = move_to_device(weight_tensor.repeat_interleave(tokens_per_row, 1)[:, None])
    result_rows = []
    for pair_index in range(max(map(len, groups_of_row))):
        has_pair = [len(row_groups) > pair_index for row_groups in groups_of_row]
        group_and_offset_by_row = [
            row_groups[pair_index] if has_it else (0, 0)
            for row_groups, has_it in zip(groups_of_row, has_pair, strict=True)
        ]
        result_positions = [
            group * group_size + offset for group, offset in group_and_offset_by_row
        ]
        result_index = token_indices_of(result_positions)
        has_no_pair = ~torch.tensor(has_pair, device="cpu").repeat_interleave(tokens_per_row)
        result_rows.append(
            (result_index, None if all(has_pair) else move_to_device(has_no_pair[:, None]))
        )
    return Grouping(group_count, order, weights, tuple(result_rows))


def gather_rows(x: Tensor, grouping: Grouping) -> Tensor:
    """The rows of x [N, in], arranged in the S groups of ``grouping``, each padded to n positions:
    [S, n, in]."""
    x = x if grouping.order is None else x.index_select(0, grouping.order)
    return x.view(grouping.group_count, -1, x.shape[1])


def project_down(x: Tensor, A: Tensor, grouping: Grouping) -> Tensor:
    """h = A xᵀ, [S, r, n], times ``grouping.weights``, for x in groups [S, n, in] (by
    ``gather_rows``) and one A for each group, [S, r, in]."""
    h = torch.bmm(A, x.mT)
    return h if grouping.weights is None else h.mul_(grouping.weights)


def project_up(h: Tensor, B: Tensor, grouping: Grouping, output: Tensor | None = None) -> Tensor:
    """hᵀ B in the order of the batch's rows, [N, out], for h [S, r, n] (by ``project_down``) and
    one transposed B for each group, B [S, r, out]. If ``output`` [N, out] is not None, the result
    is added to it in place."""
    group_results = torch.bmm(h.mT, B).view(-1, B.shape[2])
    for result_index, has_no_result in grouping.result_rows:
        row_results = (
            group_results if result_index is None else group_results.index_select(0, result_index)
        )
        if has_no_result is not None:  # a factor of 0 would keep a NaN of another row
            row_results = row_results.masked_fill(has_no_result, 0.0)
        output = row_results if output is None else output.add_(row_results)
    assert output is not None
    return output


def multiply_rows(x: Tensor, A: Tensor, B: Tensor, weights: Tensor | None) -> Tensor:
    """The low-rank term Δ = (weights ⊙ x Aᵀ) B, [N · t, out], of N rows of t tokens, x [N · t, in],
    where each row has its own A [N, r, in] and transposed B [N, r, out]. ``weights`` [N, 1, r] are
    all 1 if None."""
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
    and B_n. Differentiable in x, bias, A, B and scale. For devices other than the CPU.

    Args:
        x: [N, *, in].
        weight: W, [out, in].
        A, B: for each row, a tensor [r_n, in] and a tensor [out, r_n], all of one dtype. Rows may
            share a tensor.
        scale: a number for all rows, or a tensor [N, 1, 1].
        zeros: a flat tensor of zeros, of the dtype of A and B, from which smaller ranks are padded
            to the largest. It needs (largest rank) · max(in, out) elements.
    """
    needs_graph = torch.is_grad_enabled()
    rows = x.reshape(len(A), -1, x.shape[-1])
    largest_rank = max(map(len, A))
    factor_stacks = []
    for factors in (A, [factor.mT for factor in B]):
        width = factors[0].shape[1]
        padding = zeros[: largest_rank * width].view(largest_rank, width)
        # One ``cat`` joins all factors, each followed by zeros up to the largest rank.
        padded_factors = [
            block for factor in factors for block in (factor, padding[len(factor) :]) if len(block)
        ]
        factor_stacks.append(torch.cat(padded_factors).view(len(factors), largest_rank, width))
    A_by_row, B_by_row = (
        [factor.to(x.dtype) for factor in factor_stacks]
        if needs_graph
        else cast(Any, device.same_dtype(factor_stacks, x.dtype))
    )
    h = torch.bmm(rows, A_by_row.mT)
    h, alpha = (h * scale, 1) if isinstance(scale, Tensor) else (h, scale)
    delta = torch.baddbmm(h.detach().view(-1)[:1], h, B_by_row, beta=0, alpha=alpha).view(
        -1, weight.shape[0]
    )
    tokens = rows.reshape(-1, x.shape[-1])
    if not needs_graph:
        y = fused.add_product(delta, tokens, weight, bias)
    elif bias is None:
        # out of place, because ``delta`` is a view, which autograd would copy for an in-place sum
        y = torch.addmm(delta, tokens, weight.mT)
    else:
        y = torch.addmm(delta + bias, tokens, weight.mT)
    return y.view(*x.shape[:-1], weight.shape[0])


#: a run, that is neighbouring rows with the same adapters: (first row, row after the last, and for
#: each adapter (A [r, in], transposed B [r, out], weight of its term))
Run = tuple[int, int, Sequence[tuple[Tensor, Tensor, float]]]


def multiply_runs(x: Tensor, out: int, runs: Sequence[Run], tokens_per_row: int) -> Tensor:
    """The low-rank term Δ [N · t, out] of N rows of t = ``tokens_per_row`` tokens, x [N · t, in],
    computed for one run of neighbouring rows with the same adapters after another. Zero for a run
    without adapters."""
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
