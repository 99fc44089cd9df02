"""The number of prompt tokens that a step of the engine computes while other requests generate
tokens (the running rows), from measured times.

    prompt tokens of a step = seconds that prompts may take / measured seconds of a prompt token

A few prompt tokens join the forward call of the running rows. They take little time there, because
that call reads the model's weights in any case. More tokens get a call of their own.

The seconds are ``gap`` if it is given, and otherwise ``PROMPT_SHARE`` of the duration of a decode
call, so that the time between two tokens of an answer stays below twice that duration even if
measurements lag behind. If there are more prompts than half of the running rows, the seconds grow
in proportion (12 times for 24 prompts and 4 rows), since only few answers then wait for many
prompts.

Prompts that arrive together with the running requests are all computed first (``Batch.is_burst``).
"""

from __future__ import annotations

from veneer.models.decode.forward import MAX_TOKENS_TOGETHER

#: the seconds for prompts in a step, as a share of the duration of a decode call
PROMPT_SHARE = 0.7

#: up to this many times more or fewer rows, the duration of the latest decode call is used
MAX_ROW_GROWTH = 1.25

#: the prompt tokens of a step are a multiple of this, so that many steps have the same number
TOKEN_MULTIPLE = 8


class PrefillBudget:
    """Measures calls, and computes from their durations how many prompt tokens a step takes.

    Args:
        gap: seconds of a step that prompts may take while rows run; None: in proportion to the
            duration of a decode call.
        max_prompt_tokens: the most prompt tokens of a step. While no row runs, every step may take
            so many.
        max_scored_tokens: the same for prompts whose log-probabilities are asked for; None:
            ``max_prompt_tokens``.
    """

    def __init__(
        self, gap: float | None, max_prompt_tokens: int, max_scored_tokens: int | None = None
    ) -> None:
        self.gap, self.max_prompt_tokens = gap, max_prompt_tokens
        self.max_scored_tokens = (
            max_prompt_tokens if max_scored_tokens is None else max_scored_tokens
        )
        # recent seconds of a decode call, and of a prompt token: in a call for prompts alone, in a
        # call with running rows, and in a call that scores prompts; 0.0: not measured yet
        self._decode_seconds = self._alone_token_seconds = 0.0
        self._shared_token_seconds = self._scored_token_seconds = 0.0
        self._decode_rows = 0  # of the latest decode call

    def note_fill(self, tokens: int, seconds: float, *, scored: bool = False) -> None:
        """Record the duration of a call for ``tokens`` prompt tokens, including padding.
        ``scored``: whether the call computed the log-probabilities of prompts."""
        if scored:
            self._scored_token_seconds = _average(self._scored_token_seconds, seconds / tokens)
        else:
            self._alone_token_seconds = _average(self._alone_token_seconds, seconds / tokens)

    def note_decode(self, rows: int, seconds: float) -> None:
        """Record the duration of a decode call."""
        self._decode_seconds = _average(
            self._decode_seconds if self._knows_decode(rows) else 0.0, seconds
        )
        self._decode_rows = rows

    def note_together(self, tokens: int, seconds: float) -> None:
        """Record the duration of a decode call that also computed ``tokens`` prompt tokens."""
        added = max(seconds - self._decode_seconds, seconds / 20)
        self._shared_token_seconds = _average(
            self._shared_token_seconds or self._alone_token_seconds, added / tokens
        )

    def tokens(self, running: int, filling: int, max_shared: int = MAX_TOKENS_TOGETHER) -> int:
        """How many tokens of ``filling`` prompts the next step computes while ``running`` rows run.
        Up to ``max_shared`` tokens join the call of the rows. 0 if the duration of a decode call
        for so many rows alone is not known: the step then only decodes, and measures it."""
        if not running or not self._alone_token_seconds:
            return self.max_prompt_tokens
        if not self._knows_decode(running):
            return 0
        seconds = self._prompt_seconds(running, filling)
        count = int(seconds / (self._shared_token_seconds or self._alone_token_seconds))
        if count > max_shared:
            count = max(max_shared, int(seconds / self._alone_token_seconds))
        return min(self.max_prompt_tokens, max(TOKEN_MULTIPLE, count - count % TOKEN_MULTIPLE))

    def scored_tokens(self, running: int, filling: int) -> int:
        """How many tokens the next step computes of ``filling`` prompts whose log-probabilities are
        asked for, in a call of their own. The arguments and the case 0 are those of ``tokens``."""
        token_seconds = self._scored_token_seconds or self._alone_token_seconds
        if not running or not token_seconds:
            return self.max_scored_tokens
        if not self._knows_decode(running):
            return 0
        count = int(self._prompt_seconds(running, filling) / token_seconds)
        return min(self.max_scored_tokens, max(TOKEN_MULTIPLE, count - count % TOKEN_MULTIPLE))

    def _knows_decode(self, rows: int) -> bool:
        """Whether the latest call that only decoded had about ``rows`` rows. If many rows were
        added since, their time would be mistaken for that of prompts (``note_together``)."""
        return self._decode_rows <= MAX_ROW_GROWTH * rows and rows <= (
            MAX_ROW_GROWTH * self._decode_rows
        )

    def _prompt_seconds(self, running: int, filling: int) -> float:
        """Seconds of a step that prompts may take beside running rows."""
        share = PROMPT_SHARE * max(1.0, 2 * filling / running)
        return self._decode_seconds * share if self.gap is None else self.gap


def _average(before: float, seconds: float) -> float:
    """A moving average in which the latest duration counts half. ``before``: the average so far; 0
    if nothing was measured."""
    return (before + seconds) / 2 if before else seconds
