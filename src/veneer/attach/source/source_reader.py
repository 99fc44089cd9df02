"""Follow a method through its syntax tree: which attribute paths below ``self`` it reads and
writes.

``Reader`` implements ``source_analysis.reads``, which describes the results and the limits.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, cast

from torch import nn

from veneer.attach.layer.state import ModulePath

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

#: attributes of a weight that do not depend on its values
_METADATA = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "size",
    "dim",
    "numel",
    "requires_grad",
    "is_cuda",
    "is_meta",
    "itemsize",
}
_METADATA_CALLS = {"isinstance", "type", "hasattr", "id", "len"}

#: functions that return the elements of their argument
_SAME = {"list", "tuple", "iter", "reversed", "sorted"}
#: tables and methods of a module that return its children and parameters
_TABLES = {"_modules", "_parameters", "_buffers"}
_VALUES = {"values", "children"}
_PAIRS = {"items", "named_children"}
_BY_PATH = {"get_submodule", "get_parameter"}

#: the value of a condition that cannot be evaluated
UNKNOWN = object()
#: the comparisons that are evaluated
_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

#: the depth to which calls are followed
_DEPTH = 16


@dataclass(frozen=True)
class Reads:
    """The paths below ``self`` that a method, and the functions that it calls, read and write.
    ``code`` holds the syntax trees of the functions that run with ``self`` as their first argument.
    """

    read: set[ModulePath] = field(default_factory=set)
    written: set[ModulePath] = field(default_factory=set)
    code: list[Function] = field(default_factory=list)


def attribute(cls: type, name: str) -> Any:
    """The attribute of a class, without binding it."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def python_function(value: Any) -> FunctionType | None:
    """The Python function behind a class's attribute: a method, decorated or not, or the getter of
    a property. None if there is none."""
    value = (
        getattr(value, "fget", None)
        or getattr(value, "func", None)
        or getattr(value, "__func__", value)
    )
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


