"""Analyse the source of a model's Python code. All parsing of source in Veneer is done here and in
``source_reader.py``.

    paths_used_by(cls, method)      which parameters below ``self`` a method reads and writes
    words_in_method(cls, method)    names and strings in the method, found without parsing
    shared_input_groups(cls)        which children forward calls on one value, as ("q_proj", …)
    submodule_calls(forward)        which submodules a forward calls, and whether code after a call
                                    reads other inputs
    compares_attention(model)       whether code compares the name of the attention implementation
                                    with "sdpa"

``paths_used_by`` gives paths of attributes below ``self``:

    self.lm_head.weight                       ("lm_head", "weight")
    for i, l in enumerate(self.ls): l.weight  ("ls", "*", "weight")           "*" is any index
    project(h, self.emb)                      ("emb", "weight") if project reads its weight

The analysis follows calls of methods of the class and its base classes, and calls of plain Python
functions with arguments from ``self``. It tracks local names, loops, tuples, properties and return
values. It has limits. It sees nothing in C code, in code made at run time, and in classes without
source; it ignores attribute names that are computed (``getattr(self, name)``); it follows calls to
a depth of 16; and it counts a branch that never runs, unless the caller passes the attributes that
rule it out. So no result is certain, and each caller checks it: ``veneer.check`` finds weights that
are read in other ways, ``fused_linear.py`` compares the inputs, and ``train/head_split.py``
tests the head on a few rows.
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
    """The paths of attributes below ``self``, such as ("lm_head", "weight"), that ``cls.method``
    reads and writes.

    Args:
        member_names: the names of the module's children and parameters; other attributes are
            ignored.
        attributes: (name, value) of plain attributes of the module. The analysis skips branches
            that cannot run with these values.
    """
    reader = Reader(cls, member_names, method == "forward", dict(attributes))
    reader.follow(python_function(class_attribute(cls, method)), [{()}])
    return reader.used_paths


@functools.cache
def words_in_method(cls: type[nn.Module], method: str) -> frozenset[str]:
    """The names and string constants in the compiled code of a method and of the functions that it
    may call, found without parsing. If the name of a weight is not among the words of a method
    other than forward, ``weight_readers`` does not run the slow ``paths_used_by`` on it."""
    functions_by_name, visited_functions, mentioned_words = _functions_by_name(cls), set(), set()
    pending_functions = [*functions_by_name.get(method, ())]
    while pending_functions:
        if (function := pending_functions.pop()) in visited_functions:
            continue
        visited_functions.add(function)
        words_of_function = _words_in_code(function.__code__)
        mentioned_words |= words_of_function
        pending_functions += [
            called_function
            for word in words_of_function & functions_by_name.keys()
            for called_function in functions_by_name[word]
        ]
        global_values = [function.__globals__.get(word) for word in words_of_function]
        for module in [
            global_value
            for global_value in global_values
            if isinstance(global_value, ModuleType) and not is_torch_module(global_value.__name__)
        ]:
            global_values += [vars(module).get(word) for word in words_of_function]
        pending_functions += [
            global_value
            for global_value in global_values
            if isinstance(global_value, FunctionType)
            and not is_torch_module(global_value.__module__)
        ]
    return frozenset(mentioned_words)


@functools.cache
def _functions_by_name(cls: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """The functions that a class and its base classes define, by name, without those of
    ``nn.Module``. A name has one function for each class that defines it."""
    functions: dict[str, list[FunctionType]] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, attribute in vars(base).items():
            function = python_function(attribute)
            functions.setdefault(name, []).extend([function] if function else [])
    return functions


@functools.cache
def _words_in_code(code: CodeType) -> frozenset[str]:
    """The names in compiled code and in the functions that are defined in it, and the string
    constants, split at dots."""
    inner_words = [
        _words_in_code(constant) for constant in code.co_consts if isinstance(constant, CodeType)
    ]
    string_parts = [constant.split(".") for constant in code.co_consts if isinstance(constant, str)]
    return frozenset(code.co_names).union(*string_parts, *inner_words)


@functools.cache
def shared_input_groups(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Groups of children that get the same input: a class's forward, or a method that it calls,
    calls them with the same local name, as in ``self.q_proj(x)``, ``self.k_proj(x)``. Calls in two
    branches of an ``if`` are in different groups, and so are calls between which the name was
    assigned anew."""
    groups: list[tuple[str, ...]] = []
    for function in paths_used_by(cls, "forward").functions:
        finder = _SharedInputFinder()
        finder.visit_block(function.body if isinstance(function, ast.FunctionDef) else [])
        groups += [
            tuple(children) for children in finder.children_by_value.values() if len(children) > 1
        ]
    return tuple(groups)


