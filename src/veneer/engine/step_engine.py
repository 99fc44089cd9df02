"""Forward, backward and optimiser steps of several adapters on one base. The caller decides which
adapters take a step, and should skip adapters whose gradients are not finite.

    requests by adapter ─ equal shapes ─> one forward of the base ─> a loss for each adapter
                        ─ one backward ─> gradients of each adapter's own parameters ─> its step

Each adapter has its own parameters (any variant, rank, dtype), random numbers
(``random_streams.py``), rows, loss and optimiser. The base's forward and backward are shared.
Batches of different shapes do not share a forward, because padding to the longest batch would
change the numbers that dropout draws. So an adapter's results never depend on other adapters.

A pass that raises leaves the gradients and random numbers of its adapters unchanged.
``isolate_failures`` then computes each adapter separately, so that only failing adapters fail.

Rejected: one loss function on the joined output, because a mean over its rows would depend on the
rows of all adapters; and a copy of the model for each adapter.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach import ActiveAdapter, RowAdapters, common_base_adapter, need_adapters, time_first
from veneer.engine.batches import (
    AdapterBatch,
    check_independent_rows,
    join_batches,
    read_batch,
    split_output,
)
from veneer.engine.gradients import (
    add_to_earlier_gradients,
    clip_gradients,
    restore_gradients,
    take_gradients,
)
from veneer.engine.random_streams import (
    DropoutByAdapter,
    RandomStream,
    dropout_settings,
    equal_states,
    generator_states,
    random_devices,
)
from veneer.errors import ConfigError, SelectionError

#: the maximal number of cached ``RowAdapters``, each of which assigns the rows of a joined batch
MAX_CACHED_ASSIGNMENTS = 64

#: (the base, batches by adapter) -> the output of each adapter's rows, by one forward of all rows
Forward = Callable[[nn.Module, Mapping[str, AdapterBatch]], Mapping[str, Any]]


class PassRequest(NamedTuple):
    """A request for a forward of one adapter's rows, and the backward of its loss.

    Fields:
        loss: (output, target) -> scalar. None requests a forward alone, which returns the output.
        forward: a function that computes the outputs of joined batches. If None, the model is
            called and its output is split by batch. Requests share a forward only if they have the
            same function here.
        weight: a factor of the gradient, but not of the returned loss.
    """

    batch: AdapterBatch
    loss: Callable[[Any, Any], Any] | None = None
    forward: Forward | None = None
    weight: float = 1.0

    @property
    def group_key(self) -> Hashable:
        return self.forward, self.batch.shape_key


Requests = Mapping[str, PassRequest]


class PassResult(NamedTuple):
    """The results of a pass. ``values``: by adapter, its detached loss, or its output if it
    requested no loss. ``failures``: the errors of adapters that failed."""

    values: dict[str, Any]
    failures: dict[str, Exception]


@dataclass(eq=False)
class TrainedAdapter:
    """Parameters, random numbers and optimiser of one adapter. ``scheduler``: its learning-rate
    schedule; None if the caller sets the learning rate before each step."""

    parameters: list[nn.Parameter]
    stream: RandomStream
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients that no step has used."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def clip(self, max_norm: float, *, in_float64: bool = False) -> float:
        """Clip the gradients, as ``clip_gradients`` does, and return their norm before."""
        return clip_gradients(self.parameters, max_norm, in_float64=in_float64)

    def step(self) -> None:
        """Take a step of the optimiser and of the schedule, and clear the gradients."""
        assert self.optimizer is not None
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser, the schedule and the random numbers, for ``torch.save``."""
        assert self.optimizer is not None
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.stream.states,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.stream.states = state["random"]


