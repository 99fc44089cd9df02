"""Follows a method through its syntax tree: which paths of attributes below ``self`` it reads and
writes. ``Reader`` is the engine of ``source_analysis.reads``, where its results and limits are
described.
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

from veneer.attach.state import ModulePath

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

#: What may be asked of a weight without reading its values.
_ABOUT = {
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
_ABOUT_CALLS = {"isinstance", "type", "hasattr", "id", "len"}

#: Calls that give what they are given, one after the other; the tables and methods of a module
#: that give what is in it.
_SAME = {"list", "tuple", "iter", "reversed", "sorted"}
_TABLES = {"_modules", "_parameters", "_buffers"}
_VALUES = {"values", "children"}
_PAIRS = {"items", "named_children"}
_BY_PATH = {"get_submodule", "get_parameter"}

#: What a condition that is not followed is, and the comparisons that are followed.
UNKNOWN = object()
_COMPARED: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip

#: So many calls deep code is followed.
_DEPTH = 16


@dataclass(frozen=True)
class Reads:
    """The paths below ``self`` that a method and all it calls reads and writes, and the code of
    what runs on it."""

    read: set[ModulePath] = field(default_factory=set)
    written: set[ModulePath] = field(default_factory=set)
    code: list[Function] = field(default_factory=list)


def attribute(cls: type, name: str) -> Any:
    """What a class keeps under a name, as it is written there."""
    return next((vars(above)[name] for above in cls.__mro__ if name in vars(above)), None)


def plain(value: Any) -> FunctionType | None:
    """The function in a class's attribute: of a method, whatever it is decorated with, or of a
    property."""
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
    """Visits a function's code with the paths that each local name may stand for."""

    def __init__(
        self,
        cls: type[nn.Module],
        within: frozenset[str],
        follow_forward: bool,
        known: Mapping[str, Any],
    ) -> None:
        self.cls, self.within, self.follow_forward, self.known_values = (
            cls,
            within | {"*"},
            follow_forward,
            known,
        )
        self.found = Reads()
        self.returned: dict[Any, set[ModulePath]] = {}  # by function and arguments
        self.stack: list[FunctionType] = []
        self.names: dict[str, set[ModulePath]] = {}
        self.returns: set[ModulePath] = set()

    def follow(
        self,
        function: FunctionType | None,
        given: Sequence[set[ModulePath]],
        named: dict[str, set[ModulePath]] | None = None,
    ) -> set[ModulePath]:
        """Visit a function that is called with these arguments; the paths that it returns."""
        tree = None if function is None or len(self.stack) > _DEPTH else tree_of(function)
        if function is None or tree is None:
            return set()
        parameters = [one.arg for one in (*tree.args.posonlyargs, *tree.args.args)]
        names = {**dict(zip(parameters, given, strict=False)), **(named or {})}
        key = (
            function,
            frozenset((name, frozenset(paths)) for name, paths in names.items() if paths),
        )
        if key not in self.returned:
            outside = self.names, self.returns
            self.names, self.returns = dict(names), self.returned.setdefault(key, set())
            self.stack.append(function)
            if given[:1] == [{()}] and tree not in self.found.code:
                self.found.code.append(tree)
            if isinstance(tree, ast.Lambda):
                self.returns |= self.paths(tree.body)
                self.visit(tree.body)
            for statement in () if isinstance(tree, ast.Lambda) else tree.body:
                self.visit(statement)
            self.stack.pop()
            self.names, self.returns = outside
        return self.returned[key]

    def paths(self, node: ast.AST | None) -> set[ModulePath]:
        """What an expression stands for."""
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
                return self.called(node)
        return set()

    def attribute(self, above: set[ModulePath], name: str) -> set[ModulePath]:
        if name in _TABLES:
            return above
        own = attribute(self.cls, name) if () in above else None
        computed = self.follow(plain(own), [{()}]) if isinstance(own, property) else set()
        return {(*path, name) for path in above if path or name in self.within} | computed

    def called(self, node: ast.Call) -> set[ModulePath]:
        """What a call gives, and whatever it reads."""
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
        function, given = self.function(called)
        given = [*given, *map(self.paths, node.args)]
        named = {one.arg: self.paths(one.value) for one in node.keywords if one.arg}
        return self.follow(function, given, named) if any((*given, *named.values())) else set()

    def function(self, node: ast.expr) -> tuple[FunctionType | None, list[set[ModulePath]]]:
        """The function that an expression calls, and the arguments that go before those of the
        call."""
        if () in self.paths(node) and self.follow_forward:
            return plain(self.cls.forward), [{()}]
        if isinstance(node, ast.Attribute):
            if _is_call(node.value, "super"):
                classes = self.cls.__mro__
                own = next(
                    (
                        i
                        for i, c in enumerate(classes)
                        if self.stack[-1] in map(plain, vars(c).values())
                    ),
                    0,
                )
                found = next(
                    (vars(c)[node.attr] for c in classes[own + 1 :] if node.attr in vars(c)), None
                )
                return (None if _of_every_module(node.attr) else plain(found)), [{()}]
            if () in self.paths(node.value):
                found = attribute(self.cls, node.attr)
                left = _of_every_module(node.attr) or (
                    node.attr == "forward" and not self.follow_forward
                )
                return (None if left else plain(found)), (
                    [] if isinstance(found, staticmethod) else [{()}]
                )
        known = self.known(node)
        function = plain(known) if isinstance(known, FunctionType | staticmethod) else None
        return (None if function is None or of_torch(function.__module__) else function), []

    def known(self, node: ast.expr) -> Any:
        """What an expression names outside of the function: a function, a class, a module or
        something of them."""
        if isinstance(node, ast.Name):
            return None if node.id in self.names else self.stack[-1].__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            holder = self.known(node.value)
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
        """``target`` stands for something of these."""
        if isinstance(target, ast.Name):
            self.names[target.id] = self.names.get(target.id, set()) | paths
        for one in target.elts if isinstance(target, ast.Tuple | ast.List) else ():
            self.bind(one, _below(paths, "*"))

    def assign(self, target: ast.AST, value: ast.AST | None) -> None:
        pairs = [node.elts for node in (target, value) if isinstance(node, ast.Tuple | ast.List)]
        if len(pairs) == 2:
            for one, other in zip(*pairs, strict=False):
                self.assign(one, other)
        else:
            self.bind(target, self.paths(value))

    def loop(self, target: ast.AST, values: ast.AST) -> None:
        parts = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        call = values if isinstance(values, ast.Call) else None
        if call and _is_call(call, "enumerate") and len(parts) == 2:
            self.loop(parts[1], call.args[0])
        elif call and _is_call(call, "zip") and parts:
            for one, other in zip(parts, call.args, strict=False):
                self.loop(one, other)
        elif call and isinstance(call.func, ast.Attribute) and call.func.attr in _PAIRS:
            self.bind(parts[-1] if parts else target, _below(self.paths(call.func.value), "*"))
        elif isinstance(values, ast.Tuple | ast.List):
            for value in values.elts:
                self.assign(target, value)
        else:
            self.bind(target, _below(self.paths(values), "*"))

    def visit_Name(self, node: ast.Name) -> None:
        pass  # what it stands for was read where it got its name

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.use(node.value if isinstance(node.ctx, ast.Load) else node)  # weight[0] reads weight
        self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.use(node)

    def use(self, node: ast.expr) -> None:
        """An expression is read or written."""
        paths = self.paths(node)
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            self.write(node)
        else:
            self.found.read.update(path for path in paths if path and path[-1] not in _ABOUT)
        if not paths:
            self.generic_visit(node)

    def write(self, node: ast.AST | None) -> None:
        """What an expression stands for is written: its paths, and the names in it, whatever those
        are below."""
        self.found.written.update(self.paths(node))
        while isinstance(node, ast.Attribute | ast.Subscript):
            self.found.written.update({("", node.attr)} if isinstance(node, ast.Attribute) else ())
            node = node.value

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if isinstance(node.func, ast.Name) and name in _ABOUT_CALLS:
            return
        if name.endswith("_") and not name.endswith("__"):  # w.copy_(x), nn.init.zeros_(w)
            holder = node.func.value if isinstance(node.func, ast.Attribute) else None
            outside = holder is None or isinstance(self.known(holder), ModuleType)
            self.write(node.args[0] if outside and node.args else holder)
        elif name == "setattr":
            self.found.written.update(_below(self.paths(node.args[0]), _text(node.args[1]) or "*"))
        self.found.read.update(path for path in self.called(node) if path)
        if isinstance(node.func, ast.Attribute) and name not in _ABOUT:
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
        """The value of a condition over attributes of the module that are known, or ``UNKNOWN``."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Attribute() if self.known_values and self.paths(node.value) == {()}:
                return self.known_values.get(node.attr, UNKNOWN)
            case ast.UnaryOp(op=ast.Not()):
                value = self.value(node.operand)
                return UNKNOWN if value is UNKNOWN else not value
            case ast.BoolOp():
                values, settles = [*map(self.value, node.values)], isinstance(node.op, ast.Or)
                if any(value is not UNKNOWN and bool(value) == settles for value in values):
                    return settles
                return UNKNOWN if UNKNOWN in values else not settles
            case ast.Compare(ops=[compared], comparators=[other]) if type(compared) in _COMPARED:
                one, two = self.value(node.left), self.value(other)
                alike = type(one) is type(two) or {type(one), type(two)} <= {int, float, bool}
                ordered = isinstance(compared, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                return (
                    UNKNOWN
                    if UNKNOWN in (one, two) or (ordered and not alike)
                    else _COMPARED[type(compared)](one, two)
                )
        return UNKNOWN

    def visit_For(self, node: Any) -> None:
        for one in getattr(node, "generators", [node]):
            self.loop(one.target, one.iter)
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


def of_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"
