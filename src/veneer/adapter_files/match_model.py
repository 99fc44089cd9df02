"""An adapter folder against a model: does it fit, is it of this base, and what would be installed?

    fitted(model, folder) -> Fit        plans, trained numbers, and what is trained in full

The model stays as it is. ``adapter.py`` installs a ``LoadPlan`` on the model, a bank keeps it beside.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.base_proof import base_tensors, prints_of
from veneer.adapter_files.folder import NUMBERS, AdapterFiles, read
from veneer.adapter_files.peft_mapping import (
    all_refs,
    attention_above,
    differs,
    kind_for,
    means_parameter,
    module_at,
    ref_at,
)
from veneer.attach.adapted_module import own_class, weight_of
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import parameter_path
from veneer.attach.plan import LowRankPlan, Plans, TargetSpec, changed_refs, full_readers, plan_low
from veneer.attach.refusals import check_full
from veneer.attach.shared_memory import overlaps
from veneer.attach.targets import Names, ParamRef, own_parameters
from veneer.attach.weight_tying import apart
from veneer.errors import AdapterError, BaseMismatchError, listing, nearest, raise_all, sentence
from veneer.fileio.hashing import fingerprint, prints_in
from veneer.fileio.throttle import throttled
from veneer.formats import peft
from veneer.layers import LAYERS, kind_of
from veneer.layers._base import GENERAL
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS, InitContext, Variant


class UnverifiedAdapter(UserWarning):
    """Nobody can tell whether an adapter was made for this base: another library wrote it, so it carries no
    fingerprint, or the base has parameters of which its record does not speak."""


@dataclass(frozen=True)
class LoadPlan:
    """An adapter folder that was verified against a model: what to plan, the trained numbers of each weight, and what
    is trained in full, by module."""

    saved: AdapterFiles
    plans: Plans
    numbers: Mapping[ParamRef, Mapping[str, Tensor]]
    full: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def fill(self, parts: Mapping[str, LayerAdapter]) -> None:
        """Put the values of what is trained in full into the parts that were made for it."""
        for at, part in parts.items():
            for key, value in self.full.get(at, {}).items():
                {**part.full._parameters, **part.full._buffers}[key].copy_(value)


@dataclass
class MatchCache:
    """What was found out about a model that nobody changes meanwhile, so that further adapters of it are verified in a
    fraction of the time: the fingerprints of its weights, and what was planned for the same wishes."""

    names: Names
    fingerprints: dict[str, str] = field(default_factory=dict)
    plans: dict[Any, tuple[LowRankPlan, ...]] = field(default_factory=dict)

    def plan(self, wanted: Mapping[ParamRef, TargetSpec], problems: list[str]) -> tuple[LowRankPlan, ...]:
        """As ``plan_low``."""
        key = tuple((ref, spec.rank, spec.alpha, repr(spec.slices)) for ref, spec in wanted.items())
        if key not in self.plans:
            before = len(problems)
            low = tuple(plan_low(self.names, wanted, problems))
            if len(problems) > before:
                return low
            self.plans[key] = low
        return self.plans[key]


def match(
    model: nn.Module,
    path: str | Path,
    problems: list[str],
    *,
    verify_base: bool = True,
    of_weights: bool = False,
    known: MatchCache | None = None,
) -> LoadPlan:
    """Verify a folder against a model, which stays as it is (see ``install_from``).

    Args:
        problems: those that are known already.
        known: what is known of the model already; what is found out is added.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: the base's weights are others than those it was trained on.
    """
    saved = read(path)
    peft_s = saved.record is None and not of_weights
    known = MatchCache(Names(model)) if known is None else known
    names, config = known.names, saved.peft_config
    file_of: dict[ParamRef, peft.PeftLayer] = {}
    for file_path, entry in throttled(saved.low.items()):
        ref = ref_at(names, file_path, config)
        if ref is None:
            found = f"a change of {entry.at!r}, which this model lacks{nearest(entry.at, names.modules)}"
            problems.append(sentence(found, "the same modules", "load it on the model that it was trained on"))
            continue
        if ref in file_of:
            found = f"two changes of {parameter_path(*ref)!r} in {path}"
            problems.append(sentence(found, "one", "get the whole file again"))
        parameter = means_parameter(names, ref, config)
        nested = attention_above(names, ref) if peft.attention_of(file_path) is not None else None
        module = names.modules[ref[0]]
        several = len(kind_for(module, ref[1]).weights(module)) > 1
        at = parameter_path(*ref) if parameter or several else ref[0] if nested is None else nested
        rank, alpha, scale = peft.strength(config, at)
        if nested is not None and peft_s:
            alpha, scale = peft.TIMES * alpha, peft.TIMES * scale
        file_of[ref] = replace(entry, rank=rank, alpha=alpha, scale=scale)
        reason = differs(names, ref, parameter, nested) if peft_s else None
        if reason is None and nested is not None and peft_s:
            reason = peft.unsure(config)
        if reason is not None:
            found = f"a change of {entry.at!r} that PEFT applies in another way: {reason}"
            problems.append(sentence(found, "a change of the weight", "use PEFT for it"))
    recorded = saved.metadata.get("changes")
    if recorded is None:
        wanted = {ref: TargetSpec(entry.rank, entry.alpha) for ref, entry in file_of.items()}
    else:
        wanted = _recorded(names, recorded, problems)
    low = known.plan(wanted, problems)
    numbers = {entry.ref: _numbers(names, entry, file_of, saved, problems) for entry in throttled(low)}
    covered = {ref for entry in low for ref in entry.holders}
    if recorded is not None:
        meant = covered | set(wanted)
        unknown = [parameter_path(*ref) for ref in file_of if ref not in meant]
        unknown += sorted(saved.numbers.keys() - recorded.keys())
        if unknown:
            found = f"changes that the record does not know: {listing(unknown)}"
            problems.append(sentence(found, "the files as they were saved", "get another copy of the folder"))
    full: dict[str, dict[str, Tensor]] = {}
    for file_path, tensors in saved.full.items():
        full.setdefault(module_at(names, file_path), {}).update(tensors)
    for entry in low:
        _take_base_weight(names, entry, full, path)
    _check_full_tensors(names, full, problems)
    own = {
        key: tuple(n for n in tensors if n in names.modules[key]._parameters)
        for key, tensors in full.items()
        if key in names.modules
    }
    problems += overlaps(names, changed_refs(low, own))
    if saved.record is None:
        lacking = _lacking(names, saved, set(file_of))
        if lacking:
            problems.append(
                sentence(f"no tensors for {listing(lacking)}", "those of every target", "get the whole file")
            )
    raise_all(AdapterError, f"The adapter {path} does not fit this {own_class(model).__name__}", problems)
    if saved.record is not None and verify_base:
        _verify_base(names, saved, known.fingerprints)
    elif saved.record is None:
        warnings.warn(
            f"{path} was written by another library and carries no fingerprint of its base: names and shapes fit this "
            "model, but only you can tell whether it was trained on these weights. Save it with veneer.save to have it "
            "checked from now on.",
            UnverifiedAdapter,
            stacklevel=4,
        )
    whole = frozenset(key for key, tensors in full.items() if any(n in names.modules[key]._buffers for n in tensors))
    weight_readers = full_readers(names, own)
    return LoadPlan(
        saved, Plans(saved.config, tuple(low), own, whole, weight_readers, apart(names, full)), numbers, full
    )


def _recorded(names: Names, recorded: Mapping[str, Any], problems: list[str]) -> dict[ParamRef, TargetSpec]:
    """What the record says of each change."""
    wanted: dict[ParamRef, TargetSpec] = {}
    for at, described in recorded.items():
        above, _, name = at.rpartition(".")
        path = names.canonical.get(above)
        if path is None or name not in own_parameters(names.modules[path]):
            found = f"a change of {at!r}, which this model lacks{nearest(above, names.modules)}"
            problems.append(sentence(found, "the same modules", "load it on the model that it was trained on"))
        else:
            wanted[path, name] = TargetSpec(described["rank"], described["alpha"], described.get("rows"))
    return wanted


def _lacking(names: Names, saved: AdapterFiles, found: set[ParamRef]) -> list[str]:
    """The targets of a PEFT config for which the file holds nothing."""
    config = saved.peft_config
    modules = {path: kind.weight for path, module in names.modules.items() if (kind := kind_of(module)) is not None}
    expected = {(path, modules[path]) for path in peft.expected_paths(config, modules) or ()}
    expected = {ref for ref in expected if weight_of(names.modules[ref[0]], ref[1]) is not None}
    expected |= {ref for ref in all_refs(names) if means_parameter(names, ref, config)}
    return sorted(parameter_path(*ref) for ref in expected - found)


def _take_base_weight(
    names: Names, entry: LowRankPlan, full: Mapping[str, dict[str, Tensor]], path: str | Path
) -> None:
    """PEFT writes the frozen weight of an adapted embedding or head along (``save_embedding_layers``). It is no part
    of the change; it tells whether this is the base."""
    weight = weight_of(names.modules[entry.path], entry.weight)
    for holder, name in entry.holders:
        written = full.get(holder, {}).pop(name, None)
        if written is not None and fingerprint(written) != fingerprint(entry.storage.dense(weight)):
            found = f"another weight of {holder!r} in {path} than in this model"
            raise BaseMismatchError(sentence(found, "the base that it was trained on", "load that base"))


def _numbers(
    names: Names,
    entry: LowRankPlan,
    file_of: Mapping[ParamRef, peft.PeftLayer],
    saved: AdapterFiles,
    problems: list[str],
) -> dict[str, Tensor]:
    """The trained numbers of one planned weight: from ``veneer.safetensors``, or from what the PEFT file holds for
    each module that has the weight."""
    found, at = [], parameter_path(*entry.ref)
    for path, name in entry.holders:
        pair = _pair(names, (path, name), entry, file_of.get((path, name)), saved, problems)
        if pair is None:
            return {}
        found.append(pair)
    said = [tuple(file_of[ref].extras.values()) for ref in entry.holders]
    if any(not _equal((*pair, *more), (*found[0], *said[0])) for pair, more in zip(found, said, strict=True)):
        what = f"different changes for {entry.path!r} and the modules that share its weight"
        problems.append(sentence(what, "one change of a tied weight", "untie the weights first"))
    (A, B), layer, variant = found[0], file_of[entry.ref], VARIANTS[saved.config.variant]
    frozen_input = entry.layer.frozen_input(names.modules[entry.path])
    if frozen_input is not None and A[..., frozen_input].any():
        what = f"a change of the padding row {frozen_input} of {entry.path!r}"
        problems.append(sentence(what, "none, as Veneer keeps that row at rest", "set it to zero, or use PEFT for it"))
    if layer.extras.keys() != set(variant.peft_keys.values()):
        what = f"{listing(layer.extras)} at {entry.path!r}"
        expected = f"{listing(variant.peft_keys.values())}, as variant {variant.name!r} has"
        problems.append(sentence(what, expected, "get both files again"))
        return {}
    own = saved.numbers.get(at)
    if own is not None:
        problem = _unlike(names, entry, dict(own), LowRank(A, B, layer.scale), variant)
        if problem:
            do = "get another copy of the folder"
            problems.append(sentence(f"{problem} in {NUMBERS} for {at!r}", f"what {peft.TENSORS} holds of it", do))
        return dict(own)
    lacking = _number_names(variant.name) - {"A", "B", *variant.peft_keys}
    if lacking and saved.record is not None:
        what = f"no {listing(sorted(lacking))} of {at!r} in {NUMBERS}"
        problems.append(sentence(what, f"those of variant {variant.name!r}", "get another copy of the folder"))
    scale = variant.scale(entry.alpha, entry.rank)
    if entry.rank != layer.rank or not math.isclose(scale, layer.scale):
        what = f"rank {entry.rank}, alpha {entry.alpha:g} and scale {scale:g} of {at!r} in the record"
        expected = f"{layer.rank}, {layer.alpha:g} and {layer.scale:g}, as in {peft.CONFIG}"
        problems.append(sentence(what, expected, "get another copy of the folder"))
    rows = None if entry.rows is None else torch.tensor(entry.rows)
    if rows is not None and B.index_fill(1, rows, 0).any():
        what = f"a change outside the rows that the record names for {at!r}"
        problems.append(sentence(what, "zeros there", "get another copy of the folder"))
    numbers = {"A": A, "B": B if rows is None else B[:, rows]}
    for number, suffix in variant.peft_keys.items():
        vector = layer.extras[suffix].reshape(-1)
        if vector.numel() != entry.dims.groups * entry.dims.out:
            problems.append(sentence(f"no {suffix!r} that fits {entry.path!r}", "one number an output", "get it again"))
            return {}
        numbers[number] = vector if rows is None else vector[rows]
    return numbers


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _pair(
    names: Names,
    ref: ParamRef,
    entry: LowRankPlan,
    layer: peft.PeftLayer | None,
    saved: AdapterFiles,
    problems: list[str],
) -> tuple[Tensor, Tensor] | None:
    """A and B that the file holds for one module with the weight, in the shapes of the weight's own layer."""
    (path, name), module = ref, names.modules[ref[0]]
    if layer is None:
        what = f"a change of {entry.path!r}, whose weight {path!r} shares, without one for {path!r}"
        if ref == entry.ref:
            what = f"no change of {parameter_path(*ref)!r} in {peft.TENSORS}"
        problems.append(sentence(what, "one change for a tied weight, under every name", "untie the weights first"))
        return None
    kind = kind_for(module, name)
    if means_parameter(names, ref, saved.peft_config):
        kind = LAYERS[GENERAL]  # as PEFT reads a parameter, whatever its module makes of it
    shape = entry.storage.shape(weight_of(module, name))
    pair = kind.unpack(layer.A, layer.B, module, shape) if layer.suffixes == kind.file_keys else None
    if pair is not None and kind.out_axis != entry.layer.out_axis:
        pair = pair[1].mT, pair[0].mT
    groups, out, in_ = entry.dims
    if pair is None or pair[0].shape[::2] != (groups, in_) or pair[1].shape[:2] != (groups, out):
        what = f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {path!r}"
        expected = f"those of a {kind.name} layer with (groups, out, in) = {tuple(kind.dims(module, shape))}"
        problems.append(sentence(what, expected, "load it on the model that it was trained on"))
        return None
    if pair[0].shape[1] != layer.rank:
        what = f"rank {pair[0].shape[1]} at {path!r}"
        problems.append(sentence(what, f"{layer.rank}, as the config says", "get both files again"))
        return None
    return pair


