"""Look up the adapters of a model, and the layers and weights that an adapter changes.

adapters_of(model)      the ``ModelAdapters`` of a model or None. The model may be wrapped by DDP or
                        ``torch.compile``
need_adapters(model)    the ``ModelAdapters`` of a model; an error if it has none
adapters(model, name)   (path, module, LayerAdapter) of each layer that the adapter changes
changes(model, name)    (path, module, weight name, Change) of each weight with a low-rank change; a
                        tied weight is listed once
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer import context
from veneer.attach.layer.adapted_module import layer_states
from veneer.attach.layer.change import Change, frozen_weight
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.state import (
    COPIES_WITHOUT_ROOT,
    MODEL_ADAPTERS_NAME,
    ModelAdapters,
    one_thread_at_a_time,
)
from veneer.errors import SelectionError, TargetError, listing, nearest, sentence


def adapters_of(model: nn.Module) -> ModelAdapters | None:
    """The ``ModelAdapters`` of the model inside the wrappers of DDP and ``torch.compile``; None if
    nothing is attached."""
    return unwrap(model).__dict__.get(MODEL_ADAPTERS_NAME)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and of (distributed) data parallelism.

    Raises:
        TargetError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"a {type(model).__name__} for a model", "a torch.nn.Module", "load the model first"
        )
    while MODEL_ADAPTERS_NAME not in model.__dict__:
        inner_model = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner_model is None or len(model._modules) != 1:
            return model
        model = inner_model
    return model


def need_adapters(
    model: nn.Module, name: str | None = None, *, check_all_layers: bool = True
) -> ModelAdapters:
    """The ``ModelAdapters`` of a model.

    Args:
        name: an adapter that must exist. None does not require a particular adapter.
        check_all_layers: whether to check all layers for adapters of another model object. If
            False, for speed, they are checked only while there is a copy of adapted layers that is
            not known to belong to a copy of the full model (``COPIES_WITHOUT_ROOT``).

    Raises:
        SelectionError: the model has no adapter, or none of this name, or a layer has adapters of
            another model.
    """
    model_adapters = adapters_of(model)
    if model_adapters is None:
        raise SelectionError(
            f"no adapter on this {type(model).__name__}",
            "an attached adapter",
            "call veneer.attach or load first",
        )
    model_adapters.claim(unwrap(model))
    if (check_all_layers or COPIES_WITHOUT_ROOT) and (problem := foreign_layers_problem(model)):
        raise SelectionError(problem)
    if name is not None and not (isinstance(name, str) and name in model_adapters.configs):
        raise SelectionError(
            f"no adapter named {name!r}{nearest(str(name), model_adapters.configs)}",
            f"one of {', '.join(model_adapters.configs)}",
            "use a name that is attached",
        )
    return model_adapters


def foreign_layers_problem(model: nn.Module) -> str | None:
    """An error text if layers of this model have adapters that were attached through another model
    object, such as a parent model or the source of a copied layer; else None."""

    def foreign_paths() -> list[str]:
        model_adapters = adapters_of(model)
        return [
            path
            for path, _, layer_state in layer_states(unwrap(model))
            if layer_state.model_adapters is not model_adapters
        ]

    # checked again under the lock, because another thread may be in the middle of an attach
    if not foreign_paths() or not (paths := one_thread_at_a_time(foreign_paths)()):
        return None
    return sentence(
        f"adapters attached through another model object at {listing(paths, 3)}",
        "one root for all adapters",
        "go through the model that they were attached to; if a layer was copied, take the copy out,"
        " and detach before copying or attach after",
    )


def name_or_default(model: nn.Module, name: str | None) -> str:
    """``name``, or, if it is None, the name of the model's default adapter or of its only adapter.

    Raises:
        SelectionError: there is no adapter of this name; or ``name`` is None, and the model has
            several adapters and no default, or has no adapters but those of a ``Bank``.
    """
    model_adapters = need_adapters(model, name)
    name = model_adapters.default_name if name is None else name
    if name is None and not model_adapters.configs:
        raise SelectionError(
            f"a {type(model).__name__} that has no adapters but those of a bank",
            "an attached adapter",
            "call veneer.attach or load first",
        )
    if name is None and len(model_adapters.configs) > 1:
        names_text = ", ".join(model_adapters.configs)
        raise SelectionError(
            f"{len(model_adapters.configs)} adapters ({names_text}) and no name",
            "a name",
            "pass the name of one adapter",
        )
    return name if name is not None else next(iter(model_adapters.configs))


def selected_name(model: nn.Module, method: str = "this") -> str:
    """The name of the adapter that a call of the model would use in the current context.

    Args:
        method: the name of the calling method, for the text of the error.

    Raises:
        SelectionError: the model has several adapters and none is selected; or the base, a blend,
            or an adapter for each row is selected.
    """
    model_adapters = need_adapters(model)
    active_adapter = context.current.selection.get(model_adapters.uid)
    if active_adapter is None:
        return name_or_default(model, None)
    name = active_adapter.name
    if name is None or name not in model_adapters.configs:
        raise SelectionError(
            "a selection of the base, of a blend, or of an adapter for each row",
            "one adapter",
            f"call {method} inside `with veneer.use(model, name):`",
        )
    return name


def adapters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LayerAdapter]]:
    """Yield (path, module, layer adapter) for each module in which the adapter has parameters, in
    the model's order.

    Raises:
        SelectionError: a layer or weight that the adapter changes has been replaced or removed.
    """
    layers = list(layer_states(model))
    model_adapters = adapters_of(model)
    if model_adapters is not None and name in model_adapters.selections:
        _require_layers_present(
            model_adapters, name, {layer_state.key for _, _, layer_state in layers}
        )
    for path, module, layer_state in layers:
        layer_adapter = layer_state.get(name)
        if layer_adapter is not None and _holds_parameters(layer_adapter):
            # The calls below raise the error if a parameter is no longer there.
            for weight_name, change in layer_adapter.changes.items():
                frozen_weight(change, module, weight_name)
            layer_adapter.replacements(module)
            yield path, module, layer_adapter


def _holds_parameters(layer_adapter: LayerAdapter) -> bool:
    return bool(layer_adapter.low._modules or layer_adapter.full.state_dict())


def _require_layers_present(
    model_adapters: ModelAdapters, name: str, present_keys: set[int]
) -> None:
    """Raise a SelectionError if a layer that the adapter changes is no longer in the model.
    ``present_keys`` are the keys of the layer states in the model."""
    layer_adapters = model_adapters.selections[name].layer_adapters or {}
    missing_keys = [
        key
        for key, layer_adapter in layer_adapters.items()
        if isinstance(key, int) and key not in present_keys and _holds_parameters(layer_adapter)
    ]
    if missing_keys:
        paths = [repr(model_adapters.layer_paths.get(key, f"layer {key}")) for key in missing_keys]
        raise SelectionError(
            f"{listing(paths, 3)} of adapter {name!r}, replaced or taken out of the model after it"
            " was attached",
            "every layer that the adapter changes",
            "put the layers back, or detach, change the model, and attach or load again",
        )


def changes(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str, Change]]:
    """Yield (path, module, weight name, change) for each weight that has a low-rank change of the
    adapter, in the model's order. A tied weight is yielded once. Raises the errors of
    ``adapters``."""
    for path, module, layer_adapter in adapters(model, name):
        for weight_name, change in layer_adapter.low._modules.items():
            yield path, module, weight_name, change  # pyright: ignore[reportReturnType]
