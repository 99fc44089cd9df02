"""Who reads a weight: not always the module that holds it.

    F.linear(x, self.lm_head.weight)          a module reads a weight of another below it, past that one's forward
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all
    self.q(x), self.k(x), self.v(x)           several layers read one input

``hosts`` finds the modules whose code reads a weight like this. They run on a view in which the weight is changed (see
``adapted.py``). For torch's fused fast paths ``SWITCHES`` says how to take the plain path, on which every adapter is
seen. What reading code cannot show is proven on a live model by ``veneer.check``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from veneer.adapted import own_class
from veneer.targets import Names

#: Attributes that turn a fused fast path off, by module class.
SWITCHES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}

#: What may be asked of a weight without reading its values.
_ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "itemsize"}
_ABOUT_CALLS = {"isinstance", "type", "hasattr", "id", "len", "getattr"}

Chain = tuple[str, ...]


def switches(module: nn.Module) -> dict[str, Any]:
    """The attributes that a view of ``module`` needs so that it takes no fused fast path."""
    return next((own for cls, own in SWITCHES.items() if isinstance(module, cls)), {})


def switched(names: Names, path: str) -> Iterator[str]:
    """The modules above ``path``, and it itself, that have a fused fast path to be turned off."""
    yield from (above for above, _ in _above(names, path) if switches(names.modules[above]))


def hosts(names: Names, path: str, weight: str) -> Iterator[tuple[str, Chain]]:
    """(path, way from there to the holder) of each module that reads ``weight`` of the module at ``path`` directly."""
    if not has_forward(names.modules[path]):
        for above, way in _above(names, path):
            if way and has_forward(names.modules[above]):
                yield above, way
                break
    for above, way in _above(names, path):
        if not way or switches(names.modules[above]):
            continue
        if any(_fits(chain, (*way, weight)) for chain in direct_reads(own_class(names.modules[above]))):
            yield above, way


def has_forward(module: nn.Module) -> bool:
    """Whether a module does something itself, and is no mere container of parameters."""
    forward = getattr(own_class(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward


def unreachable(names: Names, path: str) -> str | None:
    """Why an adapter at ``path`` would have no effect there, or None."""
    module = names.modules[path]
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks?), which would pass the adapter by"
    return None


def _above(names: Names, path: str) -> Iterator[tuple[str, Chain]]:
    """(path, way down) of the module itself and of every module above it, the nearest first, under each of its
    names."""
    seen: set[tuple[str, Chain]] = set()
    for alias in names.aliases[path]:
        parts = alias.split(".") if alias else []
        for depth in range(len(parts), -1, -1):
            entry = names.canonical[".".join(parts[:depth])], tuple(parts[depth:])
            if entry not in seen:
                seen.add(entry)
                yield entry


def _fits(chain: Chain, way: Chain) -> bool:
    return len(chain) >= len(way) and all(said in ("*", actual) for said, actual in zip(chain, way, strict=False))


@functools.cache
def direct_reads(cls: type[nn.Module]) -> frozenset[Chain]:
    """The attribute chains below ``self`` that a class's forward (and what it calls of itself) reads, such as
    ("lm_head", "weight"). "*" stands for any index. Chains of one name, its own attributes, are left out."""
    chains: set[Chain] = set()
    for method in _methods(cls):
        reader = _Reader()
        reader.visit(method)
        chains |= reader.chains
    return frozenset(chains)


class _Reader(ast.NodeVisitor):
    """Collects the chains that code reads off ``self``, through local names and loops, and the methods that it
    calls."""

    def __init__(self) -> None:
        self.chains: set[Chain] = set()
        self.calls: list[str] = []
        self.names: dict[str, Chain] = {"self": ()}

    def chain(self, node: ast.AST) -> Chain | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            above = self.chain(node.value)
            return None if above is None else (*above, node.attr)
        if isinstance(node, ast.Subscript):
            above = self.chain(node.value)
            return None if above is None else (*above, "*")
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self.chain(node)
        if chain is not None and chain[-1] not in _ABOUT:
            self._add(chain)
        elif chain is None:
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)  # weight[0] reads weight, weight.shape[0] does not
        self.visit(node.slice)

    def visit_Call(self, node: ast.Call) -> None:
        chain = self.chain(node.func)
        if isinstance(node.func, ast.Name) and node.func.id in _ABOUT_CALLS:
            return
        if chain is not None and len(chain) == 1:
            self.calls.append(chain[0])
        elif chain is not None and chain[-1] not in _ABOUT:
            self._add(chain[:-1])  # a method of what the chain names, such as weight.t()
        else:
            self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)

    def visit_Assign(self, node: ast.Assign) -> None:
        chain = self.chain(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and chain is not None:
                self.names[target.id] = chain
        self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        chain = self.chain(node.iter)
        if isinstance(node.target, ast.Name) and chain is not None:
            self.names[node.target.id] = (*chain, "*")
        self.generic_visit(node)

    def _add(self, chain: Chain) -> None:
        if len(chain) > 1:
            self.chains.add(chain)


@functools.cache
def alike(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The children that a class's forward (and what it calls of itself) calls on the same local value, one after the
    other: ("q_proj", "k_proj", "v_proj"). Calls on two branches of an ``if`` are not the same value, nor is a name that
    has been assigned anew. Whether the value is one tensor is seen when they are called (``adapted.Together``)."""
    groups: list[tuple[str, ...]] = []
    for method in _methods(cls):
        finder = _Alike()
        finder.block(method.body)
        groups += [tuple(names) for names in finder.calls.values() if len(names) > 1]
    return tuple(groups)


def _methods(cls: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    """The source of forward, and of what it calls of the same class; without what is written in C, or was made at run
    time, of which `check` tells."""
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        function = getattr(cls, name, None)
        if name in done or not callable(function) or (hasattr(nn.Module, name) and name != "forward"):
            continue
        done.add(name)
        try:
            (method,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        except (OSError, TypeError, SyntaxError, IndentationError, ValueError):
            continue
        if isinstance(method, ast.FunctionDef):
            yield method
            reader = _Reader()
            reader.visit(method)
            todo += reader.calls


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
