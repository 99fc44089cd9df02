"""The fused kernels against float64 arithmetic on W + ΔW: values, gradients, and gradients of
gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.toys import error

from veneer.kernels import dropout, fused

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
sizes = st.integers(1, 9)


def make(in_, outs, ranks, batch, dtype, biases=True):
    x = torch.randn(*batch, in_, dtype=torch.float64)
    weights = [torch.randn(out, in_, dtype=torch.float64) for out in outs]
    bias = [torch.randn(out, dtype=torch.float64) if biases else None for out in outs]
    A = [torch.randn(rank, in_, dtype=torch.float64) for rank in ranks]
    B = [torch.randn(out, rank, dtype=torch.float64) for out, rank in zip(outs, ranks, strict=True)]
    tensors = [x, *weights, *bias, *A, *B]
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def run(tensors, scales, dropout=0.0, form=False):
    x, *rest = tensors
    count = len(rest) // 4
    seed = int(torch.randint(2**62, ())) if dropout else 0
    settings = fused.Settings(tuple(scales), dropout, seed, form)
    return fused.linears(settings, x, *(rest[k * count : (k + 1) * count] for k in range(4)))


def expected(tensors, scales, kept=1.0):
    """The same by the definition, in float64; ``kept`` multiplies x on the low-rank path."""
    x, *rest = [None if tensor is None else tensor.double() for tensor in tensors]
    count = len(rest) // 4
    parts = zip(*(rest[k * count : (k + 1) * count] for k in range(4)), scales, strict=True)
    return tuple(F.linear(x, W, bias) + s * (x * kept) @ A.mT @ B.mT for W, bias, A, B, s in parts)


def trained(tensors, which=None):
    """Copies that need a gradient, but for the weights."""
    count = (len(tensors) - 1) // 4
    copies = [None if tensor is None else tensor.detach().clone() for tensor in tensors]
    for number, copy in enumerate(copies):
        frozen = 1 <= number <= count
        if copy is not None and not frozen and (which is None or which[number % len(which)]):
            copy.requires_grad_()
    return copies


def gradients(outputs, weights, tensors):
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@settings(max_examples=150, deadline=None)
@given(
    in_=sizes, outs=st.lists(sizes, min_size=1, max_size=3), batch=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(), biases=st.booleans(), dtype=st.sampled_from(list(BOUNDS)), form=st.booleans(),
)  # fmt: skip
def test_values_and_gradients(in_, outs, batch, data, biases, dtype, form):
    ranks = [data.draw(st.integers(1, 6)) for _ in outs]
    scales = [data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in outs]
    form = form and dtype != torch.bfloat16
    tensors = trained(
        make(in_, outs, ranks, batch, dtype, biases),
        data.draw(st.lists(st.booleans(), min_size=1, max_size=7)),
    )
    outputs, exact = run(tensors, scales, form=form), None
    reference = trained([None if t is None else t.double() for t in tensors])
    for mine, copy in zip(tensors, reference, strict=True):
        if copy is not None:
            copy.requires_grad_(mine.requires_grad)
    exact = expected(reference, scales)
    bounds = expected(
        [None if t is None else t.double().abs() for t in tensors], scales
    )  # before terms cancel
    for y, wanted, bound in zip(outputs, exact, bounds, strict=True):
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        assert bool(((y - wanted).abs() <= BOUNDS[dtype] * bound).all())
    if any(t is not None and t.requires_grad for t in tensors) and outputs[0].requires_grad:
        weights = [torch.randn(y.shape, dtype=torch.float64) for y in outputs]
        found, wanted = gradients(outputs, weights, tensors), gradients(exact, weights, reference)
        before = [
            None if t is None else t.detach().abs().requires_grad_(t.requires_grad)
            for t in reference
        ]
        bounds = gradients(expected(before, scales), [weight.abs() for weight in weights], before)
        for one, other, bound in zip(
            found, wanted, bounds, strict=True
        ):  # also before terms cancel
            assert bool(((one - other).abs() <= 20 * BOUNDS[dtype] * bound).all())
    with torch.no_grad():
        for y, wanted in zip(run(tensors, scales, form=form), outputs, strict=True):
            assert torch.equal(y, wanted)


def test_only_some_outputs_are_used():
    tensors = trained(make(5, [4, 3, 6], [2, 1, 2], [7], torch.float64))
    exact = expected(tensors, [1.0, 2.0, 3.0])
    for used in (0, 1, 2):
        weights = torch.randn(exact[used].shape, dtype=torch.float64)
        wanted = gradients(exact[used : used + 1], [weights], tensors)
        found = gradients(run(tensors, [1.0, 2.0, 3.0])[used : used + 1], [weights], tensors)
        for mine, true in zip(found, wanted, strict=True):
            assert (mine is None or not mine.any()) if true is None else error(mine, true) < 1e-12
        exact = expected(tensors, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("form", [False, True])
def test_gradcheck_and_gradients_of_gradients(form):
    tensors = trained(make(3, [2, 4], [1, 2], [5], torch.float64))
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: run(tensors, [0.5, 2.0], form=form), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: run(tensors, [0.5, 2.0], form=form), leaves)


def test_backward_twice_and_inputs_that_are_not_contiguous():
    tensors = trained(make(6, [5], [2], [4, 3], torch.float64))
    x = tensors[0].detach().transpose(0, 1).requires_grad_()
    (y,) = run([x, *tensors[1:]], [1.5])
    (wanted,) = expected([x, *tensors[1:]], [1.5])
    assert error(y, wanted) < 1e-12
    first = torch.autograd.grad(y.square().sum(), [x, *tensors[-2:]], retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), [x, *tensors[-2:]])
    true = torch.autograd.grad(wanted.square().sum(), [x, *tensors[-2:]])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(error(one, other) < 1e-12 for one, other in zip(first, true, strict=True))
    found, true = (
        torch.autograd.grad(f([x, *tensors[1:]], [1.5])[0].sum(), x)[0] for f in (run, expected)
    )
    assert error(found, true) < 1e-12, "the gradient of a sum is an expanded tensor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_each_entry_by_itself_and_again_in_backward(p, dtype):
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    tensors = trained(make(40, [8, 8], [4, 4], [203], dtype))
    state = torch.get_rng_state()
    outputs = run(tensors, [1.0, 2.0], dropout=p)
    torch.set_rng_state(state)
    seed = int(torch.randint(2**62, ()))
    mask = torch.ones(203 * 40, dtype=torch.float64)
    mask[dropout.draw_entries(tensors[0].numel(), p, seed, tensors[0].device)] = 0
    exact = expected(tensors, [1.0, 2.0], mask.view(203, 40) / (1 - p))
    weights = [torch.randn_like(y) for y in exact]
    for y, wanted in zip(outputs, exact, strict=True):
        assert error(y.double(), wanted) < bound
    for found, wanted in zip(
        gradients(outputs, weights, tensors), gradients(exact, weights, tensors), strict=True
    ):
        assert error(found.double(), wanted.double()) < 10 * bound
    assert not torch.equal(run(tensors, [1.0, 2.0], dropout=p)[0], outputs[0]), (
        "another draw drops other entries"
    )


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.7])
def test_entries_are_dropped_with_their_probability_independently(p):
    """Counts over many draws: the mean, the spread of a Bernoulli variable, and no correlation of
    neighbours."""
    count, runs = 500, 2000
    masks = torch.zeros(runs, count)
    for seed in range(runs):
        masks[seed, dropout.draw_entries(count, p, seed, masks.device)] = 1
    total = count * runs
    assert abs(masks.mean().item() - p) < 4 * (p * (1 - p) / total) ** 0.5
    by_run = masks.sum(1)  # binomial: variance n p (1 - p)
    assert abs(by_run.var().item() / (count * p * (1 - p)) - 1) < 0.15
    both = (masks[:, 1:] * masks[:, :-1]).mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / total) ** 0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_small_change_is_all_there_in_sixteen_bits(size, bias):
    """‖ΔW‖ = 1e-4 ‖W‖ is lost in the rounding of W + ΔW, and in adding ΔW x to an output that has
    been rounded. As a slope: how much of the exact change the outputs, and the gradients of the
    inputs, contain."""
    torch.manual_seed(0)
    W, x = torch.randn(256, 256).bfloat16(), torch.randn(2048, 256).bfloat16().requires_grad_()
    A, B, b = (
        torch.randn(8, 256),
        torch.randn(256, 8),
        torch.randn(256).bfloat16() * 30 if bias else None,
    )
    B *= size * W.float().norm() / (B @ A).norm()
    (y,) = fused.linears(fused.Settings((1.0,)), x, [W], [b], [A], [B])
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    delta = (B @ A).double()
    for actual, base, change in (
        (
            y,
            F.linear(x.double(), W.double(), None if b is None else b.double()),
            x.double() @ delta.mT,
        ),
        (x.grad, dy.double() @ W.double(), dy.double() @ delta),
    ):
        kept = ((actual.double() - base) * change).sum() / change.square().sum()
        assert abs(kept - 1) < (0.15 if bias else 0.05)
    with pytest.raises(ValueError, match="float32"):
        fused.linears(fused.Settings((1.0,), forms_weight=True), x, [W], [b], [A], [B])


def test_a_bias_is_added_on_a_cpu_without_bfloat16_in_onednn(monkeypatch):
    monkeypatch.setattr(fused, "onednn_supports_bfloat16", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    x, W, b, change = (torch.randn(size).bfloat16() for size in ((5, 4), (3, 4), (3,), (5, 3)))
    y = fused.add_product(change.clone(), x, W, b)
    assert error(y, change.double() + F.linear(x.double(), W.double(), b.double())) < 2e-2
