"""``save_pretrained`` of a model with adapters, and ``refill``, which puts back what it wrote.

    model.save_pretrained(d), trainer.save_model(d), model.push_to_hub(…)
        an adapter          d is an adapter folder, as ``veneer.save`` writes it and PEFT would
        a merged adapter    d holds the plain model, its changed weights under their own names

Without this, transformers would write all that ``state_dict()`` holds. ``trainers.py`` puts it in
place.
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
from veneer.attach.adapted_module import base_class, layer_states, with_values
from veneer.attach.change import Change
from veneer.attach.fresh_weights import fresh_parameters
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import (
    adapters,
    adapters_of,
    changes,
    need_adapters,
    parameter_path,
    selected_name,
    unwrap,
)
from veneer.attach.merge import must_stand
from veneer.attach.method_overrides import without_adapters
from veneer.attach.state import STATE, ModelAdapters
from veneer.attach.targets import Names, ParamRef
from veneer.distributed import is_spread
from veneer.errors import AdapterError, SelectionError, listing, raise_all, sentence
from veneer.formats import peft
from veneer.models.safetensors_dir import must_hold_no_adapter

SAVE = "save_pretrained"


def save_pretrained(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """What ``module.save_pretrained(…)`` does, with the arguments of its own method, while there
    are adapters. ``SelectionError``: several adapters and none selected, or rows of several;
    ``module`` is but a part of the model that they were attached to. ``AdapterError``: an option or
    a state dict that an adapter folder cannot follow, and all that ``veneer.save`` refuses.
    ``OutputExistsError``: the folder holds what ``from_pretrained`` would load along."""
    options = _arguments(module, args, kwargs)
    attached = next((layer_state.attached for _, _, layer_state in layer_states(module)), None)
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
    """The arguments of a call of the module's own method, by name. The first one is the folder in
    every library."""
    method = getattr(without_adapters(module), SAVE)
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    rest = next(
        (p.name for p in inspect.signature(method).parameters.values() if p.kind is p.VAR_KEYWORD),
        "",
    )
    return {**{name: value for name, value in bound.items() if name != rest}, **bound.get(rest, {})}


def _save_plain(module: nn.Module, options: dict[str, Any]) -> None:
    """The module as it would be without adapters."""
    folder, seen = Path(next(iter(options.values()))), without_adapters(module)
    must_hold_no_adapter(folder)
    if options.get("state_dict") is not None:
        ours = module.state_dict().keys() - seen.state_dict().keys()
        options["state_dict"] = {
            key: value for key, value in _state(options).items() if key not in ours
        }
    getattr(seen, SAVE)(**options)


def _save_adapter(model: nn.Module, options: dict[str, Any]) -> None:
    """The selected adapter, or the only one, as a folder beside whatever else lies in it."""
    folder, name = Path(next(iter(options.values()))), selected_name(model, SAVE)
    odd = [option for option in ("variant", "distributed_checkpoint") if options.get(option)]
    odd += [
        option
        for option in ("save_peft_format", "safe_serialization")
        if options.get(option) is False
    ]
    if odd:
        problem = (
            f"{', '.join(f'{one}={options[one]!r}' for one in odd)} for a model with an unmerged"
            " adapter"
        )
        do = "leave it out, or merge the adapter to save the whole model"
        raise AdapterError(problem, "what an adapter folder can follow", do)
    state = _state(options)
    if not options.get("is_main_process", True):
        if not state and is_spread(model.modules()):
            # every process has a part of what the main one writes
            write_adapter(model, name, folder, alone=False)
        return
    if state:
        _with_state(model, name, state, lambda: write_adapter(model, name, folder, alone=True))
    else:
        write_adapter(model, name, folder, alone=not is_spread(model.modules()))
    _tell(model, folder)
    if options.get("push_to_hub"):
        known = ("commit_message", "private", "token", "revision", "create_pr")
        given = {key: options[key] for key in known if options.get(key) is not None}
        model.push_to_hub(options.get("repo_id") or folder.name, **given)  # pyright: ignore[reportCallIssue]


def _runs_on_top(attached: ModelAdapters) -> bool:
    """Whether a call would use an adapter of the merged weights."""
    chosen = context.current.selection.get(attached.uid, attached.default)
    return chosen.name in attached.configs and chosen.on == attached.merged


def write_adapter(model: nn.Module, name: str, folder: Path, *, alone: bool) -> None:
    """The files of an adapter among those that a folder holds already. ``alone``: trainers let one
    process save."""

    def put(content: Mapping[str, Any]) -> None:
        write(folder, **content, provenance={}, overwrite=True)

    save_by(put, model, folder, name, alone=alone)


def _tell(model: nn.Module, folder: Path) -> None:
    """Warn of what ``from_pretrained`` could not do with the folder, in the process that wrote
    it."""
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
            "transformers' from_pretrained leaves out the magnitudes of this DoRA adapter (PEFT's "
            "own as well; it logs them as UNEXPECTED): load it with veneer.load or PEFT",
        ),
        (
            hasattr(model, "config") and base_name_of(model) is None,
            f"{peft.CONFIG} names no base (base_model_name_or_path), as this model was not loaded "
            "from one, so that from_pretrained will not find it: load the base yourself, then the "
            "adapter with veneer.load or PEFT, or set model.config._name_or_path before saving",
        ),
        (
            labels is not None,
            "from_pretrained makes a head of 2 labels on a base without one: pass "
            f"num_labels={labels} to it, or load the base so and then the adapter with veneer.load",
        ),
        (
            need_adapters(model).merged is not None,
            f"{peft.CONFIG} names no base, as this adapter is one of merged weights: merge there "
            "first too, or save the merged model and name its folder with "
            "veneer.save(…, base_name=…)",
        ),
    )
    for text in (text for applies, text in texts if applies):
        warnings.warn(text, LoadedElsewhere, stacklevel=5)


def _labels_to_pass(model: nn.Module) -> int | None:
    """How many labels ``from_pretrained`` must be told of: those of a head that the base's files,
    and so its configuration, lack; None where it is right without."""
    labels = labels_of(model)
    return (
        None
        if labels is None or len(labels) == 2 or not fresh_parameters(Names(model))
        else len(labels)
    )


def _state(options: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that was passed, without what wrappers put before its names."""
    state = options.get("state_dict") or {}
    return {re.sub(r"^(_orig_mod\.)?(module\.)?", "", key): value for key, value in state.items()}


