"""Sample the next token of each row of a batch from its logits.

    grammar's mask → processors → temperature → min_p → top_k → top_p
    → argmin of E_i / p_i over tokens i, where E_i is an exponential random number → token

A row is the answer to one request. Each row has its own random generator and draws one number E_i
for each token i of the vocabulary, so its tokens do not depend on the other rows of the batch. The
argmin is token i with probability p_i. Sorting the vocabulary is slow, so only the 1,024 most
likely tokens are sorted (with a larger top_k, so many); if the tokens that top_p selects are not
all among them, the row is sorted in full. The processors (``processors.py``) change the logits as
the request's fields say, such as ``logit_bias``.
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
from veneer.serve.requests import ErrorKind, RequestError, Sampling, error_kind_of

log = logging.getLogger("veneer.serve")

#: at least this many of the most likely tokens are sorted to find the tokens that top_p selects
MIN_SORTED_TOKENS = 1024


@dataclass(frozen=True)
class SampledToken:
    """The next token of a row, or the reason why there is none.

    Fields:
        token: its id; None if no token can be sampled.
        logprob: its log-probability, if the request asks for log-probabilities.
        top: (id, log-probability) of the most likely tokens, as many as ``Sampling.logprobs``.
        error, error_kind: if ``token`` is None, the message and its kind.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    error_kind: ErrorKind | None = None


NOT_FINITE = SampledToken(None, error="the model's logits are no finite numbers")
NO_TOKEN_LEFT = SampledToken(
    None,
    error=sentence(
        "no token that the fields of the request leave to choose from",
        "one at each place of the answer",
        "relax allowed_token_ids, bad_words, logit_bias, min_tokens or the grammar",
    ),
    error_kind="no_token_left",
)


