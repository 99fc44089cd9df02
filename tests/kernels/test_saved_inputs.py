"""What the fused kernel keeps of its input for backward: nothing, where autograd keeps what it was
made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.support.compiled import needs_loop
from tests.support.toys import error, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import context
from veneer.kernels import saved_inputs

NEVER = 10**9
needs_edits = needs_loop("saved_inputs")


class Gated(nn.Module):
    """The last layer reads a product, as in a gated MLP; two layers, if it has ``also``."""

    def __init__(self, activation=F.silu, turned: bool = False, also: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.also = nn.Linear(8, 6) if also else None
        self.activation, self.turned = activation, turned

    def forward(self, x):
        gate, up = self.activation(self.gate(x)), self.up(x)
        product = up * gate if self.turned else gate * up
        y = self.down(product)
        return y if self.also is None else y + self.also(product).square()


class Normed(nn.Module):
    """A layer reads what Llama's norm makes."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(torch.rand(6) + 0.5), turned
        self.down = nn.Linear(6, 6)

    def forward(self, x):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.down(normed * self.weight if self.turned else self.weight * normed)


MODELS = {
    "silu": Gated,
    "turned": lambda: Gated(turned=True),
    "gelu": lambda: Gated(F.gelu),
    "gelu of tanh": lambda: Gated(lambda x: F.gelu(x, approximate="tanh")),
    "another activation": lambda: Gated(torch.sigmoid),
    "two readers": lambda: Gated(also=True),
    "norm": Normed,
    "norm, turned": lambda: Normed(turned=True),
}
FULL = 8 * 5 * 8  # bytes of a float64 product of Gated on 5 rows


def adapted(module, **fields):
    handle = veneer.attach(module.double(), veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    return module, handle


def values(module, x):
    module.zero_grad()
    torch.manual_seed(1)  # of dropout
    x = x.detach().clone().requires_grad_()
    y = module(x * 1)  # with a graph of its own, as inside a model
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in veneer.Handle(module, "default").parameters()),
    ]


