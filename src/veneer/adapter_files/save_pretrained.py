"""The replacement of ``save_pretrained`` for a model with adapters, and ``load_into_attached``,
which copies a saved adapter into the parameters of an attached adapter.

``model.save_pretrained(d)``, ``trainer.save_model(d)`` and ``model.push_to_hub(…)`` write:

    for an adapter           an adapter folder ``d``, as ``veneer.save`` writes it
    for a merged adapter     the plain model, in which the changed weights have their usual names

Without the replacement, which ``trainers.py`` installs, transformers' method would write every
tensor of ``state_dict()``.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.adapter_files.folder import write
from veneer.adapter_files.match_model import LoadPlan, match
from veneer.adapter_files.save_load import LoadedElsewhere, base_name_of, labels_of, save_with
from veneer.attach import (
    LAYER_STATE_NAME,
    Change,
    LayerAdapter,
    ModelAdapters,
    ModelIndex,
    adapters,
    adapters_of,
    changes,
    layer_states,
    need_adapters,
    replaced_tensors,
    require_attached_base,
    selected_name,
    unwrap,
    without_adapters,
)
from veneer.distributed import base_class, is_spread
from veneer.errors import AdapterError, SelectionError, listing, raise_all, sentence
from veneer.formats import peft
from veneer.layers import ParamRef, parameter_path
from veneer.models.safetensors_dir import must_hold_no_adapter

#: the name of the method that ``trainers.patch_model`` replaces
SAVE_METHOD = "save_pretrained"


def save_pretrained(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The replacement for ``module.save_pretrained`` while the model has adapters. It takes the
    same arguments. It saves the selected adapter as a folder, or, if an adapter is merged, the
    model with the merged weights.

    Raises:
        SelectionError: there are several adapters and none is selected, or rows of the batch select
            several; or ``module`` is only a submodule of the adapted model.
        AdapterError: an option or the state dict asks for content that an adapter folder cannot
            have; or any error of ``veneer.save``.
        OutputExistsError: the folder holds other files that ``from_pretrained`` would load, too.
    """
    options = _arguments(module, args, kwargs)
    model_adapters = next(
        (layer_state.model_adapters for _, _, layer_state in layer_states(module)), None
    )
    if (
        model_adapters is None
        or not model_adapters.configs
        or (model_adapters.merged is not None and not _uses_adapter_on_merge(model_adapters))
    ):
        _save_model(module, options)
    elif adapters_of(module) is not model_adapters:
        adapter_names = ", ".join(model_adapters.configs)
        raise SelectionError(
            f"{SAVE_METHOD} of a {base_class(module).__name__} within the model that"
            f" {adapter_names} belongs to",
            "one folder for all of an adapter",
            f"call {SAVE_METHOD} (or veneer.save) of the model that the adapter was attached to",
        )
    else:
        _save_adapter(module, options)


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the replaced method, by name, in the order of its signature. The
    first one is the folder, whatever its name is in the library that defines the method."""
    method = getattr(without_adapters(module), SAVE_METHOD)
    bound_arguments = inspect.signature(method).bind(*args, **kwargs).arguments
    keywords_name = next(
        (
            parameter.name
            for parameter in inspect.signature(method).parameters.values()
            if parameter.kind is parameter.VAR_KEYWORD
        ),
        "",
    )
    named_arguments = {
        name: value for name, value in bound_arguments.items() if name != keywords_name
    }
    return {**named_arguments, **bound_arguments.get(keywords_name, {})}


def _save_model(module: nn.Module, options: dict[str, Any]) -> None:
    """Save the module without its adapters by the original method. ``options``: the arguments of
    the call by name. If there is a state dict among them, the adapters' tensors are removed."""
    folder, plain_module = Path(next(iter(options.values()))), without_adapters(module)
    must_hold_no_adapter(folder)
    if options.get("state_dict") is not None:
        adapter_keys = module.state_dict().keys() - plain_module.state_dict().keys()
        options["state_dict"] = {
            key: value for key, value in _passed_state(options).items() if key not in adapter_keys
        }
    getattr(plain_module, SAVE_METHOD)(**options)


def _save_adapter(model: nn.Module, options: dict[str, Any]) -> None:
    """Save one adapter into a folder that may hold other files: the selected adapter, else the
    default one, else the only one. ``options``: the arguments of the call by name. An option that
    an adapter folder cannot follow raises an AdapterError."""
    folder, name = Path(next(iter(options.values()))), selected_name(model, SAVE_METHOD)
    unsupported_options = [
        *(option for option in ("variant", "distributed_checkpoint") if options.get(option)),
        *(
            option
            for option in ("save_peft_format", "safe_serialization")
            if options.get(option) is False
        ),
    ]
    if unsupported_options:
        values = [f"{option}={options[option]!r}" for option in unsupported_options]
        raise AdapterError(
            f"{', '.join(values)} for a model with an unmerged adapter",
            "what an adapter folder can follow",
            "leave it out, or merge the adapter to save the whole model",
        )
    passed_state = _passed_state(options)
    if not options.get("is_main_process", True):
        # torch gives an empty state dict to all processes but the first
        if options.get("state_dict") is None and is_spread(model.modules()):
            # the main process needs the shards of this process, too, to write the tensors
            write_adapter(model, name, folder, alone=False)
        return
    if passed_state:
        _save_from_state(
            model, name, passed_state, lambda: write_adapter(model, name, folder, alone=True)
        )
    else:
        write_adapter(model, name, folder, alone=not is_spread(model.modules()))
    _warn_limits(model, folder)
    if options.get("push_to_hub"):
        forwarded_options = ("commit_message", "private", "token", "revision", "create_pr")
        push_options = {
            key: options[key] for key in forwarded_options if options.get(key) is not None
        }
        model.push_to_hub(  # pyright: ignore[reportCallIssue]
            options.get("repo_id") or folder.name, **push_options
        )


