"""Warn if the first step of an optimiser after ``attach`` does not train the adapter.

An optimiser that was created before ``attach`` holds only the frozen base, so its steps change
nothing. An optimiser of an adapter that was loaded without ``trainable=True`` changes nothing
either. Backward raises an error in that case, unless other parameters require a gradient.

A hook on all optimisers checks each new adapter until a step has shown whether an optimiser trains
the adapter. The hook is removed once there is no adapter left to check. It stays while other code
has global optimiser hooks too, because threads may be iterating over all of these hooks, and the
removal of one would raise an error in the iteration.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from veneer.attach.layer.adapted_module import layer_states
from veneer.errors import NotTrained, sentence, warn_caller


@dataclass(frozen=True, eq=False)
class _NewAdapter:
    """An adapter for which no optimiser step has shown yet whether an optimiser trains it. The
    model and the parameters are weak references, so that this object does not keep them alive."""

    name: str
    model: weakref.ref[nn.Module]
    parameters: tuple[weakref.ref[nn.Parameter], ...]

    def live_parameters(self) -> list[nn.Parameter]:
        parameters = (parameter_ref() for parameter_ref in self.parameters)
        return [parameter for parameter in parameters if parameter is not None]


#: the adapters for which no step has shown yet whether an optimiser trains them
_NEW_ADAPTERS: list[_NewAdapter] = []
#: the handle of the hook on all optimisers, in a list that is empty while there is no hook
_HOOKS: list[Any] = []
#: held while ``_NEW_ADAPTERS`` or ``_HOOKS`` is used, because several threads may step at once
_LOCK = threading.Lock()


def watch_first_step(model: nn.Module, name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Register a hook that warns (``NotTrained``) in the first step of an optimiser that should
    train the new adapter ``name`` of ``model``, but does not. ``parameters`` are the adapter's."""
    parameter_refs = tuple(map(weakref.ref, parameters))
    with _LOCK:
        _NEW_ADAPTERS[:] = [adapter for adapter in _NEW_ADAPTERS if adapter.live_parameters()]
        if parameter_refs:
            _NEW_ADAPTERS.append(_NewAdapter(name, weakref.ref(model), parameter_refs))
        if _NEW_ADAPTERS and not _HOOKS:
            _HOOKS.append(register_optimizer_step_pre_hook(_check_step))


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hook before each step of an optimiser: warn if the step should train a new adapter but does
    not."""
    if torch.compiler.is_compiling():
        return
    with _LOCK:
        problems = _check_new_adapters(optimizer) if _NEW_ADAPTERS else []
        if _HOOKS and not _NEW_ADAPTERS and [*_HOOKS[0].hooks_dict_ref()] == [_HOOKS[0].id]:
            _HOOKS.pop().remove()
    for problem in problems:
        warn_caller(problem, NotTrained, within=("veneer", "torch"))


def _check_new_adapters(optimizer: Optimizer) -> list[str]:
    """Error texts for the new adapters that a step of ``optimizer`` should train but does not. The
    adapters for which the step shows this, one way or the other, are removed from
    ``_NEW_ADAPTERS``. The caller holds ``_LOCK``."""
    optimizer_parameters = _optimizer_parameters(optimizer)
    problems: list[str] = []
    for adapter in tuple(_NEW_ADAPTERS):
        parameters = adapter.live_parameters()
        stepped_parameters = [
            parameter for parameter in parameters if id(parameter) in optimizer_parameters
        ]
        has_no_gradients = not stepped_parameters and all(
            parameter.grad is None for parameter in parameters
        )
        if parameters and (
            has_no_gradients
            or not (stepped_parameters or _holds_base(adapter, optimizer_parameters))
        ):
            continue  # the step shows nothing: it trains something else, or no backward has run yet
        _NEW_ADAPTERS.remove(adapter)
        if stepped_parameters and not any(
            parameter.requires_grad for parameter in stepped_parameters
        ):
            problems += _frozen_adapter_problems(adapter, optimizer_parameters)
        elif parameters and not stepped_parameters and not _in_any_optimizer(parameters):
            problem = (
                f"a step of {type(optimizer).__name__}, which holds no parameter of adapter"
                f" {adapter.name!r}, whose parameters have gradients"
            )
            advice = "make the optimizer after attach, of handle.parameters()"
            problems.append(sentence(problem, "an optimizer that trains the adapter", advice))
    return problems


def _optimizer_parameters(optimizer: Any) -> dict[int, Any]:
    """The parameters of an optimiser, by their ``id``."""
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(parameter): parameter for group in groups for parameter in group["params"]}


def _frozen_adapter_problems(
    adapter: _NewAdapter, optimizer_parameters: dict[int, Any]
) -> list[str]:
    """The error text for an optimiser that holds a frozen adapter, as a list. The list is empty if
    the adapter may be frozen on purpose, because the optimiser also holds base parameters of the
    same model, and at least one parameter that requires a gradient."""
    if any(parameter.requires_grad for parameter in optimizer_parameters.values()) and _holds_base(
        adapter, optimizer_parameters
    ):
        return []
    problem = f"an optimizer of adapter {adapter.name!r}, whose parameters require no gradient"
    advice = "load it with trainable=True, or leave its parameters out of the optimizer"
    return [sentence(problem, "parameters that train", advice)]


def _holds_base(adapter: _NewAdapter, optimizer_parameters: dict[int, Any]) -> bool:
    """Whether an optimiser holds parameters of the base model, as one that was created before
    ``attach`` does. An optimiser of another adapter of the model holds none."""
    model = adapter.model()
    if model is None:
        return False
    adapter_parameter_ids = {
        id(parameter)
        for *_, layer_state in layer_states(model)
        for parameter in layer_state.parameters()
    }
    return any(
        parameter_id in optimizer_parameters and parameter_id not in adapter_parameter_ids
        for parameter_id in map(id, model.parameters())
    )


def _in_any_optimizer(parameters: list[nn.Parameter]) -> bool:
    """Whether any optimiser that exists in this process holds one of these parameters."""
    parameter_ids = set(map(id, parameters))
    optimizers = (
        tracked_object
        for tracked_object in gc.get_objects()
        if issubclass(type(tracked_object), Optimizer)
    )
    return any(
        not parameter_ids.isdisjoint(_optimizer_parameters(optimizer)) for optimizer in optimizers
    )