def nodes(output):
    """The graph below an output."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [below for below, _ in node.next_functions]
    return seen


def held(output):
    """Address -> bytes of what the graph below an output holds; what goes through hooks counts as
    they left it."""
    found = {}
    for node in nodes(output):
        for name in (name for name in dir(node) if name.startswith("_raw_saved_")):
            raw = getattr(node, name)
            try:
                value = raw.data
            except (AttributeError, RuntimeError):  # several, or no hooks
                value = getattr(node, name.removeprefix("_raw"), None)
            found |= {value.data_ptr(): value.nbytes} if isinstance(value, torch.Tensor) else {}
        found |= {
            one.data_ptr(): one.nbytes
            for one in getattr(node, "saved_tensors", ())
            if one is not None
        }
    return found


@needs_edits
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_an_input_is_made_again_to_the_same_bits(name, dropout, monkeypatch):
    model, handle = adapted(MODELS[name](), dropout=dropout)
    read, x = [], torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    model.down.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", NEVER)
    expected, before = values(model, x), held(model(x * 1))
    assert read[-1].data_ptr() in before
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    found, now = values(model, x), held(model(x * 1))
    assert all(map(torch.equal, expected, found))
    assert read[-1].data_ptr() not in now
    fewer = sum(before.values()) - sum(now.values())
    one = FULL if isinstance(model, Gated) else 8 * 5 * 6
    assert fewer == one * (1 if name in ("another activation", "norm", "norm, turned") else 2)
    if not dropout:
        with context.override(path="materialised"):
            definition = values(model, x)
        assert all(error(one, other) < 1e-11 for one, other in zip(found, definition, strict=True))
        assert torch.autograd.gradcheck(lambda x, *numbers: model(x * 1), (x, *handle.parameters()))
        assert torch.autograd.gradgradcheck(
            lambda x, *numbers: model(x * 1), (x, *handle.parameters())
        )


@needs_edits
@pytest.mark.parametrize("also", [False, True])
def test_a_graph_that_is_kept_gives_the_same_twice_and_in_parts(also, monkeypatch):
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    model, handle = adapted(Gated(also=also))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y, own = model(x * 1).square().sum(), [x, *handle.parameters()]
    last = [*handle.layers["down"].parameters()]
    alone = torch.autograd.grad(y, last, retain_graph=True)  # ends before the product
    gates = [
        node.metadata[saved_inputs.Gate][1]
        for node in nodes(y)
        if saved_inputs.Gate in node.metadata
    ]
    assert len(gates) == 1
    first = torch.autograd.grad(y, own, retain_graph=True)
    assert gates[0].output is None
    second = torch.autograd.grad(y, own, create_graph=True)
    assert all(error(one, other) < 1e-12 for one, other in zip(first, second, strict=True))
    assert gates[0].output is None
    by_name = {id(number): gradient for number, gradient in zip(own, first, strict=True)}
    assert all(
        torch.equal(by_name[id(number)], one) for number, one in zip(last, alone, strict=True)
    )


def test_a_product_whose_factors_are_freed_or_written_to_is_kept(monkeypatch):
    """What the layer computes needs the product alone."""
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    layer, handle = adapted(nn.Linear(6, 4))
    for freed in (True, False):
        one = torch.randn(5, 6, dtype=torch.float64, requires_grad=True) * 1
        product = F.silu(one) * torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        plain = torch.autograd.grad(layer(product.detach()).sum(), handle.parameters())
        if freed:
            product.sum().backward()
        else:
            one.detach().zero_()
        found = torch.autograd.grad(layer(product).sum(), handle.parameters())
        assert all(map(torch.equal, plain, found))


def test_a_product_that_is_written_to_without_a_graph_is_kept(monkeypatch):
    """Its node still shows the factors, which give the product as it was before."""
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    layer, handle = adapted(nn.Linear(6, 4))
    gate, up = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for product in (F.silu(gate) * up, gate * up):
        with torch.no_grad():
            product.clamp_(-0.1, 0.1)
        plain = torch.autograd.grad(layer(product.detach()).sum(), handle.parameters())
        found = torch.autograd.grad(layer(product).sum(), handle.parameters())
        assert all(map(torch.equal, plain, found))


def test_what_is_written_to_afterwards_is_refused_by_autograd(monkeypatch):
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    model, _ = adapted(Gated())
    gates = []
    model.gate.register_forward_hook(lambda *call: gates.append(call[2]))
    y = model(torch.randn(5, 6, dtype=torch.float64, requires_grad=True) * 1).sum()
    gates[0].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_product_is_kept_under_checkpointing(monkeypatch):
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    model, _ = adapted(Gated())
    x, runs = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), []
    plain = torch.autograd.grad(model(x).square().sum(), x)
    model.gate.register_forward_hook(lambda *call: runs.append(call))
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(*plain, *again)
    assert len(runs) == 2, "once forward, once again for backward"


@pytest.mark.parametrize(
    ("make", "whole"),
    [
        pytest.param(
            lambda x, row: x * row, False, marks=needs_edits
        ),  # both are kept, and make all of it
        (lambda x, row: (row * row).expand(5, 6), True),  # of another shape than what is read
        (lambda x, row: x * 0.5, True),
        (lambda x, row: (x + 1) * row.detach(), True),  # a sum, of which nothing is kept
        (lambda x, row: x.float() * row.float(), True),  # of another dtype
        (lambda x, row: (x * row)[:, :6], True),
    ],
)
def test_what_else_is_read(make, whole, monkeypatch):
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    layer, handle = adapted(nn.Linear(6, 4))
    x, row = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (6,))
    )
    read = make(x, row).double()
    y = layer(read)
    assert (read.data_ptr() in held(y)) is whole
    found = torch.autograd.grad(y.sum(), handle.parameters())
    plain = torch.autograd.grad(layer(read.detach()).sum(), handle.parameters())
    assert all(error(one, other) < 1e-12 for one, other in zip(found, plain, strict=True))
