"""Detach adapters from a model, and restore what ``install.py`` changed.

detach            removes an adapter; with the last one, the model is as it was before ``attach``
close_bank        ends the use of adapted layers by a ``Bank``
"""

from __future__ import annotations

from torch import nn

from veneer.attach.invocation import update_invocation_hooks
from veneer.attach.layer.adapted_module import (
    layer_states,
    restore_module,
    set_child,
    stop_answering_peft_names,
    walk,
)
from veneer.attach.layer.lookup import adapters_of, need_adapters, unwrap
from veneer.attach.layer.state import MODEL_ADAPTERS_NAME, ModelAdapters, one_thread_at_a_time
from veneer.attach.planning.weight_tying import tie_again
from veneer.attach.source.from_peft import answer_peft_names
from veneer.attach.source.method_overrides import remove_overrides
from veneer.bases import storage_of, weight_of
from veneer.errors import MergeError


@one_thread_at_a_time
def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Remove the adapter ``name`` (None: all adapters). When the last one is removed, the model has
    the same objects as before ``attach``: classes, modules, parameters, ``requires_grad``.

    Args:
        keep_merged: keep the weights of a merged adapter merged, so that the plain model has them.

    Raises:
        SelectionError: there is no such adapter.
        MergeError: the adapter is merged and ``keep_merged`` is False; or it is merged on top of
            another adapter that stays; or an adapter that stays was attached while this one was
            merged, and this one is no longer merged. The model is not changed.
    """
    model = unwrap(model)
    model_adapters = need_adapters(model, name)
    removed_names = list(model_adapters.configs) if name is None else [name]
    _require_detachable(model_adapters, removed_names, keep_merged)
    if not set(removed_names).isdisjoint(model_adapters.merge_order):
        # Weights that were untied for an adapter may differ now that it is merged, so
        # ``_release_layers`` must not tie them again.
        model_adapters.untied = ()
    was_answering_peft_names = stop_answering_peft_names(model)
    for adapter_name in removed_names:
        # so that a call that still selects the adapter raises an error
        model_adapters.selections[adapter_name].layer_adapters = None
    for _, _, layer_state in layer_states(model):
        for adapter_name in removed_names:
            set_child(layer_state, adapter_name, None)
    remaining_names = [key for key in model_adapters.configs if key not in removed_names]
    had_invocations = any(config.invocation_tokens for config in model_adapters.configs.values())
    for active_adapter in model_adapters.selections.values():
        if active_adapter.merged_at_attach in removed_names:  # the merged weights become the base's
            active_adapter.merged_at_attach = None
    model_adapters.merge_order = tuple(
        merged_name
        for merged_name in model_adapters.merge_order
        if merged_name not in removed_names
    )
    model_adapters.set_adapters(
        {key: model_adapters.configs[key] for key in remaining_names},
        {key: model_adapters.selections[key] for key in remaining_names},
    )
    if had_invocations:
        update_invocation_hooks(model, model_adapters)
    for _, module in walk(model) if not remaining_names else ():
        remove_overrides(module)
    _release_layers(model, model_adapters)
    if was_answering_peft_names and remaining_names:
        answer_peft_names(model)


def _require_detachable(
    model_adapters: ModelAdapters, removed_names: list[str], keep_merged: bool
) -> None:
    """Raise a MergeError if some of these adapters cannot be detached now, for a reason that
    ``detach`` lists."""
    merged_names = model_adapters.merge_order[::-1]  # the last merged one first
    for index, name in enumerate(merged_names):
        if name not in removed_names:
            continue
        remaining_name = next(
            (
                lower_name
                for lower_name in merged_names[index + 1 :]
                if lower_name not in removed_names
            ),
            None,
        )
        if not keep_merged:
            raise MergeError(
                f"{name!r} is merged into the weights",
                "an unmerged model",
                "call veneer.unmerge(model) first, or detach(model, keep_merged=True) to keep the"
                " merged weights",
            )
        if remaining_name is not None:
            raise MergeError(
                f"{name!r} merged on top of {remaining_name!r}, which stays",
                "the adapter that was merged first",
                f"detach {remaining_name!r} with keep_merged=True first, or call"
                " veneer.unmerge(model)",
            )
    for kept_name, active_adapter in model_adapters.selections.items():
        base_name = active_adapter.merged_at_attach
        if (
            base_name in removed_names
            and base_name not in merged_names
            and kept_name not in removed_names
        ):
            raise MergeError(
                f"{kept_name!r}, attached while {base_name!r} was merged, which is to be detached",
                f"{base_name!r} merged, or {kept_name!r} detached",
                "detach that one first",
            )


@one_thread_at_a_time
def close_bank(model: nn.Module, model_adapters: ModelAdapters) -> None:
    """End the use of a model's adapted layers by a ``Bank``, which ``install.open_bank`` began.
    When no bank uses the model any more, layers without an adapter are restored."""
    model_adapters.bank_count -= 1
    if adapters_of(model) is model_adapters:
        _release_layers(model, model_adapters)


def _release_layers(model: nn.Module, model_adapters: ModelAdapters) -> None:
    """Restore the class and storage of modules that have no adapter. If the model has none, also
    restore ties and ``requires_grad``, and delete its ``ModelAdapters``. While a bank uses the
    model, nothing is restored."""
    if model_adapters.bank_count:
        return
    for _, module, layer_state in list(layer_states(model)):
        if not layer_state._modules:
            restore_module(module)
            for name in layer_state.layer.weights(module) if layer_state.layer is not None else ():
                storage = storage_of(weight_of(module, name))
                if storage is not None:
                    storage.release(module)
    if not model_adapters.configs:
        for untied in reversed(model_adapters.untied):
            tie_again(model, untied)
        for path, parameter in model.named_parameters():
            original_flags = model_adapters.original_requires_grad
            parameter.requires_grad = original_flags.get(path, parameter.requires_grad)
        del model.__dict__[MODEL_ADAPTERS_NAME]
