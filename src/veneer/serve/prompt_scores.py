"""Log-probabilities of a prompt's tokens, for requests with ``prompt_logprobs``, or with ``echo``
and ``logprobs``.

    prompt → chunks → logits [prompts, tokens, vocabulary] → for each token its log-probability, its
    rank and the k most likely tokens

Like every prompt, such a prompt is computed in chunks, at most one in each step of the engine, and
then its answer is generated. Two things differ. First, the logits of all of its tokens are needed,
not only those of the last token. A prefix cache has no logits, so the whole prompt is computed.
Second, its chunks are not computed in the same forward call as running requests or prompts without
log-probabilities. The logits of a whole prompt may need gigabytes, so those of a chunk are freed
before the next chunk is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.serve.requests import Token

#: LOGIT_BYTES: the most bytes that the float32 logits of a forward call may need. MIN_TOKENS: the
#: number of tokens that a call may have even if their logits need more.
LOGIT_BYTES, MIN_TOKENS = 64 * 2**20, 16


def scored_per_call(max_tokens: int, vocabulary_size: int) -> int:
    """The most prompt tokens for which one forward call computes log-probabilities: ``max_tokens``,
    or fewer if ``vocabulary_size`` logits for each of them need too much memory."""
    return max(MIN_TOKENS, min(max_tokens, LOGIT_BYTES // (4 * vocabulary_size)))


def take_scores(
    scores: Sequence[PromptScore],
    starts: Sequence[int],
    lengths: Sequence[int],
    logits: Tensor,
    is_finite: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add the logits of a forward call, which computed a chunk of each of n prompts, to the scores
    of the prompts.

    Args:
        scores: the scores of each prompt; they are changed.
        starts, lengths: for each prompt, the index in the prompt of the chunk's first token, and
            the number of tokens of the chunk.
        logits: [n, tokens, vocabulary], padded to the longest chunk.
        is_finite: [n, tokens], whether the largest logit of a token is finite (not NaN or inf).

    Returns:
        (the logits of the last token of each chunk [n, vocabulary], whether ``is_finite`` holds
        for all tokens of each chunk [n]).
    """
    for score, start, length, chunk_logits in zip(scores, starts, lengths, logits, strict=True):
        score.take(start, chunk_logits[:length])
    last_logits = [
        chunk_logits[length - 1] for chunk_logits, length in zip(logits, lengths, strict=True)
    ]
    all_finite = [
        chunk_logits[:length].all() for chunk_logits, length in zip(is_finite, lengths, strict=True)
    ]
    return torch.stack(last_logits), torch.stack(all_finite)


@dataclass(eq=False)
class PromptScore:
    """A prompt's tokens with their log-probabilities, as far as these are computed.

    Fields:
        prompt: the token ids of the prompt.
        alternatives: the number of most likely tokens to record at each position.
        text_of: gives the text of a token id.
        length: the number of prompt tokens whose logits were computed.
        tokens: the result so far.
    """

    prompt: Sequence[int]
    alternatives: int
    text_of: Callable[[int], str]
    length: int = 0
    tokens: list[Token] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.length == len(self.prompt)

    def take(self, start: int, logits: Tensor) -> None:
        """Add the logits [n, vocabulary] of n prompt tokens from index ``start`` on. If the request
        was preempted, the engine computes its prompt again, and logits of tokens that were added
        before are ignored."""
        logits = logits[max(0, self.length - start) :]
        start, self.length = self.length, self.length + len(logits)
        if not self.tokens:
            self.tokens.append(Token(self.prompt[0], self.text_of(self.prompt[0])))
        next_tokens = self.prompt[start + 1 : self.length + 1]
        if next_tokens:
            self._add(next_tokens, logits[: len(next_tokens)])

    def _add(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Add n tokens with their log-probabilities. Row i of ``logits`` [n, vocabulary] belongs to
        the token before token i, so it predicts token i."""
        logprobs = logits.float().log_softmax(-1)
        token_logprobs = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
        ranks = ((logprobs > token_logprobs).sum(-1) + 1).tolist()
        top_tokens = logprobs.topk(min(max(self.alternatives, 1), logprobs.shape[-1]))
        token_lists = (
            tokens,
            token_logprobs[:, 0].tolist(),
            top_tokens.indices.tolist(),
            top_tokens.values.tolist(),
            ranks,
        )
        for token, logprob, top_ids, top_logprobs, rank in zip(*token_lists, strict=True):
            top_pairs = list(zip(top_ids, top_logprobs, strict=True))[: self.alternatives]
            alternatives = tuple((id, self.text_of(id), value) for id, value in top_pairs)
            self.tokens.append(Token(token, self.text_of(token), logprob, alternatives, rank))
