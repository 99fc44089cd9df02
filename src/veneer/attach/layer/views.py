"""Run a module's own forward on changed weights, without changing the module.

    y = forward(view of the module with gain ⊙ (W + ΔW) in place of W)

A view is another object of the module's class that shares everything with the module except the
changed weights. This path is right for every module. If forward changes attributes of the view (a
cache, a counter), they are written back to the module afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from veneer.attach.layer.adapted_module import (
    ACCELERATE_FORWARD,
    COMPRESSED_FORWARD,
    has_wrapped_forward,
    method_of,
    state_of,
)
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.dtypes import (
    cast_floats,
    cast_outputs,
    is_float,
    no_autocast,
    output_dtype,
    widen,
)
from veneer.attach.layer.experts import LAYERS_THAT_FORM, unformed_weights_of
from veneer.attach.layer.state import LAYER_STATE_NAME, Call, LayerState, ModulePath, detached_error
from veneer.attach.layer.unformed import CannotFormError
from veneer.bases import BASES
from veneer.distributed import base_class
from veneer.precision import at_least_float32

#: types of arguments that an extra call of a forward may get: if the tensors among them are copied,
#: the call cannot change an object of the caller
ARGUMENT_TYPES = (Tensor, PackedSequence, int, float, str, torch.dtype, torch.device, type(None))


def run_on_view(layer_adapter: Any, call: Call) -> Any:
    """Run the called method of the module, usually forward, on a view: a second object of the
    module's class with the changed weights of ``layer_adapter``, such as a ``LayerAdapter``. What
    the method writes to attributes and buffers of the view is copied to the module. A layer with an
    opaque storage is computed without its forward (``_run_opaque``)."""
    module, base_cls, layer_state, args, kwargs, _, method, *_ = call
    if any(change.storage.opaque for change in layer_adapter.changes.values()):
        return _run_opaque(layer_adapter, module, layer_state, args, kwargs)
    base_method, submodule_adapters = (
        method_of(base_cls, method),
        layer_adapter.adapters_read_by(method),
    )
    replacements = layer_adapter.replacements(module)
    weight_dtypes = {
        change.storage.dtype(frozen_weight(change, module, name))
        for name, change in layer_adapter.changes.items()
    }
    narrow_dtype = next(
        (dtype for dtype in weight_dtypes if at_least_float32(dtype) != dtype), None
    )
    if submodule_adapters or _keeps_dtype(layer_adapter, module, layer_state):
        narrow_dtype = None
    runs_wide = narrow_dtype is not None
    unformed_weights = (
        None
        if submodule_adapters
        else unformed_weights_of(
            layer_adapter, module, layer_state, (args, kwargs), can_form=not runs_wide
        )
    )
    if unformed_weights is not None:
        try:
            return _run_unformed(
                base_method,
                module,
                base_cls,
                {**replacements, **unformed_weights},
                layer_state,
                args,
                kwargs,
            )
        except CannotFormError:
            LAYERS_THAT_FORM.add(layer_state)
    view_tensors = {**replacements, **layer_adapter.changed_weights(module, runs_wide)}
    wide_copies = _wide_copies(module, view_tensors) if runs_wide else {}
    views: list[_View] = []
    child_views = _child_views(module, submodule_adapters, views)
    view_of_module = _create_view(
        module, base_cls, view_tensors, child_views, layer_state, views, wide_copies
    )
    if narrow_dtype is None:
        y = base_method(view_of_module, *args, **kwargs)
    else:
        weight = next(iter(view_tensors.values()))
        y = _run_widened(call, partial(base_method, view_of_module), weight, narrow_dtype)
    for view_record in views:
        _write_back(view_record)
    return y


def _keeps_dtype(layer_adapter: Any, module: nn.Module, layer_state: LayerState) -> bool:
    """Whether a module with 16-bit weights runs on W + ΔW in 16 bits. It does if a child has
    tensors, because the child keeps its dtype, and the dtypes would not match. So does a module of
    stacks (experts) with children, whose products would take too long in float32."""
    children = [child for child in module._modules.values() if child not in (None, layer_state)]
    if not children:
        return False
    has_stacks = any(change.dims.groups > 1 for change in layer_adapter.changes.values())
    return has_stacks or any(
        True for child in children for _ in itertools.chain(child.parameters(), child.buffers())
    )


def _wide_copies(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies, by name, of the 16-bit tensors of a view, which has the tensors ``values``
    and the module's other parameters and buffers."""
    tensors: dict[str, Any] = {**module._buffers, **module._parameters, **values}
    return {
        name: tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if is_float(tensor) and at_least_float32(tensor.dtype) != tensor.dtype
    }


