"""Find the modules and methods that read a weight. It may be read by other code than the forward of
the module that holds it:

    F.linear(x, self.lm_head.weight)          a module reads the weight of a module below it
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    model.encode(x)                           a caller uses another method, which reads a weight

``weight_readers`` finds the methods whose code reads a weight in one of these ways. An adapter runs
these methods on a view, in which the weight is changed. ``FAST_PATH_SWITCHES`` holds the attributes
that turn off torch's fused fast paths. On the plain path that runs instead, every adapter takes
effect.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.attach.layer.adapted_module import has_wrapped_forward, instance_forward
from veneer.attach.layer.names import Names
from veneer.attach.layer.state import ModulePath
from veneer.attach.source.source_analysis import paths_used_by, words_in_method
from veneer.attach.source.source_reader import UsedPaths, class_attribute
from veneer.bases import own_parameters
from veneer.distributed import base_class

#: module class -> the attributes that turn its fused fast path off
FAST_PATH_SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}
#: containers that run or return all of their children, among which a ``LayerState`` would be
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightReader(NamedTuple):
    """A method of the module at ``path`` that reads a weight. ``path_below`` is the path from that
    module to the module that holds the weight; it is () if they are the same."""

    path: str
    path_below: ModulePath
    method: str = "forward"


def fast_path_switches(module: nn.Module) -> dict[str, Any]:
    """The attributes that turn off the fused fast path of ``module`` on a view of it."""
    return next(
        (attributes for cls, attributes in FAST_PATH_SWITCHES.items() if isinstance(module, cls)),
        {},
    )


def modules_with_fast_path(names: Names, path: str) -> Iterator[str]:
    """The paths of the module at ``path`` and of the modules above it, if they have a fused fast
    path to turn off."""
    yield from (
        path_above
        for path_above, _ in _modules_above(names, path)
        if fast_path_switches(names.modules[path_above])
    )


def weight_readers(
    names: Names, path: str, weight: str, *, reachable_only: bool = False
) -> Iterator[WeightReader]:
    """The methods that read ``weight`` of the module at ``path``, except for the forward of that
    module.

    ``reachable_only`` leaves out forwards that read the weight only in branches that the present
    attributes of their modules rule out.
    """
    if not has_forward(names.modules[path]):
        for path_above, path_below in _modules_above(names, path):
            if path_below and has_forward(names.modules[path_above]):
                yield WeightReader(path_above, path_below)
                break
    for path_above, path_below in _modules_above(names, path):
        module, weight_path = names.modules[path_above], (*path_below, weight)
        cls = base_class(module)
        forward_methods = (
            ("forward", *bound_methods(module).values())
            if path_below and not fast_path_switches(module)
            else ()
        )
        readers = [
            method for method in forward_methods if _reads_parameter(module, method, weight_path)
        ]
        is_reachable = not reachable_only or any(
            _reads_parameter(module, method, weight_path, _constants(module)) for method in readers
        )
        if readers and is_reachable:
            yield WeightReader(path_above, path_below)
        for method in _public_methods(cls):
            words = words_in_method(cls, method)
            first_name = weight_path[0]
            is_named = weight in words and (first_name in words or first_name.isdigit())
            if is_named and _reads_parameter(module, method, weight_path):
                yield WeightReader(path_above, path_below, method)


_Constants = frozenset[tuple[str, Any]]


def _constants(module: nn.Module) -> _Constants:
    """(name, value) of each attribute of a module that is a plain value and does not depend on the
    module's mode."""
    return frozenset(
        (name, value)
        for name, value in module.__dict__.items()
        if name not in ("training", "gradient_checkpointing")
        and type(value) in (bool, int, float, str, type(None))
    )


def _used_paths(module: nn.Module, method: str, constants: _Constants = frozenset()) -> UsedPaths:
    """The paths that a method of a module reads and writes. ``constants`` are (name, value) pairs
    of attributes; branches that they rule out are ignored."""
    return paths_used_by(
        base_class(module),
        method,
        frozenset((*module._modules, *own_parameters(module))),
        constants,
    )