@functools.cache
def tree_of(function: FunctionType) -> Function | None:
    """The syntax tree of a function, if there is source for it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, Function)), None)


class Reader(ast.NodeVisitor):
    """Visits a function's code and tracks the paths below ``self`` that each local name may stand
    for."""

    def __init__(
        self,
        cls: type[nn.Module],
        within: frozenset[str],
        follow_forward: bool,
        attribute_values: Mapping[str, Any],
    ) -> None:
        self.cls, self.within = cls, within | {"*"}
        self.follow_forward, self.attribute_values = follow_forward, attribute_values
        self.reads = Reads()
        self.return_paths: dict[Any, set[ModulePath]] = {}  # by function and arguments
        self.stack: list[FunctionType] = []
        self.names: dict[str, set[ModulePath]] = {}
        self.returns: set[ModulePath] = set()

    def follow(
        self,
        function: FunctionType | None,
        arguments: Sequence[set[ModulePath]],
        named: dict[str, set[ModulePath]] | None = None,
    ) -> set[ModulePath]:
        """Visit a function that is called with these arguments. Returns the paths that it
        returns."""
        tree = None if function is None or len(self.stack) > _DEPTH else tree_of(function)
        if function is None or tree is None:
            return set()
        parameters = [parameter.arg for parameter in (*tree.args.posonlyargs, *tree.args.args)]
        names = {**dict(zip(parameters, arguments, strict=False)), **(named or {})}
        key = (
            function,
            frozenset((name, frozenset(paths)) for name, paths in names.items() if paths),
        )
        if key not in self.return_paths:
            caller_state = self.names, self.returns
            self.names, self.returns = dict(names), self.return_paths.setdefault(key, set())
            self.stack.append(function)
            if arguments[:1] == [{()}] and tree not in self.reads.code:
                self.reads.code.append(tree)
            if isinstance(tree, ast.Lambda):
                self.returns |= self.paths(tree.body)
                self.visit(tree.body)
            for statement in () if isinstance(tree, ast.Lambda) else tree.body:
                self.visit(statement)
            self.stack.pop()
            self.names, self.returns = caller_state
        return self.return_paths[key]

    def paths(self, node: ast.AST | None) -> set[ModulePath]:
        """The paths that an expression may stand for."""
        match node:
            case ast.Name():
                return self.names.get(node.id, set())
            case ast.Attribute():
                return self.attribute(self.paths(node.value), node.attr)
            case ast.Subscript():
                above = self.paths(node.value)
                return (
                    above
                    if isinstance(node.slice, ast.Slice)
                    else self.attribute(above, _text(node.slice) or "*")
                )
            case ast.NamedExpr() | ast.Starred() | ast.Await():
                return self.paths(node.value)
            case ast.IfExp():
                return self.paths(node.body) | self.paths(node.orelse)
            case ast.BoolOp():
                return set().union(*map(self.paths, node.values))
            case ast.Call():
                return self.call_paths(node)
        return set()

    def attribute(self, above: set[ModulePath], name: str) -> set[ModulePath]:
        """The paths of an attribute of objects at the paths ``above``."""
        if name in _TABLES:
            return above
        getter = attribute(self.cls, name) if () in above else None
        is_property = isinstance(getter, property)
        computed = self.follow(python_function(getter), [{()}]) if is_property else set()
        return {(*path, name) for path in above if path or name in self.within} | computed

    def call_paths(self, node: ast.Call) -> set[ModulePath]:
        """The paths that a call returns; records the paths that it reads."""
        called, first = node.func, self.paths(node.args[0]) if node.args else set()
        match called:
            case ast.Name(id="next"):
                return self.attribute(first, "*")
            case ast.Name(id="getattr"):
                return self.attribute(first, name) if (name := _text(node.args[1])) else set()
            case ast.Name() if called.id in _SAME:
                return first
            case ast.Attribute() if called.attr in _VALUES and not (node.args or node.keywords):
                return self.paths(called.value)
            case ast.Attribute() if (
                called.attr in _BY_PATH and node.args and (dotted := _text(node.args[0]))
            ):
                return {(*path, *dotted.split(".")) for path in self.paths(called.value)}
        function, arguments = self.function(called)
        arguments = [*arguments, *map(self.paths, node.args)]
        named = {keyword.arg: self.paths(keyword.value) for keyword in node.keywords if keyword.arg}
        if not any((*arguments, *named.values())):
            return set()
        return self.follow(function, arguments, named)

    def function(self, node: ast.expr) -> tuple[FunctionType | None, list[set[ModulePath]]]:
        """The function that an expression names, and the arguments that are already bound to it."""
        if () in self.paths(node) and self.follow_forward:
            return python_function(self.cls.forward), [{()}]
        if isinstance(node, ast.Attribute):
            if _is_call(node.value, "super"):
                classes = self.cls.__mro__
                index = next(
                    (
                        i
                        for i, c in enumerate(classes)
                        if self.stack[-1] in map(python_function, vars(c).values())
                    ),
                    0,
                )
                method = next(
                    (vars(c)[node.attr] for c in classes[index + 1 :] if node.attr in vars(c)), None
                )
                return (None if _of_every_module(node.attr) else python_function(method)), [{()}]
            if () in self.paths(node.value):
                method = attribute(self.cls, node.attr)
                skipped = _of_every_module(node.attr) or (
                    node.attr == "forward" and not self.follow_forward
                )
                return (None if skipped else python_function(method)), (
                    [] if isinstance(method, staticmethod) else [{()}]
                )
        value = self.global_value(node)
        is_function = isinstance(value, FunctionType | staticmethod)
        function = python_function(value) if is_function else None
        return (None if function is None or is_of_torch(function.__module__) else function), []

    def global_value(self, node: ast.expr) -> Any:
        """The global object that an expression names: a function, a class, a module, or an
        attribute of one of these. None if it names no global."""
        if isinstance(node, ast.Name):
            return None if node.id in self.names else self.stack[-1].__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            holder = self.global_value(node.value)
            if () in self.paths(node.value) and node.attr == "__class__":
                return self.cls
            if isinstance(holder, type):
                return attribute(holder, node.attr)
            return vars(holder).get(node.attr) if isinstance(holder, ModuleType) else None
        return (
            self.cls
            if _is_call(node, "type") and () in self.paths(cast(ast.Call, node).args[0])
            else None
        )

    def bind(self, target: ast.AST, paths: set[ModulePath]) -> None:
        """Let the name or names of ``target`` stand for these paths."""
        if isinstance(target, ast.Name):
            self.names[target.id] = self.names.get(target.id, set()) | paths
        for element in target.elts if isinstance(target, ast.Tuple | ast.List) else ():
            self.bind(element, _below(paths, "*"))

    def assign(self, target: ast.AST, value: ast.AST | None) -> None:
        """``target = value``; tuples element by element."""
        pairs = [node.elts for node in (target, value) if isinstance(node, ast.Tuple | ast.List)]
        if len(pairs) == 2:
            for element, element_value in zip(*pairs, strict=False):
                self.assign(element, element_value)
        else:
            self.bind(target, self.paths(value))

    def loop(self, target: ast.AST, values: ast.AST) -> None:
        """``for target in values``."""
        elements = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        call = values if isinstance(values, ast.Call) else None
        if call and _is_call(call, "enumerate") and len(elements) == 2:
            self.loop(elements[1], call.args[0])
        elif call and _is_call(call, "zip") and elements:
            for element, values_of_element in zip(elements, call.args, strict=False):
                self.loop(element, values_of_element)
        elif call and isinstance(call.func, ast.Attribute) and call.func.attr in _PAIRS:
            self.bind(
                elements[-1] if elements else target, _below(self.paths(call.func.value), "*")
            )
        elif isinstance(values, ast.Tuple | ast.List):
            for value in values.elts:
                self.assign(target, value)
        else:
            self.bind(target, _below(self.paths(values), "*"))

    def visit_Name(self, node: ast.Name) -> None:
        pass  # its value was recorded where the name was bound

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.use(node.value if isinstance(node.ctx, ast.Load) else node)  # weight[0] reads weight
        self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.use(node)

    def use(self, node: ast.expr) -> None:
        """Record that an expression is read or written."""
        paths = self.paths(node)
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            self.write(node)
        else:
            self.reads.read.update(path for path in paths if path and path[-1] not in _METADATA)
        if not paths:
            self.generic_visit(node)

    def write(self, node: ast.AST | None) -> None:
        """Record that an expression is written: its paths, and ("", name) for each attribute in it,
        which may be an attribute of any object."""
        self.reads.written.update(self.paths(node))
        while isinstance(node, ast.Attribute | ast.Subscript):
            self.reads.written.update({("", node.attr)} if isinstance(node, ast.Attribute) else ())
            node = node.value

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if isinstance(node.func, ast.Name) and name in _METADATA_CALLS:
            return
        if name.endswith("_") and not name.endswith("__"):  # w.copy_(x), nn.init.zeros_(w)
            holder = node.func.value if isinstance(node.func, ast.Attribute) else None
            is_module_function = holder is None or isinstance(self.global_value(holder), ModuleType)
            self.write(node.args[0] if is_module_function and node.args else holder)
        elif name == "setattr":
            self.reads.written.update(_below(self.paths(node.args[0]), _text(node.args[1]) or "*"))
        self.reads.read.update(path for path in self.call_paths(node) if path)
        if isinstance(node.func, ast.Attribute) and name not in _METADATA:
            self.use(node.func.value)  # weight.t() reads weight
        elif not isinstance(node.func, ast.Attribute):
            self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            self.assign(target, node.value)
        self.generic_visit(node)

    visit_AnnAssign = visit_NamedExpr = visit_Assign  # noqa: N815

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        truth = self.value(node.test)
        runs = (
            [*node.body, *node.orelse] if truth is UNKNOWN else node.body if truth else node.orelse
        )
        for statement in runs:
            self.visit(statement)

    def value(self, node: ast.AST) -> Any:
        """The value of a condition on attributes in ``attribute_values``; else ``UNKNOWN``."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Attribute() if self.attribute_values and self.paths(node.value) == {()}:
                return self.attribute_values.get(node.attr, UNKNOWN)
            case ast.UnaryOp(op=ast.Not()):
                value = self.value(node.operand)
                return UNKNOWN if value is UNKNOWN else not value
            case ast.BoolOp():
                values, decisive = [*map(self.value, node.values)], isinstance(node.op, ast.Or)
                if any(value is not UNKNOWN and bool(value) == decisive for value in values):
                    return decisive
                return UNKNOWN if UNKNOWN in values else not decisive
            case ast.Compare(ops=[comparison], comparators=[operand]) if (
                type(comparison) in _COMPARISONS
            ):
                left_value, right_value = self.value(node.left), self.value(operand)
                types = {type(left_value), type(right_value)}
                comparable = len(types) == 1 or types <= {int, float, bool}
                ordered = isinstance(comparison, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                return (
                    UNKNOWN
                    if UNKNOWN in (left_value, right_value) or (ordered and not comparable)
                    else _COMPARISONS[type(comparison)](left_value, right_value)
                )
        return UNKNOWN

    def visit_For(self, node: Any) -> None:
        for clause in getattr(node, "generators", [node]):
            self.loop(clause.target, clause.iter)
        self.generic_visit(node)

    visit_AsyncFor = visit_For  # noqa: N815
    visit_ListComp = visit_SetComp = visit_For  # noqa: N815
    visit_GeneratorExp = visit_DictComp = visit_For  # noqa: N815

    def visit_Return(self, node: ast.Return) -> None:
        self.returns |= self.paths(node.value)
        self.generic_visit(node)


def _below(paths: set[ModulePath], name: str) -> set[ModulePath]:
    return {(*path, name) for path in paths}


def _text(node: ast.AST) -> str | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _of_every_module(name: str) -> bool:
    return hasattr(nn.Module, name) and name != "forward"


def is_of_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"
