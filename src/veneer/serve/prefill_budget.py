"""The number of prompt tokens that a step computes beside running rows, from measured times.

    tokens = seconds that prompts may take / recent seconds of a prompt token

A few tokens are computed in the call of the running rows, and cost what they add to it: its weights
are read in any case. More of them are a call of their own. Without a ``gap`` prompts may take
``SHARE`` of the time that the running rows take by themselves, so that the time between two tokens
stays below twice that, measurements being late. Where more prompts wait than half as many rows run,
they may take more, by as much: with 4 rows and 24 prompts 12 times. Few rows are kept waiting for
them by that. Requests that arrive together have all of their prompts computed first
(``Batch.is_burst``).
"""

from __future__ import annotations

from veneer.models.decode.forward import TOGETHER

#: the time for prompts as a share of the time of a decode call
SHARE = 0.7

#: by what factor the rows may be more or fewer than those of the latest decode call
MOST_ROW_GROWTH = 1.25

#: tokens of a step are a multiple of this, so that many steps have the same number
MULTIPLE = 8


class PrefillBudget:
    """``gap``: seconds of a step that prompts may take while rows run; None follows the decode
    calls. ``most``: tokens of prompts in any step, and in all steps in which no row runs;
    ``most_scored`` of prompts that are scored, whose tokens take longer."""

    def __init__(self, gap: float | None, most: int, most_scored: int | None = None) -> None:
        self.gap, self.most = gap, most
        self.most_scored = most if most_scored is None else most_scored
        #: seconds of late: of a decode call, and of a prompt's token in a call of its own and in
        #: one together with running rows, and of one that is scored
        self._decode = self._apart = self._together = self._scored = 0.0
        self._decode_rows = 0  # of the latest decode call

    def note_fill(self, tokens: int, seconds: float, *, scored: bool = False) -> None:
        """A call for so many tokens of prompts, padding included, took so long."""
        if scored:
            self._scored = _average(self._scored, seconds / tokens)
        else:
            self._apart = _average(self._apart, seconds / tokens)

    def note_decode(self, rows: int, seconds: float) -> None:
        """Record the duration of a decode call."""
        self._decode = _average(self._decode if self._knows_decode(rows) else 0.0, seconds)
        self._decode_rows = rows

    def note_together(self, tokens: int, seconds: float) -> None:
        """Record the duration of a decode call with ``tokens`` prompt tokens."""
        added = max(seconds - self._decode, seconds / 20)
        self._together = _average(self._together or self._apart, added / tokens)

    def tokens(self, running: int, filling: int, together: int = TOGETHER) -> int:
        """How many tokens the next step computes of ``filling`` prompts, beside ``running`` rows;
        up to ``together`` are computed in their call. 0 where it is not known how long so
        many rows take by themselves."""
        if not running or not self._apart:
            return self.most
        if not self._knows_decode(running):
            return 0
        seconds = self._seconds(running, filling)
        count = int(seconds / (self._together or self._apart))
        if count > together:
            count = max(together, int(seconds / self._apart))
        return min(self.most, max(MULTIPLE, count - count % MULTIPLE))

    def scored_tokens(self, running: int, filling: int) -> int:
        """The same of prompts that are scored, in a call of their own."""
        token_seconds = self._scored or self._apart
        if not running or not token_seconds:
            return self.most_scored
        if not self._knows_decode(running):
            return 0
        count = int(self._seconds(running, filling) / token_seconds)
        return min(self.most_scored, max(MULTIPLE, count - count % MULTIPLE))

    def _knows_decode(self, rows: int) -> bool:
        """Whether the latest decode call had about as many rows. While prompts arrive, steps are
        calls together, and what further rows take would count as the time of the prompts."""
        return self._decode_rows <= MOST_ROW_GROWTH * rows and rows <= (
            MOST_ROW_GROWTH * self._decode_rows
        )

    def _seconds(self, running: int, filling: int) -> float:
        """Seconds of a step that prompts may take beside running rows."""
        share = SHARE * max(1.0, 2 * filling / running)
        return self._decode * share if self.gap is None else self.gap


def _average(before: float, seconds: float) -> float:
    """A moving average in which the latest duration counts half."""
    return (before + seconds) / 2 if before else seconds
