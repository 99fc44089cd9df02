"""The logits processors for a request's sampling fields. They change the logits before these are
divided by the temperature.

    allowed_token_ids → bad_words → min_tokens → logit_bias → repetition → frequency, presence

The order is that of vLLM, so that equal requests get equal logits: ``logit_bias`` is added before
the repetition penalty scales the sum. Each processor has the interface of transformers' logits
processors, and is one of them where possible. It gets the ids [1, n] of the answer's n tokens so
far, and scores [1, vocabulary] in float32. Each row of a batch is processed by itself, because the
result depends on the row's own answer. A request without these fields has no processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from veneer.serve.requests import RequestError, Sampling

#: (ids [1, n] of the answer so far, scores [1, vocabulary]) → new scores
Processor = Callable[[Any, Any], Tensor]


class AllowedTokens(LogitsProcessor):
    """Sets the scores of all tokens except the allowed ids to −inf."""

    def __init__(self, allowed_ids: frozenset[int]) -> None:
        self._allowed_ids = _sorted_tensor(allowed_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._allowed_ids = self._allowed_ids.to(scores.device)
        allowed_scores = scores.index_select(-1, self._allowed_ids)
        return torch.full_like(scores, -torch.inf).index_copy(-1, self._allowed_ids, allowed_scores)


@lru_cache(maxsize=8)  # the answers to one request share the set
def _sorted_tensor(allowed_ids: frozenset[int]) -> Tensor:
    return torch.tensor(sorted(allowed_ids), dtype=torch.long, device="cpu")


class PromptRepetitionPenalty(LogitsProcessor):
    """transformers' repetition penalty, applied to the tokens of the prompt and of the answer so
    far. transformers' own processor would see only the answer, since the ids that it gets here do
    not include the prompt."""

    def __init__(self, penalty: float, prompt_ids: Sequence[int]) -> None:
        self._penalty = RepetitionPenaltyLogitsProcessor(float(penalty))
        # each token once, because the penalty does not depend on its count
        self._prompt_ids = torch.tensor([sorted(set(prompt_ids))])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._prompt_ids = self._prompt_ids.to(scores.device)
        return self._penalty(torch.cat([self._prompt_ids, input_ids], 1), scores)  # pyright: ignore


class CountPenalties(LogitsProcessor):
    """OpenAI's frequency and presence penalties. The logit of each token that occurs in the answer
    so far is reduced by frequency · (its number of occurrences) + presence."""

    def __init__(self, frequency_penalty: float, presence_penalty: float) -> None:
        self._frequency_penalty, self._presence_penalty = frequency_penalty, presence_penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0].unique(return_counts=True)
        penalties = self._frequency_penalty * counts.to(scores.dtype) + self._presence_penalty
        return scores.index_add(-1, tokens, -penalties[None])


def processors_of(
    sampling: Sampling,
    prompt_ids: Sequence[int],
    end_tokens: Iterable[int],
    vocabulary_size: int,
    device: torch.device,
) -> list[Processor]:
    """The processors of a request, in the order in which they are applied.

    Args:
        prompt_ids: the token ids of the prompt.
        end_tokens: ids of the tokens that end a text, which ``min_tokens`` forbids at first.
        vocabulary_size: the number of logits.

    Raises:
        RequestError: a field contains a token id that the model does not have.
    """
    _check_tokens(sampling, vocabulary_size)
    processors: list[Processor] = []
    if sampling.allowed_tokens is not None:
        processors.append(AllowedTokens(sampling.allowed_tokens))
    if sampling.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.min_tokens and (banned_tokens := sorted({*end_tokens, *sampling.stop_tokens})):
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                0, sampling.min_tokens, banned_tokens, device=str(device)
            )
        )
    if sampling.logit_bias:
        bias_pairs = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        processors.append(SequenceBiasLogitsProcessor(bias_pairs))
    if sampling.repetition_penalty != 1:
        processors.append(PromptRepetitionPenalty(sampling.repetition_penalty, prompt_ids))
    if sampling.frequency_penalty or sampling.presence_penalty:
        processors.append(CountPenalties(sampling.frequency_penalty, sampling.presence_penalty))
    return processors


def _check_tokens(sampling: Sampling, vocabulary_size: int) -> None:
    """Check the token ids in the fields of a request. ``RequestError``: one of them is not below
    ``vocabulary_size``."""
    tokens_by_field = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_tokens or (),
        "bad_words": {token for word in sampling.bad_words for token in word},
    }
    for name, tokens in tokens_by_field.items():
        if tokens and max(tokens) >= vocabulary_size:
            raise RequestError(
                f"token {max(tokens)} in {name}",
                f"ids from 0 to {vocabulary_size - 1}",
                "leave that word out" if name == "bad_words" else "use its tokenizer",
            )
