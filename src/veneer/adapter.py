"""Between a model and an adapter folder: ``save`` collects what an adapter is, ``install_from`` verifies a folder
against a model and puts it in place. The folder itself is ``artefact.py``'s."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import sites
from veneer.artefact import Artefact, read, write
from veneer.attach import (
    LowPlan,
    Plans,
    adapters,
    check_full,
    install,
    name_problems,
    need_group,
    only_name,
    plan_low,
    unwrap,
)
from veneer.config import LoraConfig
from veneer.errors import AdapterError, BaseMismatchError, listing, nearest, raise_all, sentence
from veneer.formats import peft
from veneer.hashing import fingerprint
from veneer.layers import kind_of
from veneer.merge import originals
from veneer.targets import Names, expand
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
    tensors, fingerprints = _tensors(model, name)
    if base_name is None:
        base_name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    write(
        path,
        tensors,
        _peft_config(model, name, config, base_name),
        base={"name": base_name, "architecture": type(model).__name__, "weights": fingerprints},
        config=config,
        provenance=provenance or {},
        overwrite=overwrite,
    )
    return path


def install_from(model: nn.Module, path: str | Path, name: str, *, trainable: bool, verify_base: bool) -> None:
    """What ``veneer.load`` does: verify the folder against the model, then install it."""
    artefact = read(path)
    names = Names(model)
    problems = [*name_problems(model, name)]
    wanted, file_of = {}, {}
    for file_path, entry in artefact.low.items():
        actual = names.canonical.get(file_path)
        if actual is None:
            near = nearest(file_path, names.modules)
            problems.append(
                sentence(
                    f"a change of {file_path!r}, which this model lacks{near}",
                    "the same modules",
                    "load it on the model that it was trained on",
                )
            )
        else:
            wanted[actual], file_of[actual] = (entry.rank, entry.alpha), entry
    low = plan_low(names, wanted, problems)
    numbers = {entry.path: _numbers(names, entry, file_of, problems) for entry in low}
    full = {names.canonical.get(path, path): dict(tensors) for path, tensors in artefact.full.items()}
    for entry in low:
        _take_base_weight(entry, full.get(entry.path, {}), path)
    _check_full_tensors(names, full, problems)
    if artefact.record is None:
        expected = peft.expected_paths(artefact.peft_config, [n for n, m in names.modules.items() if kind_of(m)])
        lacking = sorted((expected or set()) - set(wanted))
        if lacking:
            problems.append(
                sentence(f"no tensors for {listing(lacking)}", "those of every target", "get the whole file")
            )
    raise_all(AdapterError, f"The adapter {path} does not fit this {type(model).__name__}", problems)
    if artefact.record is not None and verify_base:
        _verify_base(model, artefact)
    elif artefact.record is None:
        warnings.warn(
            f"{path} was written by another library and carries no fingerprint of its base: names and shapes fit this "
            "model, but only you can tell whether it was trained on these weights. Save it with veneer.save to have it "
            "checked from now on.",
            UnverifiedAdapter,
            stacklevel=3,
        )
    names_of_full = {
        key: tuple(n for n in tensors if n in names.modules[key]._parameters) for key, tensors in full.items()
    }
    install(model, name, Plans(artefact.config, tuple(low), names_of_full), trainable=trainable)
    _fill(model, name, numbers, full)


def _take_base_weight(entry: LowPlan, tensors: dict[str, Tensor], path: str | Path) -> None:
    """PEFT writes the frozen weight of an adapted embedding or head along (``save_embedding_layers``). It is no part
    of the change; it tells whether this is the base."""
    written = tensors.pop(entry.layer.weight, None)
    weight: Any = entry.module._parameters[entry.layer.weight]
    if written is not None and fingerprint(written) != fingerprint(entry.storage.dense(weight)):
        found = f"another weight of {entry.path!r} in {path} than in this model"
        raise BaseMismatchError(sentence(found, "the base that it was trained on", "load that base"))


def _tensors(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(file tensors, fingerprints of the changed weights). A tied weight's change stands under every module that
    reads it, each time as that module reads it, so that a library which adapts modules one by one gives the same
    outputs."""
    tensors: dict[str, Tensor] = {}
    fingerprints: dict[str, str] = {}
    owners = {id(adapter): path for path, _, adapter in adapters(model, name)}
    for path, module, site in sites(model):
        adapter = site.get(name)
        if adapter is None:
            continue
        if adapter.layer is not None:
            kind = site.layer
            weight: Any = module._parameters[kind.weight]
            low, _ = adapter.resolve(weight)
            A, B = kind.pack(low.T if site.transposed else low, module)
            for suffix, tensor in zip(kind.file_keys, (A, B), strict=True):
                tensors[peft.key(path, suffix)] = tensor.detach().cpu().contiguous().clone()
            if owners[id(adapter)] == path:
                kept = originals(adapter).get(kind.weight, weight)
                fingerprints[path] = fingerprint(adapter.storage.dense(kept))
        for key, value in adapter.full.state_dict().items() if owners[id(adapter)] == path else ():
            inner = f"base_layer.{key}" if adapter.layer is not None else key
            tensors[peft.key(path, inner)] = value.detach().cpu().contiguous().clone()
    return tensors, fingerprints


