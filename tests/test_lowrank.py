"""LowRank against dense float64 arithmetic, the shapes of the kernels, and rounding once."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from veneer.kernels import reference
from veneer.lowrank import LowRank

sizes = st.integers(1, 7)


@settings(max_examples=50, deadline=None)
@given(groups=sizes, rank=sizes, out=sizes, in_=sizes, scale=st.floats(-3, 3))
def test_delta_transpose_and_norm(groups, rank, out, in_, scale):
    low = LowRank(
        torch.randn(groups, rank, in_).double(), torch.randn(groups, out, rank).double(), scale
    )
    dense = torch.einsum("gor,gri->goi", low.B, low.A) * scale
    torch.testing.assert_close(low.delta(), dense)
    torch.testing.assert_close(low.T.delta(), dense.mT)
    assert low.norm() == pytest.approx(dense.norm().item(), rel=1e-9, abs=1e-12)
    assert low.rank == rank
    torch.testing.assert_close(low.thin().delta(), dense)
    assert low.thin().rank == min(rank, out, in_)


def test_kernel_signatures_hold_their_shapes():
    checked = jaxtyped(typechecker=beartype)(reference.matmul_update)
    x, A, B, y = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(7, 4), torch.randn(2, 3, 7)
    assert checked(x, A, B, 2.0, y).shape == y.shape
    torch.testing.assert_close(checked(x, A, B, 2.0, y), y + 2 * x @ A.T @ B.T)
    with pytest.raises(TypeCheckError):
        checked(x, A.T, B, 2.0, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_once_is_correctly_rounded(dtype):
    """Values on, just above and just below the ties of the 16-bit grid, and random ones, against
    exact arithmetic."""
    grid = torch.randn(4000).to(dtype)
    grid = torch.cat([grid, torch.tensor([0.0, 1e-7, -6e-8, 3e-5, 1.0, 2.0]).to(dtype)])
    step = (torch.nextafter(grid, torch.full_like(grid, torch.inf)).double() - grid.double()).abs()
    tie = grid.double() + step / 2
    values = torch.cat(
        [tie, tie * (1 + 2**-40), tie * (1 - 2**-40), torch.randn(4000).double(), grid.double()]
    )
    rounded = reference.round_once(values, dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)).double()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)).double()
    error = (values - rounded.double()).abs()
    assert (error <= (values - below).abs()).all()
    assert (error <= (values - above).abs()).all()
    ties = (error == (values - below).abs()) | (error == (values - above).abs())
    assert ties.sum() > 1000
    assert (rounded.view(torch.int16)[ties] & 1 == 0).all(), "a tie goes to the even neighbour"
    twice = values.float().to(dtype)
    assert not torch.equal(twice, rounded), (
        "torch's own cast rounds twice; if it no longer does, round_once can go"
    )


def test_round_once_keeps_what_is_not_finite():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e300, 7e4]).double()
    rounded = reference.round_once(values, torch.float16)
    assert rounded.isinf()[[0, 1, 3, 4]].all()
    assert rounded[2].isnan()
