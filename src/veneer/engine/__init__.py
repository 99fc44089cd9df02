"""One engine for training several adapters on one base: `train_many`, the candidates of a sweep and
the training service are its callers.

    engine = StepEngine(model)
    engine.add("a", handle.parameters(), engine.new_stream(seed=0))
    result = engine.backward({"a": PassRequest(engine.read_batch("a", (x, y)), loss), "b": …})
    engine.adapters["a"].clip(1.0); engine.adapters["a"].step()

    step_engine.py      requests of adapters → shared passes → losses, gradients, steps
    batches.py          batches joined, outputs split, rows checked for independence
    random_streams.py   random numbers of each adapter
    gradients.py        set aside, restored, added, clipped
    optimizer_state.py  an optimiser's state as named tensors

In: attached adapters, and a request for each. Out: losses and gradients with the numbers that each
adapter's own loop would compute, and the errors of those that failed.
"""

from veneer.engine.random_streams import RandomStream
from veneer.engine.step_engine import (
    PassRequest,
    PassResult,
    StepEngine,
    TrainedAdapter,
    isolate_failures,
)

__all__ = [
    "PassRequest",
    "PassResult",
    "RandomStream",
    "StepEngine",
    "TrainedAdapter",
    "isolate_failures",
]
