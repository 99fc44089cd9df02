"""Questions that are answered by reading the source of a model's Python code; nothing else in
Veneer parses source.

    reads(cls, method)              which parameters below ``self`` a method reads and writes
    mentions(cls, method)           a superset of the names in it, told without parsing
    same_input(cls)                 which children forward calls on one value: ("q_proj", "k_proj", "v_proj")
    submodule_calls(forward)        which modules below a forward calls, and whether inputs are used after that
    compares_attention(model)       whether the code of a model asks if its attention is called "sdpa"

``reads`` gives paths of attributes below ``self``:

    self.lm_head.weight                       ("lm_head", "weight")
    for i, l in enumerate(self.ls): l.weight  ("ls", "*", "weight")           "*" is any index
    project(h, self.emb)                      what project reads of that parameter: ("emb", "weight")

It follows a method into what it calls of its own class, of the classes above and of plain Python
functions that are given something of ``self``; through local names, loops, tuples, properties and
what a call returns. Code in C, or made at run time, shows nothing, nor does a class without source;
a name that is computed is no name; calls are followed to a depth of 16; a branch that never runs
counts as read, unless who asks gives the attributes that rule it out. Hence no answer is a promise,
and each is checked by who asks: ``veneer.check`` finds weights that are read unseen,
``fused_linear.py`` compares the inputs, ``train/loss.py`` tries.
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

from veneer.attach.source_reader import Reader, Reads, attribute, of_torch, plain, tree_of
from veneer.attach.state import ModulePath


@functools.cache
def reads(
    cls: type[nn.Module],
    method: str,
    within: frozenset[str] = frozenset(),
    known: frozenset[tuple[str, Any]] = frozenset(),
) -> Reads:
    """What ``cls.method`` does with what is ``within`` the module: its children and parameters, by
    their names. Where attributes of the module are ``known``, without the branches that they rule
    out."""
    reader = Reader(cls, within, method == "forward", dict(known))
    reader.follow(plain(attribute(cls, method)), [{()}])
    return reader.found


@functools.cache
def mentions(cls: type[nn.Module], method: str) -> frozenset[str]:
    """The names and texts in the compiled code of a method and of what it may call."""
    own, done, found = _functions(cls), set(), set()
    todo = [*own.get(method, ())]
    while todo:
        if (function := todo.pop()) in done:
            continue
        done.add(function)
        words = _words(function.__code__)
        found |= words
        todo += [one for word in words & own.keys() for one in own[word]]
        outside = [function.__globals__.get(word) for word in words]
        for module in [
            one for one in outside if isinstance(one, ModuleType) and not of_torch(one.__name__)
        ]:
            outside += [vars(module).get(word) for word in words]
        todo += [
            one for one in outside if isinstance(one, FunctionType) and not of_torch(one.__module__)
        ]
    return frozenset(found)


@functools.cache
def _functions(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    found: dict[str, list[FunctionType]] = {}
    for above in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(above).items():
            found.setdefault(name, []).extend([one] if (one := plain(value)) else [])
    return found


@functools.cache
def _words(code: CodeType) -> frozenset[str]:
    inner = [_words(value) for value in code.co_consts if isinstance(value, CodeType)]
    texts = [value.split(".") for value in code.co_consts if isinstance(value, str)]
    return frozenset(code.co_names).union(*texts, *inner)


@functools.cache
def same_input(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The children that a class's forward (and what it calls of itself) calls on the same local
    value, one after the other. Calls on two branches of an ``if`` are not the same value, nor is a
    name that has been assigned anew."""
    children: list[tuple[str, ...]] = []
    for method in reads(cls, "forward").code:
        finder = _SameInput()
        finder.block(method.body if isinstance(method, ast.FunctionDef) else [])
        children += [tuple(names) for names in finder.calls.values() if len(names) > 1]
    return tuple(children)


#: expressions of which a part may not be evaluated, or more than once
_PARTLY = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _SameInput:
    """Collects ``self.child(name)`` by the value of the name, in the order of evaluation."""

    def __init__(self) -> None:
        self.calls: dict[tuple[int, str, int], list[str]] = {}
        self.blocks, self.here = 0, 0
        self.assigned: dict[str, int] = {}

    def block(self, statements: Sequence[ast.AST]) -> None:
        """What runs one after the other, or not at all."""
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
                    self.block([item]) if isinstance(node, _PARTLY) else self.node(item)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            self.call(node.func, node)

    def call(self, called: ast.Attribute, node: ast.Call) -> None:
        """``self.child(name)``, once its argument has been evaluated."""
        of_self = isinstance(called.value, ast.Name) and called.value.id == "self"
        if (
            of_self
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Name)
        ):
            value = node.args[0].id
            names = self.calls.setdefault((self.here, value, self.assigned.get(value, 0)), [])
            if called.attr not in names:
                names.append(called.attr)


@functools.cache
def submodule_calls(forward: Callable[..., Any]) -> tuple[tuple[ModulePath, bool], ...]:
    """(path, late) of each call `self.path(…)` in the source of a forward. `late`: whether what
    follows reads another input, such as `input_ids`, whose rows would no longer be those that the
    call gave, or writes to the module, which would be the view. Left out are the parts of the code
    that do not run here (with labels, for router logits) or do nothing (`logits_to_keep`)."""
    own = plain(forward)
    function = tree_of(own) if own else None
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
    """("a", "b") of `self.a.b`."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    above = _path_below_self(node.value) if isinstance(node, ast.Attribute) else None
    return None if above is None else (*above, node.attr)  # pyright: ignore[reportAttributeAccessIssue]


#: code that asks whether a model's attention is transformers' "sdpa"
_ASKS = re.compile(
    r"""_attn_implementation\s*(?:[!=]=\s*["']sdpa|(?:not\s+)?in\s*[(\[{][^)\]}]*["']sdpa)"""
)


def compares_attention(model: nn.Module) -> bool:
    """Whether code of one of the model's modules, of transformers or that came through it, compares
    the name of its attention with "sdpa"."""
    return any(_compares(name) for name in {type(module).__module__ for module in model.modules()})


@functools.cache
def _compares(module: str) -> bool:
    return (
        module.startswith("transformers")
        and _ASKS.search(inspect.getsource(sys.modules[module])) is not None
    )
