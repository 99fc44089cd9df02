"""One engine that trains several adapters on one base, for `train_many`, for the candidates of a
sweep, and for the training service.

    engine = StepEngine(model)
    engine.add("a", handle.parameters(), engine.new_stream(seed=0))
    result = engine.backward({"a": PassRequest(engine.read_batch("a", (x, y)), loss), "b": …})
    engine.adapters["a"].clip(1.0); engine.adapters["a"].step()

    step_engine.py      one forward and one backward for the batches of several adapters; steps
    batches.py          join batches, split outputs, check that rows are independent
    random_streams.py   the random numbers of each adapter
    gradients.py        take, restore, add and clip gradients
    optimizer_state.py  the state of an optimiser as named tensors

The caller attaches the adapters and passes one request for each. The engine returns each adapter's
loss, sets the gradients of its parameters, and lists the errors of adapters that failed. Losses and
gradients equal those of a training loop for the adapter alone.
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