def _uses_adapter_on_merge(model_adapters: ModelAdapters) -> bool:
    """Whether a forward would use an adapter that was attached on top of the adapter that is merged
    now. It is then this adapter that ``save_pretrained`` saves, instead of the merged model."""
    selection = context.current.selection.get(model_adapters.uid, model_adapters.default)
    return (
        selection.name in model_adapters.configs
        and selection.merged_at_attach == model_adapters.merged
    )


def write_adapter(model: nn.Module, name: str, folder: Path, *, alone: bool) -> None:
    """Write the files of an adapter into a folder that may hold other files. ``alone``: whether
    this process saves without the other processes, as when a trainer lets only one process save.
    """

    def write_content(content: Mapping[str, Any]) -> None:
        write(folder, **content, provenance={}, overwrite=True)

    save_with(write_content, model, folder, name, alone=alone)


def _warn_limits(model: nn.Module, folder: Path) -> None:
    """Warn ``LoadedElsewhere`` of everything in the folder that ``from_pretrained`` cannot load. A
    process that has not written the folder, and so sees no adapter in it, does not warn."""
    if not (folder / peft.CONFIG).exists():
        return
    peft_config = json.loads((folder / peft.CONFIG).read_text(encoding="utf-8"))
    peft_type = str(peft_config["peft_type"])
    label_count = _label_count_to_pass(model)
    warning_texts = (
        (
            peft_type.startswith(peft.NOT_FOR_PEFT),
            f"from_pretrained and PEFT will refuse this adapter ({peft_type}): load it with"
            " veneer.load",
        ),
        (
            peft_config.get("use_dora"),
            (
                "transformers' from_pretrained leaves out the magnitudes of this DoRA adapter"
                " (PEFT's own as well; it logs them as UNEXPECTED): load it with veneer.load or"
                " PEFT"
            ),
        ),
        (
            hasattr(model, "config") and base_name_of(model) is None,
            (
                f"{peft.CONFIG} names no base (base_model_name_or_path), as this model was not"
                " loaded from one, so that from_pretrained will not find it: load the base"
                " yourself, then the adapter with veneer.load or PEFT, or set"
                " model.config._name_or_path before saving"
            ),
        ),
        (
            label_count is not None,
            (
                "from_pretrained makes a head of 2 labels on a base without one: pass"
                f" num_labels={label_count} to it, or load the base so and then the adapter with"
                " veneer.load"
            ),
        ),
        (
            need_adapters(model).merged is not None,
            (
                f"{peft.CONFIG} names no base, as this adapter is one of merged weights: merge"
                " there first too, or save the merged model and name its folder with"
                " veneer.save(…, base_name=…)"
            ),
        ),
    )
    for warning_text in (warning_text for applies, warning_text in warning_texts if applies):
        warnings.warn(warning_text, LoadedElsewhere, stacklevel=5)


def _label_count_to_pass(model: nn.Module) -> int | None:
    """The ``num_labels`` that must be passed to ``from_pretrained`` when the saved adapter is
    loaded, because the base's files have no head and the default is 2 labels. None if that is not
    needed."""
    labels = labels_of(model)
    return (
        None
        if labels is None or len(labels) == 2 or not ModelIndex(model).fresh_parameters()
        else len(labels)
    )


