"""Follow a method through its syntax tree: which attribute paths below ``self`` it reads and
writes.

``Reader`` implements ``source_analysis.paths_used_by``. The module ``source_analysis`` documents
the results and the limits.
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

#: attributes and methods of a weight that do not depend on its values. Code that reads only these
#: does not need the changed weight
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
#: functions whose result does not depend on the values of a weight that they get
_METADATA_CALLS = {"isinstance", "type", "hasattr", "id", "len"}

#: functions that return the elements of their argument
_ELEMENT_FUNCTIONS = {"list", "tuple", "iter", "reversed", "sorted"}
#: attributes of a module that are dicts of its children and parameters, by name
_TABLE_ATTRIBUTES = {"_modules", "_parameters", "_buffers"}
#: methods that return all children or parameters: alone, and in pairs with their names
_VALUE_METHODS = {"values", "children"}
_PAIR_METHODS = {"items", "named_children"}
#: methods that return a child or parameter at a dotted path
_PATH_METHODS = {"get_submodule", "get_parameter"}

#: the result of ``Reader.evaluate`` for a condition that cannot be evaluated
UNKNOWN = object()
#: the comparisons that ``Reader.evaluate`` can evaluate
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

#: the depth to which calls within calls are followed
_MAX_DEPTH = 16


@dataclass(frozen=True)
class UsedPaths:
    """What a method, and the functions that it calls, use of ``self``.

    Fields:
        read, written: the attribute paths below ``self`` that they read and write, such as
            ("lm_head", "weight").
        functions: the syntax trees of those functions that get ``self`` as their first argument.
    """

    read: set[ModulePath] = field(default_factory=set)
    written: set[ModulePath] = field(default_factory=set)
    functions: list[Function] = field(default_factory=list)


def class_attribute(cls: type, name: str) -> Any:
    """The attribute of a class or its base classes as it is stored, such as a property object. None
    if there is no such attribute."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def python_function(attribute: Any) -> FunctionType | None:
    """The Python function behind an attribute of a class: a method, decorated or not, or the getter
    of a property. None if there is none."""
    function = (
        getattr(attribute, "fget", None)
        or getattr(attribute, "func", None)
        or getattr(attribute, "__func__", attribute)
    )
    function = inspect.unwrap(function) if callable(function) else function
    return function if isinstance(function, FunctionType) else None