def _run_widened(call: Call, function: Any, weight: Tensor, weight_dtype: torch.dtype) -> Any:
    """Run ``function``, which is the called method bound to a view with float32 weights, on the
    arguments of ``call`` in float32. The output is cast to the dtypes that it would have with
    weights of ``weight_dtype``. ``weight`` is a weight of the view, for its device."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    # ``data`` is a tensor for both kinds of leaves: tensors and packed sequences
    first_tensor = next((leaf.data for leaf in leaves if is_float(leaf)), None)
    y_dtype = weight_dtype if first_tensor is None else output_dtype(first_tensor, weight_dtype)
    output_dtypes = _base_dtypes(call, leaves, weight, weight_dtype, y_dtype)
    with no_autocast(weight):
        args, kwargs = cast_floats((call.args, call.kwargs), torch.float32)
        return cast_outputs(function(*args, **kwargs), output_dtypes, y_dtype)


def _base_dtypes(
    call: Call,
    leaves: Sequence[Any],
    weight: Tensor,
    weight_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> Sequence[torch.dtype | None]:
    """The dtypes of the leaves of the output that the module computes without its adapter, for a
    call whose arguments have these ``leaves``. None for a leaf that is not a floating-point tensor.
    The module is called once, without the adapter, to find them; the layer state caches them.

    Empty if they cannot be found, because that call fails or could change an argument. Empty also
    for the classes of ``torch.nn``: all their outputs have the dtype ``y_dtype``.
    """
    layer_state = call.layer_state
    if layer_state.is_stock_class or call.base_cls.__module__.startswith("torch.nn."):
        return ()
    if not all(isinstance(leaf, ARGUMENT_TYPES) for leaf in leaves):
        return ()
    if torch.compiler.is_compiling():
        # The compiler removes the call below, because only the dtypes of its output are used.
        accepts_arguments = all(
            leaf.data.dtype == weight_dtype for leaf in leaves if is_float(leaf)
        )
        return _call_base(call) if accepts_arguments else ()
    key = (
        call.method,
        call.module.training,
        weight_dtype,
        y_dtype,
        output_dtype(weight, weight_dtype),  # depends on autocast
        *call.kwargs,
        *map(_dtype_signature, leaves),
    )
    # torch.jit.trace compares several traces, which are equal only if none uses the cache, so each
    # traced call gets an empty cache.
    dtype_cache = {} if torch._C._get_tracing_state() is not None else layer_state.base_dtypes
    if key not in dtype_cache:
        cuda_devices = [weight.device] if weight.is_cuda else []
        # A dispatch mode, such as selective checkpointing, must see equal operations in each call,
        # so the extra call is hidden from it.
        has_dispatch_modes = torch._C._len_torch_dispatch_stack() > 0
        without_modes = _disable_current_modes() if has_dispatch_modes else nullcontext()
        try:
            with without_modes, torch.random.fork_rng(devices=cuda_devices):
                dtype_cache[key] = _call_base(call)
        except Exception:  # the call of the view, in float32, may still work
            return ()
    return dtype_cache[key]


def _dtype_signature(leaf: Any) -> Any:
    """The part of an argument on which the dtypes of an output may depend: the dtype of a tensor,
    the type of a number, any other argument itself."""
    if isinstance(leaf, Tensor | PackedSequence):
        return leaf.data.dtype
    return leaf if isinstance(leaf, bool) or not isinstance(leaf, int | float) else type(leaf)


def _call_base(call: Call) -> tuple[torch.dtype | None, ...]:
    """Call the module without its adapter and without gradients, on copies of everything that the
    called method could write to. Return the dtypes of the leaves of the output; None for a leaf
    that is not a floating-point tensor."""
    module, base_cls, layer_state, args, kwargs, _, method, *_ = call
    with torch.no_grad():
        tensors = {**module._buffers, **module._parameters}
        tensor_copies = {name: _copy_mutable(tensor) for name, tensor in tensors.items()}
        base_view = _create_view(module, base_cls, tensor_copies, {}, layer_state, [], {})
        attributes = base_view.__dict__
        attributes.update(
            {name: _copy_mutable(attribute) for name, attribute in attributes.items()}
        )
        args, kwargs = pytree.tree_map(_copy_mutable, (args, kwargs))
        y = method_of(base_cls, method)(base_view, *args, **kwargs)
    return tuple(leaf.data.dtype if is_float(leaf) else None for leaf in pytree.tree_leaves(y))


def _copy_mutable(value: Any) -> Any:
    """A copy of a tensor, list, dict or set; any other value itself."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(value) if type(value) in (dict, list, set) else value


