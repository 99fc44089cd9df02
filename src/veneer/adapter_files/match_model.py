"""Match an adapter folder with a model: does it fit, was it trained on this base, and what would be
installed?

match(model, path, problems) -> LoadPlan        plans, adapter parameters, and parameters trained in
                                                full

read            the folder, without the model                           folder
match modules   each change of the file to a weight of the model        peft_mapping
plan            ranks and weight readers of each change
parameters      A, B and a variant's own                                match_parameters
plan full       the parameters that are trained in full
complete        is there a tensor for every target?
verify          the fingerprints of the base                            match_base
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import saved_token_rows
from veneer.adapter_files.expert_pairs import stack_experts
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import must_be_base, warn_foreign, warn_module_only
from veneer.adapter_files.match_parameters import COPY, USE_ITS_MODEL, ParameterReader
from veneer.adapter_files.peft_deviations import attention_above, deviations
from veneer.adapter_files.peft_mapping import all_refs, means_parameter, module_at, ref_at
from veneer.adapter_files.peft_starts import without_start
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach import (
    ROWS,
    LayerAdapter,
    LowRankPlan,
    Names,
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
    """A folder that fits a model: its plans, its adapter parameters, and the tensors that are
    trained in full, by module."""

    saved: AdapterFiles
    plans: Plans
    adapter_parameters: Mapping[ParamRef, Mapping[str, Tensor]]
    full: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def fill(self, layer_adapters: Mapping[str, LayerAdapter]) -> None:
        """Copy the tensors that are trained in full into installed layer adapters, by module
        path."""
        for path, layer_adapter in layer_adapters.items():
            targets = {**layer_adapter.full._parameters, **layer_adapter.full._buffers}
            for key, value in self.full.get(path, {}).items():
                targets[key].copy_(value)


@dataclass
class MatchCache:
    """The fingerprints of a model's weights by kind, and the plans of targets. With it, further
    adapters of the same model are verified in a fraction of the time. The model must not change in
    between."""

    names: Names
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    plans: dict[Any, tuple[LowRankPlan, ...]] = field(default_factory=dict)

    def plan(
        self, specs: Mapping[ParamRef, TargetSpec], problems: list[str]
    ) -> tuple[LowRankPlan, ...]:
        key = tuple(
            (ref, spec.rank, spec.alpha, repr(spec.slices), spec.module_only, spec.tokens)
            for ref, spec in specs.items()
        )
        if key in self.plans:
            return self.plans[key]
        before, low = len(problems), tuple(plan_low(self.names, specs, problems))
        if len(problems) == before:
            self.plans[key] = low
        return low


def match(
    model: nn.Module,
    path: str | Path,
    problems: list[str],
    *,
    verify_base: bool = True,
    of_weights: bool = False,
    cache: MatchCache | None = None,
) -> LoadPlan:
    """Verify a folder against a model, without changing the model (see ``install_from``).

    Args:
        problems: problems that the caller knows already; they are raised with the others.
        of_weights: the changes are changes of weights, also where no record says it.
        cache: earlier results for the same model; new ones are added.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: it was trained on a base with other weights.
    """
    cache = MatchCache(Names(model)) if cache is None else cache
    saved = stack_experts(read(path, weights_of(cache.names)), cache.names, problems)
    folder = _Match(
        saved, cache.names, problems, by_peft_rules=saved.record is None and not of_weights
    )
    folder.match_modules()
    folder.plan_low_rank(cache)
    folder.plan_full()
    folder.check_complete()
    raise_all(
        AdapterError, f"The adapter {path} does not fit this {base_class(model).__name__}", problems
    )
    if saved.record is None:
        warn_foreign(path)
        warn_module_only(path, [entry.path for entry in folder.low if entry.module_only])
    elif verify_base:
        must_be_base(cache.names, saved, cache.fingerprints)
    return folder.plan()


class _Match:
    """The state of one match. Each step reads the attributes that the steps before it set, and adds
    to ``problems``."""

    def __init__(
        self, saved: AdapterFiles, names: Names, problems: list[str], *, by_peft_rules: bool
    ) -> None:
        """``by_peft_rules``: another library wrote it, so that PEFT's rules give its tensors their
        meaning."""
        self.saved, self.names, self.problems = saved, names, problems
        self.by_peft_rules = by_peft_rules
        self.layers: dict[ParamRef, peft.PeftLayer] = {}
        #: changes of a module's output alone, as other code reads the weight directly
        self.module_only: set[ParamRef] = set()
        self.low: tuple[LowRankPlan, ...] = ()
        self.adapter_parameters: dict[ParamRef, dict[str, Tensor]] = {}
        self.tokens: dict[ParamRef, peft_tokens.TokenRows] = {}
        self.full: dict[str, dict[str, Tensor]] = {}
        #: the changes of biases (``lora_bias``), by module path
        self.biases: dict[str, Tensor] = {}
        #: the names of the parameters in ``full``, without buffers
        self.full_names: dict[str, tuple[str, ...]] = {}

    def add_problem(self, found: str, expected: str, do: str = USE_ITS_MODEL) -> None:
        self.problems.append(sentence(found, expected, do))

    def add_missing_module(self, target_path: str, module_path: str) -> None:
        nearby = nearest(module_path, self.names.modules)
        problem = f"a change of {target_path!r}, which this model lacks{nearby}"
        self.add_problem(problem, "the same modules")

    def match_modules(self) -> None:
        for file_path, entry in throttle(self.saved.low.items()):
            ref = ref_at(self.names, file_path, self.saved.peft_config)
            if ref is None:
                self.add_missing_module(entry.target_path, entry.target_path)
                continue
            if ref in self.layers:
                problem = f"two changes of {parameter_path(*ref)!r} in {self.saved.path}"
                self.add_problem(problem, "one", "get the whole file again")
            layer = self.without_bias(ref, self.with_strength(ref, file_path, entry))
            self.layers[ref] = (
                layer if self.saved.record is not None else self.as_change(ref, layer)
            )
        # PEFT skips these silently; here a folder of another model is refused
        for path in self.saved.left_out:
            if path not in self.names.modules:
                self.add_missing_module(path, path)
        if self.saved.tokens or self.saved.peft_config.get(peft_tokens.INDICES_FIELD):
            self.tokens = saved_token_rows.match_tokens(
                self.names, self.saved, self.problems, self.by_peft_rules
            )

    def with_strength(self, ref: ParamRef, file_path: str, entry: peft.PeftLayer) -> peft.PeftLayer:
        """The change with the rank, alpha and scale that the config gives to this weight. A change
        that PEFT would not apply as a change of the weight is a problem."""
        names, config = self.names, self.saved.peft_config
        parameter = means_parameter(names, ref, config)
        nested = (
            attention_above(names, ref) if peft_paths.attention_of(file_path) is not None else None
        )
        module = names.modules[ref[0]]
        several = len(kind_for(module, ref[1]).weights(module)) > 1
        config_path = (
            parameter_path(*ref) if parameter or several else ref[0] if nested is None else nested
        )
        rank, alpha, scale = peft_paths.rank_alpha_scale(config, config_path)
        if self.by_peft_rules:
            past, reason = deviations(names, ref, entry, parameter, self.saved.tuner, nested)
            if past is not None and has_forward(module):
                self.module_only.add(ref)
            elif past is not None:
                reason = past
            if nested is not None:
                alpha, scale = (
                    peft_behaviour.OUT_PROJ_REPEATS * alpha,
                    peft_behaviour.OUT_PROJ_REPEATS * scale,
                )
                reason = peft_behaviour.out_proj_problem(config) if reason is None else reason
            if reason is not None:
                problem = (
                    f"a change of {entry.target_path!r} that PEFT applies in another way: {reason}"
                )
                self.add_problem(problem, "a change of the weight", "use PEFT for it")
        return replace(entry, rank=rank, alpha=alpha, scale=scale)

    def without_bias(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """The change without the bias beside its B (``lora_bias``), which ``add_biases`` adds to
        the bias of the module."""
        if self.saved.peft_config.get("lora_bias") is not True:
            return layer
        extras = dict(layer.extras)
        bias = extras.pop(peft.LORA_BIAS, None)
        module, weight = self.names.modules[ref[0]], weight_of(self.names.modules[ref[0]], ref[1])
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
        """Add the biases of ``lora_bias`` to the parameters that are trained in full."""
        for path, bias in self.biases.items():
            full, module_bias = (
                self.full.setdefault(path, {}),
                self.names.modules[path]._parameters["bias"],
            )
            trained_bias = full.get("bias", module_bias)
            total = (
                bias
                if trained_bias is None
                else trained_bias.detach().to("cpu", torch.float64) + bias
            )
            full["bias"] = total.to(
                at_least_float32(total.dtype if module_bias is None else module_bias.dtype)
            )

    def as_change(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """A change from another library's folder as a change of the unchanged base, with a rank of
        at most min(out, in): PEFT changes some bases when it loads a folder, and takes any rank."""
        if peft_fields.starts_from_base(self.saved.peft_config):
            kind = kind_for(self.names.modules[ref[0]], ref[1]).name
            low = without_start(self.names, ref, kind, self.saved.peft_config, layer)
            if isinstance(low, str):
                self.add_problem(
                    f"{layer.target_path!r}: {low}",
                    "a change of the base",
                    "let PEFT convert it when it saves",
                )
                return layer
            layer = self.as_product(layer, low)
        A, B = layer.A, layer.B
        fits = not (A.numel() and B.numel()) or layer.rank <= min(
            A.numel() // len(A), B.numel() // B.shape[1]
        )
        if fits or layer.low.rank != layer.rank:
            return layer
        return self.as_product(layer, layer.low.thin())

    def as_product(self, layer: peft.PeftLayer, low: LowRank) -> peft.PeftLayer:
        """The change with another product, and with the alpha that gives its scale under the
        config's rule."""
        rooted = self.saved.peft_config.get("use_rslora")
        alpha = low.scale * (math.sqrt(low.rank) if rooted else low.rank)
        return replace(layer.with_low(low), alpha=alpha, extras=layer.extras)

    def plan_low_rank(self, cache: MatchCache) -> None:
        """Plan every change by the record, or by the file if there is no record, and read its
        adapter parameters."""
        saved, layers = self.saved, self.layers
        recorded = saved.metadata.get("changes")
        if recorded is None:
            tuner_sizes = {} if saved.tuner is None else saved.tuner.sizes
            sizes = {
                ref: tuner_sizes.get(parameter_path(*ref), (entry.rank, entry.alpha))
                for ref, entry in layers.items()
            }
            module_only = self.module_only
            specs = {
                ref: TargetSpec(rank, alpha, module_only=ref in module_only)
                for ref, (rank, alpha) in sizes.items()
            }
        else:
            specs = self.specs_from_record(recorded)
        for owner, tokens in self.tokens.items():
            specs[owner] = replace(specs.get(owner, TargetSpec(0, 1.0)), tokens=tokens.ids)
        self.low = cache.plan(specs, self.problems)
        reader = ParameterReader(saved, self.names, layers, self.problems)
        self.adapter_parameters = {
            entry.ref: (reader.read(entry) if entry.rank else {}) | self.rows_of(entry)
            for entry in throttle(self.low)
        }
        if recorded is not None:
            planned = {ref for entry in self.low for ref in entry.holders} | set(specs)
            unknown = [parameter_path(*ref) for ref in layers if ref not in planned]
            unknown += sorted(saved.adapter_parameters.keys() - recorded.keys())
            if unknown:
                problem = f"changes that the record does not know: {listing(unknown)}"
                self.add_problem(problem, "the files as they were saved", COPY)

    def rows_of(self, entry: LowRankPlan) -> dict[str, Tensor]:
        """The trained token rows of one planned weight, under their parameter name; empty if it
        has none."""
        tokens = self.tokens.get(entry.ref)
        if self.saved.record is not None and saved_token_rows.differs_from_record(
            self.saved, entry.full_path, tokens
        ):
            self.add_problem(
                f"other trained tokens of {entry.full_path!r} than its record says",
                "the same",
                COPY,
            )
        return {} if tokens is None else {ROWS: tokens.rows}

    def specs_from_record(self, changes: Mapping[str, Any]) -> dict[ParamRef, TargetSpec]:
        """The target specs of the changes in a record, by weight."""
        specs: dict[ParamRef, TargetSpec] = {}
        for weight_path, change in changes.items():
            module_path, _, name = weight_path.rpartition(".")
            path = self.names.canonical.get(module_path)
            if path is None or name not in own_parameters(self.names.modules[path]):
                self.add_missing_module(weight_path, module_path)
            else:
                module_only, rows = change.get("module_only", False), change.get("rows")
                specs[path, name] = TargetSpec(
                    change["rank"], change["alpha"], rows, module_only=module_only
                )
        return specs

    def plan_full(self) -> None:
        """Check the tensors that are trained in full against the modules of the model."""
        names = self.names
        for file_path, tensors in self.saved.full.items():
            self.full.setdefault(module_at(names, file_path), {}).update(tensors)
        for entry in self.low:
            self.take_base_weight(entry)
        self.add_biases()
        for path, tensors in self.full.items():
            module = names.modules.get(path)
            module_tensors = {**module._parameters, **module._buffers} if module is not None else {}
            for key, tensor in tensors.items():
                if key == "bias" and path in self.biases and module_tensors[key] is None:
                    continue  # of a layer without one
                if module_tensors.get(key) is None:
                    problem = f"a tensor for {path}.{key}, which this model lacks"
                    self.add_problem(problem, "the same modules", "use its model")
                elif module_tensors[key].shape != tensor.shape:
                    problem = f"{path}.{key} of shape {tuple(tensor.shape)}"
                    self.add_problem(
                        problem,
                        f"{tuple(module_tensors[key].shape)}",
                        "use the model that it was trained on",
                    )
            if module is not None:
                self.full_names[path] = tuple(key for key in tensors if key in module._parameters)
        buffers = frozenset(
            path
            for path, tensors in self.full.items()
            if path in names.modules and names.modules[path]._buffers.keys() & tensors
        )
        self.plans = complete_plans(
            names,
            self.saved.config,
            self.low,
            self.full_names,
            self.problems,
            full_modules=buffers,
            split_ties=names.split_ties(self.full),
        )

    def take_base_weight(self, entry: LowRankPlan) -> None:
        """Remove the frozen weight of an adapted embedding or head from ``full``, where PEFT saves
        it (``save_embedding_layers``), and check that the model has the same weight."""
        weight = weight_of(self.names.modules[entry.path], entry.weight)
        for holder, name in entry.holders:
            written = self.full.get(holder, {}).pop(name, None)
            trained = entry.tokens or ()  # the base's values of these rows do not matter
            dense = entry.storage.dense(weight)
            if written is not None and fingerprint_without_rows(
                written, trained
            ) != fingerprint_without_rows(dense, trained):
                problem = f"another weight of {holder!r} in {self.saved.path} than in this model"
                raise BaseMismatchError(
                    problem, "the base that it was trained on", "load that base"
                )

    def check_complete(self) -> None:
        """Check that a folder without a record has a tensor for every target of its config, as its
        file may have been cut short at a tensor."""
        if self.saved.record is not None:
            return
        names, config = self.names, self.saved.peft_config
        modules = {
            path: kind.weight
            for path, module in names.modules.items()
            if (kind := kind_of(module)) is not None
        }
        expected = {
            (path, modules[path]) for path in peft_paths.expected_paths(config, modules) or ()
        }
        expected = {ref for ref in expected if weight_of(names.modules[ref[0]], ref[1]) is not None}
        expected |= {ref for ref in all_refs(names) if means_parameter(names, ref, config)}
        lacking = sorted(parameter_path(*ref) for ref in expected - self.layers.keys())
        # the tuner trains its layers in full
        if self.saved.tuner is not None and self.saved.tuner.trains_in_full:
            meant = peft_paths.expected_paths(self.saved.tuner.source, names.modules) or set()
            lacking += sorted(path for path in meant if not self.full.get(names.canonical[path]))
        if lacking:
            self.add_problem(
                f"no tensors for {listing(lacking)}", "those of every target", "get the whole file"
            )

    def plan(self) -> LoadPlan:
        return LoadPlan(self.saved, self.plans, self.adapter_parameters, self.full)
