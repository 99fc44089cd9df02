"""The adapter parameters of a planned change: A, B and a variant's own, from the tensors of a
folder.

PEFT's file             A and B in PEFT's shapes, and what its variants have beside them
veneer.safetensors      the parameters of variants that PEFT lacks; A and B of PEFT's file are then
                        the plain change that they amount to, and must agree with them
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import means_parameter
from veneer.adapter_files.record import PARAMETERS
from veneer.attach import LowRankPlan, Names
from veneer.bases import weight_of
from veneer.errors import listing, sentence
from veneer.formats import peft
from veneer.layers import GENERAL_KIND, ParamRef, kind_for, parameter_path
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS, InitContext, Variant

#: the advice for files that do not belong together
COPY = "get another copy of the folder"
UNTIE = (
    "load it with veneer.load(…, untie=True), which gives each name a weight of its own; merged"
    " there, model.save_pretrained writes both"
)
USE_ITS_MODEL = "load it on the model that it was trained on"


@dataclass(frozen=True)
class ParameterReader:
    """Reads the adapter parameters of planned weights; adds what does not fit to ``problems``.

    Args:
        layers: the changes of PEFT's file, by the weight that each one changes.
    """

    saved: AdapterFiles
    names: Names
    layers: Mapping[ParamRef, peft.PeftLayer]
    problems: list[str]

    def add_problem(self, found: str, expected: str, do: str = USE_ITS_MODEL) -> None:
        self.problems.append(sentence(found, expected, do))

    def read(self, entry: LowRankPlan) -> dict[str, Tensor]:
        """The adapter parameters of one planned weight, by name; empty if they do not fit."""
        weight_path, layer = parameter_path(*entry.ref), self.layers.get(entry.ref)
        variant = VARIANTS[self.saved.config.variant]
        pair = self.shared_pair(entry)
        if pair is None or layer is None:
            return {}
        A, B = pair
        if layer.extras.keys() != set(variant.peft_keys.values()):
            expected = f"{listing(variant.peft_keys.values())}, as variant {variant.name!r} has"
            problem = f"{listing(layer.extras)} at {entry.path!r}"
            self.add_problem(problem, expected, "get both files again")
            return {}
        stored = self.saved.adapter_parameters.get(weight_path)
        if stored is not None:
            product = LowRank(A, B, layer.scale)
            reason = _disagreement(self.names, entry, dict(stored), product, variant)
            if reason:
                problem = f"{reason} in {PARAMETERS} for {weight_path!r}"
                self.add_problem(problem, f"what {peft.TENSORS} holds of it", COPY)
            return dict(stored)
        self.check_sizes(entry, layer, variant)
        rows = None if entry.rows is None else torch.tensor(entry.rows)
        if rows is not None and B.index_fill(1, rows, 0).any():
            problem = f"a change outside the rows that the record names for {weight_path!r}"
            self.add_problem(problem, "zeros there", COPY)
        parameters = {"A": A, "B": B if rows is None else B[:, rows]}
        for name, suffix in variant.peft_keys.items():
            vector = layer.extras[suffix].reshape(-1)
            if vector.numel() != entry.dims.groups * entry.dims.out:
                problem = f"no {suffix!r} that fits {entry.path!r}"
                self.add_problem(problem, "one number an output", "get it again")
                return {}
            parameters[name] = vector if rows is None else vector[rows]
        return parameters

    def check_sizes(self, entry: LowRankPlan, layer: peft.PeftLayer, variant: Variant) -> None:
        """Check that the plan, made from the record, has the rank, alpha and scale of PEFT's
        config."""
        weight_path = parameter_path(*entry.ref)
        missing = _parameter_names(variant.name) - {"A", "B", *variant.peft_keys}
        if missing and self.saved.record is not None:
            problem = f"no {listing(sorted(missing))} of {weight_path!r} in {PARAMETERS}"
            self.add_problem(problem, f"those of variant {variant.name!r}", COPY)
        scale = variant.scale(entry.alpha, entry.rank)
        if entry.rank != layer.rank or not math.isclose(scale, layer.scale):
            problem = (
                f"rank {entry.rank}, alpha {entry.alpha:g} and scale {scale:g} of {weight_path!r}"
                " in the record"
            )
            expected = f"{layer.rank}, {layer.alpha:g} and {layer.scale:g}, as in {peft.CONFIG}"
            self.add_problem(problem, expected, COPY)

    def shared_pair(self, entry: LowRankPlan) -> tuple[Tensor, Tensor] | None:
        """A and B of a planned weight, which every module that shares the weight must have alike;
        None if one of them has none that fits."""
        changes: list[tuple[Tensor, ...]] = []
        for ref in entry.holders:
            pair = self.pair(ref, entry)
            if pair is None:
                return None
            changes.append((*pair, *self.layers[ref].extras.values()))
        first = changes[0]
        if any(
            len(change) != len(first) or not all(map(torch.equal, change, first))
            for change in changes
        ):
            problem = f"different changes for {entry.path!r} and the modules that share its weight"
            self.add_problem(problem, "one change of a tied weight", UNTIE)
        A, B, *_ = first
        frozen_input = entry.layer.frozen_input(self.names.modules[entry.path])
        if frozen_input is not None and A[..., frozen_input].any():
            problem = f"a change of the padding row {frozen_input} of {entry.path!r}"
            expected = "none, as Veneer keeps that row at rest"
            self.add_problem(problem, expected, "set it to zero, or use PEFT for it")
        return A, B

    def pair(self, ref: ParamRef, entry: LowRankPlan) -> tuple[Tensor, Tensor] | None:
        """A [groups, rank, in] and B [groups, out, rank] that the file holds for ``ref``, one of
        the modules with the planned weight; None if they do not fit."""
        (path, name), module, layer = ref, self.names.modules[ref[0]], self.layers.get(ref)
        if layer is None:
            problem = (
                f"a change of {entry.path!r}, whose weight {path!r} shares, without one for"
                f" {path!r}"
            )
            if ref == entry.ref:
                problem = f"no change of {parameter_path(*ref)!r} in {peft.TENSORS}"
            self.add_problem(problem, "one change for a tied weight, under every name", UNTIE)
            return None
        kind = kind_for(module, name)
        if means_parameter(self.names, ref, self.saved.peft_config):
            kind = GENERAL_KIND  # PEFT reads a parameter alike in every kind of module
        shape = entry.storage.shape(weight_of(module, name))
        pair = None
        if layer.suffixes == kind.file_keys:
            pair = kind.unpack(layer.A, layer.B, module, shape)
        if pair is not None and kind.out_axis != entry.layer.out_axis:
            pair = pair[1].mT, pair[0].mT
        groups, out, in_ = entry.dims
        if (
            pair is None
            or pair[0].shape[::2] != (groups, in_)
            or pair[1].shape[:2] != (groups, out)
        ):
            problem = f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {path!r}"
            expected = (
                f"those of a {kind.name} layer with (groups, out, in) ="
                f" {tuple(kind.dims(module, shape))}"
            )
            self.add_problem(problem, expected)
            return None
        if pair[0].shape[1] != layer.rank:
            problem = f"rank {pair[0].shape[1]} at {path!r}"
            expected = f"{layer.rank}, as the config says"
            self.add_problem(problem, expected, "get both files again")
            return None
        return pair


@functools.cache
def _parameter_names(variant: str) -> frozenset[str]:
    """The names of a variant's parameters that a file holds, found by starting a tiny layer."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        eye = torch.eye(2)[None]
        start = InitContext(1, 2, 2, 1, 2, lambda: eye, eye.double, eye.double, lambda: eye)
        return frozenset(VARIANTS[variant].init(start)) - VARIANTS[variant].derived