def _run_opaque(
    layer_adapter: Any, module: Any, layer_state: Any, args: tuple, kwargs: Mapping[str, Any]
) -> Tensor:
    """The output of a linear layer with an opaque storage, computed with W + ΔW in at least float32
    and cast to the dtype of the layer's output. The forward of the layer reads its weight in a form
    that only its library knows, so it cannot run on a view with another weight."""
    (x,), replacements = (*args, *kwargs.values()), layer_adapter.replacements(module)
    ((name, dense),) = layer_adapter.changed_weights(module, wide=True).items()
    bias = replacements.get("bias", getattr(module, "bias", None))
    with no_autocast(x):
        bias = None if bias is None else widen(bias, dense.dtype)
        y = layer_state.layer.op(module, widen(x, dense.dtype), dense, bias)
    return y.to(output_dtype(x, layer_adapter.changes[name].storage.dtype(module)))


def _run_unformed(
    function: Any,
    module: nn.Module,
    base_cls: type[nn.Module],
    values: Mapping[str, Tensor],
    layer_state: LayerState,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Any:
    """Run ``function``, a method of ``base_cls``, on a view with the tensors ``values``, among them
    ``Unformed`` weights: W + ΔW whose values are not computed. Raises a CannotFormError if the
    method needs the values in a call in which they must not be formed."""
    views: list[_View] = []
    view_of_module = _create_view(module, base_cls, values, {}, layer_state, views, {})
    y = function(view_of_module, *args, **kwargs)
    _write_back(views[0])
    return y


def _child_views(
    module: nn.Module, layer_adapters: Mapping[ModulePath, Any], views: list[_View]
) -> dict[str, nn.Module]:
    """Views of the children of ``module`` that are, or contain, modules whose weights the called
    method reads without calling them; by the name of the child. ``layer_adapters`` are those of
    these modules, by their path from ``module``. The views are added to ``views``."""
    adapters_by_child: dict[str, dict[ModulePath, Any]] = {}
    for path, layer_adapter in layer_adapters.items():
        if path:
            adapters_by_child.setdefault(path[0], {})[path[1:]] = layer_adapter
    return {
        name: _view_below(cast(nn.Module, module._modules[name]), child_adapters, views)
        for name, child_adapters in adapters_by_child.items()
    }


def _view_below(
    module: nn.Module, layer_adapters: Mapping[ModulePath, Any], views: list[_View]
) -> nn.Module:
    """A view of ``module``, which is below the called module, with changed weights. The called
    method reads weights of ``module``, or of modules below it, without calling them.

    Args:
        layer_adapters: the layer adapters of ``module``, by the path (), and of modules below it.
        views: a list to which the view, and those of modules below, are added.
    """
    layer_adapter, layer_state = layer_adapters.get(()), state_of(module)
    if layer_adapter is None:
        child_views = _child_views(module, layer_adapters, views)
        return _create_view(module, type(module), {}, child_views, None, views, {})
    if layer_state is None and LAYER_STATE_NAME in module._modules:
        return module  # already a view, created for a module above
    if layer_state is None:
        raise detached_error("the selected one")
    # Methods of ``module`` that the called method uses run on the view too, so the weights that
    # they read are replaced as well.
    for submodule_adapters in (
        layer_adapter.submodule_adapters,
        *layer_adapter.submodule_adapters_by_method.values(),
    ):
        layer_adapters = {**submodule_adapters, **layer_adapters}
    view_tensors = {
        **layer_adapter.replacements(module),
        **layer_adapter.changed_weights(module, wide=False),
    }
    child_views = _child_views(module, layer_adapters, views)
    return _create_view(
        module, base_class(module), view_tensors, child_views, layer_state, views, {}
    )


class _View(NamedTuple):
    """A view of a module for one call.

    Fields:
        attributes: the view's attributes before the call.
        values: the tensors that replace parameters and buffers of the module, by name. Writes of
            forward to them are not copied to the module.
        wide_buffers: float32 copies of the other 16-bit buffers, by name, each with its number of
            writes before the call (``_write_count``), which tells whether forward wrote to it.
    """

    module: nn.Module
    view: nn.Module
    attributes: Mapping[str, Any]
    values: Mapping[str, Tensor]
    wide_buffers: Mapping[str, tuple[Tensor, int | None]]


def _write_count(tensor: Tensor) -> int | None:
    """The number of writes to a tensor so far. None for an inference tensor, which does not count
    writes, and while compiling, where the number is not known."""
    is_unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return None if is_unknown else tensor._version


def _write_back(view_record: _View) -> None:
    """Copy the changes that forward made to a view back to the module: attributes (a cache, a
    counter) and buffers."""
    module, view, attributes, values, wide_buffers = view_record
    module_attributes, view_attributes = module.__dict__, view.__dict__
    module_attributes.update(
        {
            name: value
            for name, value in view_attributes.items()
            if name not in attributes or attributes[name] is not value
        }
    )
    for name in attributes.keys() - view_attributes.keys():
        module_attributes.pop(name, None)
    for name, buffer in view._buffers.items():
        if name in values:
            continue
        module_buffer: Any = module._buffers.get(name)
        wide_copy, version = wide_buffers.get(name, (module_buffer, None))
        if buffer is not wide_copy:  # forward has assigned a new buffer
            is_widened = name in wide_buffers and is_float(buffer)
            module._buffers[name] = buffer.to(module_buffer.dtype) if is_widened else buffer
        elif name in wide_buffers and (
            0 not in module_buffer.stride() if version is None else version != wide_copy._version
        ):
            module_buffer.copy_(wide_copy)  # if no write happened, it copies equal numbers


def _create_view(
    module: nn.Module,
    base_cls: type[nn.Module],
    values: Mapping[str, Tensor],
    children: Mapping[str, nn.Module],
    layer_state: LayerState | None,
    views: list[_View],
    wide_copies: Mapping[str, Tensor],
) -> nn.Module:
    """A view of ``module`` (see ``view``) that is ready for a call: it also has the attributes that
    the layer state lists, and its bound methods are bound to the view. An entry for it is added to
    ``views``. ``wide_copies``: float32 tensors, by name, that replace tensors of the view."""
    attributes = None if layer_state is None else layer_state.view_attributes
    tensors = {**values, **wide_copies}
    module_view = view(module, base_cls, tensors, children, attributes)
    for name in () if layer_state is None else layer_state.bound_methods:
        module_view.__dict__[name] = MethodType(module_view.__dict__[name].__func__, module_view)
    if layer_state is not None and layer_state.layer is not None:
        layer_state.layer.bind(module_view, tensors)
    wide_buffers = {
        name: (wide_copy, _write_count(wide_copy))
        for name, wide_copy in wide_copies.items()
        if name in module._buffers and name not in values
    }
    views.append(_View(module, module_view, dict(module_view.__dict__), values, wide_buffers))
    return module_view


def view(
    module: nn.Module,
    base_cls: type[nn.Module],
    values: Mapping[str, Tensor],
    children: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A view of ``module``: another object, of class ``base_cls``, that shares the attributes of
    the module. ``values`` (parameters and buffers), ``children`` and ``attributes`` replace those
    of the module, by name. The module is not changed, so several threads may use views of it at
    once; ``torch.func.functional_call`` would swap its parameters in place."""
    if values and is_parametrized(module):
        # The parametrised class computes weights in properties. The view has the original class,
        # and holds the computed weights.
        parametrizations = cast(nn.ModuleDict, module._modules["parametrizations"])
        values = {
            **{
                name: BASES["parametrized"].dense(parametrization_list)
                for name, parametrization_list in parametrizations.items()
            },
            **values,
        }
        base_cls = base_cls.__bases__[0]
    module_view = object.__new__(base_cls)
    module_view.__dict__.update(module.__dict__)
    if ACCELERATE_FORWARD in module_view.__dict__ and has_wrapped_forward(module):
        # Bind accelerate's wrapper, and the forward that it wraps, to the view.
        module_view.__dict__[ACCELERATE_FORWARD] = MethodType(base_cls.forward, module_view)
        module_view.__dict__["forward"] = partial(module_view.__dict__["forward"].func, module_view)
    # Skip the wrapper of compressed-tensors that moves inputs to the module's device, because it
    # has run in the call of the module.
    if COMPRESSED_FORWARD in module_view.__dict__:
        is_adapted = base_cls is not type(module)
        forward = base_cls.forward if is_adapted else module_view.__dict__[COMPRESSED_FORWARD]
        module_view.__dict__["forward"] = MethodType(forward, module_view)
    if attributes:
        module_view.__dict__.update(attributes)
    for table_name in ("_parameters", "_buffers"):
        tensors = module.__dict__[table_name]
        module_view.__dict__[table_name] = {
            name: values.get(name, tensor) for name, tensor in tensors.items()
        }
    added_tensors: Any = {
        name: values[name]
        for name in values.keys() - module_view._parameters.keys() - module_view._buffers.keys()
    }
    module_view._parameters.update(added_tensors)
    if children:
        module_view.__dict__["_modules"] = {**module._modules, **children}
    return module_view
