"""Find the methods that read a weight, other than the forward of the module that holds it:

    F.linear(x, self.lm_head.weight)          a module reads the weight of a module below it
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    model.encode(x)                           a caller uses another method, which reads a weight

``weight_readers`` finds these methods, except for those with a fused kernel. An adapter runs them
on a view: another object of the module's class, with the changed weight. ``FAST_PATH_SWITCHES``
holds the attributes that turn off torch's fused fast paths. On the plain path that runs instead,
every adapter takes effect.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.attach.layer.adapted_module import has_wrapped_forward, instance_forward
from veneer.attach.layer.model_index import ModelIndex
from veneer.attach.layer.state import ModulePath
from veneer.attach.source.source_analysis import paths_used_by, words_in_method
from veneer.attach.source.source_reader import UsedPaths, class_attribute
from veneer.bases import own_parameters
from veneer.distributed import base_class

#: module class -> {attribute: the value that turns its fused fast path off}
FAST_PATH_SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}
#: containers that run or return all of their children. Adapters cannot be attached to them: they
#: would run or return the child that holds the adapters (``LayerState``) too
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightReader(NamedTuple):
    """A method that reads a weight without a call of the module that holds it.

    Fields:
        path: the path of the module with the method.
        path_below: the path from that module to the module that holds the weight; () if they are
            the same.
        method: the name of the method.
    """

    path: str
    path_below: ModulePath
    method: str = "forward"


def fast_path_switches(module: nn.Module) -> dict[str, Any]:
    """{attribute: value} that a view of ``module`` gets so that its fused fast path is off; empty
    for a class without a fused fast path."""
    return next(
        (attributes for cls, attributes in FAST_PATH_SWITCHES.items() if isinstance(module, cls)),
        {},
    )


def modules_with_fast_path(model_index: ModelIndex, path: str) -> Iterator[str]:
    """Yield the paths of those modules, among the module at ``path`` and the modules above it, that
    have a fused fast path to turn off."""
    yield from (
        path_above
        for path_above, _ in _modules_above(model_index, path)
        if fast_path_switches(model_index.modules[path_above])
    )


def weight_readers(
    model_index: ModelIndex, path: str, weight_name: str, *, reachable_only: bool = False
) -> Iterator[WeightReader]:
    """Yield the methods that read the weight ``weight_name`` of the module at ``path``, except for
    the forward of that module.

    ``reachable_only`` leaves out forwards that read the weight only in branches that cannot run
    with the present attributes of their modules.
    """
    if not has_forward(model_index.modules[path]):
        for path_above, path_below in _modules_above(model_index, path):
            if path_below and has_forward(model_index.modules[path_above]):
                yield WeightReader(path_above, path_below)
                break
    is_list = isinstance(model_index.modules[path], nn.ParameterList | nn.ParameterDict)
    for path_above, path_below in _modules_above(model_index, path):
        module, weight_path = model_index.modules[path_above], (*path_below, weight_name)
        module_class = base_class(module)
        forward_methods = (
            ("forward", *bound_methods(module).values())
            if path_below and not fast_path_switches(module)
            else ()
        )
        reading_methods = [
            method for method in forward_methods if _reads_parameter(module, method, weight_path)
        ]
        is_reachable = not reachable_only or any(
            _reads_parameter(module, method, weight_path, _constants(module))
            for method in reading_methods
        )
        if reading_methods and is_reachable:
            yield WeightReader(path_above, path_below)
        # a method that reads a list or dict of parameters may read any of its elements
        read_path = path_below if is_list else weight_path
        for method in _public_methods(module_class) if read_path else ():
            # code reads the elements of lists of modules by their index
            names = {name for name in (read_path[0], read_path[-1]) if not name.isdigit()}
            is_named = names <= words_in_method(module_class, method)
            if is_named and _reads_parameter(module, method, read_path):
                yield WeightReader(path_above, path_below, method)


#: (name, value) of plain attributes of a module, by which branches of its code can be ruled out
_Constants = frozenset[tuple[str, Any]]


def _constants(module: nn.Module) -> _Constants:
    """(name, value) of each attribute of a module that is a plain value (bool, number, text or
    None) and is not changed by ``train()``, ``eval()`` or gradient checkpointing."""
    return frozenset(
        (name, value)
        for name, value in module.__dict__.items()
        if name not in ("training", "gradient_checkpointing")
        and type(value) in (bool, int, float, str, type(None))
    )


def _used_paths(module: nn.Module, method: str, constants: _Constants = frozenset()) -> UsedPaths:
    """The attribute paths below ``module`` that its method reads and writes. ``constants`` are
    (name, value) of attributes; branches that cannot run with these values are ignored."""
    return paths_used_by(
        base_class(module),
        method,
        frozenset((*module._modules, *own_parameters(module))),
        constants,
    )


def _reads_parameter(
    module: nn.Module, method: str, path_below: ModulePath, constants: _Constants = frozenset()
) -> bool:
    """Whether a method reads the parameter at ``path_below``. A method besides forward that also
    writes this parameter, or one with the same name, does not count: it is to work on the base's
    values, as an initialisation does. ``constants`` are as in ``_used_paths``."""
    used_paths = _used_paths(module, method, constants)
    is_written = method != "forward" and any(
        _begins_with(path, path_below[: len(path)]) or path_below[-1] in path
        for path in used_paths.written
    )
    return not is_written and any(_begins_with(path, path_below) for path in used_paths.read)


def attributes_read_above(model_index: ModelIndex, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path of a module above, name of an attribute) for each attribute of the module at
    ``path``, such as its stride or its weight, that the forward of a module above reads directly.
    """
    for path_above, path_below in _modules_above(model_index, path):
        module = model_index.modules[path_above]
        if path_below and has_forward(module):
            attributes = {
                read_path[len(path_below)]
                for read_path in _used_paths(module, "forward").read
                if len(read_path) > len(path_below) and _begins_with(read_path, path_below)
            }
            yield from ((path_above, name) for name in sorted(attributes) if name != "*")


