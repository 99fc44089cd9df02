"""The loss curve of a run, as a bounded number of points.

    pass, pass, step  ──>  mean loss per token of these passes  ──>  a point, or part of a point

A curve is saved with its run's state, not at each step. The steps after that state are added again
from the stored requests and answers, which contain the losses and the numbers of tokens, so that a
killed process loses no point.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from veneer.fileio.atomic import write_whole
from veneer.serve.training.losses import LOSSES, Datum
from veneer.serve.training.store import SUCCEEDED, Store
from veneer.serve.training.wire import MESSAGES, read_pass

CURVE_FILE = "curve.json"
#: the largest number of points of a curve; when it is reached, each pair of points is replaced by
#: the pair's mean
MAX_POINTS = 128
#: seconds over which the tokens per second are averaged, and the most batches that are stored to
#: compute this average
RATE_SECONDS, MAX_SPANS = 10.0, 64
#: name of the metric of a pass that holds the sum of its losses
LOSS_METRIC = "loss:sum"


@dataclass(eq=False)
class Curve:
    """The losses of a run by step. One thread changes the curve; others may read it meanwhile.

    All fields but ``sums_since_step`` are saved as JSON under these names.

    Fields:
        steps: number of optimizer steps so far.
        tokens: number of tokens that the run was trained on.
        every: number of steps per point.
        points: (last step of the point, loss per token, as the mean over ``every`` steps).
        begun: (number of steps in the unfinished next point, sum of their losses per token).
        sums_since_step: (sum of the losses, sum of the token weights) over the passes since the
            last step.
    """

    steps: int = 0
    tokens: int = 0
    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)
    begun: tuple[int, float] = (0, 0.0)
    sums_since_step: tuple[float, float] = (0.0, 0.0)

    def add_pass(self, loss_sum: float, loss_name: str, data: Sequence[Datum]) -> None:
        """Add a pass with a backward. ``loss_sum``: the loss summed over all tokens of ``data``."""
        earlier_loss_sum, earlier_weight = self.sums_since_step
        weight = earlier_weight + _token_weight(loss_name, data)
        self.sums_since_step = earlier_loss_sum + loss_sum, weight
        self.tokens += sum(len(datum.tokens) for datum in data)

    def add_step(self) -> None:
        """Turn the passes since the last step into the loss of one step."""
        loss_sum, weight = self.sums_since_step
        self.sums_since_step, self.steps = (0.0, 0.0), self.steps + 1
        if not weight:
            return
        self.begun = self.begun[0] + 1, self.begun[1] + loss_sum / weight
        if self.begun[0] == self.every:
            points, self.begun = self.all_points(), (0, 0.0)
            if len(points) == MAX_POINTS:
                pairs = zip(points[::2], points[1::2], strict=True)
                points = [(step, (loss + next_loss) / 2) for (_, loss), (step, next_loss) in pairs]
                self.every *= 2
            self.points = points

    def drop_passes(self) -> None:
        """Drop the passes since the last step: a loaded checkpoint has replaced the weights and
        discarded the gradients."""
        self.sums_since_step = 0.0, 0.0

    def all_points(self) -> list[tuple[int, float]]:
        """The points, and the unfinished next point if it has a loss."""
        points, (count, loss_sum) = self.points, self.begun
        return [*points, (self.steps, loss_sum / count)] if count else [*points]

    def add_request(self, kind: str, body: bytes, answer: bytes) -> None:
        """Add a successful request that was read from the store."""
        match kind:
            case "pass":
                request = read_pass(body)
                if request.backward:
                    metrics = MESSAGES["ForwardBackwardOutput"].FromString(answer).metrics
                    loss_sum = next(metric.value for metric in metrics if metric.key == LOSS_METRIC)
                    self.add_pass(loss_sum, request.loss, request.data)
            case "step":
                self.add_step()
            case "load":
                self.drop_passes()

    def write(self, folder: Path) -> None:
        fields = {name: value for name, value in asdict(self).items() if name != "sums_since_step"}
        write_whole(folder / CURVE_FILE, json.dumps(fields))


def _token_weight(loss_name: str, data: Sequence[Datum]) -> float:
    """The number by which a sum of losses is divided to get the loss per token. For cross entropy,
    it is the sum of the magnitudes of the targets' weights. For other losses, it is the number of
    targets with an advantage that is not 0."""
    factor_name = "weights" if "weights" in LOSSES[loss_name].inputs else "advantages"
    total = 0.0
    for datum in data:
        factors = datum.inputs.get(factor_name)
        if factors is None:  # each token has weight 1
            total += datum.targets.numel()
        elif factor_name == "weights":
            total += float(factors.abs().sum())
        else:
            total += float(factors.count_nonzero())
    return total


def state_folder(store: Store, run: str, seq: int) -> Path:
    """The folder with a run's state after its request number ``seq``."""
    return store.folder_of(run) / f"state-{seq}"


def read_curve(store: Store, run: str, state_seq: int) -> Curve:
    """A run's curve after all its answered requests. ``state_seq``: the number of the last request
    in the run's saved state, or -1."""
    curve, file = Curve(), state_folder(store, run, state_seq) / CURVE_FILE
    if state_seq >= 0 and file.is_file():  # states of earlier releases have no curve
        fields = json.loads(file.read_text("utf-8"))
        points = [(step, loss) for step, loss in fields.pop("points")]
        curve = Curve(**{**fields, "points": points, "begun": tuple(fields["begun"])})
    for request in store.requests_after(run, state_seq):
        if request["done"] == SUCCEEDED:
            curve.add_request(request["kind"], request["body"], request["answer"])
    return curve


class Batch(NamedTuple):
    """The ids of the runs in a batch, and when the batch ended (``time.monotonic``)."""

    runs: tuple[str, ...]
    ended: float


@dataclass(eq=False)
class TokenRate:
    """Tokens per second over the last ``RATE_SECONDS``. ``spans``: (start time, end time, tokens)
    of batches, the oldest first."""

    spans: tuple[tuple[float, float, int], ...] = ()

    def add(self, started: float, ended: float, tokens: int) -> None:
        recent_spans = [span for span in self.spans if span[1] > ended - RATE_SECONDS]
        self.spans = (*recent_spans[1 - MAX_SPANS :], (started, ended, tokens))

    def rate_at(self, now: float) -> float:
        spans: Any = [span for span in self.spans if span[1] > now - RATE_SECONDS]
        if not spans:
            return 0.0
        seconds = now - max(spans[0][0], now - RATE_SECONDS)
        return sum(tokens for _, _, tokens in spans) / max(seconds, 1e-3)
