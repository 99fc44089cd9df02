"""What a sweep shows while it runs: a live table on a terminal, and a line an evaluation
elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from veneer.train.callbacks import say
from veneer.train.sweep.record import FINISHED, RUNNING, WAITING, Candidate, State, words

#: candidates that the table shows; of more, the best
ROWS = 30


class Progress:
    """Called with the state after each step. Use as a context manager around the sweep."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running and self.live is not None:
            self.live.stop()

    def __call__(self, state: State, steps: int) -> None:
        own = state.of(state.cohort)
        if self.live is not None:
            if not self._running:  # not before there is something to show
                self.live.start()
                self._running = True
            self.live.update(table(state, steps), refresh=True)
            return
        now = [one for one in own if one.measured and one.measured[-1][0] == state.step]
        if now:
            best = min(now, key=_loss)
            left = sum(one.status in (RUNNING, FINISHED) for one in own)
            text = (
                f"step {state.step:>5}/{steps}  {left} of {len(own)} go on; best {best.name}"
                f" ({words(best.changes)})"
            )
            told = (
                "mean loss in training"
                if best.judged and best.judged[-1][0] == state.step
                else "evaluation"
            )
            say(self.console, f"{text}, {told} {_loss(best):.4f}")


def _loss(one: Candidate) -> float:
    return float("inf") if one.loss is None else one.loss


def table(state: State, steps: int) -> Table:
    """The candidates, the best first: those of this cohort that run, those that ended, those that
    wait."""
    order = {RUNNING: 0, FINISHED: 0, WAITING: 2}
    ordered = sorted(state.candidates, key=lambda one: (order.get(one.status, 1), _loss(one)))
    made = Table(box=None, header_style="bold", caption_justify="left")
    for head in ("", "settings", "step", "loss", "held out", ""):
        made.add_column(
            head,
            justify="right" if head in ("step", "loss", "held out") else "left",
            overflow="fold",
        )
    for one in ordered[:ROWS]:
        last = f"{one.losses[-1]:.4f}" if one.losses else ""
        held = f"{one.evaluations[-1][1]['loss']:.4f}" if one.evaluations else ""
        style = "" if one.status in (RUNNING, FINISHED) else "dim"
        made.add_row(
            one.name,
            words(one.changes),
            f"{len(one.losses)}/{steps}",
            last,
            held,
            one.status,
            style=style,
        )
    if len(ordered) > ROWS:
        made.caption = f"and {len(ordered) - ROWS} more"
    return made
