"""Log-probabilities of a prompt's tokens, for ``echo`` with ``logprobs`` and ``prompt_logprobs``.

    prompt → pieces → logits [rows, tokens, vocabulary] → for each token its log-probability, its
    rank and the k most likely tokens

Like other prompts, such a prompt is computed in pieces between the steps of running rows, and then
its answer is generated. Two things differ. All of its logits are computed, not only those of a
row's last token, so a cached prefix cannot replace any of its tokens. And its pieces are forward
calls of their own. The logits of a full prompt may need gigabytes; the logits of a piece are
dropped before the next piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.serve.requests import Token

#: the most bytes of the float32 logits of a forward call. MIN_TOKENS tokens are allowed even if
#: their logits need more.
LOGIT_BYTES, MIN_TOKENS = 64 * 2**20, 16


def scored_per_call(max_tokens: int, vocabulary: int) -> int:
    """How many prompt tokens a forward call scores: ``max_tokens``, or fewer if the vocabulary is
    large."""
    return max(MIN_TOKENS, min(max_tokens, LOGIT_BYTES // (4 * vocabulary)))


def take_scores(
    scores: Sequence[PromptScore],
    starts: Sequence[int],
    lengths: Sequence[int],
    logits: Tensor,
    finite: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add the logits of a forward call to the scores of its n prompts.

    Args:
        scores: the score of each prompt.
        starts, lengths: for each prompt, the index of its first token in this call and the number
            of its tokens.
        logits: [n, tokens, vocabulary], padded to the largest number of tokens.
        finite: [n, tokens], whether the logits of a token are finite.

    Returns:
        (the logits of each prompt's last token in this call [n, vocabulary], whether all logits of
        a prompt are finite [n]).
    """
    for score, start, length, row in zip(scores, starts, lengths, logits, strict=True):
        score.take(start, row[:length])
    last_logits = [row[length - 1] for row, length in zip(logits, lengths, strict=True)]
    all_finite = [row[:length].all() for row, length in zip(finite, lengths, strict=True)]
    return torch.stack(last_logits), torch.stack(all_finite)


@dataclass(eq=False)
class PromptScore:
    """A prompt's tokens with their log-probabilities, as far as these are computed.
    ``alternatives``: how many most likely tokens to record at each position. ``text_of``: gives the
    text of a token id."""

    prompt: Sequence[int]
    alternatives: int
    text_of: Callable[[int], str]
    length: int = 0  # number of prompt tokens whose logits were computed
    tokens: list[Token] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.length == len(self.prompt)

    def take(self, start: int, logits: Tensor) -> None:
        """Add the logits [n, vocabulary] of n prompt tokens from index ``start`` on. A preempted
        request computes its prompt again; logits that were added before are then ignored."""
        logits = logits[max(0, self.length - start) :]
        start, self.length = self.length, self.length + len(logits)
        if not self.tokens:
            self.tokens.append(Token(self.prompt[0], self.text_of(self.prompt[0])))
        next_tokens = self.prompt[start + 1 : self.length + 1]
        if next_tokens:
            self._add(next_tokens, logits[: len(next_tokens)])

    def _add(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Add n tokens, each scored by the row of ``logits`` [n, vocabulary] that predicts it."""
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
        ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
        top = logprobs.topk(min(max(self.alternatives, 1), logprobs.shape[-1]))
        columns = (tokens, chosen[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), ranks)
        for token, logprob, ids, values, rank in zip(*columns, strict=True):
            best = list(zip(ids, values, strict=True))[: self.alternatives]
            alternatives = tuple((id, self.text_of(id), value) for id, value in best)
            self.tokens.append(Token(token, self.text_of(token), logprob, alternatives, rank))
