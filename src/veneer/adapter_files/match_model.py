"""An adapter folder against a model: does it fit, is it of this base, and what would be installed?

match(model, path, problems) -> LoadPlan        plans, adapter parameters, and what is trained in full

read            the folder by itself                                    folder
match modules   each change of the file to a weight of the model        peft_mapping
plan            ranks and readers of each change, its parameters
plan full       what the folder holds in full
complete        is there a tensor for every target?
verify          the fingerprints of the base                            match_base
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import token_rows
from veneer.adapter_files.expert_pairs import with_stacks
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import must_be_base, warn_foreign, warn_module_only
from veneer.adapter_files.peft_mapping import (
    all_refs,
    attention_above,
    means_parameter,
    module_at,
    otherwise,
    ref_at,
)
from veneer.adapter_files.peft_starts import without_start
from veneer.adapter_files.record import PARAMETERS
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach.adapted_module import base_class, weight_of
from veneer.attach.dtypes import at_least_float32
from veneer.attach.layer_adapter import LayerAdapter
from veneer.attach.lookup import parameter_path
from veneer.attach.plan import LowRankPlan, Plans, TargetSpec, changed_refs, full_readers, plan_low
from veneer.attach.refusals import GENERAL_KIND, check_full, kind_for
from veneer.attach.shared_memory import overlaps
from veneer.attach.targets import Names, ParamRef, own_parameters
from veneer.attach.token_rows import ROWS
from veneer.attach.weight_readers import has_forward
from veneer.attach.weight_tying import apart
from veneer.errors import AdapterError, BaseMismatchError, listing, nearest, raise_all, sentence
from veneer.fileio.hashing import fingerprint_beside
from veneer.fileio.throttle import throttled
from veneer.formats import peft, peft_tokens
from veneer.layers import kind_of
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS, InitContext, Variant

#: what to do about files that do not belong together
COPY = "get another copy of the folder"
UNTIE = (
    "load it with veneer.load(…, untie=True), which gives each name a weight of its own; merged"
    " there, model.save_pretrained writes both"
)


@dataclass(frozen=True)
class LoadPlan:
    """A folder that fits a model: its plans, its adapter parameters, and what is trained in full,
    by module."""

    saved: AdapterFiles
    plans: Plans
    adapter_parameters: Mapping[ParamRef, Mapping[str, Tensor]]
    full: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def fill(self, parts: Mapping[str, LayerAdapter]) -> None:
        """Put the values of what is trained in full into the parts that were made for it."""
        for at, part in parts.items():
            for key, value in self.full.get(at, {}).items():
                {**part.full._parameters, **part.full._buffers}[key].copy_(value)


@dataclass
class MatchCache:
    """What was found out about a model that nobody changes meanwhile, so that further adapters of
    it are verified in a fraction of the time: the fingerprints of its weights by kind, and what was
    planned for the same targets."""

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
    """Verify a folder against a model, which stays as it is (see ``install_from``). ``problems``:
    those that are known already. ``cache``: what is known of the model already; what is found out
    is added. ``AdapterError``: the folder is damaged, or does not fit the model.
    ``BaseMismatchError``: the base's weights are others than those it was trained on."""
    cache = MatchCache(Names(model)) if cache is None else cache
    saved = with_stacks(read(path, weights_of(cache.names)), cache.names, problems)
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
    """A folder on its way onto a model. Each step reads what those before it filled in, and adds
    its problems."""

    def __init__(
        self, saved: AdapterFiles, names: Names, problems: list[str], *, by_peft_rules: bool
    ) -> None:
        """``by_peft_rules``: another library wrote it, so that PEFT says what its tensors mean."""
        self.saved, self.names, self.problems, self.by_peft_rules = (
            saved,
            names,
            problems,
            by_peft_rules,
        )
        self.layers: dict[ParamRef, peft.PeftLayer] = {}
        #: those that are no changes of the weight to who reads it past its module
        self.module_only: set[ParamRef] = set()
        self.low: tuple[LowRankPlan, ...] = ()
        self.adapter_parameters: dict[ParamRef, dict[str, Tensor]] = {}
        self.tokens: dict[ParamRef, peft_tokens.TokenRows] = {}
        self.full: dict[str, dict[str, Tensor]] = {}
        #: what is added to the biases of modules, by path
        self.biases: dict[str, Tensor] = {}
        #: the parameters among these
        self.full_names: dict[str, tuple[str, ...]] = {}

    def problem(
        self, found: str, expected: str, do: str = "load it on the model that it was trained on"
    ) -> None:
        self.problems.append(sentence(found, expected, do))

    def lacks(self, at: str, path: str) -> None:
        nearby = nearest(path, self.names.modules)
        self.problem(f"a change of {at!r}, which this model lacks{nearby}", "the same modules")

    def match_modules(self) -> None:
        for file_path, entry in throttled(self.saved.low.items()):
            ref = ref_at(self.names, file_path, self.saved.peft_config)
            if ref is None:
                self.lacks(entry.at, entry.at)
                continue
            if ref in self.layers:
                problem = f"two changes of {parameter_path(*ref)!r} in {self.saved.path}"
                self.problem(problem, "one", "get the whole file again")
            layer = self.without_bias(ref, self.with_strength(ref, file_path, entry))
            self.layers[ref] = (
                layer if self.saved.record is not None else self.as_change(ref, layer)
            )
        # PEFT passes over these too, but here nothing is loaded for another model
        for path in self.saved.left_out:
            if path not in self.names.modules:
                self.lacks(path, path)
        if self.saved.tokens or self.saved.peft_config.get(peft_tokens.FIELD):
            self.tokens = token_rows.matched(
                self.names, self.saved, self.problems, self.by_peft_rules
            )

    def with_strength(self, ref: ParamRef, file_path: str, entry: peft.PeftLayer) -> peft.PeftLayer:
        """A change with the rank, alpha and scale that the config means for this weight; it is a
        problem if PEFT would do something else with it than change the weight."""
        names, config = self.names, self.saved.peft_config
        parameter = means_parameter(names, ref, config)
        nested = attention_above(names, ref) if peft.attention_of(file_path) is not None else None
        module = names.modules[ref[0]]
        several = len(kind_for(module, ref[1]).weights(module)) > 1
        at = parameter_path(*ref) if parameter or several else ref[0] if nested is None else nested
        rank, alpha, scale = peft.strength(config, at)
        if self.by_peft_rules:
            past, reason = otherwise(names, ref, entry, parameter, self.saved.tuner, nested)
            if past is not None and has_forward(module):
                self.module_only.add(ref)
            elif past is not None:
                reason = past
            if nested is not None:
                alpha, scale = peft.TIMES * alpha, peft.TIMES * scale
                reason = peft.unsure(config) if reason is None else reason
            if reason is not None:
                problem = f"a change of {entry.at!r} that PEFT applies in another way: {reason}"
                self.problem(problem, "a change of the weight", "use PEFT for it")
        return replace(entry, rank=rank, alpha=alpha, scale=scale)

    def without_bias(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """A change without the bias beside its B, which ``add_biases`` adds to that of its
        module."""
        if self.saved.peft_config.get("lora_bias") is not True:
            return layer
        extras = dict(layer.extras)
        bias = extras.pop(peft.LORA_BIAS, None)
        module, weight = self.names.modules[ref[0]], weight_of(self.names.modules[ref[0]], ref[1])
        if bias is None or bias.shape != (layer.B.shape[0],):
            problem = f"no {peft.LORA_BIAS!r} that fits {layer.at!r}"
            self.problem(problem, "one number an output", "get the whole file again")
        elif (
            "bias" not in module._parameters or kind_for(module, ref[1]).name not in peft.WITH_BIAS
        ):
            self.problem(
                f"a bias beside the change of {layer.at!r}",
                "a layer with room for one",
                "use PEFT for it",
            )
        elif (
            not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.is_floating_point()
        ):
            problem = (
                f"a bias beside the change of {layer.at!r}, whose weight is stored packed or is not"
                " here"
            )
            self.problem(problem, "a plain weight", "load it on the base in floating point")
        else:
            self.biases[ref[0]] = bias.double() * layer.scale
        return replace(layer, extras=extras)

    def add_biases(self) -> None:
        """Put the biases that change in full among what the folder holds in full."""
        for path, bias in self.biases.items():
            full, own = self.full.setdefault(path, {}), self.names.modules[path]._parameters["bias"]
            old = full.get("bias", own)
            total = bias if old is None else old.detach().to("cpu", torch.float64) + bias
            full["bias"] = total.to(at_least_float32(total.dtype if own is None else own.dtype))

    def as_change(self, ref: ParamRef, layer: peft.PeftLayer) -> peft.PeftLayer:
        """A change of another library's as one of the base, of no more rank than its weight can
        have: PEFT changes some bases as it loads a folder, and takes any rank."""
        if peft.starts_from_base(self.saved.peft_config):
            kind = kind_for(self.names.modules[ref[0]], ref[1]).name
            low = without_start(self.names, ref, kind, self.saved.peft_config, layer)
            if isinstance(low, str):
                self.problem(
                    f"{layer.at!r}: {low}",
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
        """Another product in the place of a change, with the alpha that gives its scale under the
        config's rule."""
        rooted = self.saved.peft_config.get("use_rslora")
        alpha = low.scale * (math.sqrt(low.rank) if rooted else low.rank)
        return replace(layer.with_low(low), alpha=alpha, extras=layer.extras)

    def plan_low_rank(self, cache: MatchCache) -> None:
        """Plan every change, as the record or else the file says, and take its adapter
        parameters."""
        saved, layers = self.saved, self.layers
        recorded = saved.metadata.get("changes")
        if recorded is None:
            own = {} if saved.tuner is None else saved.tuner.sizes
            sizes = {
                ref: own.get(parameter_path(*ref), (entry.rank, entry.alpha))
                for ref, entry in layers.items()
            }
            alone = self.module_only
            specs = {
                ref: TargetSpec(rank, alpha, module_only=ref in alone)
                for ref, (rank, alpha) in sizes.items()
            }
        else:
            specs = self.recorded(recorded)
        for owner, tokens in self.tokens.items():
            specs[owner] = replace(specs.get(owner, TargetSpec(0, 1.0)), tokens=tokens.ids)
        self.low = cache.plan(specs, self.problems)
        self.adapter_parameters = {
            entry.ref: (self.parameters_of(entry) if entry.rank else {}) | self.rows_of(entry)
            for entry in throttled(self.low)
        }
        if recorded is not None:
            meant = {ref for entry in self.low for ref in entry.holders} | set(specs)
            unknown = [parameter_path(*ref) for ref in layers if ref not in meant]
            unknown += sorted(saved.adapter_parameters.keys() - recorded.keys())
            if unknown:
                problem = f"changes that the record does not know: {listing(unknown)}"
                self.problem(problem, "the files as they were saved", COPY)

    def rows_of(self, entry: LowRankPlan) -> dict[str, Tensor]:
        """The rows of one planned weight that are trained in full, by the name of that
        parameter."""
        tokens = self.tokens.get(entry.ref)
        if self.saved.record is not None and token_rows.recorded_otherwise(
            self.saved, entry.where, tokens
        ):
            self.problem(
                f"other trained tokens of {entry.where!r} than its record says", "the same", COPY
            )
        return {} if tokens is None else {ROWS: tokens.rows}

    def parameters_of(self, entry: LowRankPlan) -> dict[str, Tensor]:
        """The adapter parameters of one planned weight, by name. A variant's own are those of
        ``veneer.safetensors``, where PEFT has none like them; A and B beside it are then the plain
        change that they amount to."""
        at, saved, changes = parameter_path(*entry.ref), self.saved, []
        for ref in entry.holders:
            pair = self.pair(ref, entry)
            if pair is None:
                return {}
            changes.append((*pair, *self.layers[ref].extras.values()))
        (A, B, *_), layer, variant = (
            changes[0],
            self.layers[entry.ref],
            VARIANTS[saved.config.variant],
        )
        if any(
            len(one) != len(changes[0]) or not all(map(torch.equal, one, changes[0]))
            for one in changes
        ):
            problem = f"different changes for {entry.path!r} and the modules that share its weight"
            self.problem(problem, "one change of a tied weight", UNTIE)
        frozen_input = entry.layer.frozen_input(self.names.modules[entry.path])
        if frozen_input is not None and A[..., frozen_input].any():
            problem = f"a change of the padding row {frozen_input} of {entry.path!r}"
            self.problem(
                problem,
                "none, as Veneer keeps that row at rest",
                "set it to zero, or use PEFT for it",
            )
        if layer.extras.keys() != set(variant.peft_keys.values()):
            expected = f"{listing(variant.peft_keys.values())}, as variant {variant.name!r} has"
            self.problem(
                f"{listing(layer.extras)} at {entry.path!r}", expected, "get both files again"
            )
            return {}
        stored = saved.adapter_parameters.get(at)
        if stored is not None:
            unlike = _unlike(self.names, entry, dict(stored), LowRank(A, B, layer.scale), variant)
            if unlike:
                self.problem(
                    f"{unlike} in {PARAMETERS} for {at!r}", f"what {peft.TENSORS} holds of it", COPY
                )
            return dict(stored)
        lacking = _parameter_names(variant.name) - {"A", "B", *variant.peft_keys}
        if lacking and saved.record is not None:
            problem = f"no {listing(sorted(lacking))} of {at!r} in {PARAMETERS}"
            self.problem(problem, f"those of variant {variant.name!r}", COPY)
        scale = variant.scale(entry.alpha, entry.rank)
        if entry.rank != layer.rank or not math.isclose(scale, layer.scale):
            problem = (
                f"rank {entry.rank}, alpha {entry.alpha:g} and scale {scale:g} of {at!r} in the"
                " record"
            )
            self.problem(
                problem,
                f"{layer.rank}, {layer.alpha:g} and {layer.scale:g}, as in {peft.CONFIG}",
                COPY,
            )
        rows = None if entry.rows is None else torch.tensor(entry.rows)
        if rows is not None and B.index_fill(1, rows, 0).any():
            self.problem(
                f"a change outside the rows that the record names for {at!r}", "zeros there", COPY
            )
        parameters = {"A": A, "B": B if rows is None else B[:, rows]}
        for name, suffix in variant.peft_keys.items():
            vector = layer.extras[suffix].reshape(-1)
            if vector.numel() != entry.dims.groups * entry.dims.out:
                self.problem(
                    f"no {suffix!r} that fits {entry.path!r}",
                    "one number an output",
                    "get it again",
                )
                return {}
            parameters[name] = vector if rows is None else vector[rows]
        return parameters

    def pair(self, ref: ParamRef, entry: LowRankPlan) -> tuple[Tensor, Tensor] | None:
        """A and B that the file holds for one module with the weight, in the shapes of the weight's
        own layer."""
        (path, name), module, layer = ref, self.names.modules[ref[0]], self.layers.get(ref)
        if layer is None:
            problem = (
                f"a change of {entry.path!r}, whose weight {path!r} shares, without one for"
                f" {path!r}"
            )
            if ref == entry.ref:
                problem = f"no change of {parameter_path(*ref)!r} in {peft.TENSORS}"
            self.problem(problem, "one change for a tied weight, under every name", UNTIE)
            return None
        kind = kind_for(module, name)
        if means_parameter(self.names, ref, self.saved.peft_config):
            kind = GENERAL_KIND  # as PEFT reads a parameter, whatever its module makes of it
        shape = entry.storage.shape(weight_of(module, name))
        pair = (
            kind.unpack(layer.A, layer.B, module, shape)
            if layer.suffixes == kind.file_keys
            else None
        )
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
            self.problem(problem, expected)
            return None
        if pair[0].shape[1] != layer.rank:
            problem = f"rank {pair[0].shape[1]} at {path!r}"
            self.problem(problem, f"{layer.rank}, as the config says", "get both files again")
            return None
        return pair

    def recorded(self, changes: Mapping[str, Any]) -> dict[ParamRef, TargetSpec]:
        specs: dict[ParamRef, TargetSpec] = {}
        for at, described in changes.items():
            above, _, name = at.rpartition(".")
            path = self.names.canonical.get(above)
            if path is None or name not in own_parameters(self.names.modules[path]):
                self.lacks(at, above)
            else:
                alone, rows = described.get("module_only", False), described.get("rows")
                specs[path, name] = TargetSpec(
                    described["rank"], described["alpha"], rows, module_only=alone
                )
        return specs

    def plan_full(self) -> None:
        names = self.names
        for file_path, tensors in self.saved.full.items():
            self.full.setdefault(module_at(names, file_path), {}).update(tensors)
        for entry in self.low:
            self.take_base_weight(entry)
        self.add_biases()
        for path, tensors in self.full.items():
            module = names.modules.get(path)
            there = {**module._parameters, **module._buffers} if module is not None else {}
            for key, tensor in tensors.items():
                if key == "bias" and path in self.biases and there[key] is None:
                    continue  # of a layer without one
                if there.get(key) is None:
                    problem = f"a tensor for {path}.{key}, which this model lacks"
                    self.problem(problem, "the same modules", "use its model")
                elif there[key].shape != tensor.shape:
                    problem = f"{path}.{key} of shape {tuple(tensor.shape)}"
                    self.problem(
                        problem,
                        f"{tuple(there[key].shape)}",
                        "use the model that it was trained on",
                    )
            if module is not None:
                self.full_names[path] = tuple(key for key in tensors if key in module._parameters)
        check_full(names, self.full_names, self.problems)
        self.problems += overlaps(names, changed_refs(self.low, self.full_names))

    def take_base_weight(self, entry: LowRankPlan) -> None:
        """PEFT writes the frozen weight of an adapted embedding or head along
        (``save_embedding_layers``). It is no part of the change; it tells whether this is the
        base."""
        weight = weight_of(self.names.modules[entry.path], entry.weight)
        for holder, name in entry.holders:
            written = self.full.get(holder, {}).pop(name, None)
            trained = entry.tokens or ()  # rows of which the base's do not count
            dense = entry.storage.dense(weight)
            if written is not None and fingerprint_beside(written, trained) != fingerprint_beside(
                dense, trained
            ):
                problem = f"another weight of {holder!r} in {self.saved.path} than in this model"
                raise BaseMismatchError(
                    problem, "the base that it was trained on", "load that base"
                )

    def check_complete(self) -> None:
        """A file without a record may be cut short at a whole tensor: is there one for every target
        of its config?"""
        if self.saved.record is not None:
            return
        names, config = self.names, self.saved.peft_config
        modules = {
            path: kind.weight
            for path, module in names.modules.items()
            if (kind := kind_of(module)) is not None
        }
        expected = {(path, modules[path]) for path in peft.expected_paths(config, modules) or ()}
        expected = {ref for ref in expected if weight_of(names.modules[ref[0]], ref[1]) is not None}
        expected |= {ref for ref in all_refs(names) if means_parameter(names, ref, config)}
        lacking = sorted(parameter_path(*ref) for ref in expected - self.layers.keys())
        # its layers are trained in full
        if self.saved.tuner is not None and self.saved.tuner.whole:
            meant = peft.expected_paths(self.saved.tuner.source, names.modules) or set()
            lacking += sorted(path for path in meant if not self.full.get(names.canonical[path]))
        if lacking:
            self.problem(
                f"no tensors for {listing(lacking)}", "those of every target", "get the whole file"
            )

    def plan(self) -> LoadPlan:
        names, full = self.names, self.full
        whole = frozenset(
            path for path, tensors in full.items() if names.modules[path]._buffers.keys() & tensors
        )
        readers = full_readers(names, self.full_names)
        plans = Plans(
            self.saved.config, self.low, self.full_names, whole, readers, apart(names, full)
        )
        return LoadPlan(self.saved, plans, self.adapter_parameters, full)


@functools.cache
def _parameter_names(variant: str) -> frozenset[str]:
    """The names of a variant's parameters that a file holds, from a start as small as can be."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        eye = torch.eye(2)[None]
        start = InitContext(1, 2, 2, 1, 2, lambda: eye, eye.double, eye.double, lambda: eye)
        return frozenset(VARIANTS[variant].init(start)) - VARIANTS[variant].derived


@torch.no_grad()
def _unlike(
    names: Names,
    entry: LowRankPlan,
    stored: dict[str, Tensor],
    peft_form: LowRank,
    variant: Variant,
) -> str | None:
    """Why a variant's own parameters are not those of the plain change that the PEFT file holds, or
    None."""
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
            torch.cat([low.A, peft_form.A], 1),
            torch.cat([low.B * low.scale, -peft_form.B * peft_form.scale], 2),
        )
        off = LowRank(A, B, 1.0).norm()
    except (RuntimeError, IndexError, ValueError) as error:
        return f"shapes that do not fit ({str(error).splitlines()[0]})"
    # what is stored in 16 bits may round otherwise elsewhere
    return f"another change (off by {off:.2g})" if off > 1e-2 * peft_form.norm() else None
