"""Test that a model is causal: it predicts each token only from the tokens before it.

    rows 0 and 1 differ only from token t on    →    a causal model gives equal logits before t

A model that sees later tokens reads its labels in its input, so the loss falls although it learns
nothing. ``models.must_be_causal`` recognises transformers' encoders by their config; this test runs
two short rows and works for every model.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.context import evaluation_mode
from veneer.errors import ConfigError

#: number of tokens of each of the two test rows, and number of leading tokens that they share
ROW_TOKENS, SHARED_TOKENS = 8, 5


@torch.no_grad()
def must_not_see_later_tokens(model: Any, base_name: str) -> None:
    """Raise a ConfigError if the logits of a position depend on later tokens.

    Args:
        model: a model of transformers. It is called with input_ids and attention_mask
            [2, ROW_TOKENS] in evaluation mode; each module keeps its mode.
        base_name: the name of the base, for the error.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(ROW_TOKENS) * 7 + 3).remainder(vocab_size).repeat(2, 1)
    ids[1, SHARED_TOKENS:] = (ids[1, SHARED_TOKENS:] + vocab_size // 2).remainder(vocab_size)
    ids = ids.to(model.device)
    with evaluation_mode(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            :, :SHARED_TOKENS
        ]
    first_logits, second_logits = logits.double()
    # In one batch, the logits of equal inputs differ at most by the rounding of sums, whose order
    # may vary on a GPU. So a larger difference comes from the later tokens.
    tolerance = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    if (first_logits - second_logits).norm() > tolerance * first_logits.norm():
        raise ConfigError(
            f"{base_name}, a {type(model).__name__} whose predictions change with the tokens that"
            " come after them",
            "a causal language model, which cannot see its labels",
            "choose a causal base; to train another kind of model, call veneer.attach on it in"
            " Python",
        )
