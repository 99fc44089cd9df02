"""Logits → the next token of each row.

    grammar's mask → processors → temperature → min_p → top_k → top_p
    → argmin of E_i / p_i, with exponential numbers E_i → token

Each row has its own generator and draws one number for each token of the vocabulary, so its tokens
do not depend on the other rows of the batch. The vocabulary is sorted as little as possible: the
1,024 most likely tokens are taken, and a row whose top_p needs more of them is sorted alone.
``processors.py`` applies the changes of the logits that a request asks for.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence
from veneer.serve.grammars import Layout, allowed_tokens, error_of
from veneer.serve.processors import Processor
from veneer.serve.requests import Cause, RequestError, Sampling, cause_of

log = logging.getLogger("veneer.serve")

#: tokens that are sorted at first if top_p needs an order
CANDIDATES = 1024


@dataclass(frozen=True)
class SampledToken:
    """The next token of a row. ``top``: the alternatives that ``Sampling.logprobs`` asks for, as
    (id, log-probability). ``token`` is None if none can be chosen; ``error`` then has the
    reason."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    cause: Cause | None = None


NOT_FINITE = SampledToken(None, error="the model's logits are no finite numbers")
NO_TOKEN_LEFT = SampledToken(
    None,
    error=sentence(
        "no token that the fields of the request leave to choose from",
        "one at each place of the answer",
        "relax allowed_token_ids, bad_words, logit_bias, min_tokens or the grammar",
    ),
    cause="no_token_left",
)


class Sampler:
    """The sampling state of a row: settings, random generator, logits processors, and the position
    in its grammar."""

    def __init__(
        self,
        sampling: Sampling,
        matcher: Any = None,
        processors: Sequence[Processor] = (),
        layout: Layout | None = None,
    ) -> None:
        self.sampling, self.matcher, self.processors = sampling, matcher, processors
        self.layout = layout
        self._generator: torch.Generator | None = None
        self._sampled: list[int] = []

    def draw(self, clocks: Tensor) -> None:
        """Fill ``clocks`` [vocabulary] with new exponential random numbers of rate 1."""
        if self._generator is None:
            self._generator = torch.Generator(clocks.device)
            seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
            self._generator.manual_seed(seed % 2**63)
        clocks.exponential_(generator=self._generator)

    def accept(self, token: int) -> bool:
        """Advance the grammar by ``token``; return whether it is complete. ``RequestError``: it
        cannot go on, because it exceeds the limits of its matcher or no value matches it."""
        if self.processors:
            self._sampled.append(token)
        if self.matcher is None:
            return False
        if self.layout is not None:
            self.layout.accept(token)
        if not self.matcher.consume_token(token) or self.matcher.is_error():
            raise error_of(self.matcher, "that an answer cannot follow")
        return self.matcher.is_stopped()

    def allowed_tokens(self, logits: Tensor) -> Tensor:
        """The tokens that the grammar allows next, as a mask [vocabulary]."""
        allowed = allowed_tokens(self.matcher, logits)
        if self.layout is not None and self.layout.is_full:
            blank = self.layout.is_blank.to(logits.device)
            allowed[: len(blank)] &= ~blank
        return allowed

    def process(self, logits: Tensor) -> Tensor:
        """Apply the processors to logits [vocabulary] in float32."""
        sampled = torch.tensor([self._sampled], dtype=torch.long, device="cpu")
        sampled, scores = sampled.to(logits.device, non_blocking=True), logits[None]
        for processor in self.processors:
            scores = processor(sampled, scores)
        return scores[0]


