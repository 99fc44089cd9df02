"""Between a model and an adapter folder: ``save`` collects what an adapter is, ``install_from`` verifies a folder
against a model and puts it in place. The folder itself is ``artefact.py``'s."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import Change, at_least_float32, own_class, sites, weight_of
from veneer.artefact import Artefact, read, write
from veneer.attach import (
    LowPlan,
    Plans,
    Wish,
    adapters,
    changes,
    check_full,
    full_hosts,
    install,
    name_problems,
    need_group,
    only_name,
    parameter_path,
    plan_low,
    unwrap,
    with_ties,
)
from veneer.bases import storage_of
from veneer.config import LoraConfig
from veneer.errors import AdapterError, BaseMismatchError, listing, nearest, raise_all, sentence
from veneer.formats import peft
from veneer.hashing import fingerprint
from veneer.layers import LAYERS, kind_of
from veneer.layers._base import GENERAL
from veneer.merge import original
from veneer.targets import Names, Slot, expand, own_parameters
from veneer.variants import VARIANTS

__all__ = ["Artefact", "UnverifiedAdapter", "install_from", "read", "save"]


class UnverifiedAdapter(UserWarning):
    """An adapter that another library wrote: it carries no fingerprint, so nobody can tell whether it was made for
    this base."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter ``name`` (None: the only one) as a folder, in one step: a crash leaves what was there before,
    or the whole.

    Args:
        base_name: what to call the base; None takes the name that transformers loaded it by.
        provenance: anything worth knowing about the training, as JSON values.
        overwrite: replace a folder that exists.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False.
        AdapterError: a trained number is not finite.
    """
    model = unwrap(model)
    name = only_name(model, name)
    config, path = need_group(model, name).configs[name], Path(path)
    if VARIANTS[config.variant].peft is None:
        found = f"variant {config.variant!r}"
        raise AdapterError(sentence(found, "one that PEFT's format can express", "merge it instead"))
    files = list(_filed(model, name))
    if base_name is None:
        base_name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    owned = list(changes(model, name))
    weights = {
        parameter_path(at, weight): (weight_of(module, weight), weight, change) for at, module, weight, change in owned
    }
    write(
        path,
        _tensors(model, name, files),
        _peft_config(model, name, config, base_name, files),
        base={
            "name": base_name,
            "architecture": own_class(model).__name__,
            "weights": {at: fingerprint(original(change, held, own)) for at, (held, own, change) in weights.items()},
        },
        changes={at: _described(change) for at, (_, _, change) in weights.items()},
        config=config,
        provenance=provenance or {},
        overwrite=overwrite,
        numbers={
            f"{at}.{number}": value.detach().cpu().contiguous().clone()
            for at, (_, _, change) in weights.items()
            if not _peft_has(change)
            for number, value in change.numbers.items()
            if number not in change.variant.derived
        },
    )
    return path


def install_from(model: nn.Module, path: str | Path, name: str, *, trainable: bool, verify_base: bool) -> None:
    """What ``veneer.load`` does: verify the folder against the model, then install it."""
    artefact = read(path)
    names = Names(model)
    problems = [*name_problems(model, name)]
    file_of: dict[Slot, peft.PeftLayer] = {}
    for file_path, entry in artefact.low.items():
        slot = _slot(names, file_path, artefact.peft_config)
        if slot is None:
            found = f"a change of {file_path!r}, which this model lacks{nearest(file_path, names.modules)}"
            do = "load it on the model that it was trained on"
            problems.append(sentence(found, "the same modules", do))
        elif _parameter_of(names, slot, artefact.peft_config):
            rank, alpha, scale = peft.strength(artefact.peft_config, parameter_path(*slot))
            file_of[slot] = replace(entry, rank=rank, alpha=alpha, scale=scale)
        else:
            file_of[slot] = entry
    recorded = artefact.metadata.get("changes")
    if recorded is None:
        wanted = {slot: Wish(entry.rank, entry.alpha) for slot, entry in file_of.items()}
    else:
        wanted = _recorded(names, recorded, problems)
    low = plan_low(names, wanted, problems)
    numbers = {entry.slot: _numbers(names, entry, file_of, artefact, problems) for entry in low}
    covered = {slot for entry in low for slot in entry.holders}
    for slot in file_of if recorded is not None else ():
        if slot not in covered and not problems:
            found = f"a change of {parameter_path(*slot)!r} that the record does not know"
            problems.append(sentence(found, "the files as they were saved", "get another copy of the folder"))
    full = {_canonical(names, path): dict(tensors) for path, tensors in artefact.full.items()}
    for entry in low:
        _take_base_weight(names, entry, full, path)
    _check_full_tensors(names, full, problems)
    if artefact.record is None:
        lacking = _lacking(names, artefact, set(file_of))
        if lacking:
            problems.append(
                sentence(f"no tensors for {listing(lacking)}", "those of every target", "get the whole file")
            )
    raise_all(AdapterError, f"The adapter {path} does not fit this {own_class(model).__name__}", problems)
    if artefact.record is not None and verify_base:
        _verify_base(names, artefact)
    elif artefact.record is None:
        warnings.warn(
            f"{path} was written by another library and carries no fingerprint of its base: names and shapes fit this "
            "model, but only you can tell whether it was trained on these weights. Save it with veneer.save to have it "
            "checked from now on.",
            UnverifiedAdapter,
            stacklevel=3,
        )
    own = {key: tuple(n for n in tensors if n in names.modules[key]._parameters) for key, tensors in full.items()}
    whole = frozenset(key for key, tensors in full.items() if any(n in names.modules[key]._buffers for n in tensors))
    plans = Plans(artefact.config, tuple(low), own, whole, full_hosts(names, own))
    install(model, name, plans, trainable=trainable, numbers=numbers)
    with torch.no_grad():
        for at, _, part in adapters(model, name):
            for key, value in full.get(at, {}).items():
                {**part.full._parameters, **part.full._buffers}[key].copy_(value)


def _canonical(names: Names, file_path: str) -> str:
    """The module that a path of a PEFT file means, under its first name."""
    found = names.canonical.get(file_path) or names.canonical.get(peft.unnested(file_path)[0])
    return file_path if found is None else found


def _slot(names: Names, file_path: str, config: Mapping[str, Any]) -> Slot | None:
    """What a path of a PEFT file means: a module with one weight, one of several weights by its own path, or one of
    several nested parameters."""
    bare, depth = (file_path, 0) if file_path in names.canonical else peft.unnested(file_path)
    path = names.canonical.get(bare)
    if path is None:
        above, _, name = bare.rpartition(".")
        path = names.canonical.get(above)
        return (path, name) if path is not None and name in own_parameters(names.modules[path]) else None
    module = names.modules[path]
    parameters = [name for name in own_parameters(module) if _parameter_of(names, (path, name), config)]
    if parameters:
        return (path, parameters[-1 - depth]) if depth < len(parameters) else None
    kind = kind_of(module)
    return (path, kind.weight) if kind is not None and kind.weight in kind.weights(module) else None


def _parameter_of(names: Names, slot: Slot, config: Mapping[str, Any]) -> bool:
    """Whether a PEFT config means this weight as a parameter, not by its module."""
    path, name = slot
    return bool(peft.expected_parameters(config, [parameter_path(alias, name) for alias in names.aliases[path]]))


def _filed(model: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Module, str, Change, bool]]:
    """(path in a PEFT file, path, module, weight, change, read transposed) for every module that holds a changed
    weight: a tied weight's change stands under every module that holds it, each time as that module reads it, so that
    a library which adapts modules one by one gives the same outputs."""
    attention = ""
    for path, module, site in sites(model):
        part = site.get(name)
        if part is None:
            continue
        kind = site.layer or LAYERS[GENERAL]
        if isinstance(module, nn.MultiheadAttention) and part.changes:
            attention = path
        for weight, change in part.changes.items():
            where = path
            if kind.name == GENERAL:
                # each further parameter of a module wraps the one before
                wrapped = [w for w in own_parameters(module) if w in part.changes]
                inside = len(wrapped) - 1 - wrapped.index(weight)
                where = ".".join([*([path] if path else []), *["base_layer"] * inside])
            elif weight not in kind.weights(module) or len(kind.weights(module)) > 1:
                where = parameter_path(path, weight)
            elif attention and path == f"{attention}.out_proj":
                where = f"{attention}.base_layer.out_proj"
            yield where, path, module, weight, change, site.transposed


def _peft_has(change: Change) -> bool:
    """Whether PEFT's file holds all the numbers of a change."""
    return set(change.numbers) <= {"A", "B", *change.variant.peft_keys}