#: the types of class attributes that run code of the class, which may read a weight
_READER_TYPES = (FunctionType, property, functools.cached_property)
#: methods of transformers' models that write files or create weights. They are not analysed, which
#: would take long, because they compute nothing with weights.
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
    """{attribute: method name} of the instance attributes that hold a method bound to the module
    itself, as after ``self.impl = self._impl``."""
    return {
        name: value.__func__.__name__
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and isinstance(value.__func__, FunctionType)
    }


def unreachable(model_index: ModelIndex, path: str, method: str = "forward") -> str | None:
    """The reason why no adapter can act in this ``method`` of the module at ``path``: its code is
    not the one that runs, or cannot be replaced. None if there is no such reason."""
    module = model_index.modules[path]
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    if container_name := next(
        (cls.__name__ for cls in _CONTAINERS if isinstance(module, cls)), None
    ):
        return (
            f"it is a {container_name}, whose items are its children: its adapters would be one of"
            " the items"
        )
    if isinstance(class_attribute(base_class(module), method), functools.cached_property):
        return "that is computed once and kept, whatever is selected"
    has_known_wrapper = method == "forward" and (
        has_wrapped_forward(module) or instance_forward(module) is not None
    )
    if method in module.__dict__ and not has_known_wrapper:
        explanation = " (by accelerate's hooks?)" if method == "forward" else ""
        return (
            f"its {method} was replaced on the instance{explanation}, which would pass the adapter"
            " by"
        )
    return None


def _modules_above(model_index: ModelIndex, path: str) -> Iterator[tuple[str, ModulePath]]:
    """Yield (path of a module, path from there to the module at ``path``) for this module and the
    modules above it, the nearest first. If the model holds the module in several places, the
    modules above each place are yielded."""
    visited_pairs: set[tuple[str, ModulePath]] = set()
    for alias in model_index.aliases[path]:
        components = alias.split(".") if alias else []
        for depth in range(len(components), -1, -1):
            path_pair = (
                model_index.canonical[".".join(components[:depth])],
                tuple(components[depth:]),
            )
            if path_pair not in visited_pairs:
                visited_pairs.add(path_pair)
                yield path_pair


def _begins_with(read_path: ModulePath, path_below: ModulePath) -> bool:
    """Whether ``read_path``, which the source analysis found, begins with ``path_below``. A "*" in
    ``read_path``, which stands for any index or name, matches every name."""
    return len(read_path) >= len(path_below) and all(
        name in ("*", actual_name) for name, actual_name in zip(read_path, path_below, strict=False)
    )
