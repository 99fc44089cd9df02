"""Does a model predict each token from those before it alone?

    rows 0 and 1 differ from token t on    →    logits before t are equal

A model that sees later tokens reads its labels off its input: the loss falls and nothing is learnt.
A config tells it of the encoders that transformers knows (``models.must_be_causal``); this tells it
of every model, by two short rows.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.errors import ConfigError

#: tokens of the trial, and how many of them are the same in both rows
LENGTH, SAME = 8, 5


@torch.no_grad()
def must_not_see_later_tokens(model: Any, name: str) -> None:
    """Raise a ConfigError if the logits of a position depend on tokens after it. ``model``: one of
    transformers', called with input_ids and attention_mask [2, LENGTH]. Its mode is kept. ``name``:
    what to call it in the error."""
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
    one, other = logits.double()
    # both rows run in one batch, where equal numbers give equal ones: what is left is the order of
    # sums on a GPU
    if (one - other).norm() > max(1e-4, 4 * torch.finfo(logits.dtype).eps) * one.norm():
        problem = (
            f"{name}, a {type(model).__name__} whose predictions change with the tokens that come"
            " after them"
        )
        do = (
            "choose a causal base; to train another kind of model, call veneer.attach on it in"
            " Python"
        )
        raise ConfigError(problem, "a causal language model, which cannot see its labels", do)