def _described(change: Change) -> dict[str, Any]:
    rows = None if change.rows is None else change.rows.tolist()
    return {"rank": change.rank, "alpha": change.alpha, **({} if rows is None else {"rows": _ranges(rows)})}


def _ranges(rows: list[int]) -> list[list[int]]:
    """Ascending runs of indices as (start, stop)."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    return ranges


def _recorded(names: Names, recorded: Mapping[str, Any], problems: list[str]) -> dict[Slot, Wish]:
    """What the record says of each change."""
    wanted: dict[Slot, Wish] = {}
    for at, described in recorded.items():
        above, _, name = at.rpartition(".")
        path = names.canonical.get(above)
        if path is None or name not in own_parameters(names.modules[path]):
            found = f"a change of {at!r}, which this model lacks{nearest(above, names.modules)}"
            problems.append(sentence(found, "the same modules", "load it on the model that it was trained on"))
        else:
            wanted[path, name] = Wish(described["rank"], described["alpha"], described.get("rows"))
    return wanted


def _lacking(names: Names, artefact: Artefact, found: set[Slot]) -> list[str]:
    """The targets of a PEFT config for which the file holds nothing."""
    config = artefact.peft_config
    modules = {path: kind.weight for path, module in names.modules.items() if (kind := kind_of(module)) is not None}
    expected = {(path, modules[path]) for path in peft.expected_paths(config, modules) or ()}
    expected = {slot for slot in expected if weight_of(names.modules[slot[0]], slot[1]) is not None}
    slots = [(path, name) for path, module in names.modules.items() for name in own_parameters(module)]
    expected |= {slot for slot in slots if _parameter_of(names, slot, config)}
    return sorted(parameter_path(*slot) for slot in expected - found)


def _take_base_weight(names: Names, entry: LowPlan, full: Mapping[str, dict[str, Tensor]], path: str | Path) -> None:
    """PEFT writes the frozen weight of an adapted embedding or head along (``save_embedding_layers``). It is no part
    of the change; it tells whether this is the base."""
    weight = weight_of(names.modules[entry.path], entry.weight)
    for holder, name in entry.holders:
        written = full.get(holder, {}).pop(name, None)
        if written is not None and fingerprint(written) != fingerprint(entry.storage.dense(weight)):
            found = f"another weight of {holder!r} in {path} than in this model"
            raise BaseMismatchError(sentence(found, "the base that it was trained on", "load that base"))


def _tensors(model: nn.Module, name: str, files) -> dict[str, Tensor]:
    """The tensors of the PEFT file."""
    tensors: dict[str, Tensor] = {}
    for where, _, module, weight, change, transposed in files:
        kind = _kind(module, weight)
        held = weight_of(module, weight)
        low, gain = change.resolve(held)
        shape = change.storage.shape(held)
        A, B = kind.pack(low.T if transposed else low, module, shape)
        for suffix, tensor in zip(kind.file_keys, (A, B), strict=True):
            tensors[peft.key(where, suffix)] = tensor.detach().cpu().contiguous().clone()
        for number, suffix in change.variant.peft_keys.items() if gain is not None else ():
            whole = _whole(change, held, change.numbers[number].detach())
            tensors[peft.key(where, suffix)] = kind.pack_vector(whole, shape).cpu().contiguous().clone()
    # what is trained in full stands below the wrappers that PEFT puts around a changed module
    deepest: dict[str, str] = {}
    for where, path, *_ in files:
        if peft.unnested(where)[0] == path:
            deepest[path] = max(deepest.get(path, ""), f"{where}.base_layer".lstrip("."), key=len)
    for path, _, part in adapters(model, name):
        for key, value in part.full.state_dict().items():
            tensors[peft.key(deepest.get(path, path), key)] = value.detach().cpu().contiguous().clone()
    return tensors


def _whole(change: Change, weight: Any, values: Tensor) -> Tensor:
    """A magnitude for every output: where nothing changes, the norm of the weight's own row."""
    if change.rows is None:
        return values
    dense = change.storage.dense(weight)
    norms = change.layer.unfold(dense.to(at_least_float32(dense.dtype)), change.dims).norm(dim=-1).flatten()
    return norms.index_copy(0, change.rows.to(norms.device), values.to(norms.dtype))


