"""Methods of one model object that mean something else while it has adapters.

    put(module, "save_pretrained", function)     module.save_pretrained(…) is function(module, …)
    take_back(model)                             the objects are as they were
    without_adapters(model)                      a view of the model as it would be without any of this

An override is an attribute of the object, found before the method of its class. A function
alone would not do: an attribute of an object is bound to nothing, and copies and pickles of the
model need one that is theirs. Rejected: a subclass, as for adapted layers. The forward of every
model that has the method would then be ours too, and FSDP2 puts classes of its own above.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from veneer.attach.adapted_module import base_class, walk
from veneer.attach.state import STATE, LayerState


class Instead:
    """An override of a method: ``function``, called with the module. ``before`` is the attribute
    that the object had there."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], before: Any = None) -> None:
        self.module, self.function, self.before = module, function, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def put(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let ``module.name(…)`` be ``function(module, …)``. ``function`` is a module's own, so that it
    can be pickled."""
    before = module.__dict__.get(name)
    if not isinstance(before, Instead):
        module.__dict__[name] = Instead(module, function, before)


def take_back(module: nn.Module) -> None:
    for name in [name for name in module.__dict__ if stands(module, name)]:
        before = original(module.__dict__.pop(name), module)
        module.__dict__.update({} if before is None else {name: before})


def original(value: Any, module: nn.Module) -> Any:
    """The attribute that ``module``, the object or a view of it, had before the override, bound to
    it; None if it had none."""
    before = value.before if isinstance(value, Instead) else value
    return MethodType(before.__func__, module) if isinstance(before, MethodType) else before


def stands(module: nn.Module, name: str) -> bool:
    return isinstance(module.__dict__.get(name), Instead)


def without_adapters(module: nn.Module) -> nn.Module:
    """A view of a module as it would be without adapters: its own class, no layer states, the same
    parameters."""
    plain = object.__new__(base_class(module))
    plain.__dict__.update(module.__dict__)
    take_back(plain)
    plain.__dict__["_modules"] = {
        name: without_adapters(child) if isinstance(child, nn.Module) and _differs(child) else child
        for name, child in module._modules.items()
        if not isinstance(child, LayerState)
    }
    return plain


def _differs(module: nn.Module) -> bool:
    return any(
        STATE in below._modules or any(stands(below, name) for name in below.__dict__)
        for _, below in walk(module)
    )
