"""Which cells of a product the quick suite runs.

A test over layers × variants × dtypes × ways is a product, and nearly every bug that it could find
shows wherever two certain values meet (a variant in a dtype, a layer on a path). So the quick suite
runs as many cells as it takes for any two values that meet in the product to meet in one of them;
the others are marked slow, for `make test-slow`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pytest

Cell = tuple[Hashable, ...]


def pairwise(cells: Iterable[Cell], marks: Mapping[Hashable, Any] | None = None) -> list[Any]:
    """All cells as pytest's parameters, in their order, each marked slow that no pair needs. An
    axis of several arguments is a tuple: ``(("conv1d", 3), "dora", torch.float32)`` is one of four.
    ``marks`` are those of a value."""
    product = list(cells)
    quick = covering(product)

    def parameters(cell: Cell) -> Any:
        cell_marks = [] if cell in quick else [pytest.mark.slow]
        cell_marks += [mark for value, mark in (marks or {}).items() if value in cell]
        return pytest.param(*_flat(cell), id="-".join(map(_name, _flat(cell))), marks=cell_marks)

    return [parameters(cell) for cell in product]


def covering(product: list[Cell]) -> set[Cell]:
    """Cells in which each pair of values of two axes occurs that occurs in the product: first those
    that bring only new pairs, then those that bring one less, and so on. The order in which they
    are looked at is drawn once."""
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in product}
    missing, chosen = set().union(*pairs.values()), set()
    order = random.Random(0).sample(product, len(product))
    for least in range(max(map(len, pairs.values())), 0, -1):
        for cell in order:
            if len(pairs[cell] & missing) >= least:
                chosen.add(cell)
                missing -= pairs[cell]
    return chosen


def _flat(cell: Cell) -> list[Any]:
    return [value for axis in cell for value in (axis if isinstance(axis, tuple) else (axis,))]


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)
