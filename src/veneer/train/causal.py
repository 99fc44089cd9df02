"""Test that a model is causal: it predicts each token only from the tokens before it.

    rows 0 and 1 differ only from token t on    →    a causal model gives equal logits before t

A model that sees later tokens reads its labels in its input, so the loss falls although it learns
nothing. ``models.must_be_causal`` recognises transformers' encoders by their config; this test runs
two short rows and works for every model.

A second test is for runs that pack several examples into one row: their logits must not depend on
the examples before them. Some classes of transformers accept the positions of packed examples and
ignore them.

    a packed row of the sequences a, b, a    →    both a have equal logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.context import evaluation_mode
from veneer.errors import ConfigError
from veneer.precision import double

#: number of tokens of each of the two test rows, and number of leading tokens that they share
ROW_TOKENS, SHARED_TOKENS = 8, 5
#: number of tokens of the three sequences of the packed test row. They are so short and alike that
#: attention on a CPU takes the row apart, as in training (``kernels.cpu_attention.is_packed``).
PACKED_TOKENS = (4, 3, 4)


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
    if _differ(logits[0], logits[1], logits.dtype):
        raise ConfigError(
            f"{base_name}, a {type(model).__name__} whose predictions change with the tokens that"
            " come after them",
            "a causal language model, which cannot see its labels",
            "choose a causal base; to train another kind of model, call veneer.attach on it in"
            " Python",
        )


@torch.no_grad()
def must_keep_packed_examples_apart(model: Any, base_name: str) -> None:
    """Raise a ConfigError if the logits of an example depend on the examples before it in a packed
    row.

    Args:
        model: a causal language model of transformers. It is called in evaluation mode with what
            trl's collator makes of a packed row: input_ids and position_ids [1, s] for the s tokens
            of three sequences, and where each sequence begins. Each module keeps its mode.
        base_name: the name of the base, for the error.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(sum(PACKED_TOKENS)) * 7 + 3).remainder(vocab_size)
    ids[-PACKED_TOKENS[2] :] = ids[: PACKED_TOKENS[0]]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": ids.tolist(), "seq_lengths": [*PACKED_TOKENS]}])
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    with evaluation_mode(model):
        logits = model(**inputs, use_cache=False).logits[0]
    first_logits, _, last_logits = logits.split(PACKED_TOKENS)
    if _differ(first_logits, last_logits, model.dtype):
        raise ConfigError(
            f"{base_name}, a {type(model).__name__} that mixes packed examples: the predictions for"
            " one change with those before it in the row",
            "a base that keeps them apart by position_ids",
            "leave out packing",
        )


def _differ(first_logits: Tensor, second_logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether the logits [t, v] of two sequences of t tokens in one forward pass differ by more
    than rounding to ``dtype``, in which they were computed. For equal inputs, only the order of
    sums may differ, on a GPU or at another position of a row."""
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    first_logits, second_logits = double(first_logits), double(second_logits)
    return bool((first_logits - second_logits).norm() > tolerance * first_logits.norm())