class Sampler:
    """The sampling state of one row of the batch, which answers one request.

    Args:
        matcher: a matcher of llguidance, which computes the tokens that the request's grammar or
            JSON schema allows next; None without a grammar.
        processors: they change the row's logits before sampling.
        layout: limits the whitespace of a JSON answer; None: no limit.
    """

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
        self._sampled_ids: list[int] = []

    def generator(self, device: torch.device) -> torch.Generator:
        """The random generator of the row on ``device``, made and seeded at the first call."""
        if self._generator is None:
            seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
            self._generator = torch.Generator(device).manual_seed(seed % 2**63)
        return self._generator

    def accept(self, token: int) -> bool:
        """Record the sampled ``token`` and advance the grammar by it. Returns whether the grammar
        is complete, so that the answer must end; False without a grammar. ``RequestError``: the
        grammar exceeds the limits of llguidance, or no text matches it."""
        if self.processors:
            self._sampled_ids.append(token)
        if self.matcher is None:
            return False
        if self.layout is not None:
            self.layout.accept(token)
        if not self.matcher.consume_token(token) or self.matcher.is_error():
            raise error_of(self.matcher, "that an answer cannot follow")
        return self.matcher.is_stopped()

    def allowed_tokens(self, logits: Tensor) -> Tensor:
        """The tokens that the grammar and the layout allow next, as a mask [vocabulary] of bool on
        the device of ``logits``."""
        allowed = allowed_tokens(self.matcher, logits)
        if self.layout is not None and self.layout.is_full:
            is_blank = self.layout.is_blank.to(logits.device)
            allowed[: len(is_blank)] &= ~is_blank
        return allowed

    def process(self, logits: Tensor) -> Tensor:
        """The row's ``logits``, [vocabulary] in float32, as changed by its processors."""
        sampled_ids = torch.tensor([self._sampled_ids], dtype=torch.long, device="cpu")
        sampled_ids, scores = sampled_ids.to(logits.device, non_blocking=True), logits[None]
        for processor in self.processors:
            scores = processor(sampled_ids, scores)
        return scores[0]


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken]:
    """Sample the next token of each row of ``logits`` [rows, vocabulary]; ``samplers`` has the
    sampling state of each row. A row for which this fails gets a result without a token."""
    processed_logits, failed_rows = _process_logits(logits, samplers)
    largest_logits, tokens = processed_logits.max(dim=-1)
    device_results = [torch.isfinite(largest_logits), tokens]
    random_rows = [i for i, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if random_rows:
        draw = _Draw(
            _rows_of(processed_logits, random_rows).float(), [samplers[i] for i in random_rows]
        )
        device_results[1] = _put_rows(draw.tokens, random_rows, tokens)
        no_row = torch.zeros_like(tokens, dtype=torch.bool)
        device_results.append(_put_rows(draw.needs_sort, random_rows, no_row))
    # copy all results to the CPU at once, because each copy waits until the device has computed
    packed_results = torch.stack([result.to(tokens.dtype) for result in device_results])
    is_finite, chosen_tokens, *needs_sort_rows = packed_results.tolist()
    for index, i in enumerate(random_rows):
        if is_finite[i] and needs_sort_rows[0][i]:
            chosen_tokens[i] = draw.sort_and_draw(index)  # pyright: ignore[reportPossiblyUnboundVariable]
    rows_with_logprobs = [
        i
        for i, sampler in enumerate(samplers)
        if sampler.sampling.logprobs is not None and is_finite[i]
    ]
    results = {
        i: SampledToken(token) if is_finite[i] else _no_token(logits[i], samplers[i])
        for i, token in enumerate(chosen_tokens)
    } | failed_rows
    if rows_with_logprobs:
        results |= zip(
            rows_with_logprobs,
            _with_logprobs(logits, rows_with_logprobs, chosen_tokens, samplers),
            strict=True,
        )
    return list(results.values())


def _process_logits(
    logits: Tensor, samplers: Sequence[Sampler]
) -> tuple[Tensor, dict[int, SampledToken]]:
    """Apply each row's grammar, which sets the logits of forbidden tokens to −inf, and its logits
    processors. ``logits`` is not changed.

    Returns:
        (the new logits, for each row whose grammar or processors failed the result without a
        token). The logits of the failed rows are NaN.
    """
    constrained_rows = [
        i for i, sampler in enumerate(samplers) if sampler.matcher is not None or sampler.processors
    ]
    failed_results: dict[int, SampledToken] = {}
    if not constrained_rows:
        return logits, failed_results
    has_processors = any(sampler.processors for sampler in samplers)
    processed_logits = logits.to(torch.float32 if has_processors else logits.dtype, copy=True)
    for i in constrained_rows:
        try:
            if samplers[i].matcher is not None:
                processed_logits[i].masked_fill_(~samplers[i].allowed_tokens(logits), -torch.inf)
            if samplers[i].processors:
                processed_logits[i] = samplers[i].process(processed_logits[i])
        except RequestError as error:
            failed_results[i] = SampledToken(
                None, error=str(error), error_kind=error_kind_of(error)
            )
        except Exception as error:  # must not end the other rows
            log.exception("a mask or a logits processor failed")
            failed_results[i] = SampledToken(None, error=f"{type(error).__name__}: {error}")
    for i in failed_results:
        processed_logits[i] = torch.nan
    return processed_logits, failed_results


def _no_token(logits: Tensor, sampler: Sampler) -> SampledToken:
    """The result for a row without a token to choose: either the model's ``logits`` [vocabulary]
    are not finite, or the request forbids every token."""
    is_constrained = sampler.matcher is not None or sampler.processors
    return NO_TOKEN_LEFT if is_constrained and torch.isfinite(logits.max()) else NOT_FINITE


def _tensor_like(values: Sequence[Any], device_tensor: Tensor) -> Tensor:
    """A tensor of ``values`` on the device of ``device_tensor``, copied to it without waiting until
    the device has finished its earlier work."""
    return torch.tensor(values, device="cpu").to(device_tensor.device, non_blocking=True)


def _rows_of(values: Tensor, row_indices: Sequence[int]) -> Tensor:
    """The rows of ``values`` with these indices, in this order."""
    return (
        values
        if len(row_indices) == len(values)
        else values.index_select(0, _tensor_like(row_indices, values))
    )


def _put_rows(values: Tensor, row_indices: Sequence[int], target_tensor: Tensor) -> Tensor:
    """``target_tensor`` with its rows ``row_indices``, in ascending order, replaced by
    ``values``."""
    if len(row_indices) == len(target_tensor):
        return values
    return target_tensor.index_copy(0, _tensor_like(row_indices, target_tensor), values)


class _Draw:
    """Draws a token for each row of ``logits`` [rows, vocabulary] in float32, as soon as it is
    created.

    Attributes:
        tokens: the results, [rows].
        needs_sort: the rows whose result is wrong, [rows] of bool: top_p selects more tokens than
            were sorted. For these, call ``sort_and_draw``, which uses the same random numbers.
    """

    def __init__(self, logits: Tensor, samplers: Sequence[Sampler]) -> None:
        self.settings = [sampler.sampling for sampler in samplers]
        row_generators = [sampler.generator(logits.device) for sampler in samplers]
        self.log_noise = log_exponentials(row_generators, logits.shape[-1], logits.device)
        # at least 1e-5, because lower temperatures would let the scaled logits overflow; at 1e-5
        # the most likely token already has all of the probability
        temperatures = [max(sampling.temperature, 1e-5) for sampling in self.settings]
        divisors = _tensor_like(temperatures, logits)[:, None]
        self.scaled_logits = (logits - logits.amax(-1, keepdim=True)) / divisors
        if any(sampling.min_p for sampling in self.settings):
            # the largest scaled logit is 0, so the logit of a token with min_p times the largest
            # probability is log(min_p)
            min_logits = [
                math.log(sampling.min_p) if sampling.min_p else -math.inf
                for sampling in self.settings
            ]
            is_below = self.scaled_logits < _tensor_like(min_logits, logits)[:, None]
            self.scaled_logits = self.scaled_logits.masked_fill(is_below, -torch.inf)
        self.needs_sort = logits.new_zeros(len(samplers), dtype=torch.bool)
        nucleus_rows = [
            i for i, sampling in enumerate(self.settings) if sampling.top_k or sampling.top_p < 1
        ]
        self.tokens = (
            (self.scaled_logits - self.log_noise).argmax(-1)
            if len(nucleus_rows) < len(samplers)
            else self.needs_sort.long()
        )
        if nucleus_rows:
            tokens, needs_sort = self._draw_nucleus(nucleus_rows)
            self.tokens = _put_rows(tokens, nucleus_rows, self.tokens)
            self.needs_sort = _put_rows(needs_sort, nucleus_rows, self.needs_sort)

    def _draw_nucleus(self, nucleus_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw a token for each of the rows ``nucleus_rows``, which have top_k or top_p. Only the
        most likely tokens are sorted.

        Returns:
            (the tokens [n], whether top_p selects more tokens of the row than were sorted, so that
            its token must be drawn again by ``sort_and_draw`` [n])
        """
        scaled_logits = _rows_of(self.scaled_logits, nucleus_rows)
        log_noise = _rows_of(self.log_noise, nucleus_rows)
        settings, vocabulary_size = (
            [self.settings[i] for i in nucleus_rows],
            scaled_logits.shape[-1],
        )
        candidate_count = min(
            vocabulary_size, max(MIN_SORTED_TOKENS, *(sampling.top_k for sampling in settings))
        )
        sorted_logits, sorted_ids = scaled_logits.topk(candidate_count)
        # log of the sum of exp(logit) over the tokens among which top_p selects: with top_k, the k
        # most likely ones; otherwise the whole vocabulary
        log_total = scaled_logits.logsumexp(-1)
        candidate_counts = [
            min(sampling.top_k or candidate_count, candidate_count) for sampling in settings
        ]
        top_k = _tensor_like(candidate_counts, scaled_logits)[:, None]
        is_candidate = torch.arange(candidate_count, device=scaled_logits.device) < top_k
        sorted_logits = sorted_logits.masked_fill(~is_candidate, -torch.inf)
        has_top_k = _tensor_like([bool(sampling.top_k) for sampling in settings], scaled_logits)
        log_total = torch.where(has_top_k, sorted_logits.logsumexp(-1), log_total)
        probabilities = (sorted_logits - log_total[:, None]).exp()
        top_p = _tensor_like([sampling.top_p for sampling in settings], scaled_logits)[:, None]
        tokens = _draw_from_nucleus(
            sorted_logits, sorted_ids, log_noise, _nucleus_mask(probabilities, top_p)
        )
        needs_sort = (probabilities.sum(-1, keepdim=True) < top_p)[:, 0] & ~has_top_k
        return tokens, needs_sort if candidate_count < vocabulary_size else torch.zeros_like(
            needs_sort
        )

    def sort_and_draw(self, row_index: int) -> int:
        """Sort all tokens of a row, and draw a token from those that top_p selects. The noise is
        that of the first draw."""
        full_sort = self.scaled_logits[row_index : row_index + 1].sort(descending=True)
        top_p = torch.full_like(full_sort.values[:, :1], self.settings[row_index].top_p)
        in_nucleus = _nucleus_mask(torch.softmax(full_sort.values, -1), top_p)
        log_noise = self.log_noise[row_index : row_index + 1]
        return int(_draw_from_nucleus(full_sort.values, full_sort.indices, log_noise, in_nucleus))


def _draw_from_nucleus(
    sorted_logits: Tensor, sorted_ids: Tensor, log_noise: Tensor, in_nucleus: Tensor
) -> Tensor:
    """Draw a token from each row's nucleus (the most likely tokens, which top_k and top_p select):
    the token i with the smallest E_i / p_i, where p_i is its probability and E_i its random number.

    Args:
        sorted_logits: [rows, n], log p_i plus a constant of the row, in descending order.
        sorted_ids: [rows, n], the token ids in that order.
        log_noise: [rows, vocabulary], log E_i by token id.
        in_nucleus: [rows, n] of bool, which of the sorted tokens are in the nucleus.

    Returns:
        The token ids, [rows].
    """
    scores = (sorted_logits - log_noise.gather(-1, sorted_ids)).masked_fill(~in_nucleus, -torch.inf)
    winner_positions = scores.argmax(-1, keepdim=True)
    return sorted_ids.gather(-1, winner_positions)[:, 0]


def _nucleus_mask(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Which of the probabilities [rows, n], in descending order, are in the nucleus: the fewest
    first ones that add up to ``top_p`` [rows, 1] or more, but at least one."""
    in_nucleus = probabilities.cumsum(-1) - probabilities < top_p
    in_nucleus[:, 0] = True
    return in_nucleus


def _with_logprobs(
    logits: Tensor,
    row_indices: Sequence[int],
    chosen_tokens: Sequence[int],
    samplers: Sequence[Sampler],
) -> list[SampledToken]:
    """The results of the rows ``row_indices``, with the log-probabilities of the chosen token and
    of the most likely tokens. They are computed from the model's own ``logits`` [rows, vocabulary]
    of all rows, before the changes that the requests ask for."""
    top_counts = [samplers[i].sampling.logprobs or 0 for i in row_indices]
    row_logits = logits[list(row_indices)].float()
    log_total = row_logits.logsumexp(-1, keepdim=True)
    ids = torch.tensor([chosen_tokens[i] for i in row_indices], device=logits.device)[:, None]
    logprobs = (row_logits.gather(-1, ids) - log_total)[:, 0].tolist()
    top_tokens = (row_logits - log_total).topk(min(max(*top_counts, 1), row_logits.shape[-1]))
    top_lists = zip(top_tokens.indices.tolist(), top_tokens.values.tolist(), strict=True)
    return [
        SampledToken(
            chosen_tokens[i],
            logprob,
            tuple(zip(top_ids[:top_count], top_logprobs[:top_count], strict=True)),
        )
        for i, logprob, top_count, (top_ids, top_logprobs) in zip(
            row_indices, logprobs, top_counts, top_lists, strict=True
        )
    ]