@functools.cache
def _number_names(variant: str) -> frozenset[str]:
    """The names of a variant's numbers that a file holds, from a start as small as can be."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        eye = torch.eye(2)[None]
        start = InitContext(1, 2, 2, 1, 2, lambda: eye, eye.double, eye.double, lambda: eye)
        return frozenset(VARIANTS[variant].init(start)) - VARIANTS[variant].derived


@torch.no_grad()
def _unlike(
    names: Names, entry: LowRankPlan, own: dict[str, Tensor], peft_form: LowRank, variant: Variant
) -> str | None:
    """Why a variant's own numbers are not those of the plain change that the PEFT file holds, or None."""
    if own.keys() != _number_names(variant.name):
        return f"numbers {listing(sorted(own))}"
    module, dims = names.modules[entry.path], entry.start_dims

    def base() -> Tensor:
        dense = entry.storage.dense(weight_of(module, entry.weight)).float()
        dense = entry.layer.unfold(dense, entry.dims)
        return dense if entry.rows is None else dense[:, torch.tensor(entry.rows)]

    try:
        if variant.derived:
            start = InitContext(dims.groups, dims.out, dims.in_, entry.rank, entry.layer.fan_in(entry.dims))
            own = {**variant.init(start), **own}
        low, _ = variant.resolve(own, variant.scale(entry.alpha, entry.rank), base)
        low = low if entry.rows is None else low.place(torch.tensor(entry.rows), entry.dims.out)
        frozen_input = entry.layer.frozen_input(module)
        low = low if frozen_input is None else low.without(frozen_input)
        A, B = torch.cat([low.A, peft_form.A], 1), torch.cat([low.B * low.scale, -peft_form.B * peft_form.scale], 2)
        off = LowRank(A, B, 1.0).norm()
    except (RuntimeError, IndexError, ValueError) as error:
        return f"shapes that do not fit ({str(error).splitlines()[0]})"
    # what is stored in 16 bits may round otherwise elsewhere
    return f"another change (off by {off:.2g})" if off > 1e-2 * peft_form.norm() else None


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


