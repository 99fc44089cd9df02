"""Log-probabilities of a prompt's tokens, for ``echo`` with ``logprobs`` and ``prompt_logprobs``.

    prompt → pieces → logits [rows, tokens, vocabulary] → each token's own, the k largest, its rank

Such a prompt is computed as others are, in pieces beside running rows, and its answer goes on
behind it. But the logits of all of its tokens are computed, where other calls compute those of a
row's last token alone: so no cached prefix can stand in for its tokens, and its pieces are calls of
their own. The logits of a whole prompt may be gigabytes; those of a piece are dropped before the
next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: bytes of the logits of one call, and the fewest tokens of one
LOGITS, FEWEST = 64 * 2**20, 16


def scored_per_call(most: int, vocabulary: int) -> int:
    """Tokens of prompts that one call scores, of at most ``most``."""
    return max(FEWEST, min(most, LOGITS // (4 * vocabulary)))


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
    tokens: list[TokenScore] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.length == len(self.prompt)

    def take(self, start: int, logits: Tensor) -> None:
        """Logits [n, vocabulary]: those behind its tokens from number ``start`` on. Of a request
        that gave its row back, the first of them were there before."""
        logits = logits[max(0, self.length - start) :]
        start, self.length = self.length, self.length + len(logits)
        if not self.tokens:
            self.tokens.append(TokenScore(self.prompt[0]))
        following = self.prompt[start + 1 : self.length + 1]
        if following:
            self.tokens += _score_tokens(logits[: len(following)], following, self.alternatives)


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