def _reads_parameter(
    module: nn.Module, method: str, path_below: ModulePath, constants: _Constants = frozenset()
) -> bool:
    """Whether a method reads the parameter at ``path_below``. A method other than forward that also
    writes this parameter, or one with the same name, does not count: it is to work on the base's
    values, as an initialisation does."""
    accesses = _used_paths(module, method, constants)
    is_written = method != "forward" and any(
        _begins_with(path, path_below[: len(path)]) or path_below[-1] in path
        for path in accesses.written
    )
    return not is_written and any(_begins_with(path, path_below) for path in accesses.read)


def attributes_read_above(names: Names, path: str) -> Iterator[tuple[str, str]]:
    """(path of a module above, name of an attribute) for each attribute of the module at ``path``,
    such as its stride, that the forward of a module above reads."""
    for path_above, path_below in _modules_above(names, path):
        module = names.modules[path_above]
        if path_below and has_forward(module):
            attributes = {
                read_path[len(path_below)]
                for read_path in _used_paths(module, "forward").read
                if len(read_path) > len(path_below) and _begins_with(read_path, path_below)
            }
            yield from ((path_above, name) for name in sorted(attributes) if name != "*")


#: types of class attributes whose use may read a weight
_READER_TYPES = (FunctionType, property, functools.cached_property)
#: methods of transformers' models that write files or create weights. They compute nothing with
#: weights, and analysing them would take long.
_NON_READERS = {
    "save_pretrained",
    "push_to_hub",
    "post_init",
    "init_weights",
    "tie_weights",
    "resize_token_embeddings",
}


@functools.cache
def _public_methods(cls: type[nn.Module]) -> tuple[str, ...]:
    """The public methods and properties of a class besides forward and those of ``nn.Module``."""
    return tuple(
        name
        for name in dir(cls)
        if not (name.startswith("_") or hasattr(nn.Module, name) or name in _NON_READERS)
        and isinstance(class_attribute(cls, name), _READER_TYPES)
    )


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward, and is not only a container of parameters."""
    forward = getattr(base_class(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward


def bound_methods(module: nn.Module) -> dict[str, str]:
    """{attribute: method name} of the attributes that hold a method bound to the module itself
    (``self.impl = self._impl``)."""
    return {
        name: value.__func__.__name__
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and isinstance(value.__func__, FunctionType)
    }


def unreachable(names: Names, path: str, method: str = "forward") -> str | None:
    """The reason why an adapter at ``path`` would have no effect in a method of the module; else
    None."""
    module = names.modules[path]
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    if kind := next((cls.__name__ for cls in _CONTAINERS if isinstance(module, cls)), None):
        return (
            f"it is a {kind}, whose items are its children: its adapters would be one of the items"
        )
    if isinstance(class_attribute(base_class(module), method), functools.cached_property):
        return "that is computed once and kept, whatever is selected"
    is_wrapped = method == "forward" and (
        has_wrapped_forward(module) or instance_forward(module) is not None
    )
    if method in module.__dict__ and not is_wrapped:
        cause = " (by accelerate's hooks?)" if method == "forward" else ""
        return f"its {method} was replaced on the instance{cause}, which would pass the adapter by"
    return None


def _modules_above(names: Names, path: str) -> Iterator[tuple[str, ModulePath]]:
    """Yield (path of a module, path from there to the module at ``path``) for this module and the
    modules above it, the nearest first, under each of its names."""
    visited: set[tuple[str, ModulePath]] = set()
    for alias in names.aliases[path]:
        components = alias.split(".") if alias else []
        for depth in range(len(components), -1, -1):
            entry = names.canonical[".".join(components[:depth])], tuple(components[depth:])
            if entry not in visited:
                visited.add(entry)
                yield entry


def _begins_with(read_path: ModulePath, path_below: ModulePath) -> bool:
    """Whether a path that was read begins with ``path_below``. "*" in ``read_path`` matches any
    name."""
    return len(read_path) >= len(path_below) and all(
        name in ("*", actual_name) for name, actual_name in zip(read_path, path_below, strict=False)
    )
