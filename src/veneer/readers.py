"""Who reads a weight: not always the module that holds it.

    F.linear(x, self.lm_head.weight)          a module reads a weight of another below it, past that one's forward
    nn.TransformerEncoderLayer in eval mode   a fused kernel reads every weight below it
    self.tables[i]                            a ParameterList has no forward at all

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
    todo, done = ["forward"], set()
    while todo:
        method = todo.pop()
        function = getattr(cls, method, None)
        if method in done or not callable(function) or (hasattr(nn.Module, method) and method != "forward"):
            continue
        done.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue  # written in C, or made at run time: `check` is what proves it
        reader = _Reader()
        reader.visit(tree)
        chains |= reader.chains
        todo += reader.calls
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
