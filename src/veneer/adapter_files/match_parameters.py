"""The adapter parameters of a planned change (A, B and those of its variant), read from the tensors
of an adapter folder.

adapter_model.safetensors    A and B in PEFT's shapes, and the parameters of variants that PEFT has
veneer.safetensors           the parameters of variants that PEFT lacks. A and B in PEFT's file are
                             then the equivalent plain LoRA, and must agree with the parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import KeysView, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import means_parameter
from veneer.adapter_files.record import PARAMETERS
from veneer.attach import LowRankPlan, ModelIndex
from veneer.bases import weight_of
from veneer.errors import first_line, listing, sentence
from veneer.formats import peft
from veneer.layers import GENERAL_KIND, ParamRef, kind_for, parameter_path
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS, InitContext, Variant

#: the advice in errors about files that do not belong together
COPY_ADVICE = "get another copy of the folder"
#: the advice in errors about changes of one name of a tied weight
UNTIE_ADVICE = (
    "load it with veneer.load(…, untie=True), which gives each name a weight of its own; merged"
    " there, model.save_pretrained writes both"
)
#: the advice in errors about an adapter that does not fit the model
MODEL_ADVICE = "load it on the model that it was trained on"


@dataclass(frozen=True)
class ParameterReader:
    """Reads the adapter parameters of planned changes (A, B and those of the variant) from an
    adapter's files. Errors in the files are added to ``problems``.

    Args:
        model_index: the modules of the model by path.
        layers: the changes in PEFT's file, by (module path, name) of the changed weight.
    """

    adapter_files: AdapterFiles
    model_index: ModelIndex
    layers: Mapping[ParamRef, peft.PeftLayer]
    problems: list[str]

    def add_problem(self, problem: str, expected: str, advice: str = MODEL_ADVICE) -> None:
        self.problems.append(sentence(problem, expected, advice))

    def read(self, plan: LowRankPlan) -> dict[str, Tensor]:
        """The adapter parameters of one planned change, by name; empty if they do not fit it."""
        weight_path, layer = parameter_path(*plan.ref), self.layers.get(plan.ref)
        variant = VARIANTS[self.adapter_files.config.variant]
        factors = self.tied_factors(plan)
        if factors is None or layer is None:
            return {}
        A, B = factors
        if layer.extras.keys() != set(variant.peft_keys.values()):
            self.add_problem(
                f"{listing(layer.extras)} at {plan.path!r}",
                f"{listing(variant.peft_keys.values())}, as variant {variant.name!r} has",
                "get both files again",
            )
            return {}
        variant_parameters = self.adapter_files.adapter_parameters.get(weight_path)
        if variant_parameters is not None:
            product = LowRank(A, B, layer.scale)
            reason = _disagreement(
                self.model_index, plan, dict(variant_parameters), product, variant
            )
            if reason:
                self.add_problem(
                    f"{reason} in {PARAMETERS} for {weight_path!r}",
                    f"what {peft.TENSORS} holds of it",
                    COPY_ADVICE,
                )
            # in the variant's order, by which an optimiser's state names the parameters
            ordered_names = [*_parameter_names(variant.name), *variant_parameters]
            return {n: variant_parameters[n] for n in ordered_names if n in variant_parameters}
        self.check_sizes(plan, layer, variant)
        row_indices = None if plan.rows is None else torch.tensor(plan.rows)
        if row_indices is not None and B.index_fill(1, row_indices, 0).any():
            self.add_problem(
                f"a change outside the rows that the record names for {weight_path!r}",
                "zeros there",
                COPY_ADVICE,
            )
        parameters = {"A": A, "B": B if row_indices is None else B[:, row_indices]}
        for name, suffix in variant.peft_keys.items():
            vector = layer.extras[suffix].reshape(-1)
            if vector.numel() != plan.dims.groups * plan.dims.out:
                self.add_problem(
                    f"no {suffix!r} that fits {plan.path!r}", "one number an output", "get it again"
                )
                return {}
            parameters[name] = vector if row_indices is None else vector[row_indices]
        return parameters

    def check_sizes(self, plan: LowRankPlan, layer: peft.PeftLayer, variant: Variant) -> None:
        """Add a problem if a plan from the record does not have the rank and scale that ``layer``
        has from PEFT's config, or if a parameter of the variant is missing in the folder."""
        weight_path = parameter_path(*plan.ref)
        missing_names = _parameter_names(variant.name) - {"A", "B", *variant.peft_keys}
        if missing_names and self.adapter_files.record is not None:
            self.add_problem(
                f"no {listing(sorted(missing_names))} of {weight_path!r} in {PARAMETERS}",
                f"those of variant {variant.name!r}",
                COPY_ADVICE,
            )
        scale = variant.scale(plan.alpha, plan.rank)
        if plan.rank != layer.rank or not math.isclose(scale, layer.scale):
            self.add_problem(
                f"rank {plan.rank}, alpha {plan.alpha:g} and scale {scale:g} of {weight_path!r}"
                " in the record",
                f"{layer.rank}, {layer.alpha:g} and {layer.scale:g}, as in {peft.CONFIG}",
                COPY_ADVICE,
            )

    def tied_factors(self, plan: LowRankPlan) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a planned weight, the same for every module that shares the weight: if their
        changes differ, a problem is added. None if a module has no change that fits."""
        changes: list[tuple[Tensor, ...]] = []
        for ref in plan.holders:
            factors = self.factors_at(ref, plan)
            if factors is None:
                return None
            changes.append((*factors, *self.layers[ref].extras.values()))
        first_change = changes[0]
        if any(
            len(change) != len(first_change) or not all(map(torch.equal, change, first_change))
            for change in changes
        ):
            self.add_problem(
                f"different changes for {plan.path!r} and the modules that share its weight",
                "one change of a tied weight",
                UNTIE_ADVICE,
            )
        A, B, *_ = first_change
        frozen_input = plan.layer.frozen_input(self.model_index.modules[plan.path])
        if frozen_input is not None and A[..., frozen_input].any():
            self.add_problem(
                f"a change of the padding row {frozen_input} of {plan.path!r}",
                "none, as Veneer keeps that row at rest",
                "set it to zero, or use PEFT for it",
            )
        return A, B

    def factors_at(self, ref: ParamRef, plan: LowRankPlan) -> tuple[Tensor, Tensor] | None:
        """(A [groups, rank, in], B [groups, out, rank]) from the file for ``ref``, one (module
        path, name) of the planned weight. If the file has no change of ``ref`` that fits, None, and
        a problem is added."""
        (module_path, parameter_name), module, layer = (
            ref,
            self.model_index.modules[ref[0]],
            self.layers.get(ref),
        )
        if layer is None:
            problem = (
                f"a change of {plan.path!r}, whose weight {module_path!r} shares, without one for"
                f" {module_path!r}"
            )
            if ref == plan.ref:
                problem = f"no change of {parameter_path(*ref)!r} in {peft.TENSORS}"
            self.add_problem(
                problem, "one change for a tied weight, under every name", UNTIE_ADVICE
            )
            return None
        layer_kind = kind_for(module, parameter_name)
        if means_parameter(self.model_index, ref, self.adapter_files.peft_config):
            # PEFT's file has one layout for target parameters, whatever the kind of the module
            layer_kind = GENERAL_KIND
        weight_shape = plan.storage.shape(weight_of(module, parameter_name))
        factors = (
            layer_kind.unpack(layer.A, layer.B, module, weight_shape)
            if layer.suffixes == layer_kind.file_keys
            else None
        )
        if factors is not None and layer_kind.out_axis != plan.layer.out_axis:
            factors = factors[1].mT, factors[0].mT
        groups, out, in_ = plan.dims
        if (
            factors is None
            or factors[0].shape[::2] != (groups, in_)
            or factors[1].shape[:2] != (groups, out)
        ):
            self.add_problem(
                f"A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} at {module_path!r}",
                f"those of a {layer_kind.name} layer with (groups, out, in) ="
                f" {tuple(layer_kind.dims(module, weight_shape))}",
            )
            return None
        if factors[0].shape[1] != layer.rank:
            self.add_problem(
                f"rank {factors[0].shape[1]} at {module_path!r}",
                f"{layer.rank}, as the config says",
                "get both files again",
            )
            return None
        return factors


@functools.cache
def _parameter_names(variant: str) -> KeysView[str]:
    """The names of a variant's parameters that a file holds, in the variant's order. They are found
    by initialising the variant for a tiny layer."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        eye = torch.eye(2)[None]
        init_context = InitContext(1, 2, 2, 1, 2, lambda: eye, eye.double, eye.double, lambda: eye)
        names = dict.fromkeys(VARIANTS[variant].init(init_context))
    return dict.fromkeys(name for name in names if name not in VARIANTS[variant].derived).keys()


