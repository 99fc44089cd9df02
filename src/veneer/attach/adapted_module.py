"""The adapted subclass of a layer's class, whose forward asks which adapter is selected.

    nn.Linear --install--> a subclass of nn.Linear with the same name, the child ``veneer``
    (LayerState) in the layer
               <-uninstall-

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
from veneer.attach.qconfig import Qconfig
from veneer.attach.state import STATE, LayerState
from veneer.bases import is_opaque
from veneer.distributed import plain_class

#: where accelerate's hooks keep the forward that they wrap, a bound method
WRAPPED = "_old_forward"
#: where compressed-tensors keeps it, a function, in every module of a model that has been called
KEPT = "_original_forward_func"


class Adapted:
    """Mixed in before a layer's own class by ``adapted_class``."""

    veneer_base: type[nn.Module]
    veneer_entries: tuple[str, ...]
    _modules: dict[str, Any]
    qconfig = Qconfig()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy name the base class and make it
        # again.
        return _rebuild, (type(self).veneer_base, type(self).veneer_entries), self.__getstate__()

    def _get_name(self) -> str:
        return f"Adapted{type(self).veneer_base.__name__}"


@functools.cache
def adapted_class(base: type[nn.Module], entries: tuple[str, ...]) -> type[nn.Module]:
    """The one adapted subclass of ``base``, with its name and the signature of its forward:
    libraries read both."""

    @functools.wraps(base.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Subscripts and attributes, no calls: each one is time in every layer of a decoding step.
        modules, now = self._modules, context.current
        try:
            layer_state = modules[STATE]
        except KeyError:  # another thread has detached since this method was looked up
            return base.forward(self, *args, **kwargs)
        attached, selection = layer_state.attached, now.selection
        chosen = selection[attached.uid] if attached.uid in selection else attached.default  # noqa: SIM401
        parts = chosen.parts
        if parts is None or attached.merged != chosen.on:
            if parts is None or chosen.name != attached.merged:
                raise layer_state.refusal(chosen)
            return own_forward(self, base, *args, **kwargs)
        # this adapter does nothing here; not `try`, which torch.compile would guard wrongly
        if layer_state.key not in parts:
            return own_forward(self, base, *args, **kwargs)
        part = parts[layer_state.key]
        if now.reached is not None:
            now.reached.update(part.seen())
        return part.run(self, base, layer_state, args, kwargs, now)

    about = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "veneer_base": base,
        "veneer_entries": entries,
    }
    methods = {name: _entry(base, name) for name in entries}
    return type(base.__name__, (Adapted, base), {**about, **methods, "forward": forward})


def _entry(base: type[nn.Module], name: str) -> Any:
    """A method (or property) of ``base`` that reads adapted weights. In a view it is the class's
    own again."""
    method = method_of(base, name)

    @functools.wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        layer_state, now = state_of(self), context.current
        if layer_state is None:
            return method(self, *args, **kwargs)
        chosen = now.selection.get(layer_state.attached.uid, layer_state.attached.default)
        if chosen.parts is None or layer_state.attached.merged != chosen.on:
            if chosen.parts is None or chosen.name != layer_state.attached.merged:
                raise layer_state.refusal(chosen)
            return method(self, *args, **kwargs)
        if (layer_state.key, name) not in chosen.parts:
            return method(self, *args, **kwargs)
        part = chosen.parts[layer_state.key, name]
        if now.reached is not None:
            now.reached.update(part.seen(name))
        return part.run(self, base, layer_state, args, kwargs, now, method=name)

    return property(run) if isinstance(getattr(base, name), property) else run


def method_of(base: type[nn.Module], name: str) -> Any:
    """A method of a class, or what computes a property."""
    method = getattr(base, name)
    return method.fget if isinstance(method, property) else method


def _rebuild(base: type[nn.Module], entries: tuple[str, ...] = ()) -> nn.Module:
    return object.__new__(adapted_class(base, entries))


def enter(module: nn.Module, methods: Iterable[str]) -> None:
    """Let these methods of an adapted module see its adapters too."""
    cls: Any = type(module)
    if not {*methods} <= {*cls.veneer_entries}:
        module.__class__ = adapted_class(
            cls.veneer_base, tuple(sorted({*cls.veneer_entries, *methods}))
        )


def weight_of(module: nn.Module, name: str) -> Any:
    """What a module keeps under a weight's name: its ``Parameter``, the ``ParametrizationList``
    that computes it, or, of one whose weight only its own library reads, the module."""
    own = module._parameters
    weight = own[name] if name in own else None  # noqa: SIM401 (a ScriptModule's parameters are no dict)
    if weight is None and (lists := module._modules.get("parametrizations")) is not None:
        return lists._modules.get(name)
    if name == "weight" and is_opaque_like(module, weight) and is_opaque(module):
        return module
    return weight


def is_opaque_like(module: nn.Module, weight: Any) -> bool:
    """What any opaque layer is, quickly: no parameter of a wide dtype, unless compressed-tensors
    has made it."""
    return weight is None or weight.dtype.itemsize == 1 or "quantization_scheme" in module.__dict__