#: expressions whose operands may be evaluated several times or not at all: each operand counts as a
#: block of its own
_OPTIONAL_OPERANDS = (
    ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


class _SharedInputFinder:
    """Visits the code of a function in the order of evaluation, and collects the children in calls
    ``self.child(name)`` by the value that the name has at the call.

    Fields:
        children_by_value: the children that are called with one value. A value is identified by
            (the number of the block with the call, its name, the number of assignments to this
            name before the call).
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
        """Visit the statements of a block, which run one after the other or not at all."""
        outer_block, self.block_count = self.current_block, self.block_count + 1
        self.current_block = self.block_count
        for statement in statements:
            self.visit_node(statement)
        self.current_block = outer_block

    def visit_node(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            return  # the body runs when the function is called, at an unknown time
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                self.assignment_counts[node.id] = self.assignment_counts.get(node.id, 0) + 1
            return
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            self.visit_node(node.value)  # before the targets, as Python evaluates it first
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

    def record_call(self, called_attribute: ast.Attribute, call: ast.Call) -> None:
        """Record the call ``call`` if it is ``self.child(name)``. ``called_attribute`` is its
        ``self.child``. To be called after the argument was visited, which may assign ``name``."""
        is_of_self = (
            isinstance(called_attribute.value, ast.Name) and called_attribute.value.id == "self"
        )
        if (
            is_of_self
            and len(call.args) == 1
            and not call.keywords
            and isinstance(call.args[0], ast.Name)
        ):
            argument_name = call.args[0].id
            assignment_count = self.assignment_counts.get(argument_name, 0)
            children = self.children_by_value.setdefault(
                (self.current_block, argument_name, assignment_count), []
            )
            if called_attribute.attr not in children:
                children.append(called_attribute.attr)


@functools.cache
def submodule_calls(forward: Callable[..., Any]) -> tuple[tuple[ModulePath, bool], ...]:
    """(path, is_late) of each call ``self.path(…)`` in the source of a forward. Empty if there is
    no source.

    The caller wants to compute the code after a call for some rows of its output only, which fails
    if that code depends on all rows: ``is_late`` is whether the code after the call reads an input
    of the forward, such as ``input_ids``, or writes to the module. Branches for labels and router
    logits are ignored, because they do not run in the caller's use. So is ``logits_to_keep``, which
    has no effect there.
    """
    python_forward = python_function(forward)
    tree = tree_of(python_forward) if python_forward else None
    if not isinstance(tree, ast.FunctionDef):
        return ()  # no source: the function was made at run time, or is written in C
    input_names = {argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)}
    input_names -= {"self", "logits_to_keep", "labels", "use_cache", "return_dict"}
    input_names = {name for name in input_names if not name.startswith("output_")}
    # the positions (line, column) of all uses of inputs and writes to the module, and (path, end
    # position) of all calls of submodules
    use_positions: list[tuple[int, int]] = []
    calls_with_ends: list[tuple[ModulePath, tuple[int, int]]] = []

    def visit_node(node: Any) -> None:
        if isinstance(node, ast.If) and (
            _names_in(node.test) & {"labels", "output_router_logits"}
            or "logits_to_keep" in _names_in(node)
        ):
            for statement in node.orelse:
                visit_node(statement)
            return
        writes_module = (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _path_below_self(node)
        )
        if writes_module or (isinstance(node, ast.Name) and node.id in input_names):
            use_positions.append((node.lineno, node.col_offset))
        if isinstance(node, ast.Call) and (path := _path_below_self(node.func)):
            calls_with_ends.append((path, (node.end_lineno or 0, node.end_col_offset or 0)))
        for child in ast.iter_child_nodes(node):
            visit_node(child)

    for statement in tree.body:
        visit_node(statement)
    return tuple(
        (path, any(use_position > call_end for use_position in use_positions))
        for path, call_end in calls_with_ends
    )


def _names_in(node: ast.AST) -> set[str]:
    """The names of all variables that an expression or statement uses."""
    return {subnode.id for subnode in ast.walk(node) if isinstance(subnode, ast.Name)}


def _path_below_self(node: ast.AST) -> ModulePath | None:
    """("a", "b") for the expression ``self.a.b``, () for ``self``; None for any other."""
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
    return any(_source_compares_attention(module_name) for module_name in module_names)


@functools.cache
def _source_compares_attention(module_name: str) -> bool:
    """Whether a Python module belongs to transformers and its source compares the name of the
    attention implementation with "sdpa"."""
    return (
        module_name.startswith("transformers")
        and _SDPA_COMPARISON.search(inspect.getsource(sys.modules[module_name])) is not None
    )
