"""Analyse the source of a model's Python code. All parsing of source in Veneer is done here and in
``source_reader.py``.

    paths_used_by(cls, method)      which parameters below ``self`` a method reads and writes
    words_in_method(cls, method)    a superset of the names in the method, found without parsing
    shared_input_groups(cls)        which children forward calls on one value, as ("q_proj", …)
    submodule_calls(forward)        which modules below a forward calls, and whether later code
                                    reads other inputs
    compares_attention(model)       whether code compares the name of the attention with "sdpa"

``paths_used_by`` gives paths of attributes below ``self``:

    self.lm_head.weight                       ("lm_head", "weight")
    for i, l in enumerate(self.ls): l.weight  ("ls", "*", "weight")           "*" is any index
    project(h, self.emb)                      ("emb", "weight") if project reads its weight

The analysis follows calls of methods of the class and its base classes, and calls of plain Python
functions with arguments from ``self``. It tracks local names, loops, tuples, properties and return
values. It has limits. It sees nothing in C code, in code made at run time, and in classes without
source; it ignores computed names; it follows calls to a depth of 16; and it counts a branch that
never runs, unless the caller passes the attributes that rule it out. So no result is certain, and
each caller checks it: ``veneer.check`` finds weights that are read in other ways,
``fused_linear.py`` compares the inputs, and ``train/loss.py`` tries the result on an example.
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
    UsedPaths,
    class_attribute,
    is_torch_module,
    python_function,
    tree_of,
)


@functools.cache
def paths_used_by(
    cls: type[nn.Module],
    method: str,
    member_names: frozenset[str] = frozenset(),
    attributes: frozenset[tuple[str, Any]] = frozenset(),
) -> UsedPaths:
    """The paths below ``self`` that ``cls.method`` reads and writes.

    Args:
        member_names: the names of the module's children and parameters; other attributes are
            ignored.
        attributes: (name, value) of plain attributes of the module. Branches that they rule out are
            left out.
    """
    reader = Reader(cls, member_names, method == "forward", dict(attributes))
    reader.follow(python_function(class_attribute(cls, method)), [{()}])
    return reader.used_paths


@functools.cache
def words_in_method(cls: type[nn.Module], method: str) -> frozenset[str]:
    """The names and string constants in the compiled code of a method and of the functions that it
    may call. They are found without parsing, and tell for most methods that ``paths_used_by``
    would find nothing."""
    methods, visited, mentioned_words = _functions(cls), set(), set()
    pending = [*methods.get(method, ())]
    while pending:
        if (function := pending.pop()) in visited:
            continue
        visited.add(function)
        words = _words_in_code(function.__code__)
        mentioned_words |= words
        pending += [called for word in words & methods.keys() for called in methods[word]]
        global_values = [function.__globals__.get(word) for word in words]
        for module in [
            value
            for value in global_values
            if isinstance(value, ModuleType) and not is_torch_module(value.__name__)
        ]:
            global_values += [vars(module).get(word) for word in words]
        pending += [
            value
            for value in global_values
            if isinstance(value, FunctionType) and not is_torch_module(value.__module__)
        ]
    return frozenset(mentioned_words)


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
def _words_in_code(code: CodeType) -> frozenset[str]:
    """The names in compiled code, and the string constants in it, split at dots."""
    inner_words = [_words_in_code(value) for value in code.co_consts if isinstance(value, CodeType)]
    string_parts = [value.split(".") for value in code.co_consts if isinstance(value, str)]
    return frozenset(code.co_names).union(*string_parts, *inner_words)


@functools.cache
def shared_input_groups(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Groups of children that a class's forward, or a method that it calls, calls on the same local
    value. Calls in two branches of an ``if`` are in different groups, as are calls with a name that
    was assigned in between."""
    groups: list[tuple[str, ...]] = []
    for function in paths_used_by(cls, "forward").functions:
        finder = _SharedInputFinder()
        finder.visit_block(function.body if isinstance(function, ast.FunctionDef) else [])
        groups += [
            tuple(children) for children in finder.children_by_value.values() if len(children) > 1
        ]
    return tuple(groups)