def _kind(module: nn.Module, weight: str) -> Any:
    kind = kind_of(module)
    return kind if kind is not None and weight in kind.weights(module) else LAYERS[GENERAL]


def _peft_config(model: nn.Module, name: str, config: LoraConfig, base_name: str | None, files) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    names = Names(model)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters = []
    targets = []
    for where, path, module, weight, change, _ in files:
        at = where
        if peft.unnested(where)[0] == path and _kind(module, weight).name == GENERAL:
            at = parameter_path(path, weight)
            parameters.append(at)  # in the order in which their wrappers nest
        else:
            targets.append(path)
        if _peft_has(change):
            ranks[at], alphas[at] = change.rank, change.alpha
        else:
            low, _ = change.resolve(weight_of(module, weight))
            ranks[at], alphas[at] = low.rank, low.scale * low.rank
    rank = config.rank if config.rank in ranks.values() or not ranks else max(ranks.values())
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    also = expand(names, config.train_also, "train_also", [])
    vectors = [
        path
        for path, _, part in adapters(model, name)
        if part.full._parameters.keys() - {"bias"} and not part.low._modules
    ]
    # PEFT adapts an attention's out-projection with it, and refuses dropout and Conv1D's flag where it has no input.
    plain = not parameters and not any(isinstance(module, nn.MultiheadAttention) for _, _, module, *_ in files)
    targets = [path for path in targets if not any(path == f"{other}.out_proj" for other in targets)]
    among = [path for path in names.modules if path and (path in targets or not path.endswith(".out_proj"))]
    kinds = {_kind(module, weight).name for _, _, module, weight, _, _ in files}
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout if plain else 0.0,
        "target_modules": peft.targets_for(targets, among),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": peft.patterns_for(ranks, rank),
        "alpha_pattern": peft.patterns_for(alphas, alpha),
        "modules_to_save": sorted({*also, *vectors}) or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": "conv1d_transformers" in kinds and plain,
        "init_lora_weights": True,
        "inference_mode": True,
        **(variant.peft or {}),
    }


