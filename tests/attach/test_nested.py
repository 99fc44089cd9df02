"""Nested tensors of jagged layout: what the base and a merged model run on, an adapted one does
too."""

from __future__ import annotations

import pytest
import torch
from tests.support.toys import error, randomise
from torch import nn

import veneer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, ids):
        x = self.words(ids)
        return x + self.down(torch.relu(self.up(self.norm(x))))


ROWS = [torch.tensor([1, 5, 3]), torch.tensor([2, 2, 0, 7, 8]), torch.tensor([4])]


def jagged(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("variant", ["lora", "dora", "lokr", "vera", "pissa"])
@pytest.mark.parametrize("path", [None, "factored", "materialised"])
@pytest.mark.parametrize("choice", ["a", {"a": 0.5, "b": 0.7}], ids=repr)
def test_jagged_rows_are_computed_as_each_alone(variant, path, choice):
    model = Block()
    targets = ["words", "up", "down"] + ["norm"] * (variant == "lora")
    handles = []
    for name in ("a", "b"):
        handles.append(
            veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets, variant=variant), name)
        )
        randomise(handles[-1])
    parameters = [parameter for handle in handles for parameter in handle.parameters()]
    with veneer.use(model, choice, path=path):
        alone = [model(row) for row in ROWS]
        sum(y.square().sum() for y in alone).backward()
        expected = [parameter.grad for parameter in parameters]
        model.zero_grad()
        together = model(jagged(ROWS))
        together.values().square().sum().backward()
        with torch.no_grad():
            assert error(model(jagged(ROWS)).values(), torch.cat(alone)) < 1e-5
    assert together.layout == torch.jagged
    for y, other in zip(together.unbind(), alone, strict=True):
        assert error(y, other) < 1e-5
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or error(parameter.grad, gradient) < 1e-4


def test_dropout_and_other_axes_that_are_jagged():
    model = nn.Sequential(nn.Linear(8, 8))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, dropout=0.5))
    randomise(handle)
    x = jagged([torch.randn(3, 8), torch.randn(5, 8)])
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    assert error(y.values(), model(x.values())) < 1e-5
    model.eval()
    heads = jagged([torch.randn(3, 2, 8), torch.randn(5, 2, 8)]).transpose(
        1, 2
    )  # [rows, heads, jagged, 8]
    for y, row in zip(model(heads).unbind(), heads.unbind(), strict=True):
        assert error(y, model(row)) < 1e-5
    veneer.merge(model)
    merged = model(x)
    veneer.unmerge(model)
    assert error(merged.values(), model(x).values()) < 1e-5


def test_every_row_may_use_the_same():
    model = nn.Sequential(nn.Linear(8, 8))
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2), "a"))
    x = jagged([torch.randn(3, 8), torch.randn(5, 8)])
    with veneer.use(model, ["a", "a"]):
        assert error(model(x).values(), model[0](jagged([*x.unbind()])).values()) < 1e-6