def _verify_base(names: Names, saved: AdapterFiles, fingerprints: dict[str, str]) -> None:
    """Compare the fingerprint of every tensor of the base that the record speaks of."""
    record = saved.metadata["base"]
    wanted = prints_in(record)
    missing = wanted.keys() - fingerprints.keys()
    if missing:
        held = [tensor for tensor in base_tensors(names) if tensor.known and not missing.isdisjoint(tensor.names)]
        for tensor, print_ in zip(held, prints_of(held), strict=True):
            fingerprints.update(dict.fromkeys(tensor.names, print_))
    different = [name for name, expected in wanted.items() if fingerprints.get(name, expected) != expected]
    if different:
        raise BaseMismatchError(_another_base(saved, different))
    _warn_unproven(names, saved, [name for name in wanted if name not in fingerprints])


def _another_base(saved: AdapterFiles, different: Sequence[str]) -> str:
    record, parts = saved.metadata["base"], []
    for key, what in (("weights", "adapted layers"), ("rest", "other tensors")):
        names = [name for name in different if name in record.get(key, {})]
        parts += [f"{len(names)} of {len(record[key])} {what} ({listing(names, 3)})"] if names else []
    found = f"other weights in {' and '.join(parts)}"
    expected = f"the base that it was trained on, {record['name'] or record['architecture']}"
    do = "load that base, or pass verify_base=False if these are the same weights in another precision"
    lost = [name for name in record.get("fresh", ()) if name in different]
    if lost:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in lost))
        found += f", of which {listing(lost, 3)} were random as the adapter was trained, and are in no file"
        do = f"train it anew with train_also={modules[:3]!r}, or {do}"
    return f"The adapter {saved.path} was made for another base. {sentence(found, expected, do)}"


def _warn_unproven(names: Names, saved: AdapterFiles, lacking: Sequence[str]) -> None:
    """Warn where the record and the model do not speak of the same tensors. A record of an earlier Veneer speaks of
    adapted layers alone."""
    record = saved.metadata["base"]
    if "rest" not in record:
        return
    told = {*prints_in(record), *record.get("fresh", ())}
    own = {f"{peft.unnested(path)[0]}.{name}".lstrip(".") for path, full in saved.full.items() for name in full}
    unknown = [
        tensor.path
        for tensor in base_tensors(names)
        if isinstance(tensor.held, nn.Parameter) and told.isdisjoint(tensor.names) and own.isdisjoint(tensor.names)
    ]
    if lacking or unknown:
        parts = []
        if unknown:
            parts.append(f"{len(unknown)} parameters of this model are not in its record ({listing(unknown, 3)})")
        if lacking:
            parts.append(f"{len(lacking)} tensors of its record are not in this model ({listing(lacking, 3)})")
        warnings.warn(
            f"{saved.path} does not prove all of this base: {'; '.join(parts)}. That is right where nothing that "
            "you use reads them.",
            UnverifiedAdapter,
            stacklevel=6,
        )