def _peft_config(model: nn.Module, name: str, config: LoraConfig, base_name: str | None) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    if variant.peft is None:
        raise AdapterError(sentence(f"variant {variant.name!r}", "one that PEFT's format has", "merge it instead"))
    parts: dict[str, Any] = {path: site.get(name) for path, _, site in sites(model)}
    low = {path: part for path, part in parts.items() if part is not None and part.layer is not None}
    ranks, alphas = {path: part.rank for path, part in low.items()}, {path: part.alpha for path, part in low.items()}
    alpha = variant.default_alpha if config.alpha is None else config.alpha
    names = Names(model)
    also = expand(names, config.train_also, "train_also", [])
    among = [path for path, module in names.modules.items() if kind_of(module)]
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": peft.targets_for(list(low), among),
        "rank_pattern": peft.patterns_for(ranks, config.rank),
        "alpha_pattern": peft.patterns_for(alphas, alpha),
        "modules_to_save": sorted(also) or None,
        "bias": {"none": "none", "targets": "lora_only", "all": "all"}[config.bias],
        "fan_in_fan_out": any(part.layer.name == "conv1d_transformers" for part in low.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        **variant.peft,
    }


def _task(model: nn.Module) -> str | None:
    """PEFT's task. Not for classifiers and question answering: there PEFT expects its own choice of fully trained
    heads."""
    endings = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)


def _numbers(names: Names, entry, file_of: Mapping[str, peft.PeftLayer], problems: list[str]):
    """(A [g, r, in], B [g, out, r]) of one planned layer, from what the file holds for each module that reads its
    weight."""
    found = []
    for reader in entry.readers:
        path = next(path for path, module in names.modules.items() if module is reader)
        layer = file_of.get(path)
        kind = kind_of(reader)
        if layer is None:
            what = f"a change of {entry.path!r}, whose weight {path!r} shares, without one for {path!r}"
            problems.append(sentence(what, "one change for a tied weight, under every name", "untie the weights first"))
            return None
        pair = kind.unpack(layer.A, layer.B, reader) if layer.suffixes == kind.file_keys else None
        if pair is None:
            what = f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {path!r}"
            expected = f"those of a {kind.name} layer with (groups, out, in) = {tuple(kind.dims(reader))}"
            problems.append(sentence(what, expected, "load it on the model that it was trained on"))
            return None
        A, B = pair
        found.append((B.mT, A.mT) if kind.out_axis != entry.layer.out_axis else (A, B))
    if any(not torch.equal(A, found[0][0]) or not torch.equal(B, found[0][1]) for A, B in found[1:]):
        what = f"different changes for {entry.path!r} and the modules that share its weight"
        problems.append(sentence(what, "one change of a tied weight", "untie the weights first"))
    return found[0]


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
    check_full(names, {path: keys for path, keys in known.items() if path in names.modules}, problems)


def _fill(model: nn.Module, name: str, numbers: Mapping[str, Any], full: Mapping[str, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for path, _, adapter in adapters(model, name):
            for own, value in zip(("A", "B"), numbers.get(path, ()), strict=False):
                adapter._parameters[own].copy_(value)
            for key, value in full.get(path, {}).items():
                {**adapter.full._parameters, **adapter.full._buffers}[key].copy_(value)


def _verify_base(model: nn.Module, artefact: Artefact) -> None:
    """Compare the fingerprint of every adapted weight."""
    record = artefact.metadata["base"]
    names = Names(model)
    different = []
    for path, expected in record["weights"].items():
        module = names.modules[names.canonical[path]]
        kind = kind_of(module)
        weight: Any = module._parameters[kind.weight]
        if fingerprint(weight) != expected:
            different.append(path)
    if different:
        found = (
            f"other weights in {len(different)} of {len(record['weights'])} adapted layers ({listing(different, 3)})"
        )
        expected = f"the base that it was trained on, {record['name'] or record['architecture']}"
        do = "load that base, or pass verify_base=False if these are the same weights in another precision"
        raise BaseMismatchError(
            f"The adapter {artefact.path} was made for another base. {sentence(found, expected, do)}"
        )
