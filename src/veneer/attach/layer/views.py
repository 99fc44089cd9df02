"""Run a module's own forward on changed weights, without changing the module.

    y = forward(view of the module with gain ⊙ (W + ΔW) in place of W)

A view is another object of the module's class that shares everything with the module except the
changed weights. This is the general path, which is right for every module. Changes that forward
makes to attributes of the view (a cache, a counter) are written back to the module afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from veneer.attach.layer.adapted_module import (
    ACCELERATE_FORWARD,
    COMPRESSED_FORWARD,
    method_of,
    state_of,
    wrapped_forward,
)
from veneer.attach.layer.call import Call
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.dtypes import cast_floats, is_float, no_autocast, output_dtype, widen
from veneer.attach.layer.experts import always_form_weights, stand_ins
from veneer.attach.layer.state import STATE, LayerState, ModulePath, detached_error
from veneer.attach.layer.unformed import CannotStandError
from veneer.bases import BASES
from veneer.distributed import base_class
from veneer.precision import at_least_float32


def run_on_view(layer_adapter: Any, call: Call) -> Any:
    """Run the module's own forward (or another method) on a view with the changed weights of
    ``layer_adapter``."""
    module, base, layer_state, args, kwargs, _, method, *_ = call
    if any(change.storage.opaque for change in layer_adapter.changes.values()):
        return _run_opaque(layer_adapter, module, layer_state, args, kwargs)
    function, read_below, full = (
        method_of(base, method),
        layer_adapter.below(method),
        layer_adapter.replacements(module),
    )
    dtypes = {
        change.storage.dtype(frozen_weight(change, module, name))
        for name, change in layer_adapter.changes.items()
    }
    narrow = next((dtype for dtype in dtypes if at_least_float32(dtype) != dtype), None)
    if read_below or any(child is not layer_state for child in module._modules.values()):
        narrow = None  # what runs below is not widened
    wide = narrow is not None
    unformed_weights = (
        None
        if read_below
        else stand_ins(layer_adapter, module, layer_state, (args, kwargs), formable=not wide)
    )
    if unformed_weights is not None:
        try:
            return _run_unformed(
                function, module, base, {**full, **unformed_weights}, layer_state, args, kwargs
            )
        except CannotStandError:
            always_form_weights(layer_state)
    values = {**full, **layer_adapter.changed_weights(module, wide)}
    if wide:
        tensors = {**module._buffers, **module._parameters, **values}
        values = {
            name: widen(value, torch.float32)
            for name, value in tensors.items()
            if value is not None
        }
    views: list[_View] = []
    view_of_module = _create_view(
        module, base, values, _children_read_below(module, read_below, views), layer_state, views
    )
    if narrow is None:
        y = function(view_of_module, *args, **kwargs)
    else:
        y = _run_widened(partial(function, view_of_module), args, kwargs, values, narrow)
    for created in views:
        _write_back(*created)
    return y


def _run_widened(
    function: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    narrow: torch.dtype,
) -> Any:
    """The output of a method in float32, in the dtype that it has for weights of dtype
    ``narrow``."""
    floats = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if is_float(leaf)]
    first = floats[0].data if floats else None  # of a tensor, or of a packed sequence
    output = narrow if first is None else output_dtype(first, narrow)
    with no_autocast(next(iter(values.values()))):
        args, kwargs = cast_floats((args, kwargs), torch.float32)
        return cast_floats(function(*args, **kwargs), output)


def _run_opaque(
    layer_adapter: Any, module: Any, layer_state: Any, args: tuple, kwargs: Mapping[str, Any]
) -> Tensor:
    """Run the op of a linear layer with an opaque storage on W + ΔW, in at least float32. Its own
    forward reads no tensor that a view could replace."""
    (x,), full = (*args, *kwargs.values()), layer_adapter.replacements(module)
    ((name, dense),) = layer_adapter.changed_weights(module, wide=True).items()
    bias = full.get("bias", getattr(module, "bias", None))
    with no_autocast(x):
        bias = None if bias is None else widen(bias, dense.dtype)
        y = layer_state.layer.op(module, widen(x, dense.dtype), dense, bias)
    return y.to(output_dtype(x, layer_adapter.changes[name].storage.dtype(module)))


def _run_unformed(
    function: Any,
    module: nn.Module,
    base: type[nn.Module],
    values,
    layer_state: LayerState,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Any:
    """``run_on_view`` with weights that are not formed (``Unformed``)."""
    views: list[_View] = []
    view_of_module = _create_view(module, base, values, {}, layer_state, views)
    y = function(view_of_module, *args, **kwargs)
    _write_back(*views[0])
    return y


def _children_read_below(
    module: nn.Module, layer_adapters: Mapping[ModulePath, Any], views: list[_View]
) -> dict[str, nn.Module]:
    """Views of the children below which weights are read directly, by the names of the children."""
    below: dict[str, dict[ModulePath, Any]] = {}
    for path, layer_adapter in layer_adapters.items():
        if path:
            below.setdefault(path[0], {})[path[1:]] = layer_adapter
    return {
        name: _view_read_below(cast(nn.Module, module._modules[name]), child_adapters, views)
        for name, child_adapters in below.items()
    }


def _view_read_below(
    module: nn.Module, layer_adapters: Mapping[ModulePath, Any], views: list[_View]
) -> nn.Module:
    """A view of a module below, whose own weights or those below it are read directly.

    ``layer_adapters``: the adapters' changes at this module (path ()) and below it.
    """
    layer_adapter, layer_state = layer_adapters.get(()), state_of(module)
    if layer_adapter is None:
        children = _children_read_below(module, layer_adapters, views)
        return _create_view(module, type(module), {}, children, None, views)
    if layer_state is None and STATE in module._modules:
        return module  # it is a view already, created for a module above
    if layer_state is None:
        raise detached_error("the selected one")
    # the methods of the module run on the view too
    for read_below in (layer_adapter.read_below, *layer_adapter.entries.values()):
        layer_adapters = {**read_below, **layer_adapters}
    values = {
        **layer_adapter.replacements(module),
        **layer_adapter.changed_weights(module, wide=False),
    }
    children = _children_read_below(module, layer_adapters, views)
    return _create_view(module, base_class(module), values, children, layer_state, views)


#: (a module, its view for one call, the view's attributes before the call, the values that replace
#: the module's parameters and buffers)
_View = tuple[nn.Module, nn.Module, Mapping[str, Any], Mapping[str, Tensor]]


def _write_back(
    module: nn.Module, view: nn.Module, before: Mapping[str, Any], values: Mapping[str, Tensor]
) -> None:
    """Copy the changes that forward made to a view back to the module: attributes (a cache, a
    counter) and buffers."""
    module_attributes, view_attributes = module.__dict__, view.__dict__
    module_attributes.update(
        {
            name: value
            for name, value in view_attributes.items()
            if name not in before or before[name] is not value
        }
    )
    for name in before.keys() - view_attributes.keys():
        module_attributes.pop(name, None)
    for name, value in view._buffers.items():
        if name not in values and module._buffers.get(name) is not value:
            module._buffers[name] = value


def _create_view(
    module: nn.Module, base, values, children, layer_state: LayerState | None, views: list[_View]
) -> nn.Module:
    """``view``, with what the state of the layer asks for. Adds the view to ``views``."""
    created = view(
        module, base, values, children, None if layer_state is None else layer_state.attributes
    )
    for name in () if layer_state is None else layer_state.bound:
        created.__dict__[name] = MethodType(created.__dict__[name].__func__, created)
    if layer_state is not None and layer_state.layer is not None:
        layer_state.layer.bind(created, values)
    views.append((module, created, dict(created.__dict__), values))
    return created


def view(
    module: nn.Module,
    base: type[nn.Module],
    values: Mapping[str, Tensor],
    children: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A view of ``module`` with the class ``base`` and with some parameters, buffers, children and
    attributes replaced. The module is not changed, so any number of threads may do this at once
    (``torch.func.functional_call`` swaps parameters in place)."""
    if values and is_parametrized(module):
        # The parametrised class computes weights in properties. The view has the original class,
        # and holds the computed weights.
        lists = cast(nn.ModuleDict, module._modules["parametrizations"])
        values = {
            **{
                name: BASES["parametrized"].dense(parametrized)
                for name, parametrized in lists.items()
            },
            **values,
        }
        base = base.__bases__[0]
    created = object.__new__(base)
    created.__dict__.update(module.__dict__)
    if ACCELERATE_FORWARD in created.__dict__ and wrapped_forward(module):  # bind it to the view
        created.__dict__[ACCELERATE_FORWARD] = MethodType(base.forward, created)
        created.__dict__["forward"] = partial(created.__dict__["forward"].func, created)
    # Skip the wrapper that moves inputs to the module's device: it has run already.
    if COMPRESSED_FORWARD in created.__dict__:
        created.__dict__["forward"] = MethodType(
            base.forward if base is not type(module) else created.__dict__[COMPRESSED_FORWARD],
            created,
        )
    if attributes:
        created.__dict__.update(attributes)
    for kind in ("_parameters", "_buffers"):
        tensors = module.__dict__[kind]
        created.__dict__[kind] = {name: values.get(name, tensors[name]) for name in tensors}
    extra: Any = {
        name: values[name]
        for name in values.keys() - created._parameters.keys() - created._buffers.keys()
    }
    created._parameters.update(extra)
    if children:
        created.__dict__["_modules"] = {**module._modules, **children}
    return created
