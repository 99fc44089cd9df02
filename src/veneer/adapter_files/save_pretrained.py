"""``save_pretrained`` of a model with adapters, and ``refill``, which copies a saved adapter back
into the parameters that train.

    model.save_pretrained(d), trainer.save_model(d), model.push_to_hub(…)
        an adapter          d is an adapter folder, as ``veneer.save`` writes it and PEFT would
        a merged adapter    d holds the plain model, its changed weights under their own names

Without it, transformers would write everything in ``state_dict()``. ``trainers.py`` installs it.
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
from veneer.adapter_files.save_load import LoadedElsewhere, base_name_of, labels_of, save_by
from veneer.attach import (
    STATE,
    Change,
    LayerAdapter,
    ModelAdapters,
    Names,
    adapters,
    adapters_of,
    changes,
    layer_states,
    need_adapters,
    require_attached_base,
    selected_name,
    unwrap,
    with_values,
    without_adapters,
)
from veneer.distributed import base_class, is_spread
from veneer.errors import AdapterError, SelectionError, listing, raise_all, sentence
from veneer.formats import peft
from veneer.layers import ParamRef, parameter_path
from veneer.models.safetensors_dir import must_hold_no_adapter

SAVE = "save_pretrained"


def save_pretrained(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Replacement of ``module.save_pretrained(…)``, with the same arguments, while the model has
    adapters.

    Raises:
        SelectionError: there are several adapters and none is selected, or rows of several are;
            ``module`` is only a part of the model that they were attached to.
        AdapterError: an option or a state dict that an adapter folder cannot follow, or any error
            of ``veneer.save``.
        OutputExistsError: the folder holds files that ``from_pretrained`` would load too.
    """
    options = _arguments(module, args, kwargs)
    attached = next(
        (layer_state.model_adapters for _, _, layer_state in layer_states(module)), None
    )
    if (
        attached is None
        or not attached.configs
        or (attached.merged is not None and not _runs_on_top(attached))
    ):
        _save_plain(module, options)
    elif adapters_of(module) is not attached:
        owners = ", ".join(attached.configs)
        problem = (
            f"{SAVE} of a {base_class(module).__name__} within the model that {owners} belongs to"
        )
        do = f"call {SAVE} (or veneer.save) of the model that the adapter was attached to"
        raise SelectionError(problem, "one folder for all of an adapter", do)
    else:
        _save_adapter(module, options)


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the module's own method, by name. In every library the first
    argument is the folder."""
    method = getattr(without_adapters(module), SAVE)
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    rest = next(
        (p.name for p in inspect.signature(method).parameters.values() if p.kind is p.VAR_KEYWORD),
        "",
    )
    return {**{name: value for name, value in bound.items() if name != rest}, **bound.get(rest, {})}


def _save_plain(module: nn.Module, options: dict[str, Any]) -> None:
    """Save the module without its adapters."""
    folder, plain_module = Path(next(iter(options.values()))), without_adapters(module)
    must_hold_no_adapter(folder)
    if options.get("state_dict") is not None:
        ours = module.state_dict().keys() - plain_module.state_dict().keys()
        options["state_dict"] = {
            key: value for key, value in _state(options).items() if key not in ours
        }
    getattr(plain_module, SAVE)(**options)


def _save_adapter(model: nn.Module, options: dict[str, Any]) -> None:
    """Save the selected adapter, or the only one, into a folder that may hold other files."""
    folder, name = Path(next(iter(options.values()))), selected_name(model, SAVE)
    odd = [option for option in ("variant", "distributed_checkpoint") if options.get(option)]
    odd += [
        option
        for option in ("save_peft_format", "safe_serialization")
        if options.get(option) is False
    ]
    if odd:
        problem = (
            f"{', '.join(f'{option_name}={options[option_name]!r}' for option_name in odd)} for a"
            " model with an unmerged adapter"
        )
        do = "leave it out, or merge the adapter to save the whole model"
        raise AdapterError(problem, "what an adapter folder can follow", do)
    state = _state(options)
    if not options.get("is_main_process", True):
        if not state and is_spread(model.modules()):
            # every process has a shard of the tensors that the main process writes
            write_adapter(model, name, folder, alone=False)
        return
    if state:
        _with_state(model, name, state, lambda: write_adapter(model, name, folder, alone=True))
    else:
        write_adapter(model, name, folder, alone=not is_spread(model.modules()))
    _warn_limits(model, folder)
    if options.get("push_to_hub"):
        forwarded = ("commit_message", "private", "token", "revision", "create_pr")
        push_options = {key: options[key] for key in forwarded if options.get(key) is not None}
        model.push_to_hub(options.get("repo_id") or folder.name, **push_options)  # pyright: ignore[reportCallIssue]


def _runs_on_top(attached: ModelAdapters) -> bool:
    """Whether a forward would use an adapter that was attached on top of the merged weights."""
    chosen = context.current.selection.get(attached.uid, attached.default)
    return chosen.name in attached.configs and chosen.merged_at_attach == attached.merged


def write_adapter(model: nn.Module, name: str, folder: Path, *, alone: bool) -> None:
    """Write the files of an adapter into a folder that may hold other files. ``alone``: this
    process saves by itself, as trainers let one process save."""

    def put(content: Mapping[str, Any]) -> None:
        write(folder, **content, provenance={}, overwrite=True)

    save_by(put, model, folder, name, alone=alone)


def _warn_limits(model: nn.Module, folder: Path) -> None:
    """Warn, in the process that wrote the folder, of everything that ``from_pretrained`` cannot
    load from it."""
    if not (folder / peft.CONFIG).exists():
        return
    written = json.loads((folder / peft.CONFIG).read_text(encoding="utf-8"))
    kind = str(written["peft_type"])
    labels = _labels_to_pass(model)
    texts = (
        (
            kind.startswith(peft.NOT_FOR_PEFT),
            f"from_pretrained and PEFT will refuse this adapter ({kind}): load it with veneer.load",
        ),
        (
            written.get("use_dora"),
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
            labels is not None,
            (
                "from_pretrained makes a head of 2 labels on a base without one: pass"
                f" num_labels={labels} to it, or load the base so and then the adapter with"
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
    for text in (text for applies, text in texts if applies):
        warnings.warn(text, LoadedElsewhere, stacklevel=5)


def _labels_to_pass(model: nn.Module) -> int | None:
    """The ``num_labels`` that ``from_pretrained`` needs, as the base's files and configuration have
    no such head; None if it needs none."""
    labels = labels_of(model)
    return (
        None
        if labels is None or len(labels) == 2 or not Names(model).fresh_parameters()
        else len(labels)
    )


def _state(options: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that the caller passed, without the prefixes of wrappers in its names."""
    state = options.get("state_dict") or {}
    return {re.sub(r"^(_orig_mod\.)?(module\.)?", "", key): value for key, value in state.items()}