@functools.cache
def tree_of(function: FunctionType) -> Function | None:
    """The syntax tree of a function; None if there is no source for it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, Function)), None)


class Reader(ast.NodeVisitor):
    """Visits the syntax tree of a function, and of the functions that it calls. Tracks which
    attributes below ``self`` each local name may stand for, as paths: () is ``self`` itself,
    ("lm_head", "weight") is ``self.lm_head.weight``.

    Fields:
        cls: the class of ``self``.
        member_names: the names of the children and parameters of ``self``, and "*", which stands
            for any of them.
        follow_forward: whether to follow calls of ``self`` and of its forward.
        attribute_values: the values of plain attributes of ``self``, by name.
        used_paths: the result so far: the paths that the visited code reads and writes.
        paths_by_call: the paths that a call returns, by (function, paths of its arguments).
        call_stack: the functions that are being visited, the outermost first.
        local_paths: the paths that each local name of the current function may stand for.
        returned_paths: the paths that the current function may return.
    """

    def __init__(
        self,
        cls: type[nn.Module],
        member_names: frozenset[str],
        follow_forward: bool,
        attribute_values: Mapping[str, Any],
    ) -> None:
        self.cls, self.member_names = cls, member_names | {"*"}
        self.follow_forward, self.attribute_values = follow_forward, attribute_values
        self.used_paths = UsedPaths()
        self.paths_by_call: dict[Any, set[ModulePath]] = {}
        self.call_stack: list[FunctionType] = []
        self.local_paths: dict[str, set[ModulePath]] = {}
        self.returned_paths: set[ModulePath] = set()

    def follow(
        self,
        function: FunctionType | None,
        arguments: Sequence[set[ModulePath]],
        keyword_arguments: dict[str, set[ModulePath]] | None = None,
    ) -> set[ModulePath]:
        """Visit a function that is called with these arguments. An argument, like the result, is
        the set of paths that the value may stand for. Returns an empty set for a function without
        source or more than ``_MAX_DEPTH`` calls deep."""
        tree = None if function is None or len(self.call_stack) > _MAX_DEPTH else tree_of(function)
        if function is None or tree is None:
            return set()
        parameters = [parameter.arg for parameter in (*tree.args.posonlyargs, *tree.args.args)]
        local_paths = {
            **dict(zip(parameters, arguments, strict=False)),
            **(keyword_arguments or {}),
        }
        call_key = (
            function,
            frozenset((name, frozenset(paths)) for name, paths in local_paths.items() if paths),
        )
        if call_key not in self.paths_by_call:
            caller_state = self.local_paths, self.returned_paths
            self.local_paths = dict(local_paths)
            self.returned_paths = self.paths_by_call.setdefault(call_key, set())
            self.call_stack.append(function)
            if arguments[:1] == [{()}] and tree not in self.used_paths.functions:
                self.used_paths.functions.append(tree)
            if isinstance(tree, ast.Lambda):
                self.returned_paths |= self.paths_of(tree.body)
                self.visit(tree.body)
            for statement in () if isinstance(tree, ast.Lambda) else tree.body:
                self.visit(statement)
            self.call_stack.pop()
            self.local_paths, self.returned_paths = caller_state
        return self.paths_by_call[call_key]

    def paths_of(self, node: ast.AST | None) -> set[ModulePath]:
        """The paths below ``self`` that an expression may stand for; () is ``self`` itself."""
        match node:
            case ast.Name():
                return self.local_paths.get(node.id, set())
            case ast.Attribute():
                return self.attribute_paths(self.paths_of(node.value), node.attr)
            case ast.Subscript():
                holder_paths = self.paths_of(node.value)
                return (
                    holder_paths
                    if isinstance(node.slice, ast.Slice)
                    else self.attribute_paths(holder_paths, _string_constant(node.slice) or "*")
                )
            case ast.NamedExpr() | ast.Starred() | ast.Await():
                return self.paths_of(node.value)
            case ast.IfExp():
                return self.paths_of(node.body) | self.paths_of(node.orelse)
            case ast.BoolOp():
                return set().union(*map(self.paths_of, node.values))
            case ast.Call():
                return self.call_paths(node)
        return set()

    def attribute_paths(self, holder_paths: set[ModulePath], name: str) -> set[ModulePath]:
        """The paths of the attribute ``name`` of the objects at ``holder_paths``. If it is a
        property of ``self``, also the paths that its getter returns."""
        if name in _TABLE_ATTRIBUTES:
            return holder_paths
        getter = class_attribute(self.cls, name) if () in holder_paths else None
        is_property = isinstance(getter, property)
        property_paths = self.follow(python_function(getter), [{()}]) if is_property else set()
        member_paths = {(*path, name) for path in holder_paths if path or name in self.member_names}
        return member_paths | property_paths

    def call_paths(self, node: ast.Call) -> set[ModulePath]:
        """The paths that a call may return. A called function that gets ``self`` or something below
        it as an argument is visited too, if it has source, which records the paths it uses."""
        called_node = node.func
        first_argument_paths = self.paths_of(node.args[0]) if node.args else set()
        match called_node:
            case ast.Name(id="next"):
                return self.attribute_paths(first_argument_paths, "*")
            case ast.Name(id="getattr") if len(node.args) > 1:
                attribute_name = _string_constant(node.args[1])
                return (
                    self.attribute_paths(first_argument_paths, attribute_name)
                    if attribute_name
                    else set()
                )
            case ast.Name() if called_node.id in _ELEMENT_FUNCTIONS:
                return first_argument_paths
            case ast.Attribute() if called_node.attr in _VALUE_METHODS and not (
                node.args or node.keywords
            ):
                return self.paths_of(called_node.value)
            case ast.Attribute() if (
                called_node.attr in _PATH_METHODS
                and node.args
                and (dotted_path := _string_constant(node.args[0]))
            ):
                return {
                    (*path, *dotted_path.split(".")) for path in self.paths_of(called_node.value)
                }
        function, arguments = self.resolve_function(called_node)
        arguments = [*arguments, *map(self.paths_of, node.args)]
        keyword_arguments = {
            keyword.arg: self.paths_of(keyword.value) for keyword in node.keywords if keyword.arg
        }
        if not any((*arguments, *keyword_arguments.values())):
            return set()
        return self.follow(function, arguments, keyword_arguments)

    def resolve_function(self, node: ast.expr) -> tuple[FunctionType | None, list[set[ModulePath]]]:
        """(the function that the called expression names, the paths of the arguments that are
        already bound to it: [{()}] for a method of ``self``). None for a function that is not
        followed, such as a method of ``nn.Module`` or a function of torch."""
        if () in self.paths_of(node) and self.follow_forward:
            return python_function(self.cls.forward), [{()}]
        if isinstance(node, ast.Attribute):
            if _is_call(node.value, "super"):
                classes = self.cls.__mro__
                class_index = next(
                    (
                        index
                        for index, base_class in enumerate(classes)
                        if self.call_stack[-1] in map(python_function, vars(base_class).values())
                    ),
                    0,
                )
                method = next(
                    (
                        vars(base_class)[node.attr]
                        for base_class in classes[class_index + 1 :]
                        if node.attr in vars(base_class)
                    ),
                    None,
                )
                return (None if _is_module_method(node.attr) else python_function(method)), [{()}]
            if () in self.paths_of(node.value):
                method = class_attribute(self.cls, node.attr)
                is_skipped = _is_module_method(node.attr) or (
                    node.attr == "forward" and not self.follow_forward
                )
                return (None if is_skipped else python_function(method)), (
                    [] if isinstance(method, staticmethod) else [{()}]
                )
        global_object = self.global_value(node)
        is_function = isinstance(global_object, FunctionType | staticmethod)
        function = python_function(global_object) if is_function else None
        return (None if function is None or is_torch_module(function.__module__) else function), []

    def global_value(self, node: ast.expr) -> Any:
        """The global object that an expression names: a function, a class, a Python module, or an
        attribute of one of these. None if it names none, or if its name is a local one."""
        if isinstance(node, ast.Name):
            is_local = node.id in self.local_paths
            return None if is_local else self.call_stack[-1].__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            holder = self.global_value(node.value)
            if () in self.paths_of(node.value) and node.attr == "__class__":
                return self.cls
            if isinstance(holder, type):
                return class_attribute(holder, node.attr)
            return vars(holder).get(node.attr) if isinstance(holder, ModuleType) else None
        return (
            self.cls
            if _is_call(node, "type") and () in self.paths_of(cast(ast.Call, node).args[0])
            else None
        )

    def bind(self, target: ast.AST, paths: set[ModulePath]) -> None:
        """Let the name ``target`` stand for these paths too, besides those that another branch may
        have assigned. If it is a tuple, its names stand for any element of these paths."""
        if isinstance(target, ast.Name):
            self.local_paths[target.id] = self.local_paths.get(target.id, set()) | paths
        for element in target.elts if isinstance(target, ast.Tuple | ast.List) else ():
            self.bind(element, _append_name(paths, "*"))

    def assign(self, target: ast.AST, value: ast.AST | None) -> None:
        """Record the assignment ``target = value``: the names in ``target`` stand for the paths of
        ``value``. Tuples are assigned element by element."""
        element_lists = [
            node.elts for node in (target, value) if isinstance(node, ast.Tuple | ast.List)
        ]
        if len(element_lists) == 2:
            for element, element_value in zip(*element_lists, strict=False):
                self.assign(element, element_value)
        else:
            self.bind(target, self.paths_of(value))

    def bind_loop(self, target: ast.AST, values: ast.AST) -> None:
        """Record the loop ``for target in values``: the names in ``target`` stand for elements of
        ``values``."""
        elements = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        call = values if isinstance(values, ast.Call) else None
        if call and _is_call(call, "enumerate") and len(elements) == 2:
            self.bind_loop(elements[1], call.args[0])
        elif call and _is_call(call, "zip") and elements:
            for element, values_of_element in zip(elements, call.args, strict=False):
                self.bind_loop(element, values_of_element)
        elif call and isinstance(call.func, ast.Attribute) and call.func.attr in _PAIR_METHODS:
            self.bind(
                elements[-1] if elements else target,
                _append_name(self.paths_of(call.func.value), "*"),
            )
        elif isinstance(values, ast.Tuple | ast.List):
            for value in values.elts:
                self.assign(target, value)
        else:
            self.bind(target, _append_name(self.paths_of(values), "*"))

    def visit_Name(self, node: ast.Name) -> None:
        pass  # the paths of a name are recorded where the name is bound

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # ``weight[0]`` reads ``weight``, so record a use of ``weight`` and not of the element
        self.record_use(node.value if isinstance(node.ctx, ast.Load) else node)
        self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.record_use(node)

    def record_use(self, node: ast.expr) -> None:
        """Record that an expression is read or, as a target of an assignment, written."""
        paths = self.paths_of(node)
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            self.record_write(node)
        else:
            self.used_paths.read.update(
                path for path in paths if path and path[-1] not in _METADATA
            )
        if not paths:
            self.generic_visit(node)

    def record_write(self, node: ast.AST | None) -> None:
        """Record that an expression is written: its paths, and ("", name) for each attribute in it.
        The object may be one that this analysis does not know, such as ``module`` in
        ``module.weight = …``, and stand for a submodule with that attribute."""
        self.used_paths.written.update(self.paths_of(node))
        while isinstance(node, ast.Attribute | ast.Subscript):
            self.used_paths.written.update(
                {("", node.attr)} if isinstance(node, ast.Attribute) else ()
            )
            node = node.value

    def visit_Call(self, node: ast.Call) -> None:
        function_name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if isinstance(node.func, ast.Name) and function_name in _METADATA_CALLS:
            return
        # w.copy_(x), nn.init.zeros_(w)
        if function_name.endswith("_") and not function_name.endswith("__"):
            written_node = node.func.value if isinstance(node.func, ast.Attribute) else None
            is_module_function = written_node is None or isinstance(
                self.global_value(written_node), ModuleType
            )
            self.record_write(node.args[0] if is_module_function and node.args else written_node)
        elif function_name == "setattr" and len(node.args) > 1:
            written_name = _string_constant(node.args[1]) or "*"
            self.used_paths.written.update(_append_name(self.paths_of(node.args[0]), written_name))
        self.used_paths.read.update(path for path in self.call_paths(node) if path)
        if isinstance(node.func, ast.Attribute) and function_name not in _METADATA:
            self.record_use(node.func.value)  # ``weight.t()`` reads ``weight``
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
        truth = self.evaluate(node.test)
        statements = (
            [*node.body, *node.orelse] if truth is UNKNOWN else node.body if truth else node.orelse
        )
        for statement in statements:
            self.visit(statement)

    def evaluate(self, node: ast.AST) -> Any:
        """The value of a condition that depends only on constants and on the attributes of ``self``
        in ``attribute_values``; ``UNKNOWN`` for any other condition."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Attribute() if self.attribute_values and self.paths_of(node.value) == {()}:
                return self.attribute_values.get(node.attr, UNKNOWN)
            case ast.UnaryOp(op=ast.Not()):
                value = self.evaluate(node.operand)
                return UNKNOWN if value is UNKNOWN else not value
            case ast.BoolOp():
                # one true operand decides an ``or``, one false operand an ``and``
                values, decisive_value = (
                    [*map(self.evaluate, node.values)],
                    isinstance(node.op, ast.Or),
                )
                if any(value is not UNKNOWN and bool(value) == decisive_value for value in values):
                    return decisive_value
                return UNKNOWN if UNKNOWN in values else not decisive_value
            case ast.Compare(ops=[comparison], comparators=[operand]) if (
                type(comparison) in _COMPARISONS
            ):
                left_value, right_value = self.evaluate(node.left), self.evaluate(operand)
                types = {type(left_value), type(right_value)}
                are_comparable = len(types) == 1 or types <= {int, float, bool}
                needs_order = isinstance(comparison, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                return (
                    UNKNOWN
                    if UNKNOWN in (left_value, right_value) or (needs_order and not are_comparable)
                    else _COMPARISONS[type(comparison)](left_value, right_value)
                )
        return UNKNOWN

    def visit_For(self, node: Any) -> None:
        for clause in getattr(node, "generators", [node]):
            self.bind_loop(clause.target, clause.iter)
        self.generic_visit(node)

    visit_AsyncFor = visit_For  # noqa: N815
    visit_ListComp = visit_SetComp = visit_For  # noqa: N815
    visit_GeneratorExp = visit_DictComp = visit_For  # noqa: N815

    def visit_Return(self, node: ast.Return) -> None:
        self.returned_paths |= self.paths_of(node.value)
        self.generic_visit(node)


def _append_name(paths: set[ModulePath], name: str) -> set[ModulePath]:
    return {(*path, name) for path in paths}


def _string_constant(node: ast.AST) -> str | None:
    """The value of a string constant; None for any other expression."""
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None


def _is_call(node: ast.AST, name: str) -> bool:
    """Whether an expression calls the global function ``name``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _is_module_method(name: str) -> bool:
    """Whether every ``nn.Module`` has an attribute of this name, and it is not forward."""
    return hasattr(nn.Module, name) and name != "forward"


def is_torch_module(name: str | None) -> bool:
    """Whether a Python module of this name belongs to torch."""
    return (name or "").partition(".")[0] == "torch"
