"""The fused kernels against float64 arithmetic on W + ΔW: values, gradients, and gradients of
gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.compiled import needs_loop
from tests.support.forked import printed
from tests.support.toys import error

from veneer.kernels import compiled, cost_model, dropout, fused
from veneer.kernels.compiled import MIN_TOKENS, THREADS
from veneer.kernels.compiled.switch import has_numba

if has_numba():
    from veneer.kernels.compiled import single_adapter_bf16 as alone
    from veneer.kernels.compiled import thin_matmul

needs_thin, needs_single = needs_loop("thin_matmul"), needs_loop("single_adapter_bf16")
#: tokens from which on the loop for a single adapter takes the processor's own products
MANY = 64
#: whether thin products in float32 are compiled loops, however few tokens there are
WAYS = pytest.mark.parametrize(
    "loops", [pytest.param(True, marks=needs_thin), False], ids=["loops", "library"]
)
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


@contextmanager
def way(least):
    """Yields the compiled loops that were called, from that many tokens on."""
    before, called = compiled.MIN_TOKENS, []
    compiled.MIN_TOKENS = least
    names = ("down", "up", "down_grown", "up_grown") if has_numba() else ()
    found = {name: getattr(thin_matmul, name) for name in names}
    for name, loop in found.items():
        setattr(
            thin_matmul,
            name,
            lambda *given, name=name, loop=loop: (called.append(name), loop(*given))[1],
        )
    try:
        yield called
    finally:
        compiled.MIN_TOKENS = before
        for name, loop in found.items():
            setattr(thin_matmul, name, loop)


@WAYS
@settings(max_examples=150, deadline=None)
@given(
    in_=sizes, outs=st.lists(sizes, min_size=1, max_size=3), batch=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(), biases=st.booleans(), dtype=st.sampled_from(list(BOUNDS)), form=st.booleans(),
)  # fmt: skip
def test_values_and_gradients(loops, in_, outs, batch, data, biases, dtype, form):
    with way(1 if loops else 1 << 60):
        _values_and_gradients(in_, outs, batch, data, biases, dtype, form)


def _values_and_gradients(in_, outs, batch, data, biases, dtype, form):
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
    """In float32 by the loops."""
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    tensors = trained(make(40, [8, 8], [4, 4], [203], dtype))
    state = torch.get_rng_state()
    outputs = run(tensors, [1.0, 2.0], dropout=p)
    torch.set_rng_state(state)
    seed = int(torch.randint(2**62, ()))
    mask = torch.ones(203 * 40, dtype=torch.float64)
    mask[dropout.of_rows(tensors[0], p, seed).entries()] = 0
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


@pytest.mark.parametrize("width", [None, 12, 80])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.7])
def test_entries_are_dropped_with_their_probability_independently(p, width):
    """Counts over many draws: the mean, the spread of a Bernoulli variable, and no correlation of
    neighbours. In groups of 12 and of 80 numbers, the last one is not whole."""
    count, runs = 500, 2000
    masks = torch.zeros(runs, count)
    for seed in range(runs):
        masks[seed, dropout.drawn(count, p, seed, masks.device, width).entries()] = 1
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
        fused.linears(fused.Settings((1.0,), form=True), x, [W], [b], [A], [B])


@needs_thin
@pytest.mark.parametrize("tokens", [1, 4, 63, 130])
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_the_loops_equal_float64(tokens, rank, p):
    x, A = torch.randn(tokens, 37), torch.randn(rank, 37)
    dropped = dropout.of_rows(x, p, tokens) if p else None
    mask = torch.ones(x.numel(), dtype=torch.float64)
    mask = (
        mask.view(x.shape)
        if dropped is None
        else mask.index_fill(0, dropped.entries(), 0).view(x.shape)
    )
    joined = torch.randn(tokens, rank + 5).mT
    h = joined[2 : rank + 2]  # one layer's of several
    wide = {name: one.double() for name, one in (("x", x), ("A", A), ("h", h))}
    before = x.clone()
    u, grown = thin_matmul.down_grown(A, x, h)
    part, gradient = thin_matmul.up_grown(h, A, x, dropped)
    bias = torch.randn(37)
    for found, exact in (
        (thin_matmul.down(A, x, dropped), wide["A"] @ (wide["x"] * mask).mT),
        (u, wide["A"] @ wide["x"].mT),
        (grown, wide["h"] @ wide["x"]),
        (thin_matmul.up(h, A), wide["h"].mT @ wide["A"]),
        (thin_matmul.up(h, A, bias), wide["h"].mT @ wide["A"] + bias.double()),
        (part, (wide["h"].mT @ wide["A"]) * mask),
        (gradient, wide["h"] @ (wide["x"] * mask)),
    ):
        assert error(found.double(), exact) < 1e-6
    assert torch.equal(x, before)


@needs_thin
@pytest.mark.parametrize(("threads", "loops"), [(1, True), (THREADS + 1, False)])
def test_a_step_of_many_tokens_is_loops_on_few_threads(threads, loops, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = trained(make(12, [9, 5], [4, 2], [MIN_TOKENS], torch.float32))
    with way(MIN_TOKENS) as called:
        outputs = run(tensors, [1.0, 2.0])
        gradients(outputs, [torch.randn(y.shape) for y in outputs], tensors)
    assert sorted(set(called)) == (["down", "down_grown", "up", "up_grown"] if loops else [])
    assert cost_model.looped(torch.float32, torch.device("cpu")) is loops
    assert not cost_model.looped(torch.bfloat16, torch.device("cpu"))


def test_loops_make_factors_worth_their_while():
    """Their thin products cost less, so W + ΔW is formed for more tokens only."""
    one, other = (
        cost_model.forms_above(576, 576, 8, torch.float32, loops) for loops in (True, False)
    )
    assert one > 2 * other


def test_costs_are_of_the_loops_that_run(monkeypatch):
    """None for a side narrower than ``MIN_WIDTH``, or for few tokens."""
    monkeypatch.setattr(compiled, "MIN_WIDTH", 128)

    def costs(out: int, in_: int, tokens: int, loops: bool) -> cost_model.Costs:
        return cost_model.costs(out, in_, 8, tokens, torch.float32, False, loops)

    def saved(out: int, in_: int) -> float:
        return costs(out, in_, 512, False).factored - costs(out, in_, 512, True).factored

    assert costs(127, 127, 512, True) == costs(127, 127, 512, False)
    assert costs(576, 576, MIN_TOKENS - 1, True) == costs(576, 576, MIN_TOKENS - 1, False)
    assert saved(576, 64) > saved(64, 576) > 0
    assert saved(576, 64) + saved(64, 576) == pytest.approx(saved(576, 576))
    for out, in_, differs in ((64, 64, False), (64, 576, True), (576, 576, True)):
        above = {
            cost_model.forms_above(out, in_, 8, torch.float32, loops) for loops in (True, False)
        }
        assert (len(above) == 2) is differs


@needs_single
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, THREADS + 1])
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, fused.FEW, MANY - 1, MANY])
def test_bfloat16_tokens_without_a_graph(tokens, tiles, threads, bias, monkeypatch):
    """By compiled loops, or torch's products: as near to float64 as those of the graph."""
    assert alone.MANY == MANY
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(fused, "has_tiles", lambda: tiles)
    x, W, b, A, B = make(
        40, [24], [5], [3, tokens // 3] if tokens % 3 == 0 else [tokens], torch.bfloat16, bias
    )
    W, calls, change = torch.nn.Parameter(W, requires_grad=False), [], alone.change
    monkeypatch.setattr(alone, "change", lambda *given: (calls.append(1), change(*given))[1])
    A, B = A.float()[None], 1e-3 * B.float()[None]
    found, graph = fused.unrecorded(0.5, x, W, b, A, B), fused.linear(0.5, x, W, b, A, B)
    (exact,) = expected([x, W, b, A[0], B[0]], [0.5])
    assert bool(calls) is (
        threads == 1 and (0 < tokens < MANY or (tokens > 0 and alone.bf16_dot.able()))
    )
    assert found.shape == exact.shape
    assert not tokens or error(found, exact) < 1.5 * error(graph, exact) < 1e-2


@needs_single
@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(1, 2 * MANY), in_=st.integers(1, 70), out=st.integers(1, 70), rank=st.integers(1, 17),
    factors=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 1 << 30), dots=st.booleans(),
)  # fmt: skip
def test_the_change_of_one_adapter_without_a_graph(tokens, in_, out, rank, factors, seed, dots):
    generator = torch.Generator().manual_seed(seed)
    x, A, B = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, in_), (rank, in_), (out, rank))
    )
    x, A, B = x.bfloat16(), A.to(factors), B.to(factors)
    with pytest.MonkeyPatch.context() as patch:
        if not dots:
            patch.setattr(alone.bf16_dot, "able", lambda: False)
        able = alone.able(x, A, B)
        assert able is (tokens < MANY or alone.bf16_dot.able())
        if able:
            found, wide = alone.change(x, A, B, 0.5), [one.double() for one in (x, A, B)]
            exact, terms = (
                0.5 * one @ two.mT @ three.mT
                for one, two, three in (wide, [one.abs() for one in wide])
            )
            # h, the factors and the sum are rounded once each
            assert ((found.double() - exact).abs() <= 4 * 2.0**-8 * terms + 1e-30).all()
    assert not alone.able(x.double(), A, B)
    assert not alone.able(x, A, B.half())


@needs_thin
@pytest.mark.parametrize(
    ("dtype", "width", "loaded"),
    [
        ("float32", 256, "True"),
        ("float32", 255, "False"),
        ("bfloat16", 256, "False"),
        ("float64", 256, "False"),
    ],
)
def test_a_step_loads_numba_only_where_it_has_loops(dtype, width, loaded):
    """It takes half a second and 100 MiB."""
    code = f"""
import sys, torch
from veneer.kernels import fused
torch.set_num_threads(1)
x, W = torch.randn(200, {width}, dtype=torch.{dtype}).requires_grad_(), torch.randn(16, {width}, dtype=torch.{dtype})
A, B = torch.randn(4, {width}, requires_grad=True), torch.randn(16, 4, requires_grad=True)
fused.linears(fused.Settings((1.0,), 0.1, 3), x, [W], [None], [A], [B])[0].sum().backward()
print("numba" in sys.modules)
"""
    assert printed(code).strip() == loaded
