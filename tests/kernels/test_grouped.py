"""Rows of a stack of matrices with low-rank changes equal the definition, whichever rows meet which
matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.compiled import needs_loop
from tests.support.toys import error
from torch.utils.checkpoint import checkpoint

from veneer.kernels import grouped

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@st.composite
def shapes(draw):
    """(rows of each matrix, rows of none, out, in, rank), with empty matrices, one row, and all
    rows of one."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 18, 40]), min_size=1, max_size=6))
    some = st.integers(1, 9)
    return sizes, draw(st.sampled_from([0, 0, 2])), draw(some), draw(some), draw(some)


def made(case, dtype, factors, flipped):
    sizes, rest, out, in_, rank = case
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    count = len(sizes)
    x, W = drawn(sum(sizes) + rest, in_).to(dtype), drawn(count, out, in_).to(dtype)
    A, B = drawn(count, rank, in_).to(factors), drawn(count, out, rank).to(factors)
    if flipped:  # as a stack that is held transposed gives them
        W, A, B = (one.mT.contiguous().mT for one in (W, A, B))
    ends = torch.tensor(sizes).cumsum(0).tolist()
    where = grouped.segments(ends, len(x))
    ids = torch.repeat_interleave(torch.arange(count), torch.tensor(sizes)).tolist()
    return [one.requires_grad_() for one in (x, A, B)], W, where, ids


def dense(x, W, A, B, scale, ids):
    """In float64: each row with W + ΔW of its matrix."""
    changed = W.double() + scale * (B.double() @ A.double())
    ys = [x[row].double() @ changed[matrix].mT for row, matrix in enumerate(ids)]
    ys += [x[row].double() * 0 @ changed[0].mT for row in range(len(ids), len(x))]
    return torch.stack(ys) if ys else x.new_zeros(0, W.shape[1]).double()


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
     (torch.bfloat16, torch.bfloat16)],
    ids=str,
)  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(case=shapes(), flipped=st.booleans())
def test_it_equals_the_definition(dtype, factors, case, flipped):
    (x, A, B), W, where, ids = made(case, dtype, factors, flipped)
    y = grouped.linear(x, W, A, B, 0.5, where)
    expected = dense(x, W, A, B, 0.5, ids)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    bound = BOUNDS[dtype]
    if not len(x):
        return
    sizes = [
        one.detach().abs().requires_grad_() for one in (x, A, B)
    ]  # what is summed, which may cancel
    size = dense(sizes[0], W.abs(), *sizes[1:], 0.5, ids)
    with torch.no_grad():
        without = grouped.linear(x, W, A, B, 0.5, where)
    for own in (y, without):
        assert float((own.detach().double() - expected.detach()).norm()) <= bound * float(
            size.detach().norm()
        )
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (x, A, B))
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), (x, A, B))
    sizes = torch.autograd.grad((size * weights.abs()).sum(), sizes)
    for own, gradient, size in zip(found, wanted, sizes, strict=True):
        assert float((own.double() - gradient.double()).norm()) <= bound * float(
            size.double().norm()
        )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("flipped", [False, True])
def test_one_matrix_is_a_stack_of_one(dtype, rows, flipped):
    factors = torch.float64 if dtype is torch.float64 else torch.float32
    (x, A, B), W, _, ids = made(([rows], 0, 5, 6, 3), dtype, factors, flipped)
    expected = dense(x, W, A, B, 0.5, ids)
    y = grouped.linear(x, W[0], A[0], B[0], 0.5, None)
    assert error(y, expected) < BOUNDS[dtype]
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (x, A, B))
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), (x, A, B))
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 2 * BOUNDS[dtype]
    with torch.no_grad():
        assert torch.equal(grouped.linear(x, W[0], A[0], B[0], 0.5, None), y)


def test_gradients_of_gradients_are_those_of_the_definition():
    (x, A, B), W, where, _ = made(([2, 0, 3], 1, 4, 5, 2), torch.float64, torch.float64, False)
    assert torch.autograd.gradgradcheck(
        lambda *args: grouped.linear(args[0], W, *args[1:], 0.5, where), (x, A, B)
    )


def test_gradients_of_gradients_of_one_matrix():
    (x, A, B), W, *_ = made(([3], 0, 4, 5, 2), torch.float64, torch.float64, False)
    assert torch.autograd.gradgradcheck(
        lambda x, A, B: grouped.linear(x, W[0], A[0], B[0], 0.5, None), (x, A, B)
    )


def test_rows_in_any_order_are_put_by_their_matrix():
    order, where = grouped.sort_by_expert([2, 0, 2, 1], 4)
    assert order == [1, 3, 0, 2]
    assert list(where.bounds) == [(0, 0, 1), (1, 1, 2), (2, 2, 4)]


@needs_loop("saved_inputs")
def test_rows_of_a_tensor_are_saved_as_that_tensor():
    (x, A, B), W, where, _ = made(([4, 4], 0, 5, 6, 2), torch.float32, torch.float32, False)
    source = x[:3] * 1
    rows = source[torch.tensor([0, 0, 1, -1, 2, 1, -3, 1])]
    y = grouped.linear(rows, W, A, B, 0.5, where, source)
    saved = [value for value in y.grad_fn.saved_tensors if value is not None]
    assert not any(value.data_ptr() == rows.data_ptr() for value in saved)
    found = torch.autograd.grad(y.square().sum(), (x, A, B), retain_graph=True)
    wanted = torch.autograd.grad(
        grouped.definition(rows, W, A, B, 0.5, where).square().sum(), (x, A, B)
    )
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 1e-5


def test_activation_checkpointing_recomputes_nothing_in_the_forward():
    (x, A, B), W, where, _ = made(([4, 4], 0, 5, 6, 2), torch.float32, torch.float32, False)
    calls = []

    def block(x):
        calls.append(len(x))
        source = x[:3] * 1
        rows = source[torch.tensor([0, 0, 1, -1, 2, 1, -3, 1])]
        return grouped.linear(rows, W, A, B, 0.5, where, source)

    y = checkpoint(block, x, use_reentrant=False)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@needs_loop("saved_inputs")
def test_rows_that_are_written_to_without_a_graph_are_saved_themselves():
    (x, A, B), W, where, _ = made(([4, 4], 0, 5, 6, 2), torch.float32, torch.float32, False)
    source = x[:3] * 1
    rows = source[torch.tensor([0, 0, 1, -1, 2, 1, -3, 1])]
    with torch.no_grad():
        rows.clamp_(-0.1, 0.1)
    found = torch.autograd.grad(grouped.linear(rows, W, A, B, 0.5, where, source).sum(), (A, B))
    wanted = torch.autograd.grad(grouped.definition(rows, W, A, B, 0.5, where).sum(), (A, B))
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 1e-5


def test_ranks_are_filled_up_for_the_grouped_products_of_a_gpu():
    """On a processor torch's grouped products are a loop, so that what other devices get can be
    tested here."""
    (x, A, B), W, _, ids = made(([2, 0, 3], 0, 8, 16, 3), torch.float32, torch.float32, False)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    y = grouped.linear_on_device(
        x, W, A, B, 0.5, ends, lambda x, W, ends: torch._grouped_mm(x, W, offs=ends)
    )
    expected = dense(x, W, A, B, 0.5, ids)
    assert error(y, expected) < 1e-5
    found = torch.autograd.grad(y.square().sum(), (x, A, B))
    wanted = torch.autograd.grad(expected.square().sum(), (x, A, B))
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 1e-5
