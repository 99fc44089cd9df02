"""The loss curve of a run, as a bounded number of points.

    pass, pass, step  ──>  mean loss per token of these passes  ──>  a point, or part of a point

A run is one LoRA adapter that a client trains. A pass is a forward, here followed by a backward. A
curve is saved with its run's state (adapter, optimizer, curve), not at each step. When a curve is
read, the steps after that state are added from the stored requests and answers, which contain the
losses and the numbers of tokens. Therefore no point is lost if the process is killed.
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
#: the largest number of points of a curve (even). When it is reached, each two neighbouring points
#: are replaced by their mean.
MAX_POINTS = 128
#: seconds over which a run's tokens per second are averaged, and the largest number of batches that
#: are stored to compute this average
RATE_SECONDS, MAX_SPANS = 10.0, 64
#: name of the sum of the losses among the metrics in the answer to a pass
LOSS_METRIC = "loss:sum"


@dataclass(eq=False)
class Curve:
    """The losses of a run by optimizer step. Only one thread may change the curve. Other threads
    may read it meanwhile, because each list and tuple is replaced, never changed.

    All fields but ``sums_since_step`` are saved as JSON under these names.

    Fields:
        steps: number of optimizer steps so far.
        tokens: number of tokens that the run was trained on.
        every: number of steps per point.
        points: (number of the last step of the point, mean over its steps of the loss per token).
        begun: (number of steps with a loss in the unfinished next point, sum of their losses per
            token).
        sums_since_step: (sum of the losses, sum of the weights of the tokens) over the passes since
            the last step. Their quotient will be the loss per token of the next step.
    """

    steps: int = 0
    tokens: int = 0
    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)
    begun: tuple[int, float] = (0, 0.0)
    sums_since_step: tuple[float, float] = (0.0, 0.0)

    def add_pass(self, loss_sum: float, loss_name: str, data: Sequence[Datum]) -> None:
        """Add a pass (a forward and a backward) over ``data`` that succeeded. ``loss_sum``: the
        loss summed over all tokens of ``data``."""
        earlier_loss_sum, earlier_weight = self.sums_since_step
        weight_sum = earlier_weight + _token_weight(loss_name, data)
        self.sums_since_step = earlier_loss_sum + loss_sum, weight_sum
        self.tokens += sum(len(datum.tokens) for datum in data)

    def add_step(self) -> None:
        """Add an optimizer step, whose loss per token is that of the passes since the last step. A
        step whose passes have no weight, or without passes, is counted but has no loss."""
        loss_sum, weight_sum = self.sums_since_step
        self.sums_since_step, self.steps = (0.0, 0.0), self.steps + 1
        if not weight_sum:
            return
        self.begun = self.begun[0] + 1, self.begun[1] + loss_sum / weight_sum
        if self.begun[0] == self.every:
            points, self.begun = self.all_points(), (0, 0.0)
            if len(points) == MAX_POINTS:
                pairs = zip(points[::2], points[1::2], strict=True)
                points = [(step, (loss + next_loss) / 2) for (_, loss), (step, next_loss) in pairs]
                self.every *= 2
            self.points = points

    def drop_passes(self) -> None:
        """Drop the passes since the last step, because a loaded checkpoint has replaced the weights
        and their gradients were discarded, so that no step will use them."""
        self.sums_since_step = 0.0, 0.0

    def all_points(self) -> list[tuple[int, float]]:
        """The points as (step, loss per token), and the unfinished next point, if it has a loss, as
        the mean of its steps so far."""
        points, (step_count, loss_sum) = self.points, self.begun
        return [*points, (self.steps, loss_sum / step_count)] if step_count else [*points]

    def add_request(self, kind: str, body: bytes, answer: bytes) -> None:
        """Add a successful request of the run, as it is in the store, to the curve. ``kind``:
        "pass", "step", "load", or another kind, which does not change the curve."""
        match kind:
            case "pass":
                pass_request = read_pass(body)
                if pass_request.backward:
                    metrics = MESSAGES["ForwardBackwardOutput"].FromString(answer).metrics
                    loss_sum = next(metric.value for metric in metrics if metric.key == LOSS_METRIC)
                    self.add_pass(loss_sum, pass_request.loss, pass_request.data)
            case "step":
                self.add_step()
            case "load":
                self.drop_passes()

    def write(self, folder: Path) -> None:
        """Write the curve to the file ``CURVE_FILE`` in ``folder``. No state is written while
        a run has gradients for its next step, so ``sums_since_step`` is not needed."""
        fields = {name: value for name, value in asdict(self).items() if name != "sums_since_step"}
        write_whole(folder / CURVE_FILE, json.dumps(fields))


def _token_weight(loss_name: str, data: Sequence[Datum]) -> float:
    """The number by which the summed loss of ``data`` is divided to get the loss per token. For
    cross entropy, it is the sum of the magnitudes of the targets' weights. For other losses, it is
    the number of targets whose advantage is not 0."""
    factor_name = "weights" if "weights" in LOSSES[loss_name].inputs else "advantages"
    weight_sum = 0.0
    for datum in data:
        factors = datum.inputs.get(factor_name)
        if factors is None:  # the client sent no weights, so each target has weight 1
            weight_sum += datum.targets.numel()
        elif factor_name == "weights":
            weight_sum += float(factors.abs().sum())
        else:
            weight_sum += float(factors.count_nonzero())
    return weight_sum


def state_folder(store: Store, run_id: str, seq: int) -> Path:
    """The path of the folder with a run's saved state (adapter, optimizer, loss curve) after its
    request number ``seq``. The folder need not exist."""
    return store.folder_of(run_id) / f"state-{seq}"


def read_curve(store: Store, run_id: str, state_seq: int) -> Curve:
    """A run's loss curve after all its answered requests, from the saved state and the requests
    after it. ``state_seq``: the number of the last request that the saved state includes, or -1 if
    no state is saved."""
    curve, curve_path = Curve(), state_folder(store, run_id, state_seq) / CURVE_FILE
    # states that earlier releases of Veneer have written have no curve, so it begins empty
    if state_seq >= 0 and curve_path.is_file():
        fields = json.loads(curve_path.read_text("utf-8"))
        points = [(step, loss) for step, loss in fields.pop("points")]
        curve = Curve(**{**fields, "points": points, "begun": tuple(fields["begun"])})
    for request_row in store.requests_after(run_id, state_seq):
        if request_row["done"] == SUCCEEDED:
            curve.add_request(request_row["kind"], request_row["body"], request_row["answer"])
    return curve


class Batch(NamedTuple):
    """The ids of the runs in a batch, and when the batch ended (``time.monotonic``)."""

    runs: tuple[str, ...]
    ended: float


@dataclass(eq=False)
class TokenRate:
    """The tokens per second of a run over the last ``RATE_SECONDS``. ``spans``: (start time, end
    time, tokens of the run) of its recent batches, the oldest first. Times are those of
    ``time.monotonic``."""

    spans: tuple[tuple[float, float, int], ...] = ()

    def add(self, start_time: float, end_time: float, token_count: int) -> None:
        recent_spans = [span for span in self.spans if span[1] > end_time - RATE_SECONDS]
        self.spans = (*recent_spans[1 - MAX_SPANS :], (start_time, end_time, token_count))

    def rate_at(self, now: float) -> float:
        spans: Any = [span for span in self.spans if span[1] > now - RATE_SECONDS]
        if not spans:
            return 0.0
        seconds = now - max(spans[0][0], now - RATE_SECONDS)
        return sum(tokens for _, _, tokens in spans) / max(seconds, 1e-3)
