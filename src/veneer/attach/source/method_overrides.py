"""Override methods of one model object while it has adapters.

    override_method(module, name, function)     module.name(…) calls function(module, …)
    remove_overrides(module)                    restores the object
    without_adapters(module)                    a view without adapters and overrides

An override is an attribute of the object, which Python finds before the method of the class. The
attribute is a ``MethodOverride`` and not a plain function, because Python does not bind attributes
to their object: each copy or pickle of the model needs an override that calls the function with
that copy. Rejected: a subclass, as for adapted layers. It would replace the forward of every model
that has such a method, and FSDP2 also replaces the classes of modules by subclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from veneer.attach.layer.adapted_module import walk
from veneer.attach.layer.state import LAYER_STATE_NAME, LayerState
from veneer.distributed import base_class


class MethodOverride:
    """Calls ``function`` with the module. ``attribute_before`` is the attribute of that name that
    the object had in its ``__dict__``, or None."""

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], attribute_before: Any = None
    ) -> None:
        self.module, self.function, self.attribute_before = module, function, attribute_before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def override_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Make ``module.name(…)`` call ``function(module, …)``. ``function`` must be picklable: a
    function of a Python module."""
    attribute_before = module.__dict__.get(name)
    if not isinstance(attribute_before, MethodOverride):
        module.__dict__[name] = MethodOverride(module, function, attribute_before)


def remove_overrides(module: nn.Module) -> None:
    """Restore the attributes that the object had before its overrides."""
    for name in [name for name in module.__dict__ if is_overridden(module, name)]:
        attribute_before = original(module.__dict__.pop(name), module)
        module.__dict__.update({} if attribute_before is None else {name: attribute_before})


def original(override: Any, module: nn.Module) -> Any:
    """The attribute from before an override, bound to ``module``, which is the object or a view of
    it. None if there was no such attribute."""
    attribute = override.attribute_before if isinstance(override, MethodOverride) else override
    is_method = isinstance(attribute, MethodType)
    return MethodType(attribute.__func__, module) if is_method else attribute


def is_overridden(module: nn.Module, name: str) -> bool:
    return isinstance(module.__dict__.get(name), MethodOverride)


def without_adapters(module: nn.Module) -> nn.Module:
    """A view of a module without adapters: its original class, the same parameters, no layer states
    and no overrides. Modules below it are replaced by such views too."""
    module_view = object.__new__(base_class(module))
    module_view.__dict__.update(module.__dict__)
    remove_overrides(module_view)
    module_view.__dict__["_modules"] = {
        name: without_adapters(child) if isinstance(child, nn.Module) and _differs(child) else child
        for name, child in module._modules.items()
        if not isinstance(child, LayerState)
    }
    return module_view


def _differs(module: nn.Module) -> bool:
    """Whether a module, or a module below it, has adapters or overrides."""
    return any(
        LAYER_STATE_NAME in below._modules
        or any(is_overridden(below, name) for name in below.__dict__)
        for _, below in walk(module)
    )
