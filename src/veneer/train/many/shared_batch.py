"""Batches of several runs as one, and what a model makes of it as one output for each run.

    {"a": [3, n], "b": [5, n]} ─ join ─> [8, n] ─ model ─> [8, m] ─ split ─> {"a": [3, m], "b": [5,
    m]}

That is right for a model that treats rows alike whoever else is there. ``try_rows`` tries whether
it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach.adapted_module import walk
from veneer.attach.state import BASE
from veneer.errors import DataError, SelectionError


class Batch(NamedTuple):
    """What one run gives the model and its loss. ``rows``: how many the tensors of ``args`` and
    ``kwargs`` hold."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rows: int

    @property
    def like(self) -> Any:
        """Batches that are alike here share a forward: the structure, shapes but for the rows,
        dtypes, devices."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        tensors = [
            (one.shape[1:], one.dtype, one.device)
            if isinstance(one, Tensor)
            else (type(one), repr(one))
            for one in leaves
        ]
        return str(spec), tuple(tensors)


def read(name: str, batch: Any, defaults: Mapping[str, Any]) -> Batch:
    """A batch as ``Runs.backward`` takes it, with what it leaves out by default. ``DataError``: it
    is none, or its tensors differ in rows."""
    if isinstance(batch, Mapping):
        inputs, target = (
            {key: value for key, value in batch.items() if key != "labels"},
            batch.get("labels"),
        )
    elif isinstance(batch, tuple) and len(batch) == 2:
        inputs, target = batch
    else:
        found = f"a {type(batch).__name__} as the batch of {name!r}"
        expected = "(inputs, target), or a mapping of the model's keyword arguments with labels"
        raise DataError(
            found, expected, "pass one of these; the loss gets the target or the labels"
        )
    args, kwargs = (
        ((), {**defaults, **inputs}) if isinstance(inputs, Mapping) else (inputs, {**defaults})
    )
    args = args if isinstance(args, tuple) else (args,)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    rows = {len(one) if one.dim() else 0 for one in tensors}
    if len(rows) != 1 or 0 in rows:
        found = f"tensors {[list(one.shape) for one in tensors]} in the batch of {name!r}"
        raise DataError(
            found,
            "the same number of rows in each, along its first axis",
            "leave out what has none",
        )
    return Batch(args, kwargs, target, rows.pop())


def join(batches: Sequence[Batch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call that holds the rows of all."""
    return pytree.tree_map(
        lambda *own: torch.cat(own) if isinstance(own[0], Tensor) else own[0],
        *[(batch.args, batch.kwargs) for batch in batches],
    )


def split(output: Any, sizes: Sequence[int]) -> list[Any]:
    """The output of such a call as one for each batch. ``SelectionError``: what a loss could learn
    from is not by row, such as a balance of experts over all tokens."""
    leaves, spec = pytree.tree_flatten(output)
    pieces = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == sum(sizes):
            pieces.append(leaf.split(list(sizes)))
        elif isinstance(leaf, Tensor) and leaf.requires_grad:
            found = f"an output {list(leaf.shape)} of the model, which is of all rows together"
            do = "let the model not return it, or train the runs one by one"
            raise SelectionError(
                found, f"the {sum(sizes)} rows of the batch along its first axis", do
            )
        else:
            pieces.append([leaf] * len(sizes))
    return [pytree.tree_unflatten(list(own), spec) for own in zip(*pieces, strict=True)]


def try_rows(model: nn.Module, uid: str, batches: Sequence[Batch]) -> None:
    """Raise a SelectionError if the base, in evaluation mode, makes something else of the first
    batch's rows among the others than alone."""
    training = {module: module.training for _, module in walk(model)}
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), context.changed({uid: BASE}):
            alone = model(*batches[0].args, **batches[0].kwargs)
            args, kwargs = join(batches)
            among = split(model(*args, **kwargs), [batch.rows for batch in batches])[0]
    finally:
        for module, was in training.items():
            module.training = was
    pairs = list(zip(pytree.tree_leaves(alone), pytree.tree_leaves(among), strict=True))
    for one, other in pairs:
        if not isinstance(one, Tensor) or not one.is_floating_point():
            continue
        wide = one.double() if one.is_cpu else one.float()
        near = torch.finfo(one.dtype).eps ** 0.5 * max(
            float(wide.nan_to_num(0, 0, 0).abs().max()), 1e-30
        )
        if one.shape != other.shape or not torch.allclose(
            wide, other.to(wide.dtype), rtol=0, atol=near, equal_nan=True
        ):
            found = "a model whose output of some rows depends on which others are in the batch"
            raise SelectionError(
                found, "rows that are computed each alone", "train its adapters one by one"
            )
