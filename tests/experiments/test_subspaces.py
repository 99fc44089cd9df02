"""The arithmetic of section 7, on spaces whose answer is known."""

from __future__ import annotations

import pytest
import torch
from experiments.subspaces import (
    POINTS,
    amplified,
    compared,
    inputs_of,
    rest_of,
    shared,
    similarity,
)

from veneer.lowrank import LowRank


def space(*columns: int, size: int = 8) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)[:, list(columns)]


def test_similarity_of_equal_and_of_foreign_directions():
    grid = similarity(space(0, 1, 2), space(0, 3, 2))
    assert grid[0, 0] == 1  # the first is common
    assert grid[1, 1] == 0.5  # one of two
    assert grid[2, 2] == pytest.approx(2 / 3)
    assert grid[0, 2] == 1  # the first of one lies in all of the other
    assert similarity(space(0, 1), space(2, 3)).max() == 0


def test_the_rest_leaves_out_the_first_direction_of_either():
    assert rest_of(similarity(space(0, 1, 2), space(0, 1, 2)), 3) == pytest.approx(1)
    assert rest_of(similarity(space(0, 1, 2), space(0, 3, 4)), 3) == pytest.approx(0)
    # the first of one is the second of the other: common, but not among the rest of both
    assert rest_of(similarity(space(0, 1), space(2, 0)), 2) == pytest.approx(0)


def test_random_spaces_share_what_their_size_says():
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(8, 200, generator=draw, dtype=torch.float64) for _ in range(2))
    assert float(similarity(inputs_of(one), inputs_of(other))[-1, -1]) == pytest.approx(
        8 / 200, abs=0.03
    )


def low_rank(rows: torch.Tensor, seed: int) -> LowRank:
    """A change that reads these directions [n, r], the first the most."""
    draw = torch.Generator().manual_seed(seed)
    B = torch.linalg.qr(torch.randn(64, rows.shape[1], generator=draw, dtype=torch.float64))[0]
    sizes = torch.arange(rows.shape[1], 0, -1, dtype=torch.float64)
    return LowRank(rows.mT[None].contiguous(), (B * sizes)[None], 0.5)


def test_two_changes_with_the_same_directions_in_the_same_order_are_alike():
    rows = torch.linalg.qr(
        torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    draw = torch.Generator().manual_seed(0)
    found = compared({"a": low_rank(rows, 2)}, {"a": low_rank(rows, 3)}, draw)
    assert found["first"] == [1.0]
    assert all(found["change"][i][i] == pytest.approx(1) for i in range(8))
    assert found["change rest"] == pytest.approx(1)
    assert found["random"][0][0] < 0.5
    assert shared(found) == pytest.approx(8 * (1 - found["random"][-1][-1]))
    assert [len(found["change"]), len(found["change"][0])] == [8, 8]
    assert POINTS[:8] == tuple(range(1, 9))


def test_amplification_of_known_directions():
    """W is diagonal: between e₂ and e₃ … it has what stands there, in its first directions the
    largest."""
    W = torch.diag(torch.arange(12, 0, -1, dtype=torch.float64))
    at = torch.eye(12, dtype=torch.float64)[[5, 6]]
    found = amplified(
        W, LowRank(at[None], at.mT[None].contiguous(), 3.0), torch.Generator().manual_seed(0)
    )
    assert found["change"] == pytest.approx(3 * 2**0.5)
    assert found["own"] == pytest.approx((7**2 + 6**2) ** 0.5)
    assert found["top"] == pytest.approx((12**2 + 11**2) ** 0.5)
    assert found["W"] == pytest.approx(float(W.norm()))
    assert 0 < found["random"] < found["top"]