#: expressions whose operands may be evaluated several times or not at all
_OPTIONAL_OPERANDS = (
    ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


class _SharedInputFinder:
    """Collects the children in calls ``self.child(name)``, by the value of the name, in the order
    of evaluation.

    Fields:
        children_by_value: the children that are called on one value. A value is identified by the
            block in which it is used, its name, and the number of assignments to this name before.
        block_count: the number of blocks so far. A block is a list of statements that run one after
            the other, or not at all.
        current_block: the number of the block that is being visited.
        assignment_counts: the number of assignments to each name so far.
    """

    def __init__(self) -> None:
        self.children_by_value: dict[tuple[int, str, int], list[str]] = {}
        self.block_count, self.current_block = 0, 0
        self.assignment_counts: dict[str, int] = {}

    def visit_block(self, statements: Sequence[ast.AST]) -> None:
        """Visit the statements of a block."""
        outer_block, self.block_count = self.current_block, self.block_count + 1
        self.current_block = self.block_count
        for statement in statements:
            self.visit_node(statement)
        self.current_block = outer_block

    def visit_node(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            return  # its body runs later
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                self.assignment_counts[node.id] = self.assignment_counts.get(node.id, 0) + 1
            return
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            self.visit_node(node.value)  # evaluated before the targets
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.visit_node(target)
            return
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.visit_block(value)
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    is_optional = isinstance(node, _OPTIONAL_OPERANDS)
                    self.visit_block([child]) if is_optional else self.visit_node(child)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            self.record_call(node.func, node)

    def record_call(self, function: ast.Attribute, node: ast.Call) -> None:
        """Record a call ``self.child(name)``. Its argument has been visited before."""
        is_of_self = isinstance(function.value, ast.Name) and function.value.id == "self"
        if (
            is_of_self
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Name)
        ):
            argument_name = node.args[0].id
            assignment_count = self.assignment_counts.get(argument_name, 0)
            children = self.children_by_value.setdefault(
                (self.current_block, argument_name, assignment_count), []
            )
            if function.attr not in children:
                children.append(function.attr)


@functools.cache
def submodule_calls(forward: Callable[..., Any]) -> tuple[tuple[ModulePath, bool], ...]:
    """(path, is_late) of each call `self.path(…)` in the source of a forward.

    `is_late`: whether code after the call reads an input of the forward, such as `input_ids`, whose
    rows may differ from the rows of the call's output, or writes to the module. Branches for labels
    and router logits are ignored, because they do not run here. So is `logits_to_keep`, which has
    no effect here.
    """
    plain_function = python_function(forward)
    function = tree_of(plain_function) if plain_function else None
    if not isinstance(function, ast.FunctionDef):
        return ()  # made at run time, or written in C
    input_names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    input_names -= {"self", "logits_to_keep", "labels", "use_cache", "return_dict"}
    input_names = {name for name in input_names if not name.startswith("output_")}
    # positions (line, column): of uses of inputs and writes to the module, and of the ends of calls
    uses: list[tuple[int, int]] = []
    calls: list[tuple[ModulePath, tuple[int, int]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, ast.If) and (
            _names_in(node.test) & {"labels", "output_router_logits"}
            or "logits_to_keep" in _names_in(node)
        ):
            for statement in node.orelse:
                visit(statement)
            return
        writes_module = (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _path_below_self(node)
        )
        if writes_module or (isinstance(node, ast.Name) and node.id in input_names):
            uses.append((node.lineno, node.col_offset))
        if isinstance(node, ast.Call) and (path := _path_below_self(node.func)):
            calls.append((path, (node.end_lineno or 0, node.end_col_offset or 0)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in function.body:
        visit(statement)
    return tuple((path, any(use > end for use in uses)) for path, end in calls)


def _names_in(node: ast.AST) -> set[str]:
    return {below.id for below in ast.walk(node) if isinstance(below, ast.Name)}


def _path_below_self(node: ast.AST) -> ModulePath | None:
    """("a", "b") for `self.a.b`; None for any other expression."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    holder_path = _path_below_self(node.value) if isinstance(node, ast.Attribute) else None
    return None if holder_path is None else (*holder_path, node.attr)  # pyright: ignore[reportAttributeAccessIssue]


#: code that compares the name of a model's attention implementation with "sdpa"
_SDPA_COMPARISON = re.compile(
    r"""_attn_implementation\s*(?:[!=]=\s*["']sdpa|(?:not\s+)?in\s*[(\[{][^)\]}]*["']sdpa)"""
)


def compares_attention(model: nn.Module) -> bool:
    """Whether a module of the model has code that compares the name of its attention implementation
    with "sdpa". Only code of transformers, or code that transformers has loaded, is searched."""
    module_names = {type(module).__module__ for module in model.modules()}
    return any(_compares(module_name) for module_name in module_names)


@functools.cache
def _compares(module_name: str) -> bool:
    """Whether a Python module belongs to transformers and its source matches
    ``_SDPA_COMPARISON``."""
    return (
        module_name.startswith("transformers")
        and _SDPA_COMPARISON.search(inspect.getsource(sys.modules[module_name])) is not None
    )
