"""The first step of an optimiser after an adapter was attached: does it train the adapter?

An optimiser that was made before ``attach`` holds the frozen base alone, and steps without moving
anything. So does one of the parameters of an adapter that was loaded without ``trainable=True``,
where something else gives the loss a gradient. A hook on all optimisers looks at each new adapter
until a step has shown either way, and is removed with the last of them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from veneer.attach.adapted_module import layer_states
from veneer.errors import sentence, warn_caller


class NotTrained(UserWarning):
    """An optimiser steps, and an adapter that is meant to train does not change."""


@dataclass(frozen=True, eq=False)
class _NewAdapter:
    name: str
    model: weakref.ref[nn.Module]
    parameters: tuple[weakref.ref[nn.Parameter], ...]

    def alive(self) -> list[nn.Parameter]:
        parameters = (reference() for reference in self.parameters)
        return [parameter for parameter in parameters if parameter is not None]


_NEW: list[_NewAdapter] = []
_HOOKS: list[Any] = []


def watch_first_step(model: nn.Module, name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Warn in an optimiser's first step if it shows that this new adapter does not train
    (``NotTrained``)."""
    references = tuple(map(weakref.ref, parameters))
    _NEW[:] = [adapter for adapter in _NEW if adapter.alive()]
    if references:
        _NEW.append(_NewAdapter(name, weakref.ref(model), references))
    if _NEW and not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    held = _parameters(optimizer)
    problems = []
    for adapter in tuple(_NEW):
        parameters = adapter.alive()
        ours = [parameter for parameter in parameters if id(parameter) in held]
        idle = not ours and all(parameter.grad is None for parameter in parameters)
        if parameters and (idle or not (ours or _holds_base(adapter, held))):
            continue  # a step of something else
        _NEW.remove(adapter)
        if ours and not any(parameter.requires_grad for parameter in ours):
            problems += _frozen(adapter, held)
        elif parameters and not ours and not _held_elsewhere(parameters):
            found = (
                f"a step of {type(optimizer).__name__}, which holds no parameter of adapter"
                f" {adapter.name!r}"
            )
            found += ", whose parameters have gradients"
            do = "make the optimizer after attach, of handle.parameters()"
            problems.append(sentence(found, "an optimizer that trains the adapter", do))
    if not _NEW:
        while _HOOKS:
            _HOOKS.pop().remove()
    for problem in problems:
        warn_caller(problem, NotTrained, within=("veneer", "torch"))


def _parameters(optimizer: Any) -> dict[int, Any]:
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(parameter): parameter for group in groups for parameter in group["params"]}


def _frozen(adapter: _NewAdapter, held: dict[int, Any]) -> list[str]:
    """The problem of an optimiser that holds a frozen adapter, unless it holds all of a model of
    which others train."""
    if any(parameter.requires_grad for parameter in held.values()) and _holds_base(adapter, held):
        return []
    problem = f"an optimizer of adapter {adapter.name!r}, whose parameters require no gradient"
    do = "load it with trainable=True, or leave its parameters out of the optimizer"
    return [sentence(problem, "parameters that train", do)]


def _holds_base(adapter: _NewAdapter, held: dict[int, Any]) -> bool:
    """Whether some of these are base parameters of the adapter's model. An optimiser of another
    adapter holds none."""
    model = adapter.model()
    if model is None:
        return False
    of_adapters = {
        id(parameter) for *_, state in layer_states(model) for parameter in state.parameters()
    }
    return any(key in held and key not in of_adapters for key in map(id, model.parameters()))


def _held_elsewhere(parameters: list[nn.Parameter]) -> bool:
    """Whether any other optimiser holds one of these."""
    wanted = set(map(id, parameters))
    optimizers = (value for value in gc.get_objects() if issubclass(type(value), Optimizer))
    return any(not wanted.isdisjoint(_parameters(optimizer)) for optimizer in optimizers)