def _task(model: nn.Module) -> str | None:
    """PEFT's task. Not for classifiers and question answering: there PEFT expects its own choice of fully trained
    heads."""
    endings = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    return next((task for ending, task in endings.items() if own_class(model).__name__.endswith(ending)), None)


def _numbers(
    names: Names, entry: LowPlan, file_of: Mapping[Slot, peft.PeftLayer], artefact: Artefact, problems: list[str]
) -> dict[str, Tensor]:
    """The trained numbers of one planned weight: from ``veneer.safetensors``, or from what the PEFT file holds for
    each module that has the weight."""
    found = []
    for path, name in entry.holders:
        layer, module = file_of.get((path, name)), names.modules[path]
        if layer is None:
            what = f"a change of {entry.path!r}, whose weight {path!r} shares, without one for {path!r}"
            problems.append(sentence(what, "one change for a tied weight, under every name", "untie the weights first"))
            return {}
        kind = _kind(module, name)
        if _parameter_of(names, (path, name), artefact.peft_config):
            kind = LAYERS[GENERAL]  # as PEFT reads a parameter, whatever its module makes of it
        shape = entry.storage.shape(weight_of(module, name))
        pair = kind.unpack(layer.A, layer.B, module, shape) if layer.suffixes == kind.file_keys else None
        if pair is None:
            what = f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {path!r}"
            expected = f"those of a {kind.name} layer with (groups, out, in) = {tuple(kind.dims(module, shape))}"
            problems.append(sentence(what, expected, "load it on the model that it was trained on"))
            return {}
        A, B = pair
        if B.shape[2] != layer.rank:
            what = f"rank {B.shape[2]} at {path!r}"
            problems.append(sentence(what, f"{layer.rank}, as the config says", "get both files again"))
        found.append((B.mT, A.mT) if kind.out_axis != entry.layer.out_axis else (A, B))
    if any(not torch.equal(A, found[0][0]) or not torch.equal(B, found[0][1]) for A, B in found[1:]):
        what = f"different changes for {entry.path!r} and the modules that share its weight"
        problems.append(sentence(what, "one change of a tied weight", "untie the weights first"))
    own = artefact.numbers.get(parameter_path(*entry.slot))
    if own is not None:
        return dict(own)
    A, B = found[0]
    rows = None if entry.rows is None else torch.tensor(entry.rows)
    numbers = {"A": A, "B": B if rows is None else B[:, rows]}
    for number, suffix in VARIANTS[artefact.config.variant].peft_keys.items():
        vector = file_of[entry.slot].extras.get(suffix)
        if vector is None or vector.numel() != entry.dims.groups * entry.dims.out:
            problems.append(sentence(f"no {suffix!r} that fits {entry.path!r}", "one number an output", "get it again"))
            continue
        numbers[number] = vector.reshape(-1) if rows is None else vector.reshape(-1)[rows]
    return numbers


