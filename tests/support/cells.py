"""Choose which cells of a product of test parameters the quick suite runs.

A test over layers × variants × dtypes × call paths is a product of axes. Nearly every bug that
such a test can find shows wherever two certain values occur together (a variant with a dtype, a
layer on a call path). So the quick suite runs enough cells for each pair of values that occurs in
the product to occur in one of them. The other cells are marked slow, for `make test-slow`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pytest

Cell = tuple[Hashable, ...]


def pairwise(cells: Iterable[Cell], marks: Mapping[Hashable, Any] | None = None) -> list[Any]:
    """All cells as pytest's parameters, in their order; cells that no pair needs are marked slow.
    An axis of several arguments is a tuple: ``(("conv1d", 3), "dora", torch.float32)`` has three
    axes and four arguments. ``marks``: a further mark for all cells with a value, by the value."""
    product = list(cells)
    quick = covering(product)

    def parameters(cell: Cell) -> Any:
        cell_marks = [] if cell in quick else [pytest.mark.slow]
        cell_marks += [mark for value, mark in (marks or {}).items() if value in cell]
        return pytest.param(*_flat(cell), id="-".join(map(_name, _flat(cell))), marks=cell_marks)

    return [parameters(cell) for cell in product]


def covering(product: list[Cell]) -> set[Cell]:
    """A set of cells in which each pair of values of two axes occurs that occurs in the product.
    It is built greedily: first cells that add only new pairs, then cells that add one pair less,
    and so on. The order in which cells are considered is random, with a fixed seed."""
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in product}
    missing_pairs, chosen_cells = set().union(*pairs.values()), set()
    order = random.Random(0).sample(product, len(product))
    for new_count in range(max(map(len, pairs.values())), 0, -1):
        for cell in order:
            if len(pairs[cell] & missing_pairs) >= new_count:
                chosen_cells.add(cell)
                missing_pairs -= pairs[cell]
    return chosen_cells


def _flat(cell: Cell) -> list[Any]:
    return [value for axis in cell for value in (axis if isinstance(axis, tuple) else (axis,))]


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)