def _with_state(
    model: nn.Module, name: str, state: Mapping[str, Any], write: Callable[[], None]
) -> None:
    """Call ``write`` while the model holds the tensors of a state dict: its own tensors, or the
    gathered ones of a sharded model. ``AdapterError``: the state dict lacks tensors of the adapter,
    or has names that the model lacks."""
    model_state = model.state_dict(keep_vars=True)
    model_tensors = {key: value for key, value in model_state.items() if isinstance(value, Tensor)}
    marker = f".{STATE}.{name}."
    lacking = [key for key in model_tensors if marker in f".{key}" and key not in state]
    strange = [key for key in state if key not in model_state]
    if lacking or strange:
        problem = (
            f"a state_dict without {listing(lacking, 3)}"
            if lacking
            else f"a state_dict with {listing(strange, 3)}"
        )
        do = "leave state_dict out, or pass model.state_dict()"
        raise AdapterError(
            problem, f"the tensors of adapter {name!r} under their names in the model", do
        )
    if all(
        key not in state or _is_same_tensor(state[key], value)
        for key, value in model_tensors.items()
    ):
        write()
        return
    # a tied parameter has several names; the first one in the state dict counts
    replacements: dict[int, Tensor] = {}
    for key in (key for key in model_tensors if key in state):
        is_parameter = isinstance(model_tensors[key], nn.Parameter)
        replacements.setdefault(
            id(model_tensors[key]),
            nn.Parameter(state[key], requires_grad=False) if is_parameter else state[key],
        )
    with with_values(model.modules(), replacements):
        write()


