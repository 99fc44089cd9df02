"""Who reads a weight: not always the module that holds it, nor always in ``forward``.

    F.linear(x, self.lm_head.weight)          a module reads a weight of another below it, past that one's forward
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    model.encode(x)                           another method reads a weight, and is called from outside
    self.q(x), self.k(x), self.v(x)           several layers read one input

``weight_readers`` finds the methods whose code reads a weight like this (``reading.py``). They run on a view in which
the weight
is changed (see ``adapted.py``). For torch's fused fast paths ``SWITCHES`` says how to take the plain path, on which
every adapter is seen. What reading code cannot show is proven on a live model by ``veneer.check``.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.attach.adapted_module import own_class
from veneer.attach.source_analysis import ModulePath, attribute, mentions, reads
from veneer.attach.targets import Names, own_parameters

#: Attributes that turn a fused fast path off, by module class.
SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}
#: Modules that run or give whatever is in them, which a site would be too.
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightReader(NamedTuple):
    """A method of the module at ``path`` that reads a weight; ``way`` leads from there to the weight's holder."""

    path: str
    way: ModulePath
    method: str = "forward"


def switches(module: nn.Module) -> dict[str, Any]:
    """The attributes that a view of ``module`` needs so that it takes no fused fast path."""
    return next((own for cls, own in SWITCHES.items() if isinstance(module, cls)), {})


def switched(names: Names, path: str) -> Iterator[str]:
    """The modules above ``path``, and it itself, that have a fused fast path to be turned off."""
    yield from (above for above, _ in _above(names, path) if switches(names.modules[above]))


def weight_readers(names: Names, path: str, weight: str) -> Iterator[WeightReader]:
    """Who reads ``weight`` of the module at ``path`` other than through that one's forward."""
    if not has_forward(names.modules[path]):
        for above, way in _above(names, path):
            if way and has_forward(names.modules[above]):
                yield WeightReader(above, way)
                break
    for above, way in _above(names, path):
        module, chain = names.modules[above], (*way, weight)
        cls = own_class(module)
        forward = ("forward", *bound(module).values()) if way and not switches(module) else ()
        if any(_reads(module, method, chain) for method in forward):
            yield WeightReader(above, way)
        for method in _methods(cls):
            words = mentions(cls, method)
            named = weight in words and (chain[0] in words or chain[0].isdigit())
            if named and _reads(module, method, chain):
                yield WeightReader(above, way, method)


def _reads(module: nn.Module, method: str, way: ModulePath) -> bool:
    """Whether a method reads what is at ``way``. One that writes it too, or another of its name, means the base's own
    numbers."""
    found = reads(own_class(module), method, frozenset((*module._modules, *own_parameters(module))))
    written = method != "forward" and any(_fits(c, way[: len(c)]) or way[-1] in c for c in found.written)
    return not written and any(_fits(chain, way) for chain in found.read)


def asked(names: Names, path: str) -> Iterator[tuple[str, str]]:
    """(the path of a module above, an attribute) for all that forward methods above ask of the module at ``path``
    itself, such as a convolution's stride."""
    for above, way in _above(names, path):
        module = names.modules[above]
        if way and has_forward(module):
            found = reads(own_class(module), "forward", frozenset((*module._modules, *own_parameters(module))))
            below = sorted({chain[len(way)] for chain in found.read if len(chain) > len(way) and _fits(chain, way)})
            yield from ((above, name) for name in below if name != "*")


#: What of a class may read a weight when it is used.
_READERS = (FunctionType, property, functools.cached_property)


@functools.cache
def _methods(cls: type[nn.Module]) -> tuple[str, ...]:
    """The public methods and properties that a class has besides forward and what every module has."""
    names = (name for name in dir(cls) if not (name.startswith("_") or hasattr(nn.Module, name)))
    own = {name: attribute(cls, name) for name in names}
    return tuple(name for name, value in own.items() if isinstance(value, _READERS))


