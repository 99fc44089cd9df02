"""How many tokens of prompts a step computes beside running rows: by measured time.

    tokens = seconds that prompts may take / seconds that a token of them took of late

Between two tokens of a running row lie a decode call and a call for prompts. Without a ``gap``, the
second may take as long as the first, so that a gap at most doubles; and where more prompts wait
than rows run, as many times as long: most of those who wait are served by that.
"""

from __future__ import annotations

from veneer.serve.attention import BLOCK


class Pace:
    """``gap``: seconds of a step that prompts may take while rows run; None follows the decode
    calls. ``most``: tokens of prompts in any step, and in all steps in which no row runs."""

    def __init__(self, gap: float | None, most: int) -> None:
        self.gap, self.most = gap, most
        self._token: float | None = None  # seconds of a prompt's token, of late
        self._decode = 0.0  # seconds of a decode call, of late

    def note_fill(self, tokens: int, seconds: float) -> None:
        """A call for so many tokens of prompts, padding included, took so long."""
        token = seconds / tokens
        self._token = token if self._token is None else (self._token + token) / 2

    def note_decode(self, seconds: float) -> None:
        """A call for a token of each running row took so long."""
        self._decode = (self._decode + seconds) / 2 if self._decode else seconds

    def tokens(self, running: int, filling: int) -> int:
        """How many tokens the next step computes of ``filling`` prompts, beside ``running`` rows."""
        if not running or not self._token:
            return self.most
        seconds = self._decode * max(1.0, filling / running) if self.gap is None else self.gap
        count = int(seconds / self._token)
        return min(self.most, max(BLOCK, count - count % BLOCK))
