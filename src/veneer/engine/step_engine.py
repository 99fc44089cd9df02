"""Forward, backward and optimiser steps of several adapters on one base. The caller decides which
adapters take a step, and should skip adapters whose gradients are not finite.

    requests by adapter ─ equal shapes ─> one forward of the base ─> a loss for each adapter
                        ─ one backward ─> gradients of each adapter's own parameters ─> its step

Each adapter has its own parameters (any variant, rank, dtype), random numbers
(``random_streams.py``), rows, loss and optimiser. The base's forward and backward are shared.
Batches of different shapes do not share a forward, because padding to the longest batch would
change the numbers that dropout draws. So an adapter's results never depend on other adapters.

A pass is one call of ``StepEngine.backward`` or ``forward``. A ``backward`` that raises leaves the
gradients and random numbers of its adapters unchanged. ``isolate_failures`` then computes each
adapter separately, so that only failing adapters fail.

Two other designs were rejected: one loss function on the joined output, because a mean over its
rows would depend on the rows of all adapters; and a copy of the model for each adapter, because
each copy needs the memory of the whole base.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

#: the maximal number of cached ``RowAdapters``, each of which assigns an adapter to each row of a
#: joined batch
MAX_CACHED_ASSIGNMENTS = 64

#: a function (base, {adapter name: batch}) -> {adapter name: output}, which computes the rows of
#: all batches in one forward
Forward = Callable[[nn.Module, Mapping[str, AdapterBatch]], Mapping[str, Any]]


class PassRequest(NamedTuple):
    """A request for a forward of one adapter's rows, and the backward of its loss.

    Fields:
        loss: (output, target) -> scalar. None requests a forward alone, which returns the output.
        forward: a function that computes the outputs of joined batches. If None, the model is
            called and its output is split by batch. Requests with different functions in this field
            are not computed in one forward.
        weight: a factor by which the gradient is multiplied. The returned loss is not multiplied
            by it.
    """

    batch: AdapterBatch
    loss: Callable[[Any, Any], Any] | None = None
    forward: Forward | None = None
    weight: float = 1.0


Requests = Mapping[str, PassRequest]


class PassResult(NamedTuple):
    """The results of a pass, by adapter name. ``values``: the adapter's detached loss, or its
    output if its request has no loss. ``failures``: the errors of adapters that failed, which have
    no entry in ``values``."""

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
        """Clip the gradients, as ``clip_gradients`` does, and return their norm before clipping."""
        return clip_gradients(self.parameters, max_norm, in_float64=in_float64)

    def step(self) -> None:
        """Take a step of the optimiser and of the schedule, and clear the gradients. ``optimizer``
        must be set."""
        assert self.optimizer is not None
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser, the schedule and the random numbers, for ``torch.save``.
        ``optimizer`` and ``scheduler`` must be set."""
        assert self.optimizer is not None
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.stream.states,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.stream.states = state_dict["random"]