def sample(logits: Tensor, rows: Sequence[Sampler]) -> list[SampledToken]:
    """The next token of each row of ``logits``, [rows, vocabulary]."""
    free, failed = _free_tokens(logits, rows)
    best, tokens = free.max(dim=-1)
    facts = [torch.isfinite(best), tokens]
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        draw = _Draw(_rows_of(free, drawn).float(), [rows[i] for i in drawn])
        facts[1] = (
            draw.tokens
            if len(drawn) == len(rows)
            else tokens.index_copy(0, _tensor_like(drawn, tokens), draw.tokens)
        )
        facts.append(
            draw.short if len(drawn) == len(rows) else _spread(draw.short, drawn, len(rows))
        )
    # copy all results to the CPU at once: each copy waits for the device
    finite, chosen, *short = torch.stack([fact.to(tokens.dtype) for fact in facts]).tolist()
    for number, i in enumerate(drawn):
        if finite[i] and short[0][i]:
            chosen[i] = draw.again(number)  # pyright: ignore[reportPossiblyUnboundVariable]
    rows_with_logprobs = [
        i for i, row in enumerate(rows) if row.sampling.logprobs is not None and finite[i]
    ]
    sampled = {
        i: SampledToken(token) if finite[i] else _no_token(logits[i], rows[i])
        for i, token in enumerate(chosen)
    } | failed
    if rows_with_logprobs:
        sampled |= zip(
            rows_with_logprobs,
            _with_probabilities(logits, rows_with_logprobs, chosen, rows),
            strict=True,
        )
    return list(sampled.values())


def _free_tokens(logits: Tensor, rows: Sequence[Sampler]) -> tuple[Tensor, dict[int, SampledToken]]:
    """Apply the requests' masks and processors to logits. Returns them, and the rows that have no
    token because their grammar failed."""
    masked = [i for i, row in enumerate(rows) if row.matcher is not None]
    changed = [i for i, row in enumerate(rows) if row.processors]
    failed: dict[int, SampledToken] = {}
    if not masked and not changed:
        return logits, failed
    free = logits.to(torch.float32 if changed else logits.dtype, copy=True)
    for i in masked:
        try:
            free[i].masked_fill_(~rows[i].allowed_tokens(logits), -torch.inf)
        except RequestError as error:
            failed[i] = SampledToken(None, error=str(error), cause=cause_of(error))
        except Exception as error:  # a failing schema ends only the row of its request
            log.exception("a schema's mask could not be computed")
            failed[i] = SampledToken(None, error=f"{type(error).__name__}: {error}")
    for i in changed:
        free[i] = rows[i].process(free[i])
    for i in failed:
        free[i] = torch.nan
    return free, failed


def _no_token(logits: Tensor, row: Sampler) -> SampledToken:
    """The error of a row without a possible token: logits that are not finite, or a request that
    forbids every token."""
    limited = row.matcher is not None or row.processors
    return NO_TOKEN_LEFT if limited and torch.isfinite(logits.max()) else NOT_FINITE


def _tensor_like(values: Sequence[Any], like: Tensor) -> Tensor:
    """Values as a tensor on the device of ``like``, copied without waiting."""
    return torch.tensor(values, device="cpu").to(like.device, non_blocking=True)


def _rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Select rows of ``values``, in the order of ``rows``."""
    return (
        values if len(rows) == len(values) else values.index_select(0, _tensor_like(rows, values))
    )


def _spread(values: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Put ``values`` into the given rows of ``count`` rows; the others are 0."""
    return values.new_zeros(count).index_copy(0, _tensor_like(rows, values), values)