def has_forward(module: nn.Module) -> bool:
    """Whether a module does something itself, and is no mere container of parameters."""
    forward = getattr(own_class(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward


def bound(module: nn.Module) -> dict[str, str]:
    """The attributes that hold a method bound to the module itself (``self.impl = self._impl``), and its name."""
    own = {name: value for name, value in module.__dict__.items() if isinstance(value, MethodType)}
    return {
        name: value.__func__.__name__ for name, value in own.items()
        if value.__self__ is module and isinstance(value.__func__, FunctionType)
    }  # fmt: skip


def unreachable(names: Names, path: str, method: str = "forward") -> str | None:
    """Why an adapter at ``path`` would have no effect there in a method, or None."""
    module = names.modules[path]
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    if kind := next((cls.__name__ for cls in _LISTS if isinstance(module, cls)), None):
        return f"it is a {kind}, whose items are its children: its adapters would be one of the items"
    if isinstance(attribute(own_class(module), method), functools.cached_property):
        return "that is computed once and kept, whatever is selected"
    if method in module.__dict__:
        by = " (by accelerate's hooks?)" if method == "forward" else ""
        return f"its {method} was replaced on the instance{by}, which would pass the adapter by"
    return None


def _above(names: Names, path: str) -> Iterator[tuple[str, ModulePath]]:
    """(path, way down) of the module itself and of every module above it, the nearest first, under each of its
    names."""
    seen: set[tuple[str, ModulePath]] = set()
    for alias in names.aliases[path]:
        parts = alias.split(".") if alias else []
        for depth in range(len(parts), -1, -1):
            entry = names.canonical[".".join(parts[:depth])], tuple(parts[depth:])
            if entry not in seen:
                seen.add(entry)
                yield entry


def _fits(chain: ModulePath, way: ModulePath) -> bool:
    return len(chain) >= len(way) and all(said in ("*", actual) for said, actual in zip(chain, way, strict=False))


@functools.cache
def alike(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The children that a class's forward (and what it calls of itself) calls on the same local value, one after the
    other: ("q_proj", "k_proj", "v_proj"). Calls on two branches of an ``if`` are not the same value, nor is a name that
    has been assigned anew. Whether the value is one tensor is seen when they are called (``adapted.Together``)."""
    groups: list[tuple[str, ...]] = []
    for method in reads(cls, "forward").code:
        finder = _Alike()
        finder.block(method.body if isinstance(method, ast.FunctionDef) else [])
        groups += [tuple(names) for names in finder.calls.values() if len(names) > 1]
    return tuple(groups)


#: expressions of which a part may not be evaluated, or more than once
_PARTLY = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Alike:
    """Collects ``self.child(name)`` by the value of the name, in the order of evaluation."""

    def __init__(self) -> None:
        self.calls: dict[tuple[int, str, int], list[str]] = {}
        self.blocks, self.here = 0, 0
        self.assigned: dict[str, int] = {}

    def block(self, statements: list[ast.stmt]) -> None:
        """Statements that run one after the other, or not at all."""
        outer, self.blocks = self.here, self.blocks + 1
        self.here = self.blocks
        for statement in statements:
            self.node(statement)
        self.here = outer

    def node(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            return  # runs at another time
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                self.assigned[node.id] = self.assigned.get(node.id, 0) + 1
            return
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            self.node(node.value)  # evaluated first
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.node(target)
            return
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value)
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.AST):
                    self.apart(item) if isinstance(node, _PARTLY) else self.node(item)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            self.call(node.func, node)

    def apart(self, node: ast.AST) -> None:
        outer, self.blocks = self.here, self.blocks + 1
        self.here = self.blocks
        self.node(node)
        self.here = outer

    def call(self, called: ast.Attribute, node: ast.Call) -> None:
        """``self.child(name)``, once its argument has been evaluated."""
        of_self = isinstance(called.value, ast.Name) and called.value.id == "self"
        if of_self and len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name):
            value = node.args[0].id
            names = self.calls.setdefault((self.here, value, self.assigned.get(value, 0)), [])
            if called.attr not in names:
                names.append(called.attr)