def _passed_state(options: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict among the arguments ``options`` of the call, without the prefixes that
    ``torch.compile`` and DDP put before its keys; empty if there is none."""
    passed_state = options.get("state_dict") or {}
    return {
        re.sub(r"^(_orig_mod\.)?(module\.)?", "", key): value for key, value in passed_state.items()
    }


def _save_from_state(
    model: nn.Module, name: str, passed_state: Mapping[str, Any], write_folder: Callable[[], None]
) -> None:
    """Call ``write_folder`` while the model has the tensors of ``passed_state`` in place of its
    own. This state dict may hold the gathered tensors of a sharded model, or the model's own
    tensors. ``name``: the adapter's name.

    Raises:
        AdapterError: the state dict lacks tensors of the adapter, or has keys that the model lacks.
    """
    model_state = model.state_dict(keep_vars=True)
    model_tensors = {key: value for key, value in model_state.items() if isinstance(value, Tensor)}
    adapter_marker = f".{LAYER_STATE_NAME}.{name}."
    missing_keys = [
        key for key in model_tensors if adapter_marker in f".{key}" and key not in passed_state
    ]
    unknown_keys = [key for key in passed_state if key not in model_state]
    if missing_keys or unknown_keys:
        raise AdapterError(
            f"a state_dict without {listing(missing_keys, 3)}"
            if missing_keys
            else f"a state_dict with {listing(unknown_keys, 3)}",
            f"the tensors of adapter {name!r} under their names in the model",
            "leave state_dict out, or pass model.state_dict()",
        )
    if all(
        key not in passed_state or _is_same_tensor(passed_state[key], value)
        for key, value in model_tensors.items()
    ):
        write_folder()
        return
    # a tied parameter has several keys, whose tensors should be equal: the first one is used
    replacements: dict[int, Tensor] = {}
    for key in (key for key in model_tensors if key in passed_state):
        is_parameter = isinstance(model_tensors[key], nn.Parameter)
        replacements.setdefault(
            id(model_tensors[key]),
            nn.Parameter(passed_state[key], requires_grad=False)
            if is_parameter
            else passed_state[key],
        )
    with replaced_tensors(model.modules(), replacements):
        write_folder()


def _is_same_tensor(candidate: Tensor, current: Tensor) -> bool:
    has_same_type = type(candidate) is type(current.detach()) or candidate is current
    return (
        has_same_type
        and candidate.shape == current.shape
        and candidate.data_ptr() == current.data_ptr()
    )


@torch.no_grad()
def load_into_attached(model: nn.Module, folder: str | Path) -> None:
    """Copy the parameters of an adapter folder into those of an attached adapter: the selected one,
    else the default one, else the only one. They are copied in place, because an optimiser may hold
    the attached parameters. If an error is raised, no parameter has changed.

    Raises:
        AdapterError: the folder is damaged or does not fit the model, or its adapter changes other
            weights or has another variant, other ranks or other alphas.
        BaseMismatchError: it was trained on another base.
        MergeError: an adapter is merged into the weights.
    """
    model = unwrap(model)
    name = selected_name(model, SAVE_METHOD)
    require_attached_base(need_adapters(model), name, "a checkpoint for")
    load_plan = match(model, folder, [])
    attached_changes = {(path, weight): change for path, _, weight, change in changes(model, name)}
    layer_adapters = {path: layer_adapter for path, _, layer_adapter in adapters(model, name)}
    raise_all(
        AdapterError,
        f"{folder} does not fit the adapter {name!r}",
        list(_differences(attached_changes, layer_adapters, load_plan)),
    )
    for ref, change in attached_changes.items():
        for key, value in load_plan.adapter_parameters[ref].items():
            {**change.adapter_parameters, **change._parameters}[key].copy_(value)
    load_plan.fill(layer_adapters)


def _differences(
    attached_changes: Mapping[ParamRef, Change],
    layer_adapters: Mapping[str, LayerAdapter],
    load_plan: LoadPlan,
) -> Iterator[str]:
    """The error texts for settings in which the adapter of a folder differs from the attached one:
    changed weights, variant, rank, alpha, rows, tokens, and tensors that are trained in full."""
    folder_plans = {plan.ref: plan for plan in load_plan.plans.low_rank_plans}
    advice = "attach with the config of the run that wrote it"
    for problem, refs in (
        ("no change of", attached_changes.keys() - folder_plans.keys()),
        ("a change of", folder_plans.keys() - attached_changes.keys()),
    ):
        if refs:
            expected = "changes of the weights that the attached adapter changes"
            yield sentence(
                f"{problem} {listing(sorted(parameter_path(*ref) for ref in refs), 3)}",
                expected,
                advice,
            )
    for ref in attached_changes.keys() & folder_plans.keys():
        change, plan = attached_changes[ref], folder_plans[ref]
        rows, tokens = (
            None if indices is None else tuple(indices.tolist())
            for indices in (change.rows, change.tokens)
        )
        attached_settings = change.variant.name, change.rank, change.alpha, rows, tokens
        variant_name = load_plan.plans.config.variant
        folder_settings = variant_name, plan.rank, plan.alpha, plan.rows, plan.tokens
        if attached_settings != folder_settings:
            template = "variant {!r}, rank {}, alpha {}, rows {}, tokens {}"
            problem = template.format(*folder_settings)
            expected = template.format(*attached_settings)
            yield sentence(f"{problem} at {parameter_path(*ref)!r}", expected, advice)
    for path in sorted(layer_adapters.keys() | load_plan.full.keys()):
        attached_keys = set()
        if path in layer_adapters:
            attached_keys = set(layer_adapters[path].full.state_dict())
        if attached_keys != (folder_keys := set(load_plan.full.get(path, ()))):
            yield sentence(
                f"{listing(sorted(folder_keys))} of {path!r} trained in full",
                listing(sorted(attached_keys)),
                advice,
            )
