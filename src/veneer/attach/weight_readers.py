"""Who reads a weight: not always the module that holds it, nor always in ``forward``.

    F.linear(x, self.lm_head.weight)          a module reads a weight of another below it, past that one's forward
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    model.encode(x)                           another method reads a weight, and is called from outside

``weight_readers`` finds the methods whose code reads a weight like this. They run on a view in
which the weight is changed. For torch's fused fast paths ``SWITCHES`` says how to take the plain
path, on which every adapter is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.attach.adapted_module import base_class, instance_forward, wrapped_forward
from veneer.attach.source_analysis import mentions, reads
from veneer.attach.source_reader import Reads, attribute
from veneer.attach.state import ModulePath
from veneer.attach.targets import Names, own_parameters

#: Attributes that turn a fused fast path off, by module class.
SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}
#: Modules that run or give whatever is in them, which a layer's state would be too.
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightReader(NamedTuple):
    """A method of the module at ``path`` that reads a weight; ``below`` leads from there to the
    weight's holder."""

    path: str
    below: ModulePath
    method: str = "forward"


def switches(module: nn.Module) -> dict[str, Any]:
    """The attributes that a view of ``module`` needs so that it takes no fused fast path."""
    return next((own for cls, own in SWITCHES.items() if isinstance(module, cls)), {})


def switched(names: Names, path: str) -> Iterator[str]:
    """The modules above ``path``, and it itself, that have a fused fast path to be turned off."""
    yield from (above for above, _ in _above(names, path) if switches(names.modules[above]))


def weight_readers(
    names: Names, path: str, weight: str, *, now: bool = False
) -> Iterator[WeightReader]:
    """Who reads ``weight`` of the module at ``path`` other than through that one's forward. ``now``
    leaves out forwards that read it in branches alone which the modules' attributes rule out as
    they are."""
    if not has_forward(names.modules[path]):
        for above, below in _above(names, path):
            if below and has_forward(names.modules[above]):
                yield WeightReader(above, below)
                break
    for above, below in _above(names, path):
        module, target = names.modules[above], (*below, weight)
        cls = base_class(module)
        forward = ("forward", *bound(module).values()) if below and not switches(module) else ()
        found = [method for method in forward if _reads(module, method, target)]
        if found and not (
            now and not any(_reads(module, method, target, _constants(module)) for method in found)
        ):
            yield WeightReader(above, below)
        for method in _methods(cls):
            words = mentions(cls, method)
            named = weight in words and (target[0] in words or target[0].isdigit())
            if named and _reads(module, method, target):
                yield WeightReader(above, below, method)


_Constants = frozenset[tuple[str, Any]]


def _constants(module: nn.Module) -> _Constants:
    """The attributes of a module that are plain values, and that no mode of it changes."""
    own = {
        name: value
        for name, value in module.__dict__.items()
        if type(value) in (bool, int, float, str, type(None))
    }
    return frozenset(
        (name, own[name]) for name in own if name not in ("training", "gradient_checkpointing")
    )


def _analysed(module: nn.Module, method: str, known: _Constants = frozenset()) -> Reads:
    return reads(
        base_class(module), method, frozenset((*module._modules, *own_parameters(module))), known
    )


def _reads(
    module: nn.Module, method: str, below: ModulePath, known: _Constants = frozenset()
) -> bool:
    """Whether a method reads what is at ``below``. One that writes it, or its namesake, means the
    base's own values."""
    found = _analysed(module, method, known)
    written = method != "forward" and any(
        _fits(c, below[: len(c)]) or below[-1] in c for c in found.written
    )
    return not written and any(_fits(read, below) for read in found.read)


def asked(names: Names, path: str) -> Iterator[tuple[str, str]]:
    """(path of a module above, an attribute) of what forwards above ask of the module at ``path``:
    its stride, say."""
    for above, below in _above(names, path):
        module = names.modules[above]
        if below and has_forward(module):
            longer = [read for read in _analysed(module, "forward").read if len(read) > len(below)]
            asked_names = {read[len(below)] for read in longer if _fits(read, below)}
            yield from ((above, name) for name in sorted(asked_names) if name != "*")


#: What of a class may read a weight when it is used.
_READERS = (FunctionType, property, functools.cached_property)
#: Methods of transformers' models that write files or make weights, and compute nothing with them;
#: long to read.
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
    """The public methods and properties that a class has besides forward and what every module
    has."""
    names = [
        name
        for name in dir(cls)
        if not (name.startswith("_") or hasattr(nn.Module, name) or name in _NO_READERS)
    ]
    own = {name: attribute(cls, name) for name in names}
    return tuple(name for name, value in own.items() if isinstance(value, _READERS))


def has_forward(module: nn.Module) -> bool:
    """Whether a module does something itself, and is no mere container of parameters."""
    forward = getattr(base_class(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward


def bound(module: nn.Module) -> dict[str, str]:
    """The attributes that hold a method bound to the module itself (``self.impl = self._impl``),
    and its name."""
    return {
        name: value.__func__.__name__
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and isinstance(value.__func__, FunctionType)
    }


def unreachable(names: Names, path: str, method: str = "forward") -> str | None:
    """Why an adapter at ``path`` would have no effect there in a method, or None."""
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
    """(path, path down) of the module itself and of those above it, the nearest first, under each
    of its names."""
    seen: set[tuple[str, ModulePath]] = set()
    for alias in names.aliases[path]:
        parts = alias.split(".") if alias else []
        for depth in range(len(parts), -1, -1):
            entry = names.canonical[".".join(parts[:depth])], tuple(parts[depth:])
            if entry not in seen:
                seen.add(entry)
                yield entry


def _fits(read: ModulePath, below: ModulePath) -> bool:
    return len(read) >= len(below) and all(
        said in ("*", actual) for said, actual in zip(read, below, strict=False)
    )
