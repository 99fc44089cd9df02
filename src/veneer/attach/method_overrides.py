"""Methods of one model object that mean something else while it has adapters.

    put(module, "save_pretrained", function)     module.save_pretrained(…) is function(module, …)
    take_back(model)                             the objects are as they were

What stands there is an attribute of the object, found before the method of its class. Rejected: a subclass, as for
adapted layers. The forward of every model that has the method would then be ours too, and FSDP2 puts classes of its
own above. A function alone would not do: an attribute of an object is bound to nothing, and copies and pickles of the
model need one that is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Instead:
    """What stands in the place of a method: ``function``, given the module that it belongs to.

    ``before`` is what the object itself had there, which hides the method of its class too; None if nothing.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], before: Any = None) -> None:
        self.module, self.function, self.before = module, function, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def put(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let ``module.name(…)`` be ``function(module, …)``. ``function`` is a module's own, so that it can be pickled."""
    before = module.__dict__.get(name)
    if not isinstance(before, Instead):
        module.__dict__[name] = Instead(module, function, before)


def take_back(module: nn.Module) -> None:
    """Undo every ``put`` on a module."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, Instead):
            restored = original(value, module)
            module.__dict__.pop(name)
            module.__dict__.update({} if restored is None else {name: restored})


def original(value: Any, module: nn.Module) -> Any:
    """What ``module``, a view of the object or the object itself, has in the place of an attribute: that of before,
    bound to it; None if it had nothing."""
    before = value.before if isinstance(value, Instead) else value
    return MethodType(before.__func__, module) if isinstance(before, MethodType) else before


def stands(module: nn.Module, name: str) -> bool:
    """Whether something stands in the place of this method."""
    return isinstance(module.__dict__.get(name), Instead)
