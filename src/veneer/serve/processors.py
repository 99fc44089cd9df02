"""The logits processors that a request's fields ask for. They are applied before the temperature.

    allowed_token_ids → bad_words → min_tokens → logit_bias → repetition → frequency, presence

The order is vLLM's: a bias changes the logit that a penalty then scales. Each processor has the
interface of transformers' logits processors, and is one of them where possible. It gets the ids
[1, n] of the answer's n tokens so far, and scores [1, vocabulary] in float32. Each row of a batch
is processed by itself, because processors depend on the row's own answer. A request without such
fields has no processors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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

Processor = Callable[[Any, Any], Tensor]


class AllowedTokens(LogitsProcessor):
    """Forbid all tokens except the allowed ones."""

    def __init__(self, allowed: Collection[int]) -> None:
        self._allowed = torch.tensor(sorted(allowed), dtype=torch.long, device="cpu")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._allowed = self._allowed.to(scores.device)
        allowed_scores = scores.index_select(-1, self._allowed)
        return torch.full_like(scores, -torch.inf).index_copy(-1, self._allowed, allowed_scores)


class PromptRepetitionPenalty(LogitsProcessor):
    """transformers' repetition penalty, for the tokens of the prompt and the answer so far."""

    def __init__(self, penalty: float, prompt: Sequence[int]) -> None:
        self._processor = RepetitionPenaltyLogitsProcessor(float(penalty))
        self._prompt = torch.tensor([sorted(set(prompt))])  # a repeated token is penalised once

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._prompt = self._prompt.to(scores.device)
        return self._processor(torch.cat([self._prompt, input_ids], 1), scores)  # pyright: ignore


class CountPenalties(LogitsProcessor):
    """OpenAI's frequency and presence penalties: logit −= frequency · count + presence, for each
    token of the answer so far."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0].unique(return_counts=True)
        penalties = self._frequency * counts.to(scores.dtype) + self._presence
        return scores.index_add(-1, tokens, -penalties[None])


def processors_of(
    sampling: Sampling,
    prompt: Sequence[int],
    end_tokens: Iterable[int],
    vocabulary: int,
    device: torch.device,
) -> list[Processor]:
    """The processors of a request, in order. ``end_tokens``: ids of the tokens that end a text;
    ``vocabulary``: the number of logits. ``RequestError``: a field has a token id that the model
    does not have."""
    _check_tokens(sampling, vocabulary)
    processors: list[Processor] = []
    if sampling.allowed_tokens is not None:
        processors.append(AllowedTokens(sampling.allowed_tokens))
    if sampling.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.min_tokens and (banned := sorted({*end_tokens, *sampling.stop_tokens})):
        processors.append(
            MinNewTokensLengthLogitsProcessor(0, sampling.min_tokens, banned, device=str(device))
        )
    if sampling.logit_bias:
        pairs = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        processors.append(SequenceBiasLogitsProcessor(pairs))
    if sampling.repetition_penalty != 1:
        processors.append(PromptRepetitionPenalty(sampling.repetition_penalty, prompt))
    if sampling.frequency_penalty or sampling.presence_penalty:
        processors.append(CountPenalties(sampling.frequency_penalty, sampling.presence_penalty))
    return processors


def _check_tokens(sampling: Sampling, vocabulary: int) -> None:
    """``RequestError``: a token id is not below ``vocabulary``."""
    fields = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_tokens or (),
        "bad_words": {token for word in sampling.bad_words for token in word},
    }
    for name, tokens in fields.items():
        if tokens and max(tokens) >= vocabulary:
            raise RequestError(
                f"token {max(tokens)} in {name}",
                f"ids from 0 to {vocabulary - 1}",
                "leave that word out" if name == "bad_words" else "use its tokenizer",
            )