@torch.no_grad()
def _disagreement(
    model_index: ModelIndex,
    plan: LowRankPlan,
    variant_parameters: dict[str, Tensor],
    product: LowRank,
    variant: Variant,
) -> str | None:
    """Why the ``variant_parameters``, those of veneer.safetensors, make another change of the
    weight than ``product``, the plain LoRA in PEFT's file; None if they make the same change."""
    if variant_parameters.keys() - variant.derived != _parameter_names(variant.name):
        return f"numbers {listing(sorted(variant_parameters))}"
    module, dims = model_index.modules[plan.path], plan.start_dims

    def read_base_weight() -> Tensor:
        dense = plan.storage.dense(weight_of(module, plan.weight)).float()
        dense = plan.layer.unfold(dense, plan.dims)
        return dense if plan.rows is None else dense[:, torch.tensor(plan.rows)]

    try:
        if variant.derived:
            init_context = InitContext(
                dims.groups, dims.out, dims.in_, plan.rank, plan.layer.fan_in(plan.dims)
            )
            variant_parameters = {**variant.init(init_context), **variant_parameters}
        variant_product, _ = variant.resolve(
            variant_parameters, variant.scale(plan.alpha, plan.rank), read_base_weight
        )
        variant_product = (
            variant_product
            if plan.rows is None
            else variant_product.expand_rows(torch.tensor(plan.rows), plan.dims.out)
        )
        frozen_input = plan.layer.frozen_input(module)
        variant_product = (
            variant_product if frozen_input is None else variant_product.zero_input(frozen_input)
        )
        A = torch.cat([variant_product.A, product.A], 1)
        B = torch.cat([variant_product.B * variant_product.scale, -product.B * product.scale], 2)
        difference_norm = LowRank(A, B, 1.0).norm()
    except (RuntimeError, IndexError, ValueError) as error:
        return f"shapes that do not fit ({first_line(error)})"
    # another machine may round 16-bit values differently, so 1 % of difference is permitted
    if difference_norm > 1e-2 * product.norm():
        return f"another change (off by {difference_norm:.2g})"
    return None