def _with_state(
    model: nn.Module, name: str, state: Mapping[str, Any], write: Callable[[], None]
) -> None:
    """``write`` while the model holds the tensors of a state dict: its own, or the whole ones of a
    model whose parameters are sharded. ``AdapterError``: it lacks tensors of the adapter, or has
    others than the model."""
    whole = model.state_dict(keep_vars=True)
    own = {key: value for key, value in whole.items() if isinstance(value, Tensor)}
    part = f".{STATE}.{name}."
    lacking = [key for key in own if part in f".{key}" and key not in state]
    strange = [key for key in state if key not in whole]
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
    if all(key not in state or _is(state[key], value) for key, value in own.items()):
        write()
        return
    given: dict[
        int, Tensor
    ] = {}  # a tied parameter has several names, and the first that is given counts
    for key in (key for key in own if key in state):
        kept = isinstance(own[key], nn.Parameter)
        given.setdefault(
            id(own[key]), nn.Parameter(state[key], requires_grad=False) if kept else state[key]
        )
    with with_values(model.modules(), given):
        write()


def _is(one: Tensor, other: Tensor) -> bool:
    alike = type(one) is type(other.detach()) or one is other
    return alike and one.shape == other.shape and one.data_ptr() == other.data_ptr()


@torch.no_grad()
def refill(model: nn.Module, folder: str | Path) -> None:
    """Copy the parameters of an adapter folder into those of the selected adapter (or the only
    one), which an optimiser may hold. ``AdapterError``: the folder is damaged or does not fit the
    model, or the adapter there is made otherwise (other weights, ranks, strengths, another
    variant). Nothing was copied. ``BaseMismatchError``: it was made for another base.
    ``MergeError``: an adapter is merged into the weights."""
    model = unwrap(model)
    name = selected_name(model, SAVE)
    must_stand(need_adapters(model), name, "a checkpoint for")
    load_plan = match(model, folder, [])
    own = {(path, weight): change for path, _, weight, change in changes(model, name)}
    parts = {path: part for path, _, part in adapters(model, name)}
    raise_all(
        AdapterError,
        f"{folder} does not fit the adapter {name!r}",
        list(_unlike(own, parts, load_plan)),
    )
    for ref, change in own.items():
        for key, value in load_plan.adapter_parameters[ref].items():
            {**change.adapter_parameters, **change._parameters}[key].copy_(value)
    load_plan.fill(parts)


def _unlike(
    own: Mapping[ParamRef, Change], parts: Mapping[str, LayerAdapter], load_plan: LoadPlan
) -> Iterator[str]:
    """How the adapter of a folder is made otherwise than the one that is attached."""
    theirs = {entry.ref: entry for entry in load_plan.plans.low}
    do = "attach with the config of the run that wrote it"
    for found, refs in (
        ("no change of", own.keys() - theirs.keys()),
        ("a change of", theirs.keys() - own.keys()),
    ):
        if refs:
            expected = "changes of the weights that the attached adapter changes"
            yield sentence(
                f"{found} {listing(sorted(parameter_path(*ref) for ref in refs), 3)}", expected, do
            )
    for ref in own.keys() & theirs.keys():
        change, entry = own[ref], theirs[ref]
        rows, tokens = (
            None if one is None else tuple(one.tolist()) for one in (change.rows, change.tokens)
        )
        here = change.variant.name, change.rank, change.alpha, rows, tokens
        there = load_plan.plans.config.variant, entry.rank, entry.alpha, entry.rows, entry.tokens
        if here != there:
            found = "variant {!r}, rank {}, alpha {}, rows {}, tokens {}".format(*there)
            expected = "variant {!r}, rank {}, alpha {}, rows {}, tokens {}".format(*here)
            yield sentence(f"{found} at {parameter_path(*ref)!r}", expected, do)
    for path in sorted(parts.keys() | load_plan.full.keys()):
        here = set(parts[path].full.state_dict()) if path in parts else set()
        if here != (there := set(load_plan.full.get(path, ()))):
            yield sentence(
                f"{listing(sorted(there))} of {path!r} trained in full", listing(sorted(here)), do
            )
