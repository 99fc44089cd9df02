"""Analyse the source of a model's Python code. All parsing of source in Veneer is done here and in
``source_reader.py``.

    reads(cls, method)              which parameters below ``self`` a method reads and writes
    mentions(cls, method)           a superset of the names in it, found without parsing
    same_input(cls)                 which children forward calls on one value, as ("q_proj", …)
    submodule_calls(forward)        which modules below a forward calls, and what it does later
    compares_attention(model)       whether code compares the name of the attention with "sdpa"

``reads`` gives paths of attributes below ``self``:

    self.lm_head.weight                       ("lm_head", "weight")
    for i, l in enumerate(self.ls): l.weight  ("ls", "*", "weight")           "*" is any index
    project(h, self.emb)                      what project reads of its argument: ("emb", "weight")

The analysis follows calls of methods of the class and its base classes, and calls of plain Python
functions with arguments from ``self``; through local names, loops, tuples, properties and return
values. Limits: it sees nothing in C code, in code made at run time, and in classes without source;
it ignores computed names; it follows calls to a depth of 16; and it counts a branch that never
runs, unless the caller passes the attributes that rule it out. No result is a promise, so each
caller checks it: ``veneer.check`` finds weights that are read in other ways, ``fused_linear.py``
compares the inputs, ``train/loss.py`` tries.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from veneer.attach.layer.state import ModulePath
from veneer.attach.source.source_reader import (
    Reader,
    Reads,
    attribute,
    is_of_torch,
    python_function,
    tree_of,
)


@functools.cache
def reads(
    cls: type[nn.Module],
    method: str,
    within: frozenset[str] = frozenset(),
    attributes: frozenset[tuple[str, Any]] = frozenset(),
) -> Reads:
    """The paths below ``self`` that ``cls.method`` reads and writes.

    Args:
        within: the names of the module's children and parameters; other attributes are ignored.
        attributes: (name, value) of plain attributes of the module. Branches that they rule out are
            left out.
    """
    reader = Reader(cls, within, method == "forward", dict(attributes))
    reader.follow(python_function(attribute(cls, method)), [{()}])
    return reader.reads


@functools.cache
def mentions(cls: type[nn.Module], method: str) -> frozenset[str]:
    """The names and texts in the compiled code of a method and of what it may call."""
    methods, done, mentioned = _functions(cls), set(), set()
    todo = [*methods.get(method, ())]
    while todo:
        if (function := todo.pop()) in done:
            continue
        done.add(function)
        words = _words(function.__code__)
        mentioned |= words
        todo += [called for word in words & methods.keys() for called in methods[word]]
        global_values = [function.__globals__.get(word) for word in words]
        for module in [
            value
            for value in global_values
            if isinstance(value, ModuleType) and not is_of_torch(value.__name__)
        ]:
            global_values += [vars(module).get(word) for word in words]
        todo += [
            value
            for value in global_values
            if isinstance(value, FunctionType) and not is_of_torch(value.__module__)
        ]
    return frozenset(mentioned)


@functools.cache
def _functions(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """The functions that a class and its base classes below ``nn.Module`` define, by name."""
    functions: dict[str, list[FunctionType]] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = python_function(value)
            functions.setdefault(name, []).extend([function] if function else [])
    return functions


@functools.cache
def _words(code: CodeType) -> frozenset[str]:
    """The names in compiled code, and the texts in it, split at dots."""
    inner = [_words(value) for value in code.co_consts if isinstance(value, CodeType)]
    texts = [value.split(".") for value in code.co_consts if isinstance(value, str)]
    return frozenset(code.co_names).union(*texts, *inner)


@functools.cache
def same_input(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Groups of children that a class's forward (and the methods that it calls) calls on the same
    local value. Calls on two branches of an ``if``, or with a name that was assigned in between,
    are not in one group."""
    children: list[tuple[str, ...]] = []
    for method in reads(cls, "forward").code:
        finder = _SameInput()
        finder.block(method.body if isinstance(method, ast.FunctionDef) else [])
        children += [tuple(names) for names in finder.calls.values() if len(names) > 1]
    return tuple(children)


