"""A model that is changed after an adapter was attached, or called otherwise than it was selected for: each is right,
or an error that says so."""

from __future__ import annotations

import pytest
import torch
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.errors import SelectionError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def attach_two(model, **config):
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", **config), name))
    return model


ROWS = [["a"] * 4, [None] * 4, [{"a": 0.5, "b": 0.5}] * 4, ["a", "b"] * 2]


@pytest.mark.parametrize("rows", ROWS, ids=repr)
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_a_batch_of_another_number_of_rows_is_an_error_whatever_they_use(rows, count):
    model = attach_two(Mlp())
    with veneer.use(model, rows), pytest.raises(SelectionError, match="do not hold the 4 rows"):
        model(torch.randn(count, 4))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Mlp, (torch.randn(4, 4),)),
        (lambda: nn.Embedding(5, 4), (torch.tensor([[0, 1], [2, 3], [4, 4], [0, 0]]),)),
        (lambda: nn.Conv1d(4, 4, 2), (torch.randn(4, 4, 3),)),
        (lambda: nn.LSTM(4, 4), (torch.randn(3, 4, 4),)),
        (lambda: nn.MultiheadAttention(4, 2), (torch.randn(3, 4, 4),) * 3),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (torch.randn(4, 3, 4),)),
        (lambda: nn.EmbeddingBag(5, 4), (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 3, 4]))),
    ],
)
@pytest.mark.parametrize("choice", ["a", None])
def test_rows_that_use_the_same_are_a_plain_call(make, inputs, choice):
    model = attach_two(make())
    with veneer.use(model, choice):
        expected = model(*inputs)
    with veneer.use(model, [choice] * 4):
        outputs = model(*inputs)
    first = expected[0] if isinstance(expected, tuple) else expected
    assert error(outputs[0] if isinstance(outputs, tuple) else outputs, first) < 1e-6
    with veneer.use(model, [choice] * 6), pytest.raises(SelectionError, match="do not hold the 6 rows"):
        model(*inputs)


def test_a_merged_adapter_may_still_be_named_for_each_row():
    model = Mlp()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    x = torch.randn(4, 4)
    expected = model(x)
    veneer.merge(model)
    with veneer.use(model, ["default"] * 4):
        assert error(model(x), expected) < 1e-5


def lost_forms(tmp_path):
    return {
        "merge": lambda handle: handle.merge(),
        "save": lambda handle: handle.save(tmp_path / "adapter"),
        "parameters": lambda handle: handle.parameters(),
        "summary": lambda handle: handle.summary(),
        "check": lambda handle: veneer.check(handle.model, torch.randn(4, 4)),
    }


@pytest.mark.parametrize("form", ["merge", "save", "parameters", "summary", "check"])
@pytest.mark.parametrize("replacement", [lambda: nn.Linear(4, 6), nn.Identity])
def test_a_layer_that_was_replaced_after_attach_is_named(tmp_path, form, replacement):
    model = Mlp()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    weight, layer = model.down.weight.clone(), model.up
    model.up = replacement()
    with pytest.raises(SelectionError, match="'up' of adapter 'default', replaced or taken out"):
        lost_forms(tmp_path)[form](handle)
    assert torch.equal(model.down.weight, weight)
    assert not [*tmp_path.iterdir()]
    model.up = layer
    lost_forms(tmp_path)[form](handle)
    if form != "merge":
        model.up = replacement()
        veneer.detach(model)
        assert type(model.down) is nn.Linear


LAYERS = [
    (lambda: nn.Linear(4, 4), (2, 4)),
    (lambda: nn.Conv1d(4, 4, 1), (2, 4, 4)),
    (lambda: nn.Conv2d(4, 4, 1, padding_mode="circular", padding=1), (2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 4, 1), (2, 4, 4)),
]


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("path", [None, "factored", "materialised"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_an_input_of_a_dtype_that_the_layer_refuses_is_refused(variant, path, make, shape):
    model = nn.Sequential(make())
    attach_two(model, variant=variant)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        for choice in ("a", {"a": 0.5, "b": 0.5}, ["a", "b"], None):
            with veneer.use(model, choice, path=path), pytest.raises(RuntimeError, match="type"):
                model(x)
    with veneer.use(model, "a", path=path), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(shape).half()).isfinite().all()