def state_of(module: nn.Module) -> LayerState | None:
    return (
        cast("LayerState | None", module._modules.get(STATE))
        if isinstance(module, Adapted)
        else None
    )


def set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Put a child in place, or take it away (None), in a new table: another thread may be walking
    the old one."""
    children = {key: value for key, value in module._modules.items() if key != name}
    module.__dict__["_modules"] = children if child is None else {**children, name: child}


def install(module: nn.Module, layer_state: LayerState) -> None:
    """Make ``module`` adapted. Nothing else of it changes."""
    own = instance_forward(module)
    layer_state.own_forward = own if own is not type(module).forward else None
    set_child(module, STATE, layer_state)
    module.__class__ = adapted_class(type(module), ())
    if KEPT in module.__dict__:
        module.__dict__[KEPT] = type(module).forward
    elif own is not None:
        del module.__dict__["forward"]
    if wrapped_forward(module):
        module.__dict__[WRAPPED] = MethodType(type(module).forward, module)


def wrapped_forward(module: nn.Module) -> bool:
    """Whether what stands in the place of a module's forward is a wrapper of accelerate's around
    the class's own, which it keeps as a bound method: its hooks put inputs, and offloaded weights,
    on the device of a ``device_map``."""
    own = module.__dict__.get(WRAPPED)
    plain = isinstance(own, MethodType) and own.__self__ is module and "_hf_hook" in module.__dict__
    return plain and inspect.unwrap(own.__func__) is inspect.unwrap(own_class(module).forward)


def instance_forward(module: nn.Module) -> FunctionType | None:
    """What stands in the place of a module's forward on the instance, where that is
    compressed-tensors' wrapper around the class's own: of a quantised layer, which also rounds what
    goes in, and, once the model has been called, of every module (under ``KEPT``: what moves inputs
    to its device is around it)."""
    own, kept = module.__dict__.get("forward"), module.__dict__.get(KEPT)
    if (
        kept is None
        and isinstance(own, MethodType)
        and own.__self__ is module
        and is_opaque(module)
    ):
        kept = own.__func__
    plain = isinstance(kept, FunctionType) and inspect.unwrap(kept) is inspect.unwrap(
        own_class(module).forward
    )
    return cast("FunctionType | None", kept if plain else None)


def own_forward(module: Any, base: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """The forward of an adapted module without its adapters, whose class was ``base``."""
    layer_state = module._modules.get(STATE)
    if layer_state is None or layer_state.opaque is None:
        return base.forward(module, *args, **kwargs)
    forward = partial(base.forward, module)
    if layer_state.own_forward is not None:
        plain = object.__new__(base)  # the wrapper calls forward of the class of what it is given
        plain.__dict__.update(module.__dict__)
        forward = partial(layer_state.own_forward, plain)
    return layer_state.opaque.call(module, forward, *args, **kwargs)


def own_class(module: nn.Module) -> type[nn.Module]:
    return plain_class(getattr(type(module), "veneer_base", type(module)))


def uninstall(module: nn.Module) -> None:
    own, layer_state = getattr(type(module), "veneer_base", type(module)), state_of(module)
    kept = None if layer_state is None else layer_state.own_forward
    set_child(module, STATE, None)  # first: a module of its own class with a layer state is a view
    wrapped = wrapped_forward(module)
    if KEPT in module.__dict__:  # of a model that was called since, too
        module.__dict__[KEPT] = own.forward if kept is None else kept
        kept = None
    elif kept is not None and not wrapped:
        module.__dict__["forward"] = MethodType(kept, module)
    if wrapped:
        module.__dict__[WRAPPED] = MethodType(own.forward if kept is None else kept, module)
    module.__class__ = own if not is_parametrized(module) else _unadapted(type(module), own)


def _unadapted(cls: Any, own: Any) -> Any:
    """A class that torch made of an adapted one as a parametrisation was registered after it, made
    of ``own``."""
    if not issubclass(cls, Adapted):
        return cls
    if "veneer_base" in vars(cls):
        return own
    names = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    make_class: Any = type(cls)
    return make_class(cls.__name__, tuple(_unadapted(base, own) for base in cls.__bases__), names)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) under every name that a module has, in the model's order, without what is
    inside of layer states and of parametrised weights."""
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
    """(path, module, its state) of every adapted module, in the model's order, each once, under its
    first name."""
    seen: set[int] = set()
    for path, module in walk(model):
        layer_state = state_of(module)
        if layer_state is not None and id(module) not in seen:
            seen.add(id(module))
            yield path, module, layer_state


@contextmanager
def with_values(modules: Iterable[nn.Module], values: Mapping[int, Tensor]) -> Iterator[None]:
    """A block in which modules hold other tensors, ``values`` by the identity of those that they
    stand for."""
    tables: list[Any] = [
        table for module in modules for table in (module._parameters, module._buffers)
    ]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update(
                {key: values[id(value)] for key, value in table.items() if id(value) in values}
            )
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.update(own)
