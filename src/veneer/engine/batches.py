"""Join batches of several adapters into one batch of the base, and split the output by adapter.

    {"a": [3, n], "b": [5, n]} ─ join_batches ─> [8, n] ─ model ─> [8, m]
                               ─ split_output ─> {"a": [3, m], "b": [5, m]}

This requires a model that computes each row independently of the others in the batch;
``check_independent_rows`` tests it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach import BASE, walk
from veneer.errors import DataError, SelectionError


class AdapterBatch(NamedTuple):
    """Arguments of the model, and the target of the loss, for one adapter. ``row_count``: the size
    of the first axis of each tensor in ``args`` and ``kwargs``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    row_count: int

    @property
    def shape_key(self) -> Any:
        """Batches with equal keys can share a forward. The key holds their structure, the dtypes,
        devices and shapes (without the first axis) of tensors, and all other values."""
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


def read_batch(name: str, batch: Any, default_inputs: Mapping[str, Any]) -> AdapterBatch:
    """Convert a caller's batch, ``(inputs, target)`` or a mapping with labels, to an
    ``AdapterBatch``.

    Args:
        name: the adapter, for errors.
        default_inputs: keyword arguments of the model, unless the batch contains them.

    Raises:
        DataError: the batch has another form, or its tensors differ in rows.
    """
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        target = batch.get("labels")
    elif isinstance(batch, tuple) and len(batch) == 2:
        inputs, target = batch
    else:
        problem = f"a {type(batch).__name__} as the batch of {name!r}"
        expected = "(inputs, target), or a mapping of the model's keyword arguments with labels"
        raise DataError(
            problem, expected, "pass one of these; the loss gets the target or the labels"
        )
    if isinstance(inputs, Mapping):
        args, kwargs = (), {**default_inputs, **inputs}
    else:
        args, kwargs = inputs if isinstance(inputs, tuple) else (inputs,), {**default_inputs}
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    row_counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(row_counts) != 1 or 0 in row_counts:
        problem = f"tensors {[list(tensor.shape) for tensor in tensors]} in the batch of {name!r}"
        raise DataError(
            problem,
            "the same number of rows in each, along its first axis",
            "leave out what has none",
        )
    return AdapterBatch(args, kwargs, target, row_counts.pop())


def join_batches(batches: Sequence[AdapterBatch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call of the model with the rows of all batches."""
    return pytree.tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0],
        *[(batch.args, batch.kwargs) for batch in batches],
    )


def split_output(output: Any, row_counts: Sequence[int]) -> list[Any]:
    """Split the output of such a call by batch.

    Raises:
        SelectionError: a tensor that requires a gradient does not have one entry for each row, such
            as a load-balancing loss of experts over all tokens.
    """
    leaves, structure = pytree.tree_flatten(output)
    pieces = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == sum(row_counts):
            pieces.append(leaf.split(list(row_counts)))
        elif isinstance(leaf, Tensor) and leaf.requires_grad:
            problem = f"an output {list(leaf.shape)} of the model, which is of all rows together"
            do = "let the model not return it, or train the runs one by one"
            raise SelectionError(
                problem, f"the {sum(row_counts)} rows of the batch along its first axis", do
            )
        else:
            pieces.append([leaf] * len(row_counts))
    return [
        pytree.tree_unflatten(list(output_leaves), structure)
        for output_leaves in zip(*pieces, strict=True)
    ]


def check_independent_rows(model: nn.Module, uid: str, batches: Sequence[AdapterBatch]) -> None:
    """Raise a SelectionError if the base, in eval mode, gives another output for the first batch
    when it is joined with other batches."""
    training_modes = {module: module.training for _, module in walk(model)}
    for module in training_modes:
        module.training = False
    try:
        with torch.no_grad(), context.override({uid: BASE}):
            alone = model(*batches[0].args, **batches[0].kwargs)
            args, kwargs = join_batches(batches)
            among = split_output(model(*args, **kwargs), [batch.row_count for batch in batches])[0]
    finally:
        for module, training in training_modes.items():
            module.training = training
    leaf_pairs = zip(pytree.tree_leaves(alone), pytree.tree_leaves(among), strict=True)
    for alone_leaf, among_leaf in leaf_pairs:
        if not isinstance(alone_leaf, Tensor) or not alone_leaf.is_floating_point():
            continue
        wide = alone_leaf.double() if alone_leaf.is_cpu else alone_leaf.float()
        largest = max(float(wide.nan_to_num(0, 0, 0).abs().max()), 1e-30)
        tolerance = torch.finfo(alone_leaf.dtype).eps ** 0.5 * largest
        if alone_leaf.shape != among_leaf.shape or not torch.allclose(
            wide, among_leaf.to(wide.dtype), rtol=0, atol=tolerance, equal_nan=True
        ):
            problem = "a model whose output of some rows depends on which others are in the batch"
            raise SelectionError(
                problem, "rows that are computed each alone", "train its adapters one by one"
            )