class _Draw:
    """Draw tokens for rows of logits [rows, vocabulary] in float32. Rows in ``short`` need more
    sorted tokens for their top_p: ``again`` draws their tokens with the same random numbers."""

    def __init__(self, logits: Tensor, rows: Sequence[Sampler]) -> None:
        self.settings = [row.sampling for row in rows]
        clocks = torch.empty_like(logits)
        for row, clock in zip(rows, clocks, strict=True):
            row.draw(clock)
        self.noise = clocks.log_()
        # below this temperature logits overflow; the most likely token has all of the probability
        # long before
        warm = _tensor_like([max(setting.temperature, 1e-5) for setting in self.settings], logits)[
            :, None
        ]
        self.scaled = (logits - logits.amax(-1, keepdim=True)) / warm
        if any(setting.min_p for setting in self.settings):
            # the largest logit is 0 here, so a fraction of its probability is a distance from 0
            least = [
                math.log(setting.min_p) if setting.min_p else -math.inf for setting in self.settings
            ]
            below = self.scaled < _tensor_like(least, logits)[:, None]
            self.scaled = self.scaled.masked_fill(below, -torch.inf)
        self.short = logits.new_zeros(len(rows), dtype=torch.bool)
        cut = [i for i, setting in enumerate(self.settings) if setting.top_k or setting.top_p < 1]
        self.tokens = (
            (self.scaled - self.noise).argmax(-1) if len(cut) < len(rows) else self.short.long()
        )
        if cut:
            tokens, short = self._nucleus(cut)
            all_ = len(cut) == len(rows)
            self.tokens = (
                tokens if all_ else self.tokens.index_copy(0, _tensor_like(cut, tokens), tokens)
            )
            self.short = short if all_ else _spread(short, cut, len(rows))

    def _nucleus(self, cut: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For rows with top_k or top_p: a token for each, and whether more tokens must be sorted to
        choose it."""
        scaled, noise = _rows_of(self.scaled, cut), _rows_of(self.noise, cut)
        settings, vocabulary = [self.settings[i] for i in cut], scaled.shape[-1]
        most = min(vocabulary, max(CANDIDATES, *(setting.top_k for setting in settings)))
        values, ids = scaled.topk(most)
        # probability of the whole vocabulary, or with top_k of the k most likely tokens
        total = scaled.logsumexp(-1)
        limits = _tensor_like([min(setting.top_k or most, most) for setting in settings], scaled)[
            :, None
        ]
        within = torch.arange(most, device=scaled.device) < limits
        values = values.masked_fill(~within, -torch.inf)
        some = _tensor_like([bool(setting.top_k) for setting in settings], scaled)
        total = torch.where(some, values.logsumexp(-1), total)
        chances = (values - total[:, None]).exp()
        top_p = _tensor_like([setting.top_p for setting in settings], scaled)[:, None]
        tokens = _first(values, ids, noise, _nucleus_mask(chances, top_p))
        short = (chances.sum(-1, keepdim=True) < top_p)[:, 0] & ~some
        return tokens, short if most < vocabulary else torch.zeros_like(short)

    def again(self, row: int) -> int:
        order = self.scaled[row : row + 1].sort(descending=True)
        top_p = torch.full_like(order.values[:, :1], self.settings[row].top_p)
        nucleus = _nucleus_mask(torch.softmax(order.values, -1), top_p)
        return int(_first(order.values, order.indices, self.noise[row : row + 1], nucleus))


def _first(values: Tensor, ids: Tensor, noise: Tensor, nucleus: Tensor) -> Tensor:
    """The token of each row whose random number divided by its probability is smallest, among the
    sorted tokens that ``nucleus`` keeps: [rows]."""
    rings = (
        (values - noise.gather(-1, ids)).masked_fill(~nucleus, -torch.inf).argmax(-1, keepdim=True)
    )
    return ids.gather(-1, rings)[:, 0]


def _nucleus_mask(chances: Tensor, top_p: Tensor) -> Tensor:
    """A mask of the sorted probabilities [rows, n]: the first ones that add up to ``top_p``, and
    always the first."""
    nucleus = chances.cumsum(-1) - chances < top_p
    nucleus[:, 0] = True
    return nucleus


def _with_probabilities(
    logits: Tensor, row_indices: Sequence[int], chosen: Sequence[int], rows: Sequence[Sampler]
) -> list[SampledToken]:
    """Add log-probabilities, of the chosen and of the most likely tokens, to the rows that ask for
    them."""
    counts = [rows[i].sampling.logprobs or 0 for i in row_indices]
    some = logits[list(row_indices)].float()
    total = some.logsumexp(-1, keepdim=True)
    ids = torch.tensor([chosen[i] for i in row_indices], device=logits.device)[:, None]
    logprobs = (some.gather(-1, ids) - total)[:, 0].tolist()
    top = (some - total).topk(min(max(*counts, 1), some.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        SampledToken(chosen[i], logprob, tuple(zip(indices[:count], values[:count], strict=True)))
        for i, logprob, count, (indices, values) in zip(
            row_indices, logprobs, counts, pairs, strict=True
        )
    ]
