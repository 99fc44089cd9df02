"""The arithmetic of section 7, on spaces whose answer is known."""

from __future__ import annotations

import pytest
import torch
from experiments.subspaces import (
    POINTS,
    amplification,
    common_directions,
    compare_runs,
    input_directions,
    similarity,
    similarity_of_rest,
)

from veneer.lowrank import LowRank


def space(*columns: int, size: int = 8) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)[:, list(columns)]


def test_similarity_of_equal_and_of_foreign_directions():
    grid = similarity(space(0, 1, 2), space(0, 3, 2))
    assert grid[0, 0] == 1  # the first is common
    assert grid[1, 1] == 0.5  # one of two
    assert grid[2, 2] == pytest.approx(2 / 3)
    assert grid[0, 2] == 1  # the first of one space lies in the other space
    assert similarity(space(0, 1), space(2, 3)).max() == 0


def test_the_rest_leaves_out_the_first_direction_of_either():
    grid = similarity(space(0, 1, 2), space(0, 1, 2))
    assert similarity_of_rest(grid, 3) == pytest.approx(1)
    grid = similarity(space(0, 1, 2), space(0, 3, 4))
    assert similarity_of_rest(grid, 3) == pytest.approx(0)
    # the first of one space is the second of the other: common, but not among the rest of both
    assert similarity_of_rest(similarity(space(0, 1), space(2, 0)), 2) == pytest.approx(0)


def test_random_spaces_share_as_much_as_their_size_says():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(8, 200, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    grid = similarity(input_directions(first), input_directions(second))
    assert float(grid[-1, -1]) == pytest.approx(8 / 200, abs=0.03)


def low_rank(rows: torch.Tensor, seed: int) -> LowRank:
    """A change that reads these directions [n, r], the first the most."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, rows.shape[1], generator=generator, dtype=torch.float64)
    sizes = torch.arange(rows.shape[1], 0, -1, dtype=torch.float64)
    B = torch.linalg.qr(noise)[0] * sizes
    return LowRank(rows.mT[None].contiguous(), B[None], 0.5)


def test_two_changes_with_the_same_directions_in_the_same_order_are_alike():
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.linalg.qr(noise)[0]
    generator = torch.Generator().manual_seed(0)
    pair = compare_runs({"a": low_rank(rows, 2)}, {"a": low_rank(rows, 3)}, generator)
    assert pair["change"] == pytest.approx([1.0] * 8)
    assert pair["change rest"] == pytest.approx(1)
    assert pair["random"][0] < 0.5
    assert common_directions(pair) == pytest.approx(8 * (1 - pair["random"][-1]))
    assert POINTS[:8] == tuple(range(1, 9))


def test_amplification_of_known_directions():
    """W is diagonal, so its norm between two unit vectors is an entry; its first directions have
    the largest entries."""
    W = torch.diag(torch.arange(12, 0, -1, dtype=torch.float64))
    rows = torch.eye(12, dtype=torch.float64)[[5, 6]]
    low = LowRank(rows[None], rows.mT[None].contiguous(), 3.0)
    norms = amplification(W, low, torch.Generator().manual_seed(0))
    assert norms["change"] == pytest.approx(3 * 2**0.5)
    assert norms["in change"] == pytest.approx((7**2 + 6**2) ** 0.5)
    assert norms["in top"] == pytest.approx((12**2 + 11**2) ** 0.5)
    assert norms["W"] == pytest.approx(float(W.norm()))
    assert 0 < norms["in random"] < norms["in top"]
