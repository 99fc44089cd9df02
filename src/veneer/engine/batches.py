"""Join batches of several adapters into one batch of the base, and split the output by adapter.

    {"a": [3, n], "b": [5, n]} ─ join_batches ─> [8, n] ─ model ─> [8, m]
                               ─ split_output ─> {"a": [3, m], "b": [5, m]}

The model must compute each row independently of the other rows in the batch, which
``check_independent_rows`` tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach import BASE
from veneer.errors import DataError, SelectionError


class AdapterBatch(NamedTuple):
    """One adapter's batch.

    Fields:
        args, kwargs: the arguments of the model's forward.
        target: the second argument of the adapter's loss function; None if it needs none.
        row_count: the size of the first axis of each tensor in ``args`` and ``kwargs``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    row_count: int

    @property
    def shape_key(self) -> Any:
        """A hashable description of the arguments; batches with equal ``shape_key`` can be joined
        into one forward. It holds the structure of the arguments; the dtypes, devices and shapes
        (without the first axis) of their tensors; and all values that are not tensors."""
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        leaf_keys = [
            (
                (leaf.shape[1:], leaf.dtype, leaf.device)
                if isinstance(leaf, Tensor)
                else (type(leaf), repr(leaf))
            )
            for leaf in leaves
        ]
        return str(structure), tuple(leaf_keys)


def read_batch(adapter_name: str, batch: Any, default_inputs: Mapping[str, Any]) -> AdapterBatch:
    """Convert a caller's batch, ``(inputs, target)`` or a mapping with labels, to an
    ``AdapterBatch``.

    Args:
        adapter_name: for error messages.
        default_inputs: keyword arguments that the model gets in addition to the batch. If the batch
            has a key of ``default_inputs`` too, the value in the batch is used.

    Raises:
        DataError: the batch is neither a pair nor a mapping, holds no tensor or no rows, or its
            tensors differ in their number of rows.
    """
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        target = batch.get("labels")
    elif isinstance(batch, tuple) and len(batch) == 2:
        inputs, target = batch
    else:
        raise DataError(
            f"a {type(batch).__name__} as the batch of {adapter_name!r}",
            "(inputs, target), or a mapping of the model's keyword arguments with labels",
            "pass one of these; the loss gets the target or the labels",
        )
    if isinstance(inputs, Mapping):
        args, kwargs = (), {**default_inputs, **inputs}
    else:
        args, kwargs = inputs if isinstance(inputs, tuple) else (inputs,), {**default_inputs}
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    row_counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(row_counts) != 1 or 0 in row_counts:
        raise DataError(
            f"tensors {[list(tensor.shape) for tensor in tensors]} in the batch of"
            f" {adapter_name!r}",
            "the same number of rows in each, along its first axis",
            "leave out what has none",
        )
    return AdapterBatch(args, kwargs, target, row_counts.pop())


def join_batches(batches: Sequence[AdapterBatch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one call of the model with the rows of all batches, in the order of
    ``batches``, which must have equal ``shape_key``."""
    return pytree.tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0],
        *[(batch.args, batch.kwargs) for batch in batches],
    )


def split_output(output: Any, row_counts: Sequence[int]) -> list[Any]:
    """Split the model's output for joined batches into one output for each batch. A value in the
    output without one entry for each row is passed to all batches unchanged.

    Args:
        row_counts: the number of rows of each batch.

    Raises:
        SelectionError: a tensor in the output has no entry for each row, but requires a gradient,
            for example a load-balancing loss of experts over all tokens. Its gradient could not be
            divided among the adapters.
    """
    leaves, structure = pytree.tree_flatten(output)
    slices_by_leaf = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == sum(row_counts):
            slices_by_leaf.append(leaf.split(list(row_counts)))
        elif isinstance(leaf, Tensor) and leaf.requires_grad:
            raise SelectionError(
                f"an output {list(leaf.shape)} of the model, which is of all rows together",
                f"the {sum(row_counts)} rows of the batch along its first axis",
                "let the model not return it, or train the runs one by one",
            )
        else:
            slices_by_leaf.append([leaf] * len(row_counts))
    return [
        pytree.tree_unflatten(list(output_leaves), structure)
        for output_leaves in zip(*slices_by_leaf, strict=True)
    ]


def check_independent_rows(model: nn.Module, uid: str, batches: Sequence[AdapterBatch]) -> None:
    """Raise a SelectionError if the base's output for the first batch changes when the batch is
    joined with the other batches. Outputs may differ by rounding errors. The base runs in eval
    mode, without an adapter. ``uid``: the id of the set of adapters that is attached to
    ``model``."""
    with torch.no_grad(), context.override({uid: BASE}), context.evaluation_mode(model):
        separate_output = model(*batches[0].args, **batches[0].kwargs)
        args, kwargs = join_batches(batches)
        row_counts = [batch.row_count for batch in batches]
        joined_output = split_output(model(*args, **kwargs), row_counts)[0]
    leaf_pairs = zip(
        pytree.tree_leaves(separate_output), pytree.tree_leaves(joined_output), strict=True
    )
    for separate_leaf, joined_leaf in leaf_pairs:
        if not isinstance(separate_leaf, Tensor) or not separate_leaf.is_floating_point():
            continue
        wide_leaf = separate_leaf.double() if separate_leaf.is_cpu else separate_leaf.float()
        largest_value = max(float(wide_leaf.nan_to_num(0, 0, 0).abs().max()), 1e-30)
        tolerance = torch.finfo(separate_leaf.dtype).eps ** 0.5 * largest_value
        if separate_leaf.shape != joined_leaf.shape or not torch.allclose(
            wide_leaf, joined_leaf.to(wide_leaf.dtype), rtol=0, atol=tolerance, equal_nan=True
        ):
            raise SelectionError(
                "a model whose output of some rows depends on which others are in the batch",
                "rows that are computed each alone",
                "train its adapters one by one",
            )
