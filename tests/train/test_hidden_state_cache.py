"""What the lower blocks put out is computed once a row, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from tests.support.runs import Crash, same
from tests.support.tiny import tiny_config
from torch import nn

import veneer
from veneer.errors import ConfigError
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.loss import causal_loss
from veneer.train.run import fit

Make = Callable[..., Any]


def adapted(layers: list[int] | None, model: Any = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = (
        transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=4)) if model is None else model
    )
    veneer.attach(model, veneer.LoraConfig(rank=2, layers=layers, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.train()


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def packed() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
    }


def step(model: Any, inputs: Any, lower: HiddenStateCache | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    with nullcontext() if lower is None else lower.use_for(model, inputs):
        loss = causal_loss(model, inputs)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("batch", [padded, packed])
@pytest.mark.parametrize("lowest", [1, 3])
def test_losses_and_gradients_are_those_of_the_whole_model(
    batch: Callable[[], Any], lowest: int
) -> None:
    model, inputs, runs = adapted(list(range(lowest, 4))), batch(), [0] * 4
    model.double()  # in which rounding cannot be taken for an error
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(
            lambda *call, number=number: runs.__setitem__(number, runs[number] + 1)
        )
    expected = step(model, inputs)
    lower = HiddenStateCache(model)
    first = step(model, inputs, lower)
    runs[:] = [0] * 4
    again = step(model, inputs, lower)
    assert runs == [0] * lowest + [1] * (4 - lowest), "the lower blocks do not run again"
    for one, other, exact in zip(first, again, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=1e-9, atol=1e-12)
    assert all(hidden.shape[1:] == (32,) for hidden in lower.states.values())
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    for one, exact in zip(step(model, inputs), expected, strict=True):
        assert torch.equal(one, exact), "the model is as it was"


def test_a_row_has_the_same_numbers_in_any_batch() -> None:
    model, inputs = adapted([2, 3]), padded()
    whole, alone = HiddenStateCache(model), HiddenStateCache(model)
    step(model, inputs, whole)
    for number in range(3):
        step(model, {name: value[number : number + 1] for name, value in inputs.items()}, alone)
    assert whole.states.keys() == alone.states.keys()
    assert all(torch.equal(whole.states[key], alone.states[key]) for key in whole.states)


def test_a_packed_example_is_kept_once_in_whatever_row_it_lies() -> None:
    """trl joins the packed rows of a batch to one row, and a batch has other rows in each epoch."""
    model, inputs = adapted([2, 3]).double(), packed()
    lower = HiddenStateCache(model)
    step(model, inputs, lower)
    kept = dict(lower.states)
    assert len(kept) == 4
    other_way = {name: value.flip(0).reshape(1, -1) for name, value in inputs.items()}
    expected = step(model, other_way)
    for one, exact in zip(step(model, other_way, lower), expected, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-9, atol=1e-12)
    assert lower.states.keys() == kept.keys()
    assert all(lower.states[key] is kept[key] for key in kept)


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 64, "batch_size": 1},
                                     {"activation_checkpointing": True}])  # fmt: skip
def test_a_run_is_that_without_it_and_survives_a_crash(make: Make, changes: dict[str, Any]) -> None:
    changes = {"layers": [1], "dropout": 0.0, **changes}
    plain = fit(make("plain", **changes), quiet=True)
    whole = fit(make("whole", cache_lower=True, **changes), quiet=True)
    assert whole.losses == pytest.approx(plain.losses, rel=1e-3)
    config = make("broken", cache_lower=True, save_every=2, **changes)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(len(whole.losses) - 1)], quiet=True)
    same(fit(config, quiet=True), whole)


def test_what_cannot_be_kept_is_refused(make: Make) -> None:
    for model, found in (
        (adapted(None), "an adapter in block 0"),
        (adapted([2], train_also=["norm"]), "outside the blocks"),
        (adapted([3], transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=4, attention_dropout=0.1))),
         "a base with dropout"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=found):
            HiddenStateCache(model)
    model = adapted([3])
    left = {name: value.flip(1) for name, value in padded().items()}
    with pytest.raises(ConfigError, match="padding on the left"):
        step(model, left, HiddenStateCache(model))
    with pytest.raises(ConfigError, match="token_type_ids"):
        step(model, {**padded(), "token_type_ids": padded()["input_ids"]}, HiddenStateCache(model))
    config = make("refused", cache_lower=True)
    with pytest.raises(ConfigError, match="cache_lower"):
        fit(config, quiet=True)
    assert not config.output.exists()


class Shared(nn.Module):
    """A block that reads what the first one left on the model."""

    def __init__(self, block: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = block, [first]

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.seen[0] is self:
            self.left = hidden_states[:, :1]
        return self.inner(hidden_states, **kwargs) + self.seen[0].left


def test_blocks_that_read_more_than_hidden_states_are_noticed() -> None:
    model = transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=4))
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = Shared(block, None)
    for block in model.model.layers:
        block.seen[0] = model.model.layers[0]
    inputs = padded()
    model = adapted([2, 3], model)
    lower = HiddenStateCache(model)
    with pytest.raises(ConfigError, match="read more of the lower ones"):
        step(model, inputs, lower)
    assert lower.states == {}