@torch.no_grad()
def _disagreement(
    names: Names,
    entry: LowRankPlan,
    stored: dict[str, Tensor],
    product: LowRank,
    variant: Variant,
) -> str | None:
    """Why the parameters ``stored`` of a variant do not amount to ``product``, the plain change in
    PEFT's file; None if they do."""
    if stored.keys() - variant.derived != _parameter_names(variant.name):
        return f"numbers {listing(sorted(stored))}"
    module, dims = names.modules[entry.path], entry.start_dims

    def base() -> Tensor:
        dense = entry.storage.dense(weight_of(module, entry.weight)).float()
        dense = entry.layer.unfold(dense, entry.dims)
        return dense if entry.rows is None else dense[:, torch.tensor(entry.rows)]

    try:
        if variant.derived:
            start = InitContext(
                dims.groups, dims.out, dims.in_, entry.rank, entry.layer.fan_in(entry.dims)
            )
            stored = {**variant.init(start), **stored}
        low, _ = variant.resolve(stored, variant.scale(entry.alpha, entry.rank), base)
        low = (
            low if entry.rows is None else low.expand_rows(torch.tensor(entry.rows), entry.dims.out)
        )
        frozen_input = entry.layer.frozen_input(module)
        low = low if frozen_input is None else low.zero_input(frozen_input)
        A, B = (
            torch.cat([low.A, product.A], 1),
            torch.cat([low.B * low.scale, -product.B * product.scale], 2),
        )
        difference = LowRank(A, B, 1.0).norm()
    except (RuntimeError, IndexError, ValueError) as error:
        return f"shapes that do not fit ({str(error).splitlines()[0]})"
    # values stored in 16 bits may round differently on another machine
    if difference > 1e-2 * product.norm():
        return f"another change (off by {difference:.2g})"
    return None
