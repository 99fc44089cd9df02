"""Every layer kind × variant × dtype: factored = materialised = merged = float64 arithmetic on W + ΔW, and gradients
too."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
from toys import Squared, error, randomise
from veneer import context
from veneer.layers import LAYERS, kind_of
from veneer.variants import VARIANTS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # isort: skip

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
variants = pytest.mark.parametrize("variant", VARIANTS.names())
examples = pytest.mark.parametrize(("kind", "number"), EXAMPLES)


def make(kind: str, number: int, dtype: torch.dtype):
    module, x = list(LAYERS[kind].examples())[number]
    return module.to(dtype), x.to(dtype) if x.is_floating_point() else x


def attached(module, variant="lora", rank=None, **fields):
    rank = rank or min(2, kind_of(module).dims(module).max_rank)
    handle = veneer.attach(module, veneer.LoraConfig(rank=rank, targets="all", variant=variant, alpha=3, **fields))
    randomise(handle)
    return handle


def reference(handle, x, *, dropped=None):
    """y in float64 from the definition, as a function of the float64 leaves that it returns."""
    (part,) = handle.layers.values()
    module = copy.deepcopy(handle.model)
    veneer.detach(module)
    module = module.double()
    leaves = {name: p.detach().double().requires_grad_() for name, p in part.named_parameters()}
    low, gain = part.variant.resolve(leaves, part.scale, lambda: torch.zeros(part.dims).double())
    weight = getattr(module, part.layer.weight).detach() + part.layer.fold(
        torch.stack([low.B[g] @ low.A[g] * low.scale for g in range(part.dims.groups)]),
        getattr(module, part.layer.weight).shape,
    )
    if gain is not None:
        weight = weight * gain.reshape([-1 if axis == part.layer.out_axis else 1 for axis in range(weight.dim())])
    x = x.double().requires_grad_() if x.is_floating_point() else x
    y = torch.func.functional_call(module, {part.layer.weight: weight}, (x,))
    return y, leaves, x


@dtypes
@variants
@examples
def test_three_ways_to_compute_it_agree(kind, number, variant, dtype):
    module, x = make(kind, number, dtype)
    base = module(x)
    handle = attached(module, variant)
    expected, _, _ = reference(handle, x)
    with torch.no_grad():
        factored = module(x)
        with context.changed(path="materialised"):
            materialised = module(x)
        handle.merge()
        merged = module(x)
    bound = BOUNDS[dtype]
    assert factored.dtype == materialised.dtype == merged.dtype == base.dtype
    assert error(factored, expected) < bound
    assert error(materialised, expected) < bound
    assert error(merged, expected) < bound
    assert error(base, expected) > 1e-3, "the adapter changes nothing here, so this test would prove nothing"


@dtypes
@variants
@examples
@pytest.mark.parametrize("path", ["factored", "materialised"])
def test_gradients_equal_float64_autograd_through_the_changed_weight(kind, number, variant, dtype, path):
    module, x = make(kind, number, dtype)
    handle = attached(module, variant)
    expected, leaves, x64 = reference(handle, x)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), [*leaves.values(), *([x64] if x64.requires_grad else [])])
    x = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    (part,) = handle.layers.values()
    own = dict(part.named_parameters())
    assert list(own) == list(leaves)
    with context.changed(path=path):
        y = module(x)
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), [*own.values(), *([x] if x.is_floating_point() else [])])
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert error(gradient, expected_gradient) < (1e-5 if dtype == torch.float32 else 3 * BOUNDS[dtype])


@pytest.mark.parametrize("kind", LAYERS.names())
def test_gradcheck(kind):
    module, x = make(kind, 0, torch.float64)
    handle = attached(module)
    (part,) = handle.layers.values()
    assert torch.autograd.gradcheck(lambda *_: module(x), list(part.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@variants
@pytest.mark.parametrize("kind", LAYERS.names())
def test_a_thousand_merges_leave_no_trace(kind, variant, dtype):
    module, _ = make(kind, 0, dtype)
    handle = attached(module, variant)
    weight = getattr(module, kind_of(module).weight)
    before = weight.detach().clone()
    for _ in range(1000):
        handle.merge()
        handle.unmerge()
    assert torch.equal(weight, before)
    handle.merge()
    assert not torch.equal(weight, before)


@dtypes
@examples
def test_attaching_changes_no_output(kind, number, dtype):
    module, x = make(kind, number, dtype)
    before = module(x)
    rank = kind_of(module).dims(module).max_rank
    veneer.attach(module, veneer.LoraConfig(rank=min(2, rank), targets="all"))
    assert torch.equal(module(x), before)


@examples
@pytest.mark.parametrize("variant", ["lora", "toy_scaled"])
def test_dropout_is_the_same_on_both_paths_and_absent_in_eval(kind, number, variant):
    module, x = make(kind, number, torch.float64)
    handle = attached(module, variant, dropout=0.5)
    undropped, _, _ = reference(handle, x)
    outputs = []
    for path in ("factored", "materialised"):
        torch.manual_seed(3)
        with context.changed(path=path):
            outputs.append(module(x))
    assert error(*outputs) < 1e-10
    assert error(outputs[0], undropped) > 1e-4
    assert error(module.eval()(x), undropped) < 1e-10


def test_dropout_on_an_embedding_drops_whole_tokens():
    module = nn.Embedding(50, 8)
    handle = attached(module, dropout=0.5)
    ids = torch.arange(50)
    with torch.no_grad():
        change = module(ids) - module.weight
        undropped = module.eval()(ids) - module.weight
    kept = change.abs().sum(-1) > 0
    assert 10 < kept.sum() < 40
    torch.testing.assert_close(change[kept], 2 * undropped[kept])
    assert handle.config.dropout == 0.5


def test_padding_row_of_an_embedding_stays_as_it_is():
    module = nn.Embedding(9, 5, padding_idx=3)
    veneer.attach(module, veneer.LoraConfig(rank=2, targets="all"))
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        module(torch.tensor([0, 3, 5])).pow(2).sum().backward()
        optimiser.step()
    with torch.no_grad():
        assert torch.equal(module(torch.tensor([3])), module.weight[3:4])
        assert not torch.equal(module(torch.tensor([5])), module.weight[5:6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_forward_of_its_own_sees_the_changed_weight(dtype, dropout):
    """A subclass need not be linear in its weight: only the materialised form is right for it."""
    module, x = Squared(7, 5).to(dtype), torch.randn(3, 7).to(dtype)
    handle = attached(module, dropout=dropout).model.eval()
    handle = veneer.Handle(module, "default")
    (part,) = handle.layers.values()
    low, _ = part.resolve(module.weight)
    weight = module.weight.double() + low.delta(torch.float64)[0]
    expected = x.double() @ (weight * weight.abs()).T + module.bias.double()
    assert error(module(x), expected) < BOUNDS[dtype]
    assert module(x).dtype == dtype


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_a_small_change_survives_in_sixteen_bits(kind):
    """‖ΔW‖/‖W‖ = 1e-4: rounding W + ΔW to bfloat16 would lose nearly all of it; neither path may."""
    module, x = make(kind, 0, torch.bfloat16)
    handle = attached(module)
    (part,) = handle.layers.values()
    weight = getattr(module, part.layer.weight)
    part.scale *= (1e-4 * weight.double().norm() / part.resolve(weight)[0].norm()).item()
    low = part.resolve(weight)[0]
    kind_ = part.layer
    exact = kind_.update(
        copy.deepcopy(module).double(), x.double() if x.is_floating_point() else x, low.to(torch.float64), None
    )
    for path in ("factored", "materialised"):
        with context.changed(path=path), torch.no_grad():
            wide = copy.deepcopy(module).float()  # the same bf16 weights, outputs not rounded to bf16
            y = wide(x.float() if x.is_floating_point() else x)
            with veneer.use(wide, None):
                base = wide(x.float() if x.is_floating_point() else x)
        assert error(y.double() - base.double(), exact) < 2e-2
        module.zero_grad()
        with context.changed(path=path):
            module(x).float().square().sum().backward()
        assert part._parameters["B"].grad.abs().sum() > 0


sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(out=sizes, in_=sizes, rank=sizes, batch=st.lists(st.integers(1, 3), max_size=3), transposed=st.booleans())
def test_linear_shapes(out, in_, rank, batch, transposed):
    rank = min(rank, out, in_)
    module = transformers.pytorch_utils.Conv1D(out, in_) if transposed else nn.Linear(in_, out)
    module = module.double()
    x = torch.randn(*batch, in_, dtype=torch.float64)
    handle = attached(module, rank=rank)
    expected, _, _ = reference(handle, x)
    assert error(module(x), expected) < 1e-10
    with context.changed(path="materialised"):
        assert error(module(x), expected) < 1e-10


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    per=st.integers(1, 3),
    out_per=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    spatial=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
)
def test_convolution_shapes(groups, per, out_per, kernel, stride, dilation, padding, spatial, mode):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    module = cls(groups * per, groups * out_per, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x = torch.randn(2, groups * per, *[6] * spatial, dtype=torch.float64)
    handle = attached(module, rank=1)
    expected, _, _ = reference(handle, x)
    assert error(module(x), expected) < 1e-10
    handle.merge()
    assert error(module(x), expected) < 1e-10


def test_keyword_inputs_and_unbatched_inputs():
    linear, convolution = nn.Linear(4, 3), nn.Conv2d(2, 3, 3)
    handle = attached(linear)
    x = torch.randn(4)
    assert torch.equal(linear(input=x), linear(x))
    with context.changed(path="materialised"):
        torch.testing.assert_close(linear(input=x), linear(x))
    attached(convolution)
    image = torch.randn(2, 5, 5)
    torch.testing.assert_close(convolution(image), convolution(image[None])[0])
    assert handle.layers


@pytest.mark.parametrize("kind", LAYERS.names())
def test_autocast_keeps_the_adapter_and_the_output_dtype(kind):
    module, x = make(kind, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        base = module(x)
    handle = attached(module)
    expected, _, _ = reference(handle, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        y.float().sum().backward()
    assert y.dtype == base.dtype
    assert error(y, expected) < 2e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters())
