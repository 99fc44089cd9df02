"""Override methods of one model object while it has adapters.

    override_method(module, method_name, function)      calls of the method call function(module, …)
    remove_overrides(module)                            restores the object
    without_adapters(module)                            a view without adapters and overrides

An override is an attribute of the object, which Python finds before the method of the class. The
attribute is a ``MethodOverride``, which refers to its module, and not a plain function: Python does
not pass the object to a function in an attribute. If a model is copied or pickled, the reference is
copied with it, so the override of the copy calls the function with the copy. Rejected: a subclass,
as for adapted layers. It would replace the forward of every model that has such a method, and FSDP2
also replaces the classes of modules by subclasses.
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
    """An overridden method of one module: a call of it calls ``function`` with the module as the
    first argument. ``attribute_before`` is the attribute of the same name that the module had in
    its ``__dict__`` before the override; None if there was none."""

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], attribute_before: Any = None
    ) -> None:
        self.module, self.function, self.attribute_before = module, function, attribute_before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


def override_method(module: nn.Module, method_name: str, function: Callable[..., Any]) -> None:
    """Make ``module.<method_name>(…)`` call ``function(module, …)``. Does nothing if the method is
    overridden already. ``function`` must be picklable: a function of a Python module."""
    attribute_before = module.__dict__.get(method_name)
    if not isinstance(attribute_before, MethodOverride):
        module.__dict__[method_name] = MethodOverride(module, function, attribute_before)


def remove_overrides(module: nn.Module) -> None:
    """Restore the attributes that the object had before its overrides."""
    for name in [name for name in module.__dict__ if is_overridden(module, name)]:
        attribute_before = attribute_before_override(module.__dict__.pop(name), module)
        module.__dict__.update({} if attribute_before is None else {name: attribute_before})


def attribute_before_override(override: Any, module: nn.Module) -> Any:
    """The attribute that ``override`` has replaced, or ``override`` itself if it is no
    ``MethodOverride``. A bound method is bound to ``module``, the object or a view of it. None if
    the object had no such attribute."""
    original_attribute = (
        override.attribute_before if isinstance(override, MethodOverride) else override
    )
    is_method = isinstance(original_attribute, MethodType)
    return MethodType(original_attribute.__func__, module) if is_method else original_attribute


def is_overridden(module: nn.Module, method_name: str) -> bool:
    return isinstance(module.__dict__.get(method_name), MethodOverride)


def without_adapters(module: nn.Module) -> nn.Module:
    """A view of a module without adapters: another object of the module's original class, with the
    same parameters, without layer states (children that hold adapters) and overrides. Modules below
    it that have adapters or overrides are replaced by views of this sort too."""
    module_view = object.__new__(base_class(module))
    module_view.__dict__.update(module.__dict__)
    remove_overrides(module_view)
    module_view.__dict__["_modules"] = {
        name: without_adapters(child)
        if isinstance(child, nn.Module) and _has_adapters_or_overrides(child)
        else child
        for name, child in module._modules.items()
        if not isinstance(child, LayerState)
    }
    return module_view


def _has_adapters_or_overrides(module: nn.Module) -> bool:
    """Whether a module, or a module below it, has adapters or overrides."""
    return any(
        LAYER_STATE_NAME in submodule._modules
        or any(is_overridden(submodule, name) for name in submodule.__dict__)
        for _, submodule in walk(module)
    )