#: expressions whose operands may be evaluated several times or not at all
_PARTLY = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _SameInput:
    """Collects ``self.child(name)`` by the value of the name, in the order of evaluation."""

    def __init__(self) -> None:
        self.calls: dict[tuple[int, str, int], list[str]] = {}
        self.blocks, self.current_block = 0, 0
        self.assigned: dict[str, int] = {}

    def block(self, statements: Sequence[ast.AST]) -> None:
        """Visit statements that run one after the other, or not at all."""
        outer, self.blocks = self.current_block, self.blocks + 1
        self.current_block = self.blocks
        for statement in statements:
            self.node(statement)
        self.current_block = outer

    def node(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            return  # its body runs later
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
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.block([child]) if isinstance(node, _PARTLY) else self.node(child)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            self.call(node.func, node)

    def call(self, called: ast.Attribute, node: ast.Call) -> None:
        """Record a call ``self.child(name)``; its argument has been visited."""
        of_self = isinstance(called.value, ast.Name) and called.value.id == "self"
        if (
            of_self
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Name)
        ):
            value = node.args[0].id
            names = self.calls.setdefault(
                (self.current_block, value, self.assigned.get(value, 0)), []
            )
            if called.attr not in names:
                names.append(called.attr)


@functools.cache
def submodule_calls(forward: Callable[..., Any]) -> tuple[tuple[ModulePath, bool], ...]:
    """(path, late) of each call `self.path(…)` in the source of a forward.

    `late`: whether later code reads another input, such as `input_ids`, whose rows may differ from
    the rows of the call's output, or writes to the module. Branches for labels and router logits
    are left out, as they do not run here, and so is `logits_to_keep`, which has no effect.
    """
    plain_function = python_function(forward)
    function = tree_of(plain_function) if plain_function else None
    if not isinstance(function, ast.FunctionDef):
        return ()  # made at run time, or written in C
    inputs = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    inputs -= {"self", "logits_to_keep", "labels", "use_cache", "return_dict"}
    inputs = {name for name in inputs if not name.startswith("output_")}
    uses: list[tuple[int, int]] = []
    calls: list[tuple[ModulePath, tuple[int, int]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, ast.If) and (
            _names_in(node.test) & {"labels", "output_router_logits"}
            or "logits_to_keep" in _names_in(node)
        ):
            for below in node.orelse:
                visit(below)
            return
        writes = (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _path_below_self(node)
        )
        if writes or (isinstance(node, ast.Name) and node.id in inputs):
            uses.append((node.lineno, node.col_offset))
        if isinstance(node, ast.Call) and (path := _path_below_self(node.func)):
            calls.append((path, (node.end_lineno or 0, node.end_col_offset or 0)))
        for below in ast.iter_child_nodes(node):
            visit(below)

    for statement in function.body:
        visit(statement)
    return tuple((path, any(use > end for use in uses)) for path, end in calls)


def _names_in(node: ast.AST) -> set[str]:
    return {below.id for below in ast.walk(node) if isinstance(below, ast.Name)}


def _path_below_self(node: ast.AST) -> ModulePath | None:
    """("a", "b") for `self.a.b`; None for any other expression."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    above = _path_below_self(node.value) if isinstance(node, ast.Attribute) else None
    return None if above is None else (*above, node.attr)  # pyright: ignore[reportAttributeAccessIssue]


#: code that compares the name of a model's attention with transformers' "sdpa"
_SDPA_COMPARISON = re.compile(
    r"""_attn_implementation\s*(?:[!=]=\s*["']sdpa|(?:not\s+)?in\s*[(\[{][^)\]}]*["']sdpa)"""
)


def compares_attention(model: nn.Module) -> bool:
    """Whether code of one of the model's modules, from transformers or loaded by it, compares the
    name of the attention with "sdpa"."""
    return any(_compares(name) for name in {type(module).__module__ for module in model.modules()})


@functools.cache
def _compares(module: str) -> bool:
    return (
        module.startswith("transformers")
        and _SDPA_COMPARISON.search(inspect.getsource(sys.modules[module])) is not None
    )