def _check_full_tensors(names: Names, full: Mapping[str, Mapping[str, Tensor]], problems: list[str]) -> None:
    known: dict[str, tuple[str, ...]] = {}
    for path, tensors in full.items():
        module = names.modules.get(path)
        own = {**module._parameters, **module._buffers} if module is not None else {}
        for key, tensor in tensors.items():
            if own.get(key) is None:
                problems.append(
                    sentence(f"a tensor for {path}.{key}, which this model lacks", "the same modules", "use its model")
                )
            elif own[key].shape != tensor.shape:
                found = f"{path}.{key} of shape {tuple(tensor.shape)}"
                problems.append(sentence(found, f"{tuple(own[key].shape)}", "use the model that it was trained on"))
        known[path] = tuple(key for key in tensors if module is not None and key in module._parameters)
    known = {path: keys for path, keys in known.items() if path in names.modules}
    check_full(names, known, problems)
    for path, tied in with_ties(names, known).items():
        for key in tied:
            if key not in known.get(path, ()):
                found = f"{parameter_path(path, key)!r}, which shares a parameter that is trained in full, without it"
                expected = "the same values under every name of a tied parameter"
                problems.append(sentence(found, expected, "untie the weights first"))


def _verify_base(names: Names, artefact: Artefact) -> None:
    """Compare the fingerprint of every adapted weight."""
    record = artefact.metadata["base"]
    different = []
    for at, expected in record["weights"].items():
        above, _, name = at.rpartition(".")
        weight = weight_of(names.modules[names.canonical[above]], name)
        storage: Any = storage_of(weight)
        if fingerprint(storage.dense(weight)) != expected:
            different.append(at)
    if different:
        found = (
            f"other weights in {len(different)} of {len(record['weights'])} adapted layers ({listing(different, 3)})"
        )
        expected = f"the base that it was trained on, {record['name'] or record['architecture']}"
        do = "load that base, or pass verify_base=False if these are the same weights in another precision"
        raise BaseMismatchError(
            f"The adapter {artefact.path} was made for another base. {sentence(found, expected, do)}"
        )
