"""The adapted subclass of a layer's class. Its forward runs the adapter that the context selects.

    nn.Linear   --adapt_module-->     a subclass of nn.Linear with the same name; the layer has the
                <--restore_module--   child ``veneer`` (LayerState)

The layer stays the same object with the same parameters. ``adapted_class`` creates one subclass for
each class of layer and each set of methods, besides ``forward``, that read a changed weight.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from veneer import context
from veneer.attach.layer.qconfig import Qconfig
from veneer.attach.layer.state import LAYER_STATE_NAME, Call, LayerState
from veneer.bases import is_opaque
from veneer.distributed import base_class

#: the attribute in which accelerate's hooks store the forward that they wrap, a bound method
ACCELERATE_FORWARD = "_old_forward"
#: the attribute in which compressed-tensors stores the forward that it wraps, a function; every
#: module of such a model has it once the model has been called
COMPRESSED_FORWARD = "_original_forward_func"


class Adapted:
    """The first base class of each adapted class, before the layer's own class. It marks modules as
    adapted and defines how they are pickled and printed.

    Fields:
        veneer_base: the layer's class before it was adapted.
        veneer_methods: the names of the adapted methods besides forward.
    """

    veneer_base: type[nn.Module]
    veneer_methods: tuple[str, ...]
    _modules: dict[str, Any]
    qconfig = Qconfig()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time, so pickle and deepcopy store the base class and create
        # the adapted class again.
        return _rebuild, (type(self).veneer_base, type(self).veneer_methods), self.__getstate__()

    def _get_name(self) -> str:
        return f"Adapted{type(self).veneer_base.__name__}"


@functools.cache
def adapted_class(base_cls: type[nn.Module], method_names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base_cls`` whose forward, and whose methods ``method_names``, run the
    selected adapter.

    It has the name of ``base_cls`` and the signature of its forward, because libraries read both.
    """

    @functools.wraps(base_cls.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Every layer of a decoding step runs this, so it uses subscripts instead of calls.
        children, calling_context = self._modules, context.current
        try:
            layer_state = children[LAYER_STATE_NAME]
        except KeyError:  # another thread has detached since this method was looked up
            return base_cls.forward(self, *args, **kwargs)
        model_adapters, selection = layer_state.model_adapters, calling_context.selection
        uid = model_adapters.uid
        active_adapter = (
            selection[uid] if uid in selection else model_adapters.default  # noqa: SIM401
        )
        layer_adapters = active_adapter.layer_adapters
        if layer_adapters is None or model_adapters.merged != active_adapter.merged_at_attach:
            if layer_adapters is None or active_adapter.name != model_adapters.merged:
                raise layer_state.selection_error(active_adapter)
            return base_forward(self, base_cls, *args, **kwargs)
        # The adapter does not change this layer. Not tested by `try`, whose result torch.compile
        # does not guard correctly.
        if layer_state.key not in layer_adapters:
            return base_forward(self, base_cls, *args, **kwargs)
        layer_adapter = layer_adapters[layer_state.key]
        if calling_context.reached_ids is not None:
            calling_context.reached_ids.update(layer_adapter.reached_ids())
        return layer_adapter.run(Call(self, base_cls, layer_state, args, kwargs, calling_context))

    attributes = {
        "__module__": base_cls.__module__,
        "__doc__": base_cls.__doc__,
        "veneer_base": base_cls,
        "veneer_methods": method_names,
    }
    methods = {name: _adapt_method(base_cls, name) for name in method_names}
    return type(
        base_cls.__name__, (Adapted, base_cls), {**attributes, **methods, "forward": forward}
    )


def _adapt_method(base_cls: type[nn.Module], name: str) -> Any:
    """The adapted version of the method or property ``name`` of ``base_cls``, which reads adapted
    weights. For an object that is not adapted (a view of a module, or a module that was detached
    meanwhile) it calls the method of ``base_cls``."""
    method = method_of(base_cls, name)

    @functools.wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        layer_state, calling_context = state_of(self), context.current
        if layer_state is None:
            return method(self, *args, **kwargs)
        model_adapters = layer_state.model_adapters
        active_adapter = calling_context.selection.get(model_adapters.uid, model_adapters.default)
        if (
            active_adapter.layer_adapters is None
            or model_adapters.merged != active_adapter.merged_at_attach
        ):
            if (
                active_adapter.layer_adapters is None
                or active_adapter.name != model_adapters.merged
            ):
                raise layer_state.selection_error(active_adapter)
            return method(self, *args, **kwargs)
        if (layer_state.key, name) not in active_adapter.layer_adapters:
            return method(self, *args, **kwargs)
        layer_adapter = active_adapter.layer_adapters[layer_state.key, name]
        if calling_context.reached_ids is not None:
            calling_context.reached_ids.update(layer_adapter.reached_ids(name))
        return layer_adapter.run(
            Call(self, base_cls, layer_state, args, kwargs, calling_context, name)
        )

    return property(run) if isinstance(getattr(base_cls, name), property) else run


def method_of(cls: type[nn.Module], name: str) -> Any:
    """The method ``name`` of a class, or the getter if it is a property."""
    method = getattr(cls, name)
    return method.fget if isinstance(method, property) else method


def _rebuild(base_cls: type[nn.Module], method_names: tuple[str, ...] = ()) -> nn.Module:
    return object.__new__(adapted_class(base_cls, method_names))


def stop_answering_peft_names(module: nn.Module) -> bool:
    """Undo ``answer_peft_names`` (``source/from_peft.py``), which replaces the class of a model, so
    that PEFT's method names raise helpful errors. Returns whether the class had been replaced."""
    original_cls = vars(type(module)).get("veneer_original_class")
    if original_cls is not None:
        module.__class__ = original_cls
    return original_cls is not None


def adapt_methods(module: nn.Module, method_names: Iterable[str]) -> None:
    """Let these methods of an adapted module use the selected adapter, as its forward does. The
    module gets another adapted class if its class does not do so yet."""
    stop_answering_peft_names(module)
    cls: Any = type(module)
    if not {*method_names} <= {*cls.veneer_methods}:
        module.__class__ = adapted_class(
            cls.veneer_base, tuple(sorted({*cls.veneer_methods, *method_names}))
        )


def state_of(module: nn.Module) -> LayerState | None:
    return (
        cast("LayerState | None", module._modules.get(LAYER_STATE_NAME))
        if isinstance(module, Adapted)
        else None
    )


def set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Set a child of a module, or remove it if ``child`` is None. The module gets a new dict of
    children, because another thread may be iterating over the old one."""
    children = {key: value for key, value in module._modules.items() if key != name}
    module.__dict__["_modules"] = children if child is None else {**children, name: child}


def adapt_module(module: nn.Module, layer_state: LayerState) -> None:
    """Change the class of ``module`` to its adapted class, and add the layer state as a child.
    Parameters and names stay the same. A wrapper of the module's forward, by accelerate or
    compressed-tensors, is changed or removed so that calls run the adapted forward."""
    stop_answering_peft_names(module)
    forward_wrapper = instance_forward(module)
    layer_state.instance_forward = (
        forward_wrapper if forward_wrapper is not type(module).forward else None
    )
    set_child(module, LAYER_STATE_NAME, layer_state)
    module.__class__ = adapted_class(type(module), ())
    if COMPRESSED_FORWARD in module.__dict__:
        module.__dict__[COMPRESSED_FORWARD] = type(module).forward
    elif forward_wrapper is not None:
        del module.__dict__["forward"]
    if has_wrapped_forward(module):
        module.__dict__[ACCELERATE_FORWARD] = MethodType(type(module).forward, module)


def has_wrapped_forward(module: nn.Module) -> bool:
    """Whether accelerate's hooks wrap the forward of the module's class. The hooks move inputs and
    offloaded weights to the device of a ``device_map``, and store the forward that they wrap as a
    bound method."""
    stored_forward = module.__dict__.get(ACCELERATE_FORWARD)
    is_hooked = (
        isinstance(stored_forward, MethodType)
        and stored_forward.__self__ is module
        and "_hf_hook" in module.__dict__
    )
    return is_hooked and inspect.unwrap(stored_forward.__func__) is inspect.unwrap(
        base_class(module).forward
    )


def instance_forward(module: nn.Module) -> FunctionType | None:
    """The wrapper of compressed-tensors around a module's forward, or None if there is none.

    In a quantised layer, the wrapper is the attribute ``forward`` of the instance. It also rounds
    the layer's input. Once the model has been called, every module stores its wrapper under
    ``COMPRESSED_FORWARD``, inside of another wrapper that moves inputs to the module's device.
    """
    instance_attribute = module.__dict__.get("forward")
    forward_wrapper = module.__dict__.get(COMPRESSED_FORWARD)
    if (
        forward_wrapper is None
        and isinstance(instance_attribute, MethodType)
        and instance_attribute.__self__ is module
        and is_opaque(module)
    ):
        forward_wrapper = instance_attribute.__func__
    wraps_base_forward = isinstance(forward_wrapper, FunctionType) and inspect.unwrap(
        forward_wrapper
    ) is inspect.unwrap(base_class(module).forward)
    return cast("FunctionType | None", forward_wrapper if wraps_base_forward else None)


def base_forward(module: Any, base_cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """The output of an adapted module without its adapters. ``base_cls`` is the class that the
    module had before it was adapted."""
    layer_state = module._modules.get(LAYER_STATE_NAME)
    if layer_state is None or layer_state.opaque_storage is None:
        return base_cls.forward(module, *args, **kwargs)
    forward = partial(base_cls.forward, module)
    if layer_state.instance_forward is not None:
        # ``instance_forward`` calls the forward of its argument's class. Its argument is therefore
        # a copy with the base class: for the module itself, it would call the adapted forward.
        base_module = object.__new__(base_cls)
        base_module.__dict__.update(module.__dict__)
        forward = partial(layer_state.instance_forward, base_module)
    return layer_state.opaque_storage.call(module, forward, *args, **kwargs)


def restore_module(module: nn.Module) -> None:
    """Undo ``adapt_module``: restore the class and the attributes of a module."""
    stop_answering_peft_names(module)
    base_cls, layer_state = getattr(type(module), "veneer_base", type(module)), state_of(module)
    forward_wrapper = None if layer_state is None else layer_state.instance_forward
    # Remove the layer state before the class changes: calls in other threads take a module of its
    # base class with a layer state for a view.
    set_child(module, LAYER_STATE_NAME, None)
    is_wrapped = has_wrapped_forward(module)
    # Tested again, because the first call of the model may have set this attribute since
    # ``adapt_module``.
    if COMPRESSED_FORWARD in module.__dict__:
        module.__dict__[COMPRESSED_FORWARD] = (
            base_cls.forward if forward_wrapper is None else forward_wrapper
        )
        forward_wrapper = None
    elif forward_wrapper is not None and not is_wrapped:
        module.__dict__["forward"] = MethodType(forward_wrapper, module)
    if is_wrapped:
        module.__dict__[ACCELERATE_FORWARD] = MethodType(
            base_cls.forward if forward_wrapper is None else forward_wrapper, module
        )
    module.__class__ = (
        base_cls if not is_parametrized(module) else _replace_adapted_base(type(module), base_cls)
    )


def _replace_adapted_base(cls: Any, base_cls: Any) -> Any:
    """A copy of the class ``cls`` that inherits from ``base_cls`` in place of the adapted class. A
    parametrisation that is registered on an adapted module makes torch derive ``cls`` from the
    adapted class."""
    if not issubclass(cls, Adapted):
        return cls
    if "veneer_base" in vars(cls):
        return base_cls
    attributes = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    metaclass: Any = type(cls)
    return metaclass(
        cls.__name__,
        tuple(_replace_adapted_base(parent_cls, base_cls) for parent_cls in cls.__bases__),
        attributes,
    )


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for each module under each of its names, in the model's order. Modules
    inside of layer states and of parametrised weights are left out."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in list(module._modules.items())  # a copy: another thread may attach
            if not (child is None or isinstance(child, LayerState))
            and not (name == "parametrizations" and is_parametrized(module))
        ]
        stack += reversed(children)


def layer_states(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """Yield (path, module, layer state) for every adapted module once, under its first name, in the
    model's order."""
    visited_ids: set[int] = set()
    for path, module in walk(model):
        layer_state = state_of(module)
        if layer_state is not None and id(module) not in visited_ids:
            visited_ids.add(id(module))
            yield path, module, layer_state


@contextmanager
def replaced_tensors(
    modules: Iterable[nn.Module], replacements: Mapping[int, Tensor]
) -> Iterator[None]:
    """A context manager that replaces tensors of ``modules`` (not of their children). Each
    parameter or buffer whose ``id`` is a key of ``replacements`` is replaced by the value of that
    key until the end of the context."""
    tensor_dicts: list[Any] = [
        tensor_dict for module in modules for tensor_dict in (module._parameters, module._buffers)
    ]
    saved_dicts = [dict(tensor_dict) for tensor_dict in tensor_dicts]
    try:
        for tensor_dict in tensor_dicts:
            tensor_dict.update(
                {
                    key: replacements[id(value)]
                    for key, value in tensor_dict.items()
                    if id(value) in replacements
                }
            )
        yield
    finally:
        for tensor_dict, saved_dict in zip(tensor_dicts, saved_dicts, strict=True):
            tensor_dict.update(saved_dict)
