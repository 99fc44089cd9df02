"""Logits processors of one row, as its request asks, applied before the temperature.

    allowed_token_ids → bad_words → min_tokens → logit_bias → repetition → frequency, presence

The order is vLLM's: a bias moves the logit that a penalty scales. Each step has the interface of
transformers' logits processors, and is one of them where possible: it gets the ids [1, n] of the
answer so far and scores [1, vocabulary] in float32. Rows are processed one by one, since each has
its own history; a row without such fields has no steps.
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
    """Forbid all tokens but these."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._tokens, self._banned = sorted(tokens), torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not len(self._banned):
            banned = torch.ones(scores.shape[-1], dtype=torch.bool)
            banned[self._tokens] = False
            self._banned = banned.to(scores.device)
        return scores.masked_fill(self._banned, -torch.inf)


class PromptRepetitionPenalty(LogitsProcessor):
    """transformers' repetition penalty, for the tokens of prompt and answer."""

    def __init__(self, penalty: float, prompt: Sequence[int]) -> None:
        self._processor = RepetitionPenaltyLogitsProcessor(float(penalty))
        self._prompt = torch.tensor([sorted(set(prompt))])  # a token counts once

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
        amounts = self._frequency * counts.to(scores.dtype) + self._presence
        return scores.index_add(-1, tokens, -amounts[None])


def processors_of(
    sampling: Sampling,
    prompt: Sequence[int],
    ends: Iterable[int],
    vocabulary: int,
    device: torch.device,
) -> list[Processor]:
    """The processors of a request, in order. ``ends``: the tokens that end a text; ``vocabulary``:
    the number of logits. ``RequestError``: a token that the model does not have."""
    _check_tokens(sampling, vocabulary)
    steps: list[Processor] = []
    if sampling.allowed_tokens is not None:
        steps.append(AllowedTokens(sampling.allowed_tokens))
    if sampling.bad_words:
        steps.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.min_tokens and (banned := sorted({*ends, *sampling.stop_tokens})):
        steps.append(
            MinNewTokensLengthLogitsProcessor(0, sampling.min_tokens, banned, device=str(device))
        )
    if sampling.logit_bias:
        pairs = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        steps.append(SequenceBiasLogitsProcessor(pairs))
    if sampling.repetition_penalty != 1:
        steps.append(PromptRepetitionPenalty(sampling.repetition_penalty, prompt))
    if sampling.frequency_penalty or sampling.presence_penalty:
        steps.append(CountPenalties(sampling.frequency_penalty, sampling.presence_penalty))
    return steps


def _check_tokens(sampling: Sampling, vocabulary: int) -> None:
    fields = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_tokens or (),
    }
    for name, tokens in fields.items():
        if tokens and max(tokens) >= vocabulary:
            expected = f"ids from 0 to {vocabulary - 1}"
            raise RequestError(f"token {max(tokens)} in {name}", expected, "use its tokenizer")