def _is_same_tensor(candidate: Tensor, current: Tensor) -> bool:
    alike = type(candidate) is type(current.detach()) or candidate is current
    return alike and candidate.shape == current.shape and candidate.data_ptr() == current.data_ptr()


@torch.no_grad()
def refill(model: nn.Module, folder: str | Path) -> None:
    """Copy the parameters of an adapter folder into those of the selected adapter (or the only
    one), in place, as an optimiser may hold them. Nothing is copied if an error is raised.

    Raises:
        AdapterError: the folder is damaged or does not fit the model, or its adapter changes other
            weights or has another variant, other ranks or other alphas.
        BaseMismatchError: it was trained on another base.
        MergeError: an adapter is merged into the weights.
    """
    model = unwrap(model)
    name = selected_name(model, SAVE)
    require_attached_base(need_adapters(model), name, "a checkpoint for")
    load_plan = match(model, folder, [])
    attached_changes = {(path, weight): change for path, _, weight, change in changes(model, name)}
    layer_adapters = {path: layer_adapter for path, _, layer_adapter in adapters(model, name)}
    raise_all(
        AdapterError,
        f"{folder} does not fit the adapter {name!r}",
        list(_unlike(attached_changes, layer_adapters, load_plan)),
    )
    for ref, change in attached_changes.items():
        for key, value in load_plan.adapter_parameters[ref].items():
            {**change.adapter_parameters, **change._parameters}[key].copy_(value)
    load_plan.fill(layer_adapters)


def _unlike(
    attached_changes: Mapping[ParamRef, Change],
    layer_adapters: Mapping[str, LayerAdapter],
    load_plan: LoadPlan,
) -> Iterator[str]:
    """The differences between the adapter of a folder and the attached one."""
    folder_plans = {entry.ref: entry for entry in load_plan.plans.low}
    do = "attach with the config of the run that wrote it"
    for problem, refs in (
        ("no change of", attached_changes.keys() - folder_plans.keys()),
        ("a change of", folder_plans.keys() - attached_changes.keys()),
    ):
        if refs:
            expected = "changes of the weights that the attached adapter changes"
            yield sentence(
                f"{problem} {listing(sorted(parameter_path(*ref) for ref in refs), 3)}",
                expected,
                do,
            )
    for ref in attached_changes.keys() & folder_plans.keys():
        change, entry = attached_changes[ref], folder_plans[ref]
        rows, tokens = (
            None if indices is None else tuple(indices.tolist())
            for indices in (change.rows, change.tokens)
        )
        attached = change.variant.name, change.rank, change.alpha, rows, tokens
        stored = load_plan.plans.config.variant, entry.rank, entry.alpha, entry.rows, entry.tokens
        if attached != stored:
            problem = "variant {!r}, rank {}, alpha {}, rows {}, tokens {}".format(*stored)
            expected = "variant {!r}, rank {}, alpha {}, rows {}, tokens {}".format(*attached)
            yield sentence(f"{problem} at {parameter_path(*ref)!r}", expected, do)
    for path in sorted(layer_adapters.keys() | load_plan.full.keys()):
        attached = set(layer_adapters[path].full.state_dict()) if path in layer_adapters else set()
        if attached != (stored := set(load_plan.full.get(path, ()))):
            yield sentence(
                f"{listing(sorted(stored))} of {path!r} trained in full",
                listing(sorted(attached)),
                do,
            )
