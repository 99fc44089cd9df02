"""Find what is attached to a model: its adapters, the layers that one of them changes, the weights
that change there.

adapters_of(model)      what all adapters of a model share, or None       seen through DDP and ``torch.compile``
need_adapters(model)    the same, or the error that says what to do
adapters(model, name)   (path, module, LayerAdapter) of each layer that the adapter changes
changes(model, name)    (path, module, weight, Change) of each weight with a low-rank change, a tied one once
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer import context
from veneer.attach.adapted_module import layer_states
from veneer.attach.change import Change, frozen_weight
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.state import ADAPTERS, STRAY, ModelAdapters, in_turn
from veneer.errors import SelectionError, TargetError, listing, nearest, sentence


def adapters_of(model: nn.Module) -> ModelAdapters | None:
    """What the adapters attached to ``model`` share, seen through DDP's and ``torch.compile``'s
    wrappers."""
    return unwrap(model).__dict__.get(ADAPTERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and (distributed) data-parallel wrappers. ``TargetError``:
    it is no module."""
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"a {type(model).__name__} for a model", "a torch.nn.Module", "load the model first"
        )
    while ADAPTERS not in model.__dict__:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None or len(model._modules) != 1:
            return model
        model = inner
    return model


def need_adapters(model: nn.Module, name: str | None = None, *, walk: bool = True) -> ModelAdapters:
    """The model's ``ModelAdapters``; a SelectionError if it has none or none of this name, or if
    layers belong to another model's. Without ``walk`` those are looked for only while there is a
    copied layer anywhere."""
    attached = adapters_of(model)
    if attached is None:
        raise SelectionError(
            f"no adapter on this {type(model).__name__}", "one", "call veneer.attach or load first"
        )
    attached.claim(unwrap(model))
    if (walk or STRAY) and (problem := strangers(model)):
        raise SelectionError(problem)
    if name is not None and not (isinstance(name, str) and name in attached.configs):
        found = f"no adapter named {name!r}{nearest(str(name), attached.configs)}"
        raise SelectionError(
            found, f"one of {', '.join(attached.configs)}", "use a name that is attached"
        )
    return attached


def strangers(model: nn.Module) -> str | None:
    """The problem of layers with adapters of another model, which a walk over this one's layers
    would meet, or None."""

    def others() -> list[str]:
        attached = adapters_of(model)
        return [
            path
            for path, _, layer_state in layer_states(unwrap(model))
            if layer_state.attached is not attached
        ]

    if not others() or not (paths := in_turn(others)()):  # another thread may be attaching
        return None
    problem = f"adapters attached through another model object at {listing(paths, 3)}"
    do = (
        "go through the model that they were attached to; if a layer was copied, take the copy out,"
        " and detach before "
    )
    return sentence(problem, "one root for all adapters", f"{do}copying or attach after")


def only_name(model: nn.Module, name: str | None) -> str:
    """``name``, or that of the model's default, or of its only adapter; a SelectionError if there
    are several and no default."""
    attached = need_adapters(model, name)
    name = attached.default_name if name is None else name
    if name is None and len(attached.configs) > 1:
        problem = f"{len(attached.configs)} adapters ({', '.join(attached.configs)}) and no name"
        raise SelectionError(problem, "a name", "say which adapter is meant")
    return name if name is not None else next(iter(attached.configs))


def selected_name(model: nn.Module, method: str = "this") -> str:
    """The name of the adapter that a call of the model would use here. ``SelectionError``: several
    adapters and none selected, the base alone, or one for each row; ``method`` is what asks."""
    attached = need_adapters(model)
    chosen = context.current.selection.get(attached.uid)
    if chosen is None:
        return only_name(model, None)
    if chosen.name is None:
        problem = "a selection of the base, or of an adapter for each row"
        raise SelectionError(
            problem, "one adapter", f"call {method} inside `with veneer.use(model, name):`"
        )
    return only_name(model, chosen.name)


def adapters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LayerAdapter]]:
    """(path, module, its part of the adapter) of each module where that does something, in the
    model's order."""
    layers = list(layer_states(model))
    attached = adapters_of(model)
    if attached is not None and name in attached.selections:
        _must_be_there(attached, name, {layer_state.key for _, _, layer_state in layers})
    for path, module, layer_state in layers:
        part = layer_state.get(name)
        if part is not None and _holds_parameters(part):
            for weight, change in part.changes.items():
                frozen_weight(change, module, weight)
            part.replacements(module)
            yield path, module, part


def _holds_parameters(part: LayerAdapter) -> bool:
    return bool(part.low._modules or part.full.state_dict())


def _must_be_there(attached: ModelAdapters, name: str, keys: set[int]) -> None:
    """Raise a SelectionError where layers that an adapter changes, by their keys, are no longer in
    the model."""
    parts = attached.selections[name].parts or {}
    lost = [
        key
        for key, part in parts.items()
        if isinstance(key, int) and key not in keys and _holds_parameters(part)
    ]
    if lost:
        paths = [repr(attached.paths.get(key, f"layer {key}")) for key in lost]
        problem = (
            f"{listing(paths, 3)} of adapter {name!r}, replaced or taken out of the model after it"
            " was attached"
        )
        do = "put the layers back, or detach, change the model, and attach or load again"
        raise SelectionError(problem, "every layer that the adapter changes", do)


def changes(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str, Change]]:
    """(path, module, weight, change) of each weight that the adapter ``name`` changes, once, in the
    model's order."""
    for path, module, part in adapters(model, name):
        for weight, change in part.low._modules.items():
            yield path, module, weight, change  # pyright: ignore[reportReturnType]


def parameter_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
