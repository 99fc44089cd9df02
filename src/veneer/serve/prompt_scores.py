"""Log-probabilities of a prompt's tokens, for ``echo`` with ``logprobs`` and ``prompt_logprobs``.

    prompt → pieces → logits [rows, tokens, vocabulary] → each token's own, the k largest, its rank

The engine's other calls compute the logits of a row's last token alone. Here they are those of all
tokens, by the model's own attention, with keys and values beside the slots: no shared prefix can
stand in for tokens of which the logits are asked for. The logits of a whole prompt may be
gigabytes, so those of a piece are dropped before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.serve.forward import Forward
from veneer.serve.scheduler import fit_budget

#: bytes of the logits of one call, and the fewest tokens of one
LOGITS, FEWEST = 64 * 2**20, 16


@dataclass(frozen=True)
class TokenScore:
    """The score of a token of a prompt. ``top``: (id, log-probability) of the most likely tokens at
    its position; ``rank``: its rank among all tokens, from 1."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(eq=False)
class PromptScore:
    """The scores of one prompt that are computed so far."""

    prompt: Sequence[int]
    alternatives: int
    length: int = 0  # its tokens that are computed
    cache: Any = None  # of a prompt that is longer than a call
    tokens: list[TokenScore] = field(default_factory=list)
    last: Tensor | None = None  # logits [1, vocabulary] behind its last token

    @property
    def done(self) -> bool:
        return self.length == len(self.prompt)

    def take(self, logits: Tensor) -> None:
        """The next logits, [n, vocabulary]: those behind its next n tokens."""
        start, self.length = self.length, self.length + len(logits)
        if not start:
            self.tokens.append(TokenScore(self.prompt[0]))
        following = self.prompt[start + 1 : self.length + 1]
        if following:
            self.tokens += _score_tokens(logits[: len(following)], following, self.alternatives)
        if self.done:
            self.last, self.cache = logits[-1:].clone(), None


def _score_tokens(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenScore]:
    """The scores of n tokens that logits [n, vocabulary] predict."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    top = logprobs.topk(min(max(alternatives, 1), logprobs.shape[-1]))
    columns = (tokens, chosen[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), ranks)
    return [
        TokenScore(token, logprob, tuple(zip(ids, values, strict=True))[:alternatives], rank)
        for token, logprob, ids, values, rank in zip(*columns, strict=True)
    ]


class PromptScorer:
    """Computes the prompts of requests with a ``score``, a piece at a time. ``most``: tokens of one
    call."""

    def __init__(self, forward: Forward, most: int) -> None:
        self._forward = forward
        self._width = max(FEWEST, min(most, LOGITS // (4 * forward.logits)))

    def next_group(self, states: Sequence[Any]) -> list[Any]:
        """The requests of the next call: one with a prompt that is longer than a call, or several
        with short ones."""
        waiting = [state for state in states if state.score is not None and not state.score.done]
        if not waiting or len(waiting[0].score.prompt) > self._width:
            return waiting[:1]
        short = [state for state in waiting if len(state.score.prompt) <= self._width]
        lengths = [len(state.score.prompt) for state in short]
        return [short[i] for i in fit_budget(lengths, self._width)]

    def compute(self, states: Sequence[Any]) -> None:
        """One call of the model, for the next piece of each."""
        scores: list[PromptScore] = [state.score for state in states]
        if len(scores[0].prompt) > self._width and scores[0].cache is None:
            scores[0].cache = self._forward.new_cache()
        pieces = [score.prompt[score.length : score.length + self._width] for score in scores]
        logits = self._forward.score(pieces, scores[0].cache)
        for score, piece, row in zip(scores, pieces, logits, strict=True):
            score.take(row[: len(piece)])
