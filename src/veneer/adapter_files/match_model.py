"""Match an adapter folder with a model: whether it fits, whether it was trained on this base, and
what has to be installed.

The steps of ``match``, which returns a ``LoadPlan``, and the files that hold them:

read              read the folder, without the model                          folder
leave_out_ignored leave out changes that PEFT ignores                         match_base
match_modules     find the weight of the model for each change of the file    peft_mapping
plan_low_rank     plan each low-rank change; read A, B and further tensors    match_parameters
plan_full         plan the parameters that are trained in full
check_complete    check that there is a tensor for every target
must_be_base      compare the fingerprints of the base                        match_base
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import match_base, saved_token_rows
from veneer.adapter_files.expert_pairs import stack_experts
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.initial_products import without_initial_product
from veneer.adapter_files.match_parameters import COPY_ADVICE, MODEL_ADVICE, ParameterReader
from veneer.adapter_files.peft_deviations import attention_above, deviation_reasons
from veneer.adapter_files.peft_mapping import all_refs, means_parameter, module_at, ref_at
from veneer.adapter_files.tuner_folder import weight_lookup_of
from veneer.attach import (
    TOKEN_ROWS,
    LayerAdapter,
    LowRankPlan,
    ModelIndex,
    Plans,
    TargetSpec,
    complete_plans,
    has_forward,
    plan_low,
)
from veneer.bases import own_parameters, weight_of
from veneer.distributed import base_class
from veneer.errors import AdapterError, BaseMismatchError, listing, nearest, raise_all, sentence
from veneer.fileio.hashing import fingerprint_without_rows
from veneer.fileio.throttle import throttle
from veneer.formats import peft, peft_behaviour, peft_fields, peft_paths, peft_tokens
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32


@dataclass(frozen=True)
class LoadPlan:
    """An adapter folder that fits a model.

    Fields:
        adapter_files: the content of the folder.
        plans: which changes and which copies of parameters have to be installed.
        adapter_parameters: by changed weight, the parameters of its change by name (A, B, …).
        full: the tensors that are trained in full, by module path and then by name.
    """

    adapter_files: AdapterFiles
    plans: Plans
    adapter_parameters: Mapping[ParamRef, Mapping[str, Tensor]]
    full: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def fill(self, layer_adapters: Mapping[str, LayerAdapter]) -> None:
        """Copy the tensors that are trained in full into the installed ``layer_adapters``, which
        are given by module path."""
        for path, layer_adapter in layer_adapters.items():
            installed_tensors = {**layer_adapter.full._parameters, **layer_adapter.full._buffers}
            for name, tensor in self.full.get(path, {}).items():
                installed_tensors[name].copy_(tensor)


@dataclass
class MatchCache:
    """Results that are kept to verify further adapters of the same model in a fraction of the time.
    The model must not change in between.

    Fields:
        model_index: the modules of the model by path.
        fingerprints: those of the model's weights, by kind of hash and then by name.
        plans: the plans of low-rank changes, by their targets, ranks and other settings.
    """

    model_index: ModelIndex
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    plans: dict[Any, tuple[LowRankPlan, ...]] = field(default_factory=dict)

    def plan(
        self, specs: Mapping[ParamRef, TargetSpec], problems: list[str]
    ) -> tuple[LowRankPlan, ...]:
        """The plans for the targets ``specs``, from the cache if possible. Reasons against a plan
        are added to ``problems``; the plans are then not cached."""
        cache_key = tuple(
            (ref, spec.rank, spec.alpha, repr(spec.slices), spec.module_only, spec.tokens)
            for ref, spec in specs.items()
        )
        if cache_key in self.plans:
            return self.plans[cache_key]
        problem_count, plans = len(problems), tuple(plan_low(self.model_index, specs, problems))
        if len(problems) == problem_count:
            self.plans[cache_key] = plans
        return plans


def match(
    model: nn.Module,
    path: str | Path,
    problems: list[str],
    *,
    verify_base: bool = True,
    of_weights: bool = False,
    cache: MatchCache | None = None,
) -> LoadPlan:
    """Verify an adapter folder against a model, without changing the model (see ``install_from``).

    Args:
        problems: the problems that the caller found already. They are raised with all others.
        verify_base: whether to compare the base with the folder's record, or PEFT's base weights.
        of_weights: whether a folder without a record is accepted even if PEFT would compute another
            result with it than a model with changed weights does (see ``install_from``).
        cache: earlier results for the same model; new results are added.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: the adapter was trained on a base with other weights.
    """
    cache = MatchCache(ModelIndex(model)) if cache is None else cache
    index = cache.model_index
    adapter_files = match_base.leave_out_ignored(read(path, weight_lookup_of(index)), index)
    adapter_files = stack_experts(adapter_files, index, problems)
    by_peft_rules = adapter_files.record is None and not of_weights
    matching = _Match(adapter_files, index, problems, by_peft_rules)
    matching.match_modules()
    matching.plan_low_rank(cache)
    matching.plan_full(verify_base)
    matching.check_complete()
    raise_all(
        AdapterError, f"The adapter {path} does not fit this {base_class(model).__name__}", problems
    )
    if adapter_files.record is None:
        match_base.warn_foreign(path)
        module_only_paths = [plan.path for plan in matching.low_rank if plan.module_only]
        match_base.warn_module_only(path, module_only_paths)
    elif verify_base:
        match_base.must_be_base(index, adapter_files, cache.fingerprints)
    return LoadPlan(adapter_files, matching.plans, matching.adapter_parameters, matching.full)


class _Match:
    """The state of one call of ``match``. Each step reads the attributes that the earlier steps
    have set, and adds to ``problems``."""

    def __init__(
        self, files: AdapterFiles, index: ModelIndex, problems: list[str], by_peft_rules: bool
    ) -> None:
        """``by_peft_rules``: whether another library wrote the folder, so that its tensors mean
        what PEFT computes with them, which may differ from the result of changed weights."""
        self.adapter_files, self.model_index, self.problems = files, index, problems
        self.by_peft_rules = by_peft_rules
        self.layers: dict[ParamRef, peft.PeftLayer] = {}
        #: weights that other code reads directly: PEFT changes only the output of their module, so
        #: this code gets the unchanged weight
        self.module_only: set[ParamRef] = set()
        self.low_rank: tuple[LowRankPlan, ...] = ()
        self.adapter_parameters: dict[ParamRef, dict[str, Tensor]] = {}
        self.tokens: dict[ParamRef, peft_tokens.TokenRows] = {}
        self.full: dict[str, dict[str, Tensor]] = {}
        #: PEFT's biases beside B (``lora_bias``), multiplied by the scale, by module path
        self.biases: dict[str, Tensor] = {}
        #: the names of the tensors in ``full`` that are parameters, without buffers, by module path
        self.full_names: dict[str, tuple[str, ...]] = {}

    def add_problem(self, problem: str, expected: str, advice: str = MODEL_ADVICE) -> None:
        self.problems.append(sentence(problem, expected, advice))

    def add_missing_module(self, target_path: str, module_path: str) -> None:
        """Add the problem that the model lacks ``module_path``, which ``target_path`` needs."""
        suggestion = nearest(module_path, self.model_index.modules)
        problem = f"a change of {target_path!r}, which this model lacks{suggestion}"
        self.add_problem(problem, "the same modules")

    def match_modules(self) -> None:
        """Find the weight of the model for each change and for the trained tokens of the folder."""
        for file_path, file_layer in throttle(self.adapter_files.low.items()):
            ref = ref_at(self.model_index, file_path, self.adapter_files.peft_config)
            if ref is None:
                self.add_missing_module(file_layer.target_path, file_layer.target_path)
                continue
            if ref in self.layers:
                problem = f"two changes of {parameter_path(*ref)!r} in {self.adapter_files.path}"
                self.add_problem(problem, "one", "get the whole file again")
            layer = self.split_off_bias(ref, self.with_config_scale(ref, file_path, file_layer))
            self.layers[ref] = (
                layer
                if self.adapter_files.record is not None
                else self.as_weight_change(ref, layer)
            )
        # PEFT skips modules that the model lacks; here they are a sign of a wrong model
        for path in self.adapter_files.ignored_modules:
            if path not in self.model_index.modules:
                self.add_missing_module(path, path)
        if self.adapter_files.tokens or self.adapter_files.peft_config.get(
            peft_tokens.INDICES_FIELD
        ):
            self.tokens = saved_token_rows.match_tokens(
                self.model_index, self.adapter_files, self.problems, self.by_peft_rules
            )

    def with_config_scale(
        self, ref: ParamRef, file_path: str, file_layer: peft.PeftLayer
    ) -> peft.PeftLayer:
        """The change with the rank, alpha and scale that PEFT's config gives to this weight. For a
        folder of another library, PEFT's result must equal that of a changed weight. If it differs
        only for code that reads the weight directly, the weight is added to ``module_only``; for
        any other difference, a problem is added."""
        model_index, peft_config = self.model_index, self.adapter_files.peft_config
        is_parameter = means_parameter(model_index, ref, peft_config)
        attention_path = (
            attention_above(model_index, ref)
            if peft_paths.attention_of(file_path) is not None
            else None
        )
        module = model_index.modules[ref[0]]
        has_several_weights = len(kind_for(module, ref[1]).weights(module)) > 1
        if is_parameter or has_several_weights:
            config_path = parameter_path(*ref)
        else:
            config_path = ref[0] if attention_path is None else attention_path
        rank, alpha, scale = peft_paths.rank_alpha_scale(peft_config, config_path)
        if self.by_peft_rules:
            reader_reason, reason = deviation_reasons(
                model_index, ref, file_layer, is_parameter, self.adapter_files.tuner, attention_path
            )
            if reader_reason is not None and has_forward(module):
                self.module_only.add(ref)
            elif reader_reason is not None:
                reason = reader_reason
            if attention_path is not None:
                alpha = peft_behaviour.OUT_PROJ_REPEATS * alpha
                scale = peft_behaviour.OUT_PROJ_REPEATS * scale
                reason = peft_behaviour.out_proj_problem(peft_config) if reason is None else reason
            if reason is not None:
                problem = (
                    f"a change of {file_layer.target_path!r} that PEFT applies in another way:"
                    f" {reason}"
                )
                self.add_problem(problem, "a change of the weight", "use PEFT for it")
        return replace(file_layer, rank=rank, alpha=alpha, scale=scale)

    def split_off_bias(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """The change without PEFT's bias beside B (``lora_bias``), which ``add_biases`` later adds
        to the module's own bias. If the module cannot have this bias, a problem is added."""
        if self.adapter_files.peft_config.get("lora_bias") is not True:
            return layer
        extras = dict(layer.extras)
        bias = extras.pop(peft.LORA_BIAS, None)
        module, weight = (
            self.model_index.modules[ref[0]],
            weight_of(self.model_index.modules[ref[0]], ref[1]),
        )
        if bias is None or bias.shape != (layer.B.shape[0],):
            problem = f"no {peft.LORA_BIAS!r} that fits {layer.target_path!r}"
            self.add_problem(problem, "one number an output", "get the whole file again")
        elif (
            "bias" not in module._parameters
            or kind_for(module, ref[1]).name not in peft_behaviour.KINDS_WITH_BIAS
        ):
            self.add_problem(
                f"a bias beside the change of {layer.target_path!r}",
                "a layer with room for one",
                "use PEFT for it",
            )
        elif (
            not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.is_floating_point()
        ):
            problem = (
                f"a bias beside the change of {layer.target_path!r}, whose weight is stored packed"
                " or is not here"
            )
            self.add_problem(problem, "a plain weight", "load it on the base in floating point")
        else:
            self.biases[ref[0]] = bias.double() * layer.scale
        return replace(layer, extras=extras)

    def add_biases(self) -> None:
        """Put into ``full`` the sum of PEFT's bias beside B and the module's bias, if it has one,
        for each module in ``biases``."""
        for path, bias in self.biases.items():
            module_full = self.full.setdefault(path, {})
            module_bias = self.model_index.modules[path]._parameters["bias"]
            trained_bias = module_full.get("bias", module_bias)
            bias_sum = (
                bias
                if trained_bias is None
                else trained_bias.detach().to("cpu", torch.float64) + bias
            )
            module_full["bias"] = bias_sum.to(
                at_least_float32(bias_sum.dtype if module_bias is None else module_bias.dtype)
            )

    def as_weight_change(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """A change from a folder of PEFT, as ΔW = scale · B A of the original base weight. For
        PiSSA and OLoRA, ΔW is computed from the base, as PEFT subtracts the initial B A from it. A
        rank above min(out, in), which PEFT accepts, is reduced."""
        if peft_fields.changes_base_at_load(self.adapter_files.peft_config):
            kind_name = kind_for(self.model_index.modules[ref[0]], ref[1]).name
            product = without_initial_product(
                self.model_index, ref, kind_name, self.adapter_files.peft_config, layer
            )
            if isinstance(product, str):
                self.add_problem(
                    f"{layer.target_path!r}: {product}",
                    "a change of the base",
                    "let PEFT convert it when it saves",
                )
                return layer
            layer = self.with_product(layer, product)
        A, B = layer.A, layer.B
        is_rank_small = not (A.numel() and B.numel()) or layer.rank <= min(
            A.numel() // len(A), B.numel() // B.shape[1]
        )
        if is_rank_small or layer.low.rank != layer.rank:
            return layer
        return self.with_product(layer, layer.low.thin())

    def with_product(self, layer: peft.PeftLayer, product: LowRank) -> peft.PeftLayer:
        """The change with ``product`` in place of its A and B. The new alpha is the one from which
        the config's rule (with or without ``use_rslora``) computes the scale of ``product``."""
        is_rslora = self.adapter_files.peft_config.get("use_rslora")
        alpha = product.scale * (math.sqrt(product.rank) if is_rslora else product.rank)
        return replace(layer.with_low_rank(product), alpha=alpha, extras=layer.extras)

    def plan_low_rank(self, cache: MatchCache) -> None:
        """Plan the changes that the record lists, or those in the file if there is no record. Then
        read the adapter parameters of each planned weight."""
        adapter_files, layers = self.adapter_files, self.layers
        recorded_changes = adapter_files.metadata.get("changes")
        if recorded_changes is None:
            tuner = adapter_files.tuner
            ranks_and_alphas = {} if tuner is None else tuner.ranks_and_alphas
            specs = {}
            for ref, layer in layers.items():
                rank, alpha = ranks_and_alphas.get(parameter_path(*ref), (layer.rank, layer.alpha))
                specs[ref] = TargetSpec(rank, alpha, module_only=ref in self.module_only)
        else:
            specs = self.specs_from_record(recorded_changes)
        for ref, token_rows in self.tokens.items():
            specs[ref] = replace(specs.get(ref, TargetSpec(0, 1.0)), tokens=token_rows.ids)
        self.low_rank = cache.plan(specs, self.problems)
        reader = ParameterReader(adapter_files, self.model_index, layers, self.problems)
        self.adapter_parameters = {
            plan.ref: (reader.read(plan) if plan.rank else {}) | self.token_row_parameters(plan)
            for plan in throttle(self.low_rank)
        }
        if recorded_changes is not None:
            planned_refs = {ref for plan in self.low_rank for ref in plan.holders} | set(specs)
            unrecorded_paths = [parameter_path(*ref) for ref in layers if ref not in planned_refs]
            unrecorded_paths += sorted(
                adapter_files.adapter_parameters.keys() - recorded_changes.keys()
            )
            if unrecorded_paths:
                problem = f"changes that the record does not know: {listing(unrecorded_paths)}"
                self.add_problem(problem, "the files as they were saved", COPY_ADVICE)

    def token_row_parameters(self, plan: LowRankPlan) -> dict[str, Tensor]:
        """{``TOKEN_ROWS``: the trained token rows of the planned weight}, as adapter parameters;
        empty if the folder has none. If the record lists other tokens, a problem is added."""
        token_rows = self.tokens.get(plan.ref)
        if self.adapter_files.record is not None and saved_token_rows.differs_from_record(
            self.adapter_files, plan.full_path, token_rows
        ):
            self.add_problem(
                f"other trained tokens of {plan.full_path!r} than its record says",
                "the same",
                COPY_ADVICE,
            )
        return {} if token_rows is None else {TOKEN_ROWS: token_rows.rows}

    def specs_from_record(self, changes: Mapping[str, Any]) -> dict[ParamRef, TargetSpec]:
        """The settings of the changes that a record lists, by weight. For a weight that the model
        lacks, a problem is added."""
        specs: dict[ParamRef, TargetSpec] = {}
        for weight_path, change in changes.items():
            module_path, _, parameter_name = weight_path.rpartition(".")
            path = self.model_index.canonical.get(module_path)
            if path is None or parameter_name not in own_parameters(self.model_index.modules[path]):
                self.add_missing_module(weight_path, module_path)
            else:
                specs[path, parameter_name] = TargetSpec(
                    change["rank"],
                    change["alpha"],
                    change.get("rows"),
                    module_only=change.get("module_only", False),
                )
        return specs

    def plan_full(self, verify_base: bool) -> None:
        """Check the tensors that are trained in full against the modules of the model, and set
        ``plans``, the plans of all low-rank changes and of these tensors."""
        model_index = self.model_index
        for file_path, tensors in self.adapter_files.full.items():
            self.full.setdefault(module_at(model_index, file_path), {}).update(tensors)
        for plan in self.low_rank:
            self.remove_base_weight(plan, verify_base)
        self.add_biases()
        for path, tensors in self.full.items():
            module = model_index.modules.get(path)
            module_tensors = {**module._parameters, **module._buffers} if module is not None else {}
            for name, tensor in tensors.items():
                if name == "bias" and path in self.biases and module_tensors[name] is None:
                    continue  # ``lora_bias`` adds a bias to a layer that has none
                if module_tensors.get(name) is None:
                    problem = f"a tensor for {path}.{name}, which this model lacks"
                    self.add_problem(problem, "the same modules", "use its model")
                elif module_tensors[name].shape != tensor.shape:
                    problem = f"{path}.{name} of shape {tuple(tensor.shape)}"
                    expected = f"{tuple(module_tensors[name].shape)}"
                    self.add_problem(problem, expected, "use the model that it was trained on")
            if module is not None:
                self.full_names[path] = tuple(
                    name for name in tensors if name in module._parameters
                )
        modules_with_buffers = frozenset(
            path
            for path, tensors in self.full.items()
            if path in model_index.modules and model_index.modules[path]._buffers.keys() & tensors
        )
        self.plans = complete_plans(
            model_index,
            self.adapter_files.config,
            self.low_rank,
            self.full_names,
            self.problems,
            full_modules=modules_with_buffers,
            split_ties=model_index.split_ties(self.full),
        )

    def remove_base_weight(self, plan: LowRankPlan, verify_base: bool) -> None:
        """Remove the frozen weight of an adapted embedding or head from ``full``, where PEFT saves
        it. With ``verify_base``, raise ``BaseMismatchError`` if the model has another weight."""
        weight = weight_of(self.model_index.modules[plan.path], plan.weight)
        for module_path, name in plan.holders:
            saved_weight = self.full.get(module_path, {}).pop(name, None)
            if saved_weight is None or not verify_base:
                continue
            fingerprints = [  # without the rows that the adapter replaces, which may differ
                fingerprint_without_rows(tensor, plan.tokens or ())
                for tensor in (saved_weight, plan.storage.dense(weight))
            ]
            if fingerprints[0] != fingerprints[1]:
                raise BaseMismatchError(
                    f"another weight of {module_path!r} in {self.adapter_files.path} than in this"
                    " model",
                    "the base that it was trained on",
                    "load that base",
                )

    def check_complete(self) -> None:
        """Check that a folder without a record has tensors for every target of its config, because
        no hash tells whether some are missing."""
        if self.adapter_files.record is not None:
            return
        model_index, peft_config = self.model_index, self.adapter_files.peft_config
        weight_names = {
            path: layer_kind.weight
            for path, module in model_index.modules.items()
            if (layer_kind := kind_of(module)) is not None
        }
        expected_refs = {
            (path, weight_names[path])
            for path in peft_paths.expected_paths(peft_config, weight_names) or ()
            if weight_of(model_index.modules[path], weight_names[path]) is not None
        }
        expected_refs |= {
            ref for ref in all_refs(model_index) if means_parameter(model_index, ref, peft_config)
        }
        missing_paths = sorted(parameter_path(*ref) for ref in expected_refs - self.layers.keys())
        # the tensors of a tuner that trains its layers in full are in ``full``, not in ``layers``
        if self.adapter_files.tuner is not None and self.adapter_files.tuner.trains_in_full:
            source_config = self.adapter_files.tuner.source
            full_paths = peft_paths.expected_paths(source_config, model_index.modules) or ()
            missing_paths += sorted(
                path for path in full_paths if not self.full.get(model_index.canonical[path])
            )
        if missing_paths:
            self.add_problem(
                f"no tensors for {listing(missing_paths)}",
                "those of every target",
                "get the whole file",
            )