class StepEngine:
    """Trains several adapters on one base. ``adapters``: those registered with ``add``, by name.
    The caller attaches and detaches adapters, and must call all methods from one thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, TrainedAdapter] = {}
        # The next three values are computed once, because each needs a walk through the modules.
        self._devices = random_devices(model)
        self._dropout_settings = dropout_settings(model)
        self._time_first = time_first(model)
        # Training needs no KV cache, and that of a joined forward would hold the rows of all
        # adapters.
        forward_parameters = inspect.signature(model.forward).parameters
        self._default_inputs = {"use_cache": False} if "use_cache" in forward_parameters else {}
        self._checked_structures: set[Any] = set()
        self._assignments: dict[Any, tuple[list[ActiveAdapter], RowAdapters]] = {}

    def new_stream(self, seed: int) -> RandomStream:
        """Create the random stream of an adapter, which is a context manager. Attach the adapter
        within it, so that the adapter's initial parameters are drawn from the stream."""
        return RandomStream(seed, self._devices)

    def add(self, name: str, parameters: list[nn.Parameter], stream: RandomStream) -> None:
        """Register an adapter that is attached to the model for training. ``stream``: from
        ``new_stream``."""
        self.adapters[name] = TrainedAdapter(parameters, stream)

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._assignments.clear()

    def read_batch(self, name: str, batch: Any) -> AdapterBatch:
        """Convert a caller's batch, ``(inputs, target)`` or a mapping with labels, for the adapter
        ``name``. ``DataError``: the batch has another form, or its tensors differ in their number
        of rows."""
        return read_batch(name, batch, self._default_inputs)

    def backward(self, requests: Requests, keep_going: bool = False) -> PassResult:
        """Compute each adapter's loss and add its gradients to the adapter's parameters, as
        ``loss.backward()`` would in a training loop for this adapter alone.

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
            if name in result.failures:  # discard the zeros of the shared backward
                restore_gradients(adapter.parameters, gradients)
            else:
                add_to_earlier_gradients(adapter.parameters, gradients)
        return result

    def forward(self, requests: Requests, keep_going: bool = False) -> PassResult:
        """Compute each adapter's loss, or its output if its request has no loss, without gradients.
        ``keep_going``: if the loss of an adapter raises, list the error in ``failures``; else raise
        it."""
        result = PassResult({}, {})
        for group in _group_requests(requests):
            with torch.no_grad(), self._use_adapters(group) as dropout, dropout:
                result.values.update(self._compute_values(group, result.failures, keep_going))
        return result

    def _backward_group(self, group: Requests, result: PassResult, keep_going: bool) -> None:
        """Run the forward and the backward of a group of requests that share a forward. Add the
        losses and errors to ``result``. ``SelectionError``: the base drew random numbers for the
        rows of several adapters together, so an adapter's results would depend on the others."""
        with self._use_adapters(group) as dropout:
            states_before = generator_states(self._devices)
            with dropout:
                losses = self._compute_values(group, result.failures, keep_going, _check_loss)
            if len(group) > 1 and not equal_states(states_before, generator_states(self._devices)):
                quoted_names = ", ".join(map(repr, group))
                raise SelectionError(
                    f"random numbers that the base drew for rows of {quoted_names} together",
                    "numbers of each run's own",
                    "set its own dropout to 0, or its modules to eval()",
                )
            if losses:
                loss_weights = [
                    torch.full_like(loss, group[name].weight) for name, loss in losses.items()
                ]
                torch.autograd.backward(list(losses.values()), loss_weights)
        result.values.update({name: loss.detach() for name, loss in losses.items()})

    def _compute_values(
        self,
        group: Requests,
        failures: dict[str, Exception],
        keep_going: bool,
        check_value: Callable[[str, Any], None] = lambda name, value: None,
    ) -> dict[str, Any]:
        """Run one forward for a group of requests that share it. Returns the loss of each request,
        or its output if it has no loss, by adapter name.

        Args:
            failures: with ``keep_going``, gets the error of each adapter whose loss or check
                raises.
            check_value: called with (adapter name, loss or output); raises if this is not valid.
        """
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
                check_value(name, value)
            except Exception as error:
                error.add_note(f"in the loss of adapter {name!r}")
                if not keep_going:
                    raise
                failures[name] = error
                continue
            values[name] = value
        return values

    @contextmanager
    def _use_adapters(self, group: Requests) -> Iterator[AbstractContextManager[Any]]:
        """Select the adapters of ``group`` for calls of the model. A single adapter's stream also
        draws all random numbers in the block. Yields the context for the forward in which the
        base's dropout draws for each of several adapters from its stream."""
        selection, dropout = self._select_adapters(group)
        stream = self.adapters[next(iter(group))].stream if len(group) == 1 else nullcontext()
        with context.override(selection), stream:
            yield dropout

    def _select_adapters(
        self, group: Requests
    ) -> tuple[dict[str, ActiveAdapter], AbstractContextManager[Any]]:
        """({id of the model's set of adapters: selection that assigns the joined rows to the
        adapters of ``group``}, for ``context.override``; a context in which the base's dropout
        draws for each adapter from the adapter's stream)."""
        model_adapters = need_adapters(self.model, check_all_layers=False)
        selections = [model_adapters.selections[name] for name in group]
        selections_with_streams = [
            dataclasses.replace(selection, random_stream=self.adapters[name].stream)
            for name, selection in zip(group, selections, strict=True)
        ]
        if len(group) == 1:
            return {model_adapters.uid: selections_with_streams[0]}, nullcontext()
        # The assignment of rows is cached, because each layer stores in it what it prepares for
        # these rows in the first call. Later calls with the same rows need not prepare it again.
        assignment_key = tuple((name, request.batch.row_count) for name, request in group.items())
        cached_selections, assignment = self._assignments.get(assignment_key, (None, None))
        if assignment is None or cached_selections != selections:
            row_counts = [request.batch.row_count for request in group.values()]
            row_indices = torch.arange(sum(row_counts), device="cpu").split(row_counts)
            assignment = RowAdapters(
                model_adapters.uid,
                selections_with_streams,
                row_indices,
                sum(row_counts),
                self._time_first,
            )
            if len(self._assignments) >= MAX_CACHED_ASSIGNMENTS:
                self._assignments.clear()
            self._assignments[assignment_key] = selections, assignment
        joined_selection = ActiveAdapter(
            None, assignment, common_base_adapter(assignment.selections)
        )
        has_dropout = any(
            module.training and getattr(module, attribute) > 0
            for module, attribute in self._dropout_settings
        )
        dropout = DropoutByAdapter(assignment) if has_dropout else nullcontext()
        return {model_adapters.uid: joined_selection}, dropout

    def _check_rows(self, batches: Mapping[str, AdapterBatch]) -> None:
        """Raise a ``SelectionError`` if the base's output for some rows depends on other rows. This
        is checked only for several batches, and once for each set of argument names."""
        first_batches = list(batches.values())[:2]
        structure_key = len(first_batches[0].args), *first_batches[0].kwargs
        if len(first_batches) > 1 and structure_key not in self._checked_structures:
            check_independent_rows(
                self.model, need_adapters(self.model, check_all_layers=False).uid, first_batches
            )
            self._checked_structures.add(structure_key)


