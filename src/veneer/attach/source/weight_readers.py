"""Find the modules and methods that read a weight. They need not be the forward of its own module:

    F.linear(x, self.lm_head.weight)          a module reads the weight of a module below it
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    model.encode(x)                           a caller uses another method, which reads a weight

``weight_readers`` finds the methods whose code reads a weight in one of these ways. They run on a
view in which the weight is changed. For torch's fused fast paths ``SWITCHES`` holds the attributes
that select the plain path, on which every adapter takes effect.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.attach.layer.adapted_module import instance_forward, wrapped_forward
from veneer.attach.layer.names import Names
from veneer.attach.layer.state import ModulePath
from veneer.attach.source.source_analysis import mentions, reads
from veneer.attach.source.source_reader import Reads, attribute
from veneer.bases import own_parameters
from veneer.distributed import base_class

#: attributes that turn a fused fast path off, by module class
SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}
#: containers that run or return all their children, to which the state of a layer would be added
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightReader(NamedTuple):
    """A method of the module at ``path`` that reads a weight. ``below`` is the path from that
    module to the module that holds the weight."""

    path: str
    below: ModulePath
    method: str = "forward"


def fast_path_switches(module: nn.Module) -> dict[str, Any]:
    """The attributes with which a view of ``module`` takes no fused fast path."""
    return next((attributes for cls, attributes in SWITCHES.items() if isinstance(module, cls)), {})


def modules_with_fast_path(names: Names, path: str) -> Iterator[str]:
    """The module at ``path`` and the modules above it that have a fused fast path to turn off."""
    yield from (
        above for above, _ in _above(names, path) if fast_path_switches(names.modules[above])
    )


def weight_readers(
    names: Names, path: str, weight: str, *, reachable_only: bool = False
) -> Iterator[WeightReader]:
    """The methods that read ``weight`` of the module at ``path``, other than that module's forward.

    ``reachable_only`` leaves out forwards that read it only in branches that the present attributes
    of their modules rule out.
    """
    if not has_forward(names.modules[path]):
        for above, below in _above(names, path):
            if below and has_forward(names.modules[above]):
                yield WeightReader(above, below)
                break
    for above, below in _above(names, path):
        module, target = names.modules[above], (*below, weight)
        cls = base_class(module)
        forward = (
            ("forward", *bound(module).values()) if below and not fast_path_switches(module) else ()
        )
        readers = [method for method in forward if _reads(module, method, target)]
        reachable = not reachable_only or any(
            _reads(module, method, target, _constants(module)) for method in readers
        )
        if readers and reachable:
            yield WeightReader(above, below)
        for method in _methods(cls):
            words = mentions(cls, method)
            named = weight in words and (target[0] in words or target[0].isdigit())
            if named and _reads(module, method, target):
                yield WeightReader(above, below, method)


_Constants = frozenset[tuple[str, Any]]


def _constants(module: nn.Module) -> _Constants:
    """The attributes of a module that are plain values and do not depend on its mode."""
    values = {
        name: value
        for name, value in module.__dict__.items()
        if type(value) in (bool, int, float, str, type(None))
    }
    return frozenset(
        (name, value)
        for name, value in values.items()
        if name not in ("training", "gradient_checkpointing")
    )


def _analyse(module: nn.Module, method: str, constants: _Constants = frozenset()) -> Reads:
    return reads(
        base_class(module),
        method,
        frozenset((*module._modules, *own_parameters(module))),
        constants,
    )


def _reads(
    module: nn.Module, method: str, below: ModulePath, constants: _Constants = frozenset()
) -> bool:
    """Whether a method reads the parameter at the path ``below``. A method other than forward that
    also writes it, or one of the same name, does not count: it means the base's own values."""
    accesses = _analyse(module, method, constants)
    written = method != "forward" and any(
        _fits(c, below[: len(c)]) or below[-1] in c for c in accesses.written
    )
    return not written and any(_fits(read, below) for read in accesses.read)


def attributes_read_above(names: Names, path: str) -> Iterator[tuple[str, str]]:
    """(path of a module above, name of an attribute) for each attribute of the module at ``path``,
    its stride for instance, that the forward of a module above reads."""
    for above, below in _above(names, path):
        module = names.modules[above]
        if below and has_forward(module):
            longer = [read for read in _analyse(module, "forward").read if len(read) > len(below)]
            attributes = {read[len(below)] for read in longer if _fits(read, below)}
            yield from ((above, name) for name in sorted(attributes) if name != "*")


#: attributes of a class whose use may read a weight
_READERS = (FunctionType, property, functools.cached_property)
#: methods of transformers' models that write files or create weights. They compute nothing with
#: weights, and their analysis would take long.
_NO_READERS = {
    "save_pretrained",
    "push_to_hub",
    "post_init",
    "init_weights",
    "tie_weights",
    "resize_token_embeddings",
}


@functools.cache
def _methods(cls: type[nn.Module]) -> tuple[str, ...]:
    """The public methods and properties of a class besides forward and those of ``nn.Module``."""
    names = [
        name
        for name in dir(cls)
        if not (name.startswith("_") or hasattr(nn.Module, name) or name in _NO_READERS)
    ]
    attributes = {name: attribute(cls, name) for name in names}
    return tuple(name for name, value in attributes.items() if isinstance(value, _READERS))


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward, and is not only a container of parameters."""
    forward = getattr(base_class(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward


def bound(module: nn.Module) -> dict[str, str]:
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
    """Why an adapter at ``path`` would have no effect in a method of the module; or None."""
    module = names.modules[path]
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    if kind := next((cls.__name__ for cls in _LISTS if isinstance(module, cls)), None):
        return (
            f"it is a {kind}, whose items are its children: its adapters would be one of the items"
        )
    if isinstance(attribute(base_class(module), method), functools.cached_property):
        return "that is computed once and kept, whatever is selected"
    wrapped = method == "forward" and (
        wrapped_forward(module) or instance_forward(module) is not None
    )
    if method in module.__dict__ and not wrapped:
        by = " (by accelerate's hooks?)" if method == "forward" else ""
        return f"its {method} was replaced on the instance{by}, which would pass the adapter by"
    return None


def _above(names: Names, path: str) -> Iterator[tuple[str, ModulePath]]:
    """(path of a module, path from there down) for the module itself and those above it, the
    nearest first, under each of its names."""
    visited: set[tuple[str, ModulePath]] = set()
    for alias in names.aliases[path]:
        components = alias.split(".") if alias else []
        for depth in range(len(components), -1, -1):
            entry = names.canonical[".".join(components[:depth])], tuple(components[depth:])
            if entry not in visited:
                visited.add(entry)
                yield entry


def _fits(read: ModulePath, below: ModulePath) -> bool:
    """Whether a path that was read begins with ``below``; "*" in it matches any name."""
    return len(read) >= len(below) and all(
        name in ("*", actual) for name, actual in zip(read, below, strict=False)
    )
