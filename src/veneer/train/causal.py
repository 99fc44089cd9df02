"""Test that a model is causal: it predicts each token only from the tokens before it.

    rows 0 and 1 differ from token t on    →    logits before t are equal

A model that sees later tokens reads its labels in its input, so the loss falls although it learns
nothing. ``models.must_be_causal`` recognises transformers' encoders by their config; this test runs
two short rows and works for every model.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.errors import ConfigError

#: tokens of a test row, and the number of leading tokens that both rows share
LENGTH, SAME = 8, 5


@torch.no_grad()
def must_not_see_later_tokens(model: Any, name: str) -> None:
    """Raise a ConfigError if the logits of a position depend on later tokens. ``model``: a model of
    transformers; it is called with input_ids and attention_mask [2, LENGTH] in evaluation mode, and
    its mode is restored. ``name``: the base's name in the error."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(LENGTH) * 7 + 3).remainder(size).repeat(2, 1)
    ids[1, SAME:] = (ids[1, SAME:] + size // 2).remainder(size)
    ids, training = ids.to(model.device), model.training
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            :, :SAME
        ]
    finally:
        model.train(training)
    first, second = logits.double()
    # In one batch, equal inputs give equal logits, except for the order of sums on a GPU.
    if (first - second).norm() > max(1e-4, 4 * torch.finfo(logits.dtype).eps) * first.norm():
        problem = (
            f"{name}, a {type(model).__name__} whose predictions change with the tokens that come"
            " after them"
        )
        remedy = (
            "choose a causal base; to train another kind of model, call veneer.attach on it in"
            " Python"
        )
        raise ConfigError(problem, "a causal language model, which cannot see its labels", remedy)
