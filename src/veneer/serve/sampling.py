"""Sample the next token of each row of a batch from its logits.

    grammar's mask → processors → temperature → min_p → top_k → top_p
    → argmin of E_i / p_i over tokens i, where E_i is an exponential random number → token

Each row has its own random generator and draws one number for each token of the vocabulary, so its
tokens do not depend on the other rows of the batch. Sorting the vocabulary is slow, so only the
1,024 most likely tokens are sorted; a row whose top_p needs more of them is sorted by itself.
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
from veneer.kernels.draws import log_exponentials
from veneer.serve.grammars import Layout, allowed_tokens, error_of
from veneer.serve.processors import Processor
from veneer.serve.requests import Cause, RequestError, Sampling, cause_of

log = logging.getLogger("veneer.serve")

#: number of most likely tokens that are sorted at first for top_p
MIN_SORTED_TOKENS = 1024


@dataclass(frozen=True)
class SampledToken:
    """The next token of a row. ``top``: (id, log-probability) of the alternatives that
    ``Sampling.logprobs`` asks for. ``token`` is None if no token can be sampled; ``error`` then has
    the reason."""

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
    """The sampling state of a row: its settings, random generator and logits processors, and how
    far its grammar has matched the answer. ``layout`` limits the whitespace of a JSON answer."""

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

    def generator(self, device: torch.device) -> torch.Generator:
        """The random generator of the row, which is made at the first call."""
        if self._generator is None:
            seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
            self._generator = torch.Generator(device).manual_seed(seed % 2**63)
        return self._generator

    def accept(self, token: int) -> bool:
        """Record the sampled ``token`` and advance the grammar by it. Returns whether the grammar
        is complete. ``RequestError``: the grammar cannot go on, because it exceeds the limits of
        its matcher or because no text matches it."""
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
        """The tokens that the grammar and the layout allow next, as a mask [vocabulary]."""
        allowed = allowed_tokens(self.matcher, logits)
        if self.layout is not None and self.layout.is_full:
            is_blank = self.layout.is_blank.to(logits.device)
            allowed[: len(is_blank)] &= ~is_blank
        return allowed

    def process(self, logits: Tensor) -> Tensor:
        """Apply the processors to the row's logits, [vocabulary] in float32."""
        sampled = torch.tensor([self._sampled], dtype=torch.long, device="cpu")
        sampled, scores = sampled.to(logits.device, non_blocking=True), logits[None]
        for processor in self.processors:
            scores = processor(sampled, scores)
        return scores[0]


def sample(logits: Tensor, rows: Sequence[Sampler]) -> list[SampledToken]:
    """Sample the next token of each row of ``logits`` [rows, vocabulary]."""
    processed_logits, failed_rows = _process_logits(logits, rows)
    largest_logits, tokens = processed_logits.max(dim=-1)
    results = [torch.isfinite(largest_logits), tokens]
    random_rows = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if random_rows:
        draw = _Draw(
            _rows_of(processed_logits, random_rows).float(), [rows[i] for i in random_rows]
        )
        results[1] = _put_rows(draw.tokens, random_rows, tokens)
        no_row = torch.zeros_like(tokens, dtype=torch.bool)
        results.append(_put_rows(draw.needs_sort, random_rows, no_row))
    # copy all results to the CPU at once: each copy waits for the device
    packed = torch.stack([result.to(tokens.dtype) for result in results])
    finite, chosen_tokens, *unsorted = packed.tolist()
    for index, i in enumerate(random_rows):
        if finite[i] and unsorted[0][i]:
            chosen_tokens[i] = draw.sort_and_draw(index)  # pyright: ignore[reportPossiblyUnboundVariable]
    rows_with_logprobs = [
        i for i, row in enumerate(rows) if row.sampling.logprobs is not None and finite[i]
    ]
    sampled = {
        i: SampledToken(token) if finite[i] else _no_token(logits[i], rows[i])
        for i, token in enumerate(chosen_tokens)
    } | failed_rows
    if rows_with_logprobs:
        sampled |= zip(
            rows_with_logprobs,
            _with_logprobs(logits, rows_with_logprobs, chosen_tokens, rows),
            strict=True,
        )
    return list(sampled.values())