class StepEngine:
    """Trains several adapters on one base. ``adapters``: the trained adapters, by name. The caller
    attaches and detaches adapters, and must call all methods from one thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, TrainedAdapter] = {}
        # computed once, because each needs a walk through the modules of the model
        self._devices = random_devices(model)
        self._dropout_settings = dropout_settings(model)
        self._time_first = time_first(model)
        # the KV cache of a joined forward would hold the rows of all adapters
        parameters = inspect.signature(model.forward).parameters
        self._default_inputs = {"use_cache": False} if "use_cache" in parameters else {}
        self._checked_structures: set[Any] = set()
        self._assignments: dict[Any, tuple[list[ActiveAdapter], RowAdapters]] = {}

    def new_stream(self, seed: int) -> RandomStream:
        """Create the random stream of an adapter, which is a context manager. Attach the adapter
        within it, so that the adapter's initial parameters are drawn from the stream."""
        return RandomStream(seed, self._devices)

    def add(self, name: str, parameters: list[nn.Parameter], stream: RandomStream) -> None:
        """Register an attached adapter for training."""
        self.adapters[name] = TrainedAdapter(parameters, stream)

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._assignments.clear()

    def read_batch(self, name: str, batch: Any) -> AdapterBatch:
        """Convert a caller's batch for the adapter ``name``, as ``batches.read_batch`` does."""
        return read_batch(name, batch, self._default_inputs)

    def backward(self, requests: Requests, keep_going: bool = False) -> PassResult:
        """Add the gradients of each adapter's loss to its parameters, as ``loss.backward()`` does
        in a separate loop.

        Args:
            keep_going: if the loss of an adapter raises, list the error in ``failures`` and leave
                the gradients of this adapter unchanged. Without ``keep_going``, and for any other
                error, raise the error and leave all adapters unchanged.
        """
        adapters = [self.adapters[name] for name in requests]
        earlier_gradients = [take_gradients(adapter.parameters) for adapter in adapters]
        stream_states = [adapter.stream.states for adapter in adapters]
        result = PassResult({}, {})
        try:
            for group in _group_requests(requests):
                self._backward_group(group, result, keep_going)
        except BaseException:
            for adapter, gradients, states in zip(
                adapters, earlier_gradients, stream_states, strict=True
            ):
                restore_gradients(adapter.parameters, gradients)
                adapter.stream.states = states
            raise
        for name, adapter, gradients in zip(requests, adapters, earlier_gradients, strict=True):
            if name in result.failures:  # the shared backward gave it gradients of zero
                restore_gradients(adapter.parameters, gradients)
            else:
                add_to_earlier_gradients(adapter.parameters, gradients)
        return result

    def forward(self, requests: Requests, keep_going: bool = False) -> PassResult:
        """The output of each adapter's rows, or its loss, without gradients. ``keep_going``: as in
        ``backward``."""
        result = PassResult({}, {})
        for group in _group_requests(requests):
            selection, dropout = self._select_adapters(group)
            with torch.no_grad(), context.override(selection), dropout:
                result.values.update(self._compute_values(group, result.failures, keep_going))
        return result

    def _backward_group(self, group: Requests, result: PassResult, keep_going: bool) -> None:
        """Run the forward and the backward of a group of requests that share a forward."""
        with ExitStack() as stack:
            selection, dropout = self._select_adapters(group)
            stack.enter_context(context.override(selection))
            if len(group) == 1:
                stack.enter_context(self.adapters[next(iter(group))].stream)
            states_before = generator_states(self._devices)
            with dropout:
                losses = self._compute_values(group, result.failures, keep_going, _check_loss)
            if len(group) > 1 and not equal_states(states_before, generator_states(self._devices)):
                names = ", ".join(map(repr, group))
                raise SelectionError(
                    f"random numbers that the base drew for rows of {names} together",
                    "numbers of each run's own",
                    "set its own dropout to 0, or its modules to eval()",
                )
            if losses:
                factors = [
                    torch.full_like(loss, group[name].weight) for name, loss in losses.items()
                ]
                torch.autograd.backward(list(losses.values()), factors)
        result.values.update({name: loss.detach() for name, loss in losses.items()})

    def _compute_values(
        self,
        group: Requests,
        failures: dict[str, Exception],
        keep_going: bool,
        check: Callable[[str, Any], None] = lambda name, value: None,
    ) -> dict[str, Any]:
        """Run one forward. Returns the loss of each request, or its output if it has no loss.
        ``check(name, value)`` raises if a loss or an output is not valid."""
        batches = {name: request.batch for name, request in group.items()}
        self._check_rows(batches)
        forward = next(iter(group.values())).forward or _output_rows
        outputs = forward(self.model, batches)
        values: dict[str, Any] = {}
        for name, request in group.items():
            try:
                value = outputs[name]
                if request.loss is not None:
                    value = request.loss(value, request.batch.target)
                check(name, value)
            except Exception as error:
                error.add_note(f"in the loss of adapter {name!r}")
                if not keep_going:
                    raise
                failures[name] = error
                continue
            values[name] = value
        return values

    def _select_adapters(
        self, group: Requests
    ) -> tuple[dict[str, ActiveAdapter], AbstractContextManager[Any]]:
        """(the adapter selection for the joined rows, by the id of the set of adapters; a context
        in which the base's dropout draws for each adapter from the adapter's stream)."""
        attached = need_adapters(self.model, check_all_layers=False)
        selections = [attached.selections[name] for name in group]
        selections_with_streams = [
            dataclasses.replace(selection, random_stream=self.adapters[name].stream)
            for name, selection in zip(group, selections, strict=True)
        ]
        if len(group) == 1:
            return {attached.uid: selections_with_streams[0]}, nullcontext()
        # The assignment of rows is cached, because it keeps what each layer prepared for these rows
        # in the first call.
        key = tuple((name, request.batch.row_count) for name, request in group.items())
        cached_selections, assignment = self._assignments.get(key, (None, None))
        if assignment is None or cached_selections != selections:
            row_counts = [request.batch.row_count for request in group.values()]
            rows = torch.arange(sum(row_counts), device="cpu").split(row_counts)
            assignment = RowAdapters(
                attached.uid, selections_with_streams, rows, sum(row_counts), self._time_first
            )
            if len(self._assignments) >= MAX_CACHED_ASSIGNMENTS:
                self._assignments.clear()
            self._assignments[key] = selections, assignment
        selected = ActiveAdapter(None, assignment, common_base_adapter(assignment.selections))
        dropout = DropoutByAdapter(assignment) if self._has_dropout() else nullcontext()
        return {attached.uid: selected}, dropout

    def _has_dropout(self) -> bool:
        """Whether any dropout of the base is active."""
        return any(
            module.training and getattr(module, attribute) > 0
            for module, attribute in self._dropout_settings
        )

    def _check_rows(self, batches: Mapping[str, AdapterBatch]) -> None:
        """Check that the base computes rows independently of each other, once for each combination
        of the model's arguments."""
        samples = list(batches.values())[:2]
        key = len(samples[0].args), *samples[0].kwargs
        if len(samples) > 1 and key not in self._checked_structures:
            check_independent_rows(
                self.model, need_adapters(self.model, check_all_layers=False).uid, samples
            )
            self._checked_structures.add(key)


