"""The lean loss is the full loss: value and gradients, in float64, whatever is masked and wherever the adapter sits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import veneer
from tiny import tiny_model
from veneer.train.loss import IGNORED, causal_loss, token_loss


def batch(seed: int, masked: str) -> dict[str, torch.Tensor]:
    """3 rows of 12 tokens, padded on the right, with labels masked as named."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    if masked == "prompts":
        labels[:, :4] = IGNORED
    if masked == "scattered":
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.6, IGNORED)
    if masked == "one":
        labels[:], labels[1, 7] = IGNORED, ids[1, 7]
    if masked == "all":
        labels[:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition: all logits, then the cross-entropy of the shifted labels."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def adapted(targets: Any = "all-linear") -> Any:
    model = tiny_model().double()
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=targets))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("masked", ["nothing", "prompts", "scattered", "one"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["body", "head"])
def test_equal_to_the_full_loss(masked: str, targets: Any) -> None:
    model = adapted(targets)
    inputs = batch(0, masked)
    found, wanted = causal_loss(model, inputs), full_loss(model, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lean, full = torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters)
    for one, other in zip(lean, full, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_the_count_of_an_accumulated_batch_replaces_its_own() -> None:
    model, inputs = adapted(), batch(0, "prompts")
    result = token_loss(model, inputs)
    torch.testing.assert_close(causal_loss(model, inputs, num_items_in_batch=100), result.total / 100)
    assert int(result.items) == int((inputs["labels"][:, 1:] != IGNORED).sum())


def test_a_batch_without_labels_is_a_zero_that_reaches_the_parameters() -> None:
    model = adapted()
    loss = causal_loss(model, batch(0, "all"))
    assert float(loss.detach()) == 0.0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, parameters))


def test_a_forward_without_logits_to_keep_is_run_in_full() -> None:
    model, inputs = adapted(), batch(0, "prompts")

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    torch.testing.assert_close(causal_loss(Plain(), inputs), causal_loss(model, inputs), rtol=1e-12, atol=0)


def test_only_labelled_columns_reach_the_head() -> None:
    model, inputs = adapted(), batch(0, "one")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    token_loss(model, inputs)
    assert seen == [(3, 1, 32)]


def test_accuracy_counts_the_right_tokens() -> None:
    model, inputs = adapted(), batch(0, "nothing")
    best = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(-1)
    inputs["labels"][:, 1:][inputs["labels"][:, 1:] != IGNORED] = best[:, :-1][inputs["labels"][:, 1:] != IGNORED]
    result = token_loss(model, inputs, accuracy=True)
    assert int(result.correct) == int(result.items)