def _process_logits(
    logits: Tensor, rows: Sequence[Sampler]
) -> tuple[Tensor, dict[int, SampledToken]]:
    """Apply the masks of grammars and the logits processors. Returns the new logits, and results
    without a token for the rows whose grammar or processors failed, by row."""
    constrained_rows = [
        i for i, row in enumerate(rows) if row.matcher is not None or row.processors
    ]
    failed_rows: dict[int, SampledToken] = {}
    if not constrained_rows:
        return logits, failed_rows
    has_processors = any(row.processors for row in rows)
    processed_logits = logits.to(torch.float32 if has_processors else logits.dtype, copy=True)
    for i in constrained_rows:
        try:
            if rows[i].matcher is not None:
                processed_logits[i].masked_fill_(~rows[i].allowed_tokens(logits), -torch.inf)
            if rows[i].processors:
                processed_logits[i] = rows[i].process(processed_logits[i])
        except RequestError as error:
            failed_rows[i] = SampledToken(None, error=str(error), cause=cause_of(error))
        except Exception as error:  # a grammar or a processor that fails ends only its own row
            log.exception("a mask or a logits processor failed")
            failed_rows[i] = SampledToken(None, error=f"{type(error).__name__}: {error}")
    for i in failed_rows:
        processed_logits[i] = torch.nan
    return processed_logits, failed_rows


def _no_token(logits: Tensor, row: Sampler) -> SampledToken:
    """The result for a row without a possible token: the model's logits are not finite, or the
    request forbids every token."""
    is_constrained = row.matcher is not None or row.processors
    return NO_TOKEN_LEFT if is_constrained and torch.isfinite(logits.max()) else NOT_FINITE


def _tensor_like(values: Sequence[Any], like: Tensor) -> Tensor:
    """A tensor of ``values`` on the device of ``like``, copied without waiting for the device."""
    return torch.tensor(values, device="cpu").to(like.device, non_blocking=True)


def _rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """The given rows of ``values``, in the order of ``rows``."""
    return (
        values if len(rows) == len(values) else values.index_select(0, _tensor_like(rows, values))
    )


def _put_rows(values: Tensor, rows: Sequence[int], target: Tensor) -> Tensor:
    """``target`` with ``values`` in the given rows, which are in ascending order."""
    if len(rows) == len(target):
        return values
    return target.index_copy(0, _tensor_like(rows, target), values)


