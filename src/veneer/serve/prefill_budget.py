"""Choose the number of prompt tokens that a step of the engine computes while other requests
generate tokens (the running rows), from the measured durations of earlier forward calls.

    prompt tokens of a step = seconds that prompts may take / measured seconds of a prompt token

A few prompt tokens are computed in the decode call, the forward call that computes the next token
of each running row. They take little time there, because that call reads the model's weights in any
case. More tokens get a forward call of their own.

If the operator sets ``gap``, prompts may take ``gap`` seconds of a step. Otherwise they may take
``PROMPT_SHARE`` of the duration of a decode call, so that the time between two tokens of an answer
stays below twice that duration, even while the measured durations are out of date. If there are
more prompts than half of the running rows, this share grows in proportion (12 times for 24 prompts
and 4 rows), since only few answers then wait for many prompts.

These limits do not apply to prompts that arrive at the same time as the running requests: they are
all computed before the running requests go on (``Batch.is_burst``).
"""

from __future__ import annotations

from veneer.models.decode.forward import MAX_TOKENS_TOGETHER

#: the seconds that prompts may take in a step, as a share of the duration of a decode call
PROMPT_SHARE = 0.7

#: the measured duration of a decode call is used for other numbers of rows too, as long as the
#: larger number is at most this many times the smaller one
MAX_ROW_GROWTH = 1.25

#: the number of prompt tokens of a step is a multiple of this number, so that many steps compute
#: equally many tokens
TOKEN_MULTIPLE = 8


class PrefillBudget:
    """Records the durations of forward calls, and computes from them how many prompt tokens the
    next step may compute.

    Args:
        gap: seconds of a step that prompts may take while rows run; None: in proportion to the
            duration of a decode call.
        max_prompt_tokens: the most prompt tokens of a step. While no row runs, every step may
            compute so many.
        max_scored_tokens: the most tokens of a step that computes prompts whose log-probabilities
            a client asks for; None: ``max_prompt_tokens``.
    """

    def __init__(
        self, gap: float | None, max_prompt_tokens: int, max_scored_tokens: int | None = None
    ) -> None:
        self.gap, self.max_prompt_tokens = gap, max_prompt_tokens
        self.max_scored_tokens = (
            max_prompt_tokens if max_scored_tokens is None else max_scored_tokens
        )
        # moving averages: the seconds of a decode call, and the seconds of a prompt token in a call
        # for prompts alone, in a decode call, and in a call that computes the log-probabilities of
        # prompts; 0.0: not measured yet
        self._decode_seconds = self._alone_token_seconds = 0.0
        self._shared_token_seconds = self._scored_token_seconds = 0.0
        self._decode_rows = 0  # number of rows of the latest decode call

    def note_fill(self, tokens: int, seconds: float, *, scored: bool = False) -> None:
        """Record the duration of a call that computed ``tokens`` prompt tokens, including padding,
        and nothing else. ``scored``: whether it computed log-probabilities of prompts."""
        if scored:
            self._scored_token_seconds = _average(self._scored_token_seconds, seconds / tokens)
        else:
            self._alone_token_seconds = _average(self._alone_token_seconds, seconds / tokens)

    def note_decode(self, row_count: int, seconds: float) -> None:
        """Record the duration of a call that computed one token for each of ``row_count`` rows. If
        the last such call had far more or fewer rows, its duration is forgotten."""
        self._decode_seconds = _average(
            self._decode_seconds if self._knows_decode(row_count) else 0.0, seconds
        )
        self._decode_rows = row_count

    def note_together(self, tokens: int, seconds: float) -> None:
        """Record the duration of a decode call that also computed ``tokens`` prompt tokens. The
        seconds beyond those of a decode call alone are counted for the prompt tokens."""
        added_seconds = max(seconds - self._decode_seconds, seconds / 20)
        self._shared_token_seconds = _average(
            self._shared_token_seconds or self._alone_token_seconds, added_seconds / tokens
        )

    def tokens(
        self,
        running_rows: int,
        prompt_count: int,
        max_shared_tokens: int = MAX_TOKENS_TOGETHER,
        *,
        scored: bool = False,
    ) -> int:
        """How many prompt tokens the next step computes, for ``prompt_count`` prompts together.

        Args:
            running_rows: the number of rows that generate tokens.
            prompt_count: the number of prompts that are not fully computed.
            max_shared_tokens: the most prompt tokens that are computed in the decode call.
            scored: whether a client asks for the log-probabilities of these prompts, which
                therefore have a call of their own.

        Returns:
            The number; the most prompt tokens of a step if no row runs or no call for prompts was
            measured yet; 0 if the duration of a decode call with about ``running_rows`` rows is
            not known, so that the next step only decodes and its duration can be measured.
        """
        max_tokens = self.max_scored_tokens if scored else self.max_prompt_tokens
        # seconds of a prompt token in a call for prompts alone, and in a decode call, in which
        # there are never scored prompts
        alone_seconds = (self._scored_token_seconds if scored else 0.0) or self._alone_token_seconds
        shared_seconds = (0.0 if scored else self._shared_token_seconds) or alone_seconds
        if not running_rows or not alone_seconds:
            return max_tokens
        if not self._knows_decode(running_rows):
            return 0
        share = PROMPT_SHARE * max(1.0, 2 * prompt_count / running_rows)
        seconds = self._decode_seconds * share if self.gap is None else self.gap
        token_count = int(seconds / shared_seconds)
        if token_count > max_shared_tokens:
            token_count = max(max_shared_tokens, int(seconds / alone_seconds))
        return min(max_tokens, max(TOKEN_MULTIPLE, token_count - token_count % TOKEN_MULTIPLE))

    def _knows_decode(self, rows: int) -> bool:
        """Whether the latest call that only decoded had about ``rows`` rows. Otherwise its duration
        says little about a call with ``rows`` rows, and ``note_together`` would count the time of
        added rows as time of prompt tokens."""
        return self._decode_rows <= MAX_ROW_GROWTH * rows and rows <= (
            MAX_ROW_GROWTH * self._decode_rows
        )


def _average(previous_average: float, seconds: float) -> float:
    """The moving average after a new duration ``seconds``, which counts half. ``previous_average``:
    0 if nothing was measured before."""
    return (previous_average + seconds) / 2 if previous_average else seconds
