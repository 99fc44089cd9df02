"""The adapted subclass of a layer's class. Its forward runs the adapter that the context selects.

    nn.Linear   --adapt_module-->     a subclass of nn.Linear with the same name; the layer has the
                <--restore_module--   child ``veneer`` (LayerState)

The layer stays the same object with the same parameters. There is one subclass for each class of
layer and each set of methods besides ``forward`` that read a changed weight (``entries``).
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
from veneer.attach.layer.call import Call
from veneer.attach.layer.qconfig import Qconfig
from veneer.attach.layer.state import STATE, LayerState
from veneer.bases import is_opaque
from veneer.distributed import base_class

#: the attribute in which accelerate's hooks store the forward that they wrap, a bound method
ACCELERATE_FORWARD = "_old_forward"
#: the attribute in which compressed-tensors stores the forward that it wraps, a function; every
#: module of such a model has it once the model has been called
COMPRESSED_FORWARD = "_original_forward_func"


class Adapted:
    """The mixin that ``adapted_class`` puts before a layer's class."""

    veneer_base: type[nn.Module]
    veneer_entries: tuple[str, ...]
    _modules: dict[str, Any]
    qconfig = Qconfig()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time, so pickle and deepcopy store the base class and create
        # the adapted class again.
        return _rebuild, (type(self).veneer_base, type(self).veneer_entries), self.__getstate__()

    def _get_name(self) -> str:
        return f"Adapted{type(self).veneer_base.__name__}"


@functools.cache
def adapted_class(base: type[nn.Module], entries: tuple[str, ...]) -> type[nn.Module]:
    """The adapted subclass of ``base``, one for each set of ``entries``.

    It has the name of ``base`` and the signature of its forward, because libraries read both.
    """

    @functools.wraps(base.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Subscripts and attributes instead of calls: every layer of a decoding step runs this.
        modules, calling_context = self._modules, context.current
        try:
            layer_state = modules[STATE]
        except KeyError:  # another thread has detached since this method was looked up
            return base.forward(self, *args, **kwargs)
        attached, selection = layer_state.attached, calling_context.selection
        uid = attached.uid
        chosen = selection[uid] if uid in selection else attached.default  # noqa: SIM401
        layer_adapters = chosen.layer_adapters
        if layer_adapters is None or attached.merged != chosen.on:
            if layer_adapters is None or chosen.name != attached.merged:
                raise layer_state.refusal(chosen)
            return base_forward(self, base, *args, **kwargs)
        # The adapter does not change this layer. No `try`: torch.compile would guard it wrongly.
        if layer_state.key not in layer_adapters:
            return base_forward(self, base, *args, **kwargs)
        layer_adapter = layer_adapters[layer_state.key]
        if calling_context.reached is not None:
            calling_context.reached.update(layer_adapter.reached_ids())
        return layer_adapter.run(Call(self, base, layer_state, args, kwargs, calling_context))

    attributes = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "veneer_base": base,
        "veneer_entries": entries,
    }
    methods = {name: _adapt_method(base, name) for name in entries}
    return type(base.__name__, (Adapted, base), {**attributes, **methods, "forward": forward})


def _adapt_method(base: type[nn.Module], name: str) -> Any:
    """The adapted version of a method or property of ``base`` that reads adapted weights. In a
    view it calls the method of ``base``."""
    method = method_of(base, name)

    @functools.wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        layer_state, calling_context = state_of(self), context.current
        if layer_state is None:
            return method(self, *args, **kwargs)
        chosen = calling_context.selection.get(
            layer_state.attached.uid, layer_state.attached.default
        )
        if chosen.layer_adapters is None or layer_state.attached.merged != chosen.on:
            if chosen.layer_adapters is None or chosen.name != layer_state.attached.merged:
                raise layer_state.refusal(chosen)
            return method(self, *args, **kwargs)
        if (layer_state.key, name) not in chosen.layer_adapters:
            return method(self, *args, **kwargs)
        layer_adapter = chosen.layer_adapters[layer_state.key, name]
        if calling_context.reached is not None:
            calling_context.reached.update(layer_adapter.reached_ids(name))
        return layer_adapter.run(Call(self, base, layer_state, args, kwargs, calling_context, name))

    return property(run) if isinstance(getattr(base, name), property) else run


def method_of(base: type[nn.Module], name: str) -> Any:
    """The method ``name`` of a class, or the getter if it is a property."""
    method = getattr(base, name)
    return method.fget if isinstance(method, property) else method


def _rebuild(base: type[nn.Module], entries: tuple[str, ...] = ()) -> nn.Module:
    return object.__new__(adapted_class(base, entries))


def uncover(module: nn.Module) -> bool:
    """Take away the class by which a root answers PEFT's names (``source/from_peft.py``). False if
    the module has none."""
    covered = vars(type(module)).get("veneer_covered")
    if covered is not None:
        module.__class__ = covered
    return covered is not None


def adapt_methods(module: nn.Module, methods: Iterable[str]) -> None:
    """Make these methods of an adapted module use its adapters too, besides ``forward``."""
    uncover(module)
    cls: Any = type(module)
    if not {*methods} <= {*cls.veneer_entries}:
        module.__class__ = adapted_class(
            cls.veneer_base, tuple(sorted({*cls.veneer_entries, *methods}))
        )


def state_of(module: nn.Module) -> LayerState | None:
    return (
        cast("LayerState | None", module._modules.get(STATE))
        if isinstance(module, Adapted)
        else None
    )


