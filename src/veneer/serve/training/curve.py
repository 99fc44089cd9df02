"""The loss curve of a run, as a bounded number of points.

    pass, pass, step  ──>  mean loss per token of these passes  ──>  a point, or part of one

A curve is saved with its run's state. Later points are computed again from the journal, since the
bodies and answers of requests contain the losses and the numbers of tokens. A killed process
therefore loses no point, although nothing is written at a step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from veneer.fileio.atomic import write_whole
from veneer.serve.training.losses import LOSSES, Datum
from veneer.serve.training.store import Store
from veneer.serve.training.wire import MESSAGES, read_pass

FILE = "curve.json"
#: the most points of a curve; when it has so many, each pair of points is replaced by its mean
MOST = 128
#: seconds over which a rate is averaged, and the most batches that are stored for it
WINDOW, SPANS = 10.0, 64
LOSS = "loss:sum"


@dataclass(eq=False)
class Curve:
    """``points``: (step, loss per token), each the mean of the last ``every`` losses. One thread
    changes it; others may read it meanwhile."""

    steps: int = 0
    tokens: int = 0  # trained on
    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)
    begun: tuple[int, float] = (0, 0.0)  # the next point: number of losses, and their sum
    passes: tuple[float, float] = (0.0, 0.0)  # since the last step: sums of losses and of weights

    def add_pass(self, loss: float, name: str, data: Sequence[Datum]) -> None:
        """Add a pass with a backward. ``loss``: the sum over all tokens of the loss ``name``."""
        self.passes = self.passes[0] + loss, self.passes[1] + _weight(name, data)
        self.tokens += sum(len(datum.tokens) for datum in data)

    def add_step(self) -> None:
        (total, weight), self.passes, self.steps = self.passes, (0.0, 0.0), self.steps + 1
        if not weight:
            return
        self.begun = self.begun[0] + 1, self.begun[1] + total / weight
        if self.begun[0] == self.every:
            points, self.begun = self.all_points(), (0, 0.0)
            if len(points) == MOST:
                pairs = zip(points[::2], points[1::2], strict=True)
                points = [(last, (loss + next_loss) / 2) for (_, loss), (last, next_loss) in pairs]
                self.every *= 2
            self.points = points

    def drop_passes(self) -> None:
        """Drop the passes since the last step: a loaded checkpoint has replaced the weights and
        discarded the gradients."""
        self.passes = 0.0, 0.0

    def all_points(self) -> list[tuple[int, float]]:
        """The points, and the unfinished next one if it has a loss."""
        points, (count, total) = self.points, self.begun
        return [*points, (self.steps, total / count)] if count else [*points]

    def add(self, kind: str, body: bytes, answer: bytes) -> None:
        """Add a successful request of the journal."""
        match kind:
            case "pass":
                request = read_pass(body)
                if request.backward:
                    metrics = MESSAGES["ForwardBackwardOutput"].FromString(answer).metrics
                    loss = next(metric.value for metric in metrics if metric.key == LOSS)
                    self.add_pass(loss, request.loss, request.data)
            case "step":
                self.add_step()
            case "load":
                self.drop_passes()

    def write(self, folder: Path) -> None:
        fields = {name: value for name, value in asdict(self).items() if name != "passes"}
        write_whole(folder / FILE, json.dumps(fields))


def _weight(name: str, data: Sequence[Datum]) -> float:
    """The number of tokens in a loss: the sum of their weights, or those with an advantage."""
    factor, total = LOSSES[name].inputs[-1], 0.0
    for datum in data:
        values = datum.inputs.get(factor)
        if values is None:  # weights of 1
            total += datum.targets.numel()
        else:
            total += float(values.abs().sum() if factor == "weights" else values.count_nonzero())
    return total


def state_folder(store: Store, run: str, seq: int) -> Path:
    """The folder with a run's state after its request ``seq``."""
    return store.folder_of(run) / f"state-{seq}"


def read_curve(store: Store, run: str, state: int) -> Curve:
    """A run's curve after all its answered requests; ``state``: the number of the last request in
    its saved state, or -1."""
    curve, file = Curve(), state_folder(store, run, state) / FILE
    if state >= 0 and file.is_file():  # states of earlier releases have no curve
        fields = json.loads(file.read_text("utf-8"))
        points = [(step, loss) for step, loss in fields.pop("points")]
        curve = Curve(**{**fields, "points": points, "begun": tuple(fields["begun"])})
    for request in store.requests_after(run, state):
        if request["done"] == 1:
            curve.add(request["kind"], request["body"], request["answer"])
    return curve


class Batch(NamedTuple):
    """The runs of a batch, and when it ended."""

    runs: tuple[str, ...]
    ended: float


@dataclass(eq=False)
class Rate:
    """Tokens per second over the last ``WINDOW`` seconds. ``spans``: (began, ended, tokens) of
    batches, the oldest first."""

    spans: tuple[tuple[float, float, int], ...] = ()

    def add(self, began: float, ended: float, tokens: int) -> None:
        recent = [span for span in self.spans if span[1] > ended - WINDOW]
        self.spans = (*recent[1 - SPANS :], (began, ended, tokens))

    def at(self, moment: float) -> float:
        spans: Any = [span for span in self.spans if span[1] > moment - WINDOW]
        if not spans:
            return 0.0
        seconds = moment - max(spans[0][0], moment - WINDOW)
        return sum(tokens for _, _, tokens in spans) / max(seconds, 1e-3)