def isolate_failures(
    run_pass: Callable[..., PassResult], requests: Mapping[str, Any]
) -> PassResult:
    """Call ``run_pass(requests, keep_going=True)``. If it raises, call ``run_pass`` for each
    request separately, so that only the adapters that cause an error have it in ``failures``.

    Args:
        run_pass: ``StepEngine.backward``, ``forward``, or a function around one of them.
    """
    try:
        return run_pass(requests, keep_going=True)
    except Exception as error:
        if len(requests) == 1:
            return PassResult({}, dict.fromkeys(requests, error))
    # The separate passes run after the except block: Python has then deleted ``error``, and so
    # freed the tensors of the failed pass.
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
        group_key = request.forward, request.batch.shape_key
        groups.setdefault(group_key, {})[name] = request
    return list(groups.values())


def _output_rows(model: nn.Module, batches: Mapping[str, AdapterBatch]) -> dict[str, Any]:
    """The model's output for each adapter's batch, by adapter name, from one forward."""
    args, kwargs = join_batches(list(batches.values()))
    output = model(*args, **kwargs)
    if len(batches) == 1:
        return dict.fromkeys(batches, output)
    row_counts = [batch.row_count for batch in batches.values()]
    return dict(zip(batches, split_output(output, row_counts), strict=True))


def _check_loss(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        loss_description = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"loss {loss_description} of adapter {name!r}",
            "a scalar with a gradient",
            "return a mean or a sum",
        )