def set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Set a child of a module, or remove it (None). The module gets a new table of children,
    because another thread may be iterating over the old one."""
    children = {key: value for key, value in module._modules.items() if key != name}
    module.__dict__["_modules"] = children if child is None else {**children, name: child}


def adapt_module(module: nn.Module, layer_state: LayerState) -> None:
    """Give ``module`` its adapted class and its layer state. Nothing else of it changes."""
    uncover(module)
    wrapper = instance_forward(module)
    layer_state.own_forward = wrapper if wrapper is not type(module).forward else None
    set_child(module, STATE, layer_state)
    module.__class__ = adapted_class(type(module), ())
    if COMPRESSED_FORWARD in module.__dict__:
        module.__dict__[COMPRESSED_FORWARD] = type(module).forward
    elif wrapper is not None:
        del module.__dict__["forward"]
    if wrapped_forward(module):
        module.__dict__[ACCELERATE_FORWARD] = MethodType(type(module).forward, module)


def wrapped_forward(module: nn.Module) -> bool:
    """Whether accelerate's hooks wrap the forward of the module's class. These hooks move inputs
    and offloaded weights to the device of a ``device_map``, and store the forward that they wrap
    as a bound method."""
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
    """The wrapper of compressed-tensors around a module's forward, or None.

    A quantised layer has it as the attribute ``forward`` of the instance; it also rounds the
    layer's input. Once the model has been called, every module has it under ``COMPRESSED_FORWARD``,
    inside of another wrapper that moves inputs to the module's device.
    """
    instance_attribute = module.__dict__.get("forward")
    wrapper = module.__dict__.get(COMPRESSED_FORWARD)
    if (
        wrapper is None
        and isinstance(instance_attribute, MethodType)
        and instance_attribute.__self__ is module
        and is_opaque(module)
    ):
        wrapper = instance_attribute.__func__
    wraps_base = isinstance(wrapper, FunctionType) and inspect.unwrap(wrapper) is inspect.unwrap(
        base_class(module).forward
    )
    return cast("FunctionType | None", wrapper if wraps_base else None)


def base_forward(module: Any, base: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """The output of an adapted module without its adapters; ``base`` is the class that the module
    had before it was adapted."""
    layer_state = module._modules.get(STATE)
    if layer_state is None or layer_state.opaque is None:
        return base.forward(module, *args, **kwargs)
    forward = partial(base.forward, module)
    if layer_state.own_forward is not None:
        plain = object.__new__(base)  # the wrapper calls the forward of its argument's class
        plain.__dict__.update(module.__dict__)
        forward = partial(layer_state.own_forward, plain)
    return layer_state.opaque.call(module, forward, *args, **kwargs)


def restore_module(module: nn.Module) -> None:
    uncover(module)
    base, layer_state = getattr(type(module), "veneer_base", type(module)), state_of(module)
    wrapper = None if layer_state is None else layer_state.own_forward
    # first: a module of its base class that has a layer state is a view
    set_child(module, STATE, None)
    is_wrapped = wrapped_forward(module)
    # the model may have been called for the first time after ``adapt_module``
    if COMPRESSED_FORWARD in module.__dict__:
        module.__dict__[COMPRESSED_FORWARD] = base.forward if wrapper is None else wrapper
        wrapper = None
    elif wrapper is not None and not is_wrapped:
        module.__dict__["forward"] = MethodType(wrapper, module)
    if is_wrapped:
        module.__dict__[ACCELERATE_FORWARD] = MethodType(
            base.forward if wrapper is None else wrapper, module
        )
    module.__class__ = (
        base if not is_parametrized(module) else _replace_adapted_base(type(module), base)
    )


def _replace_adapted_base(cls: Any, base: Any) -> Any:
    """``cls`` with ``base`` in the place of the adapted class. torch derives a class from the
    adapted one where a parametrisation is registered on an adapted module."""
    if not issubclass(cls, Adapted):
        return cls
    if "veneer_base" in vars(cls):
        return base
    attributes = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    metaclass: Any = type(cls)
    return metaclass(
        cls.__name__,
        tuple(_replace_adapted_base(class_base, base) for class_base in cls.__bases__),
        attributes,
    )


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for every name that a module has, in the model's order. The insides of
    layer states and of parametrised weights are left out."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        skipped = (STATE, "parametrizations") if is_parametrized(module) else (STATE,)
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in list(module._modules.items())  # another thread may attach
            if child is not None
            and not (name in skipped and (name != STATE or isinstance(child, LayerState)))
        ]
        stack += reversed(children)


def layer_states(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """Yield (path, module, layer state) for every adapted module once, under its first name, in the
    model's order."""
    visited: set[int] = set()
    for path, module in walk(model):
        layer_state = state_of(module)
        if layer_state is not None and id(module) not in visited:
            visited.add(id(module))
            yield path, module, layer_state


@contextmanager
def with_values(modules: Iterable[nn.Module], values: Mapping[int, Tensor]) -> Iterator[None]:
    """A block in which modules hold other tensors: each parameter or buffer whose ``id`` is a key
    of ``values`` is replaced by that value."""
    tables: list[Any] = [
        table for module in modules for table in (module._parameters, module._buffers)
    ]
    saved_tables = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update(
                {key: values[id(value)] for key, value in table.items() if id(value) in values}
            )
        yield
    finally:
        for table, saved in zip(tables, saved_tables, strict=True):
            table.update(saved)