def isolate_failures(
    run_pass: Callable[..., PassResult], requests: Mapping[str, Any]
) -> PassResult:
    """Call ``run_pass(requests, keep_going=True)`` so that an error fails only the adapters that
    cause it: if the joint pass raises, each request is computed separately.

    Args:
        run_pass: ``StepEngine.backward``, ``forward``, or a function around one of them.
    """
    try:
        return run_pass(requests, keep_going=True)
    except Exception as error:
        if len(requests) == 1:
            return PassResult({}, dict.fromkeys(requests, error))
    # Python deletes ``error`` after the except block, and so frees the tensors of the failed pass.
    result = PassResult({}, {})
    for name, request in requests.items():
        single_result = isolate_failures(run_pass, {name: request})
        result.values.update(single_result.values)
        result.failures.update(single_result.failures)
    return result


def _group_requests(requests: Requests) -> list[dict[str, PassRequest]]:
    """Groups of requests that share a forward, ordered by the first request of each group."""
    groups: dict[Hashable, dict[str, PassRequest]] = {}
    for name, request in requests.items():
        groups.setdefault(request.group_key, {})[name] = request
    return list(groups.values())


def _output_rows(model: nn.Module, batches: Mapping[str, AdapterBatch]) -> dict[str, Any]:
    """The model's output for the rows of each adapter."""
    args, kwargs = join_batches(list(batches.values()))
    output = model(*args, **kwargs)
    if len(batches) == 1:
        return dict.fromkeys(batches, output)
    row_counts = [batch.row_count for batch in batches.values()]
    return dict(zip(batches, split_output(output, row_counts), strict=True))


def _check_loss(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"loss {shape} of adapter {name!r}",
            "a scalar with a gradient",
            "return a mean or a sum",
        )
