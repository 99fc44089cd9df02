"""Convolutions through their fused kernel: both of its ways, in everything that models do around
them."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.toys import error, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import context
from veneer.kernels import cost_model, dropout, fused_conv

CASES = {
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(0, 1)), (2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 6)),
    "pointwise, strided": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3), bias=False), (2, 4, 7, 8)),
    "pointwise, padded": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1), (2, 4, 7, 8)),
    "1d, dilated": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 11)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 2)), (2, 4, 2, 4, 5)),
}
CASES |= {
    f"{name}, last": case
    for name, case in CASES.items()
    if len(case[1]) in fused_conv.CHANNELS_LAST
}  # channels, in memory


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(fused_conv, "SMALL_INPUT_SIZE", 0)


@pytest.fixture(params=[True, False], ids=["formed", "factored"])
def formed(request, monkeypatch):
    """Whether W + ΔW is formed for any number of positions."""
    monkeypatch.setattr(
        cost_model, "max_factored_tokens", lambda *about: 0 if request.param else float("inf")
    )
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The settings of the kernel's calls, and of those that it hands on as linear layers."""
    seen = []
    for where, name in ((fused_conv._Conv, "apply"), (fused_conv.fused, "linears")):
        inner = getattr(where, name)

        def noted(settings, *tensors, inner=inner):
            seen.append(settings)
            return inner(settings, *tensors)

        monkeypatch.setattr(where, name, noted)
    return seen


def adapted(name, dtype=torch.float64, **fields):
    make, shape = CASES[name]
    torch.manual_seed(0)
    model, memory = (
        nn.Sequential(make()).to(dtype),
        fused_conv.CHANNELS_LAST[len(shape)] if "last" in name else None,
    )
    model = model if memory is None else model.to(memory_format=memory)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"], **fields))
    randomise(handle)
    model[0].bias is None or model[0].bias.requires_grad_()
    x = torch.randn(shape, dtype=dtype)
    return (
        model,
        handle,
        (x if memory is None else x.contiguous(memory_format=memory)).requires_grad_(),
    )


def values(model, handle, x, run=None):
    inputs = [x, *handle.parameters(), *([] if model[0].bias is None else [model[0].bias])]
    y = (run or model)(x * 1)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


def defined(model, handle, x):
    with context.override(path="materialised"):
        return values(model, handle, x)


@pytest.mark.parametrize(
    "fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "every entry"]
)
@pytest.mark.parametrize("name", CASES)
def test_both_ways_are_the_definition(name, fast, formed, calls):
    model, handle, x = adapted(name)
    found = values(model, handle, x)
    assert [one.forms_weight for one in calls] == [formed]
    assert not found[0].is_contiguous() or "last" not in name
    assert found[1].stride() == x.stride()
    for mine, exact in zip(found, defined(model, handle, x), strict=True):
        assert error(mine, exact) < 1e-12
    assert torch.autograd.gradgradcheck(
        lambda x, *numbers: model(x), (x, *handle.parameters()), fast_mode=fast
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtype_of_the_layer(name, dtype, calls):
    model, handle, x = adapted(name)
    exact = defined(model, handle, x)
    model, x = model.to(dtype), x.detach().to(dtype).requires_grad_()
    for mine, expected in zip(values(model, handle, x), exact, strict=True):
        assert error(mine.double(), expected) < (1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith(("3x3", "pointwise", "1d")) and "padded" not in n]
)
def test_dropout_drops_the_same_entries_in_backward(name, monkeypatch):
    model, handle, x = adapted(name, dropout=0.4)
    monkeypatch.setattr(dropout, "new_seed", lambda: 7)
    found = values(model, handle, x)
    layer, change = model[0], handle.layers["0"].changes["weight"]
    A, B = change._parameters["A"][0], change._parameters["B"][0]
    seen = x * 1
    steps = layer.stride if "pointwise, strided" in name else (1,) * len(layer.stride)
    seen = seen[(..., *(slice(None, None, step) for step in steps))]
    lying = (
        seen.movedim(1, -1) if "last" in name else seen
    )  # entries are drawn in the order of memory
    low = (
        dropout.zero_entries(lying, dropout.draw_entries(lying.numel(), 0.4, 7, lying.device)) / 0.6
    )
    low = low.movedim(-1, 1) if "last" in name else low
    options = (layer.padding, layer.dilation, False, [0] * len(steps), 1)
    h = torch.convolution(
        low, A.view(2, *layer.weight.shape[1:]), None, (1,) * len(steps), *options
    )
    y = torch.convolution(x * 1, layer.weight, layer.bias, layer.stride, *options)
    y = y + torch.einsum("or,nr...->no...", B * change.scale, h)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    inputs = [x, *handle.parameters(), *([] if layer.bias is None else [layer.bias])]
    for mine, exact in zip(
        found, [y, *torch.autograd.grad((y * weights).sum(), inputs)], strict=True
    ):
        assert error(mine, exact) < 1e-12
    with pytest.raises(NotImplementedError, match="dropout"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_used_twice_checkpointed_and_under_autocast(formed):
    model, handle, x = adapted("pointwise", torch.float32)
    once = values(model, handle, x)
    again = values(model, handle, x, lambda x: checkpoint(model, x, use_reentrant=False))
    twice = values(model, handle, x, lambda x: model(x) + model(x))
    for one, other, double in zip(once, again, twice, strict=True):
        assert torch.equal(one, other)
        assert error(double, 2 * one) < 1e-5
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), [x, *handle.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.no_grad():
        assert torch.equal(model(x), once[0])


def test_an_output_may_be_written_to(formed):
    """As a network's ``nn.ReLU(inplace=True)`` does."""
    model, handle, x = adapted("3x3")
    found = values(model, handle, x, lambda x: nn.functional.relu_(model(x)))
    for mine, exact in zip(found, values(model, handle, x, lambda x: model(x).relu()), strict=True):
        assert torch.equal(mine, exact)


def test_a_pointwise_layer_with_strides_saves_what_it_reads():
    model, _, x = adapted("pointwise, strided")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved.append(one) or one, lambda one: one
    ):
        model(x)
    assert x.shape not in [one.shape for one in saved]
    assert (2, 4, 4, 3) in [tuple(one.shape) for one in saved]


def test_a_small_call_goes_the_general_way(calls, monkeypatch):
    model, _, x = adapted("3x3")
    monkeypatch.setattr(fused_conv, "SMALL_INPUT_SIZE", x.numel())
    model(x)
    assert calls == []
    monkeypatch.setattr(fused_conv, "SMALL_INPUT_SIZE", x.numel() - 1)
    model(x)
    assert len(calls) == 1


class Doubled(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Doubled(4, 6, 3),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(4, 6, 3, padding="same"),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    ],
)
def test_other_convolutions_go_the_general_way(layer, calls):
    model = nn.Sequential(layer()).double()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
    randomise(handle)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with context.override(path="materialised"):
        exact = model(x)
    assert error(model(x), exact) < 1e-12
    assert calls == []
    assert error(copy.deepcopy(model)(x), exact) < 1e-12
