"""The adapter parameters of one planned weight, from what the files of a folder hold for it.

adapter_model.safetensors   A and B under the name of each module that holds the weight (a tied one: several)
veneer.safetensors          a variant's own parameters, where PEFT has none like them; A and B above are then the
                            plain change that they amount to, and both must agree
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import kind_for, means_parameter
from veneer.adapter_files.record import PARAMETERS
from veneer.attach.adapted_module import weight_of
from veneer.attach.lookup import parameter_path
from veneer.attach.plan import LowRankPlan
from veneer.attach.targets import Names, ParamRef
from veneer.errors import listing, sentence
from veneer.formats import peft
from veneer.layers import LAYERS
from veneer.layers._base import GENERAL
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS, InitContext, Variant


def parameters_of(
    names: Names,
    entry: LowRankPlan,
    layers: Mapping[ParamRef, peft.PeftLayer],
    saved: AdapterFiles,
    problems: list[str],
) -> dict[str, Tensor]:
    """The adapter parameters of one planned weight, by name; problems are added."""

    def problem(found: str, expected: str, do: str = "get another copy of the folder") -> None:
        problems.append(sentence(found, expected, do))

    at, changes = parameter_path(*entry.ref), []
    for ref in entry.holders:
        pair = _pair(names, ref, entry, layers.get(ref), saved, problems)
        if pair is None:
            return {}
        changes.append((*pair, *layers[ref].extras.values()))
    (A, B, *_), layer, variant = changes[0], layers[entry.ref], VARIANTS[saved.config.variant]
    if any(len(one) != len(changes[0]) or not all(map(torch.equal, one, changes[0])) for one in changes):
        found = f"different changes for {entry.path!r} and the modules that share its weight"
        problem(found, "one change of a tied weight", "untie the weights first")
    frozen_input = entry.layer.frozen_input(names.modules[entry.path])
    if frozen_input is not None and A[..., frozen_input].any():
        found = f"a change of the padding row {frozen_input} of {entry.path!r}"
        problem(found, "none, as Veneer keeps that row at rest", "set it to zero, or use PEFT for it")
    if layer.extras.keys() != set(variant.peft_keys.values()):
        expected = f"{listing(variant.peft_keys.values())}, as variant {variant.name!r} has"
        problem(f"{listing(layer.extras)} at {entry.path!r}", expected, "get both files again")
        return {}
    stored = saved.adapter_parameters.get(at)
    if stored is not None:
        unlike = _unlike(names, entry, dict(stored), LowRank(A, B, layer.scale), variant)
        if unlike:
            problem(f"{unlike} in {PARAMETERS} for {at!r}", f"what {peft.TENSORS} holds of it")
        return dict(stored)
    lacking = _parameter_names(variant.name) - {"A", "B", *variant.peft_keys}
    if lacking and saved.record is not None:
        problem(f"no {listing(sorted(lacking))} of {at!r} in {PARAMETERS}", f"those of variant {variant.name!r}")
    scale = variant.scale(entry.alpha, entry.rank)
    if entry.rank != layer.rank or not math.isclose(scale, layer.scale):
        found = f"rank {entry.rank}, alpha {entry.alpha:g} and scale {scale:g} of {at!r} in the record"
        problem(found, f"{layer.rank}, {layer.alpha:g} and {layer.scale:g}, as in {peft.CONFIG}")
    rows = None if entry.rows is None else torch.tensor(entry.rows)
    if rows is not None and B.index_fill(1, rows, 0).any():
        problem(f"a change outside the rows that the record names for {at!r}", "zeros there")
    parameters = {"A": A, "B": B if rows is None else B[:, rows]}
    for name, suffix in variant.peft_keys.items():
        vector = layer.extras[suffix].reshape(-1)
        if vector.numel() != entry.dims.groups * entry.dims.out:
            problem(f"no {suffix!r} that fits {entry.path!r}", "one number an output", "get it again")
            return {}
        parameters[name] = vector if rows is None else vector[rows]
    return parameters


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
def _parameter_names(variant: str) -> frozenset[str]:
    """The names of a variant's parameters that a file holds, from a start as small as can be."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        eye = torch.eye(2)[None]
        start = InitContext(1, 2, 2, 1, 2, lambda: eye, eye.double, eye.double, lambda: eye)
        return frozenset(VARIANTS[variant].init(start)) - VARIANTS[variant].derived


@torch.no_grad()
def _unlike(
    names: Names, entry: LowRankPlan, stored: dict[str, Tensor], peft_form: LowRank, variant: Variant
) -> str | None:
    """Why a variant's own parameters are not those of the plain change that the PEFT file holds, or None."""
    if stored.keys() != _parameter_names(variant.name):
        return f"numbers {listing(sorted(stored))}"
    module, dims = names.modules[entry.path], entry.start_dims

    def base() -> Tensor:
        dense = entry.storage.dense(weight_of(module, entry.weight)).float()
        dense = entry.layer.unfold(dense, entry.dims)
        return dense if entry.rows is None else dense[:, torch.tensor(entry.rows)]

    try:
        if variant.derived:
            start = InitContext(dims.groups, dims.out, dims.in_, entry.rank, entry.layer.fan_in(entry.dims))
            stored = {**variant.init(start), **stored}
        low, _ = variant.resolve(stored, variant.scale(entry.alpha, entry.rank), base)
        low = low if entry.rows is None else low.place(torch.tensor(entry.rows), entry.dims.out)
        frozen_input = entry.layer.frozen_input(module)
        low = low if frozen_input is None else low.without(frozen_input)
        A, B = torch.cat([low.A, peft_form.A], 1), torch.cat([low.B * low.scale, -peft_form.B * peft_form.scale], 2)
        off = LowRank(A, B, 1.0).norm()
    except (RuntimeError, IndexError, ValueError) as error:
        return f"shapes that do not fit ({str(error).splitlines()[0]})"
    # what is stored in 16 bits may round otherwise elsewhere
    return f"another change (off by {off:.2g})" if off > 1e-2 * peft_form.norm() else None
