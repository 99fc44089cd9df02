"""A reference model that is the policy's own weights: its numbers, its memory, and that nothing of
it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer.attach.reference import Reference, reference_of
from veneer.errors import MergeError, SelectionError


class Toy(nn.Module):
    """A head on a body with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def embed(self, x):
        return self.body(x)

    def output_layer(self):
        return self.head


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def train(handle: veneer.Handle, steps: int = 3) -> None:
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        handle.model.train()(x).square().sum().backward()
        optimiser.step()


def test_it_computes_the_base_while_the_adapter_trains(model):
    base = model.eval()(x).detach()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, dropout=0.5, targets="all-linear"))
    reference = Reference(model)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if "running" in name
    }
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    model.train()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(reference(x), base)
        assert torch.equal(reference.head(reference.embed(x)), base)
        assert torch.equal(reference.output_layer()(reference.body(x)), base)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(module.training for module in model.modules())
    assert not torch.equal(model.eval()(x), base)


def test_it_has_the_weights_and_no_copy_of_them(model):
    keys = {name: value.data_ptr() for name, value in model.state_dict().items()}
    veneer.attach(model, veneer.LoraConfig(rank=2))
    reference = Reference(model)
    assert {name: value.data_ptr() for name, value in reference.state_dict().items()} == keys
    assert [*reference.parameters(), *reference.buffers(), *reference.children()] == []
    assert reference.to(torch.float64).train().head.weight is model.head.weight
    assert model.head.weight.dtype == torch.float32
    assert not reference.training


def test_it_can_be_another_adapter(model):
    first = veneer.attach(model, veneer.LoraConfig(rank=2), name="before")
    nn.init.normal_(first.changes["head.weight"].B)
    model.eval()
    expected = model(x).detach()
    veneer.attach(model, veneer.LoraConfig(rank=3), name="now")
    assert torch.equal(Reference(model, "before")(x), expected)
    with veneer.use(model, "now"):
        assert torch.equal(Reference(model, "before")(x), expected)
    with pytest.raises(SelectionError, match="no adapter named 'befor'"):
        Reference(model, "befor")


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "vera"])
@pytest.mark.parametrize("trained", [False, True])
def test_what_the_model_computes_now_stays_whatever_it_learns(model, variant, trained):
    base = model.eval()(x).detach()
    config = veneer.LoraConfig(
        rank=2, alpha=2, variant=variant, targets=["body.0", "body.3"], train_also=["head"]
    )
    handle = veneer.attach(model, config)
    if trained:
        train(handle)
    start = model.eval()(x).detach()
    reference = reference_of(model)
    train(handle)
    assert not torch.allclose(model.eval()(x), start)
    assert torch.equal(reference(x), start)
    assert torch.allclose(start, base, atol=1e-5) is not trained
    parameters = [value.detach().clone() for value in handle.parameters()]
    reference(x)
    assert all(
        torch.equal(one, other) for one, other in zip(handle.parameters(), parameters, strict=True)
    )


def test_a_reference_whose_parameters_were_replaced_says_so(model):
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    train(handle)
    reference = reference_of(model)
    with reference.selected():
        reference(x)  # within itself
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(SelectionError, match="parameters were replaced"):
        reference(x)
    reference_of(model)(x)


def test_a_plain_start_takes_no_memory_at_all(model):
    veneer.attach(model, veneer.LoraConfig(rank=2))
    assert reference_of(model)._frozen_copies == {}


def test_nor_does_one_that_trains_layers_of_16_bits_in_full_and_rows_of_tokens():
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9)).bfloat16()
    tokens = {"0": [3], "2": [3, 4]}
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets="2", train_also="1", trainable_tokens=tokens)
    )
    assert handle.changes["2.weight"].token_rows.dtype is torch.float32
    assert reference_of(model)._frozen_copies == {}
    with torch.no_grad():
        handle.changes["2.weight"].token_rows[1] += 1
    assert reference_of(model)._frozen_copies != {}


def test_it_follows_whatever_stands_in_the_place_of_its_forward(model):
    """TRL puts a forward of its own there, which calls the parts of the model."""
    base = model.eval()(x).detach()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    reference = Reference(model)
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    model.forward = lambda x: None
    reference.forward = lambda x: reference.head(reference.body(x))
    assert torch.equal(reference(x), base)


def test_a_model_without_an_adapter_or_with_a_merged_one_has_no_reference(model):
    with pytest.raises(SelectionError, match="no adapter on this Toy"):
        Reference(model)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    reference = Reference(model)
    nn.init.normal_(handle.changes["head.weight"].B)
    handle.merge()
    for call in (lambda: Reference(model), lambda: reference(x), lambda: reference_of(model)):
        with pytest.raises(
            MergeError, match="'default' merged into the weights of a reference model"
        ):
            call()
    handle.unmerge()
    reference(x)
