"""Run a module's own forward on changed weights, without touching the module.

    y = forward(view of the module with gain ⊙ (W + ΔW) in the place of W)

A view is another object of the module's class that shares everything with it but the weights that
change. This is the general path, right for every module there is. What forward does to the
attributes of the view (a cache, a counter) is written back to the module afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from veneer.attach.adapted_module import (
    ACCELERATE_FORWARD,
    COMPRESSED_FORWARD,
    base_class,
    method_of,
    state_of,
    wrapped_forward,
)
from veneer.attach.change import frozen_weight
from veneer.attach.dtypes import (
    at_least_float32,
    cast_floats,
    is_float,
    no_autocast,
    output_dtype,
    widen,
)
from veneer.attach.experts import always_form_weights, stand_ins
from veneer.attach.state import STATE, LayerState, ModulePath, detached
from veneer.attach.unformed import CannotStandError
from veneer.bases import BASES

if TYPE_CHECKING:
    from veneer.attach.layer_adapter import LayerAdapter


def viewed(
    part: Any,
    module: Any,
    base: Any,
    layer_state: Any,
    args: tuple,
    kwargs: dict,
    now: Any,
    share=True,
    method="forward",
) -> Any:
    """The module's own forward (or another method), on a view with a part's changed weights:
    ``run`` of any part."""
    if any(change.storage.opaque for change in part.changes.values()):
        return _on_numbers(part, module, layer_state, args, kwargs)
    function, read_below, full = (
        method_of(base, method),
        part.below(method),
        part.replacements(module),
    )
    dtypes = {
        change.storage.dtype(frozen_weight(change, module, name))
        for name, change in part.changes.items()
    }
    narrow = next((dtype for dtype in dtypes if at_least_float32(dtype) != dtype), None)
    if read_below or any(child is not layer_state for child in module._modules.values()):
        narrow = None  # what runs below is not widened
    wide = narrow is not None
    standing = (
        None
        if read_below
        else stand_ins(part, module, layer_state, (args, kwargs), formable=not wide)
    )
    if standing is not None:
        try:
            return _on_stand_ins(
                function, module, base, {**full, **standing}, layer_state, args, kwargs
            )
        except CannotStandError:
            always_form_weights(layer_state)
    values = {**full, **part.changed_weights(module, wide)}
    if wide:
        own = {**module._buffers, **module._parameters, **values}
        values = {
            name: widen(value, torch.float32) for name, value in own.items() if value is not None
        }
    made: list[_Made] = []
    seen = _seen(
        module, base, values, _children_read_below(module, read_below, made), layer_state, made
    )
    if narrow is None:
        y = function(seen, *args, **kwargs)
    else:
        floats = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_float(leaf)]
        first = floats[0].data if floats else None  # a tensor's, or a packed sequence's
        output = narrow if first is None else output_dtype(first, narrow)
        with no_autocast(next(iter(values.values()))):
            args, kwargs = cast_floats((args, kwargs), torch.float32)
            y = cast_floats(function(seen, *args, **kwargs), output)
    for entry in made:
        _write_back(*entry)
    return y


def _on_numbers(part: Any, module: Any, layer_state: Any, args: tuple, kwargs: dict) -> Tensor:
    """A linear layer whose own forward reads nothing that could be replaced: its op, on W + ΔW in
    at least float32."""
    (x,), full = (*args, *kwargs.values()), part.replacements(module)
    ((name, dense),) = part.changed_weights(module, wide=True).items()
    bias = full.get("bias", getattr(module, "bias", None))
    with no_autocast(x):
        bias = None if bias is None else widen(bias, dense.dtype)
        y = layer_state.layer.op(module, widen(x, dense.dtype), dense, bias)
    return y.to(output_dtype(x, part.changes[name].storage.dtype(module)))


def _on_stand_ins(
    function: Any,
    module: nn.Module,
    base: type[nn.Module],
    values,
    layer_state: LayerState,
    args: tuple,
    kwargs: dict,
) -> Any:
    """``viewed`` with weights that are not formed."""
    made: list[_Made] = []
    y = function(_seen(module, base, values, {}, layer_state, made), *args, **kwargs)
    _write_back(*made[0])
    return y


def _children_read_below(
    module: nn.Module, parts: Mapping[ModulePath, LayerAdapter], made: list[_Made]
) -> dict[str, nn.Module]:
    """Views of the modules below whose weights are read directly, under the names of this module's
    children."""
    below: dict[str, dict[ModulePath, LayerAdapter]] = {}
    for path, part in parts.items():
        if path:
            below.setdefault(path[0], {})[path[1:]] = part
    return {
        name: _view_read_below(cast(nn.Module, module._modules[name]), rest, made)
        for name, rest in below.items()
    }


def _view_read_below(
    module: nn.Module, parts: Mapping[ModulePath, LayerAdapter], made: list[_Made]
) -> nn.Module:
    own, layer_state = parts.get(()), state_of(module)
    if own is None:
        return _seen(
            module, type(module), {}, _children_read_below(module, parts, made), None, made
        )
    if layer_state is None and STATE in module._modules:
        return module  # a module further above has made this view
    if layer_state is None:
        raise detached("the selected one")
    # its own methods run on the view too
    for read_below in (
        own.read_below,
        *own.entries.values(),
    ):
        parts = {**read_below, **parts}
    values = {**own.replacements(module), **own.changed_weights(module, wide=False)}
    return _seen(
        module,
        base_class(module),
        values,
        _children_read_below(module, parts, made),
        layer_state,
        made,
    )


#: a module, its view for one call, what the view's attributes were before it, and the values in
#: place of the module's
_Made = tuple[nn.Module, nn.Module, Mapping[str, Any], Mapping[str, Tensor]]


def _write_back(
    module: nn.Module, seen: nn.Module, before: Mapping[str, Any], values: Mapping[str, Tensor]
) -> None:
    """Give a module what forward did to its view: attributes (a cache, a counter) and buffers."""
    own, now = module.__dict__, seen.__dict__
    own.update(
        {
            name: value
            for name, value in now.items()
            if name not in before or before[name] is not value
        }
    )
    for name in before.keys() - now.keys():
        own.pop(name, None)
    for name, value in seen._buffers.items():
        if name not in values and module._buffers.get(name) is not value:
            module._buffers[name] = value


def _seen(
    module: nn.Module, base, values, children, layer_state: LayerState | None, made: list[_Made]
) -> nn.Module:
    seen = view(
        module, base, values, children, None if layer_state is None else layer_state.attributes
    )
    for name in () if layer_state is None else layer_state.bound:
        seen.__dict__[name] = MethodType(seen.__dict__[name].__func__, seen)
    if layer_state is not None and layer_state.layer is not None:
        layer_state.layer.bind(seen, values)
    made.append((module, seen, dict(seen.__dict__), values))
    return seen


def view(
    module: nn.Module,
    base: type[nn.Module],
    values: Mapping[str, Tensor],
    children: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """``module`` as ``base`` sees it, with other parameters, buffers, children and attributes. The
    module is not touched, so that any number of threads may do this at once
    (``torch.func.functional_call`` swaps them in place)."""
    if values and is_parametrized(module):
        # Its class computes the weight by a property: the view is of the class from before, with
        # every such weight.
        lists = cast(nn.ModuleDict, module._modules["parametrizations"])
        values = {
            **{name: BASES["parametrized"].dense(own) for name, own in lists.items()},
            **values,
        }
        base = base.__bases__[0]
    seen = object.__new__(base)
    seen.__dict__.update(module.__dict__)
    if ACCELERATE_FORWARD in seen.__dict__ and wrapped_forward(
        module
    ):  # of the view, as it is of the module
        seen.__dict__[ACCELERATE_FORWARD] = MethodType(base.forward, seen)
        seen.__dict__["forward"] = partial(seen.__dict__["forward"].func, seen)
    # what is around it moves inputs to the device of the module, which has run already
    if COMPRESSED_FORWARD in seen.__dict__:
        seen.__dict__["forward"] = MethodType(
            base.forward if base is not type(module) else seen.__dict__[COMPRESSED_FORWARD], seen
        )
    if attributes:
        seen.__dict__.update(attributes)
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        seen.__dict__[kind] = {name: values.get(name, own[name]) for name in own}
    extra: Any = {
        name: values[name]
        for name in values.keys() - seen._parameters.keys() - seen._buffers.keys()
    }
    seen._parameters.update(extra)
    if children:
        seen.__dict__["_modules"] = {**module._modules, **children}
    return seen
