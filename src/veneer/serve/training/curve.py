"""The losses of a run, step by step, in a bounded number of points.

    pass, pass, step  ──>  the loss a token of these passes  ──>  a point, or a part of one

A curve lies in its run's state. What came after that state is read off the journal: bodies and
answers of requests say how large a loss was and of how many tokens. So a kill loses no point of it,
though nothing is written at a step.
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
#: points of a curve; one that has so many is drawn from half of them, each the mean of two
MOST = 128
#: seconds over which a rate is a mean, and the batches that are remembered for it
WINDOW, SPANS = 10.0, 64
LOSS = "loss:sum"


@dataclass(eq=False)
class Curve:
    """``points``: (step, loss a token), each the mean of the last ``every`` losses. One thread
    changes it; others may read it meanwhile."""

    steps: int = 0
    tokens: int = 0  # that it was trained on
    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)
    begun: tuple[int, float] = (0, 0.0)  # of the next point: losses, and their sum
    passes: tuple[float, float] = (
        0.0,
        0.0,
    )  # since the last step: the sum of their losses, and of its weights

    def passed(self, loss: float, name: str, data: Sequence[Datum]) -> None:
        """A pass with a backward, of the loss ``name``, whose sum over all tokens is ``loss``."""
        self.passes = self.passes[0] + loss, self.passes[1] + _weight(name, data)
        self.tokens += sum(len(datum.tokens) for datum in data)

    def stepped(self) -> None:
        (total, weight), self.passes, self.steps = self.passes, (0.0, 0.0), self.steps + 1
        if not weight:
            return
        self.begun = self.begun[0] + 1, self.begun[1] + total / weight
        if self.begun[0] == self.every:
            points, self.begun = self.shown(), (0, 0.0)
            if len(points) == MOST:
                pairs = zip(points[::2], points[1::2], strict=True)
                points, self.every = (
                    [(last, (loss + next_loss) / 2) for (_, loss), (last, next_loss) in pairs],
                    2 * self.every,
                )
            self.points = points

    def loaded(self) -> None:
        """A checkpoint took the place of the run's numbers, and its gradients are gone."""
        self.passes = 0.0, 0.0

    def shown(self) -> list[tuple[int, float]]:
        """The points, and what is known of the next one."""
        points, (count, total) = self.points, self.begun
        return [*points, (self.steps, total / count)] if count else [*points]

    def add(self, kind: str, body: bytes, answer: bytes) -> None:
        """A request of the journal that went well."""
        match kind:
            case "pass":
                asked = read_pass(body)
                if asked.backward:
                    metrics = MESSAGES["ForwardBackwardOutput"].FromString(answer).metrics
                    loss = next(one.value for one in metrics if one.key == LOSS)
                    self.passed(loss, asked.loss, asked.data)
            case "step":
                self.stepped()
            case "load":
                self.loaded()

    def write(self, folder: Path) -> None:
        fields = {name: value for name, value in asdict(self).items() if name != "passes"}
        write_whole(folder / FILE, json.dumps(fields))


def _weight(name: str, data: Sequence[Datum]) -> float:
    """Of how many tokens a loss is: those that weights or advantages leave in."""
    factor, total = LOSSES[name].inputs[-1], 0.0
    for datum in data:
        values = datum.inputs.get(factor)
        if values is None:  # weights of 1
            total += datum.targets.numel()
        else:
            total += float(values.abs().sum() if factor == "weights" else values.count_nonzero())
    return total


def state_folder(store: Store, run: str, seq: int) -> Path:
    """Where a run's state is, as it was after its request ``seq``."""
    return store.folder_of(run) / f"state-{seq}"


def read_curve(store: Store, run: str, state: int) -> Curve:
    """A run's curve after all of its requests that are done; ``state``: the request that its state
    follows, or -1."""
    curve, file = Curve(), state_folder(store, run, state) / FILE
    if state >= 0 and file.is_file():  # a state of an earlier release has none
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
    """How many tokens a second, lately. ``spans``: (began, ended, tokens) of batches, the oldest
    first."""

    spans: tuple[tuple[float, float, int], ...] = ()

    def add(self, began: float, ended: float, tokens: int) -> None:
        recent = [span for span in self.spans if span[1] > ended - WINDOW]
        self.spans = (*recent[1 - SPANS :], (began, ended, tokens))

    def at(self, now: float) -> float:
        spans: Any = [span for span in self.spans if span[1] > now - WINDOW]
        if not spans:
            return 0.0
        return sum(tokens for _, _, tokens in spans) / max(
            now - max(spans[0][0], now - WINDOW), 1e-3
        )