class _Draw:
    """Draws tokens for rows of logits [rows, vocabulary] in float32. ``tokens`` has the results. In
    the rows of ``needs_sort``, top_p needs more tokens than were sorted: ``sort_and_draw`` draws
    their tokens, with the same random numbers."""

    def __init__(self, logits: Tensor, rows: Sequence[Sampler]) -> None:
        self.settings = [row.sampling for row in rows]
        row_generators = [row.generator(logits.device) for row in rows]
        self.log_noise = log_exponentials(row_generators, logits.shape[-1], logits.device)
        # lower temperatures would let the scaled logits overflow; at 1e-5 the most likely token
        # already has all of the probability
        temperatures = [max(setting.temperature, 1e-5) for setting in self.settings]
        divisors = _tensor_like(temperatures, logits)[:, None]
        self.scaled_logits = (logits - logits.amax(-1, keepdim=True)) / divisors
        if any(setting.min_p for setting in self.settings):
            # the largest logit is 0 here: log(min_p) is the logit with min_p times its probability
            min_logits = [
                math.log(setting.min_p) if setting.min_p else -math.inf for setting in self.settings
            ]
            is_below = self.scaled_logits < _tensor_like(min_logits, logits)[:, None]
            self.scaled_logits = self.scaled_logits.masked_fill(is_below, -torch.inf)
        self.needs_sort = logits.new_zeros(len(rows), dtype=torch.bool)
        nucleus_rows = [
            i for i, setting in enumerate(self.settings) if setting.top_k or setting.top_p < 1
        ]
        self.tokens = (
            (self.scaled_logits - self.log_noise).argmax(-1)
            if len(nucleus_rows) < len(rows)
            else self.needs_sort.long()
        )
        if nucleus_rows:
            tokens, needs_sort = self._draw_nucleus(nucleus_rows)
            self.tokens = _put_rows(tokens, nucleus_rows, self.tokens)
            self.needs_sort = _put_rows(needs_sort, nucleus_rows, self.needs_sort)

    def _draw_nucleus(self, nucleus_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw a token for each row with top_k or top_p. Returns the tokens, and whether more
        tokens of the row must be sorted to draw its token."""
        scaled = _rows_of(self.scaled_logits, nucleus_rows)
        log_noise = _rows_of(self.log_noise, nucleus_rows)
        settings, vocabulary = [self.settings[i] for i in nucleus_rows], scaled.shape[-1]
        candidate_count = min(
            vocabulary, max(MIN_SORTED_TOKENS, *(setting.top_k for setting in settings))
        )
        values, ids = scaled.topk(candidate_count)
        # log of the sum over the whole vocabulary, or with top_k over the k most likely tokens
        log_total = scaled.logsumexp(-1)
        limits = [min(setting.top_k or candidate_count, candidate_count) for setting in settings]
        top_k = _tensor_like(limits, scaled)[:, None]
        is_candidate = torch.arange(candidate_count, device=scaled.device) < top_k
        values = values.masked_fill(~is_candidate, -torch.inf)
        has_top_k = _tensor_like([bool(setting.top_k) for setting in settings], scaled)
        log_total = torch.where(has_top_k, values.logsumexp(-1), log_total)
        probabilities = (values - log_total[:, None]).exp()
        top_p = _tensor_like([setting.top_p for setting in settings], scaled)[:, None]
        tokens = _draw_from_nucleus(values, ids, log_noise, _nucleus_mask(probabilities, top_p))
        needs_sort = (probabilities.sum(-1, keepdim=True) < top_p)[:, 0] & ~has_top_k
        return tokens, needs_sort if candidate_count < vocabulary else torch.zeros_like(needs_sort)

    def sort_and_draw(self, row: int) -> int:
        """Sort all tokens of a row, and draw its token from its nucleus."""
        sorted_logits = self.scaled_logits[row : row + 1].sort(descending=True)
        top_p = torch.full_like(sorted_logits.values[:, :1], self.settings[row].top_p)
        in_nucleus = _nucleus_mask(torch.softmax(sorted_logits.values, -1), top_p)
        log_noise = self.log_noise[row : row + 1]
        return int(
            _draw_from_nucleus(sorted_logits.values, sorted_logits.indices, log_noise, in_nucleus)
        )


def _draw_from_nucleus(
    values: Tensor, ids: Tensor, log_noise: Tensor, in_nucleus: Tensor
) -> Tensor:
    """The token i of each row with the smallest E_i / p_i among the sorted tokens in the nucleus,
    [rows]. ``values`` [rows, n]: log p_i plus a constant of the row; ``ids`` [rows, n]: the token
    ids; ``log_noise`` [rows, vocabulary]: log E_i by token id."""
    scores = (values - log_noise.gather(-1, ids)).masked_fill(~in_nucleus, -torch.inf)
    winners = scores.argmax(-1, keepdim=True)
    return ids.gather(-1, winners)[:, 0]


def _nucleus_mask(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Which of the sorted probabilities [rows, n] are in the nucleus: the first ones that add up to
    ``top_p``, and always the first."""
    in_nucleus = probabilities.cumsum(-1) - probabilities < top_p
    in_nucleus[:, 0] = True
    return in_nucleus


def _with_logprobs(
    logits: Tensor,
    row_indices: Sequence[int],
    chosen_tokens: Sequence[int],
    rows: Sequence[Sampler],
) -> list[SampledToken]:
    """The results of the rows ``row_indices``, with the log-probabilities of the chosen token and
    of the most likely tokens."""
    counts = [rows[i].sampling.logprobs or 0 for i in row_indices]
    row_logits = logits[list(row_indices)].float()
    log_total = row_logits.logsumexp(-1, keepdim=True)
    ids = torch.tensor([chosen_tokens[i] for i in row_indices], device=logits.device)[:, None]
    logprobs = (row_logits.gather(-1, ids) - log_total)[:, 0].tolist()
    top = (row_logits - log_total).topk(min(max(*counts, 1), row_logits.shape[-1]))
    top_tokens = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        SampledToken(
            chosen_tokens[i], logprob, tuple(zip(indices[:count], values[:count], strict=True))
        )
        for i, logprob, count, (indices, values) in zip(
            row_indices, logprobs, counts, top_tokens, strict=True
        )
    ]
