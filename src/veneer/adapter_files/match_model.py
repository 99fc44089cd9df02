"""An adapter folder against a model: does it fit, is it of this base, and what would be installed?

    match(model, path, problems) -> LoadPlan        plans, adapter parameters, and what is trained in full

    read            the folder by itself                                    folder
    match modules   each change of the file to a weight of the model        peft_mapping
    plan            ranks and readers of each change, its parameters        match_parameters
    plan full       what the folder holds in full
    complete        is there a tensor for every target?
    verify          the fingerprints of the base                            match_base

The model stays as it is, and all problems up to the last stage are raised at once. ``save_load`` installs a
``LoadPlan`` on the model, a bank keeps it outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import must_be_base, warn_foreign
from veneer.adapter_files.match_parameters import parameters_of
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
from veneer.fileio.hashing import fingerprint
from veneer.fileio.throttle import throttled
from veneer.formats import peft
from veneer.layers import kind_of


@dataclass(frozen=True)
class LoadPlan:
    """An adapter folder that was verified against a model: what to plan, the adapter parameters of each weight, and
    what is trained in full, by module."""

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
    """What was found out about a model that nobody changes meanwhile, so that further adapters of it are verified in a
    fraction of the time: the fingerprints of its weights by kind, and what was planned for the same targets."""

    names: Names
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    plans: dict[Any, tuple[LowRankPlan, ...]] = field(default_factory=dict)

    def plan(self, specs: Mapping[ParamRef, TargetSpec], problems: list[str]) -> tuple[LowRankPlan, ...]:
        """As ``plan_low``."""
        key = tuple((ref, spec.rank, spec.alpha, repr(spec.slices)) for ref, spec in specs.items())
        if key not in self.plans:
            before = len(problems)
            low = tuple(plan_low(self.names, specs, problems))
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
    cache: MatchCache | None = None,
) -> LoadPlan:
    """Verify a folder against a model, which stays as it is (see ``install_from``).

    Args:
        problems: those that are known already.
        cache: what is known of the model already; what is found out is added.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: the base's weights are others than those it was trained on.
    """
    saved = read(path)
    cache = MatchCache(Names(model)) if cache is None else cache
    folder = _Match(saved, cache.names, problems, by_peft_rules=saved.record is None and not of_weights)
    folder.match_modules()
    folder.plan_low_rank(cache)
    folder.plan_full()
    folder.check_complete()
    raise_all(AdapterError, f"The adapter {path} does not fit this {own_class(model).__name__}", problems)
    if saved.record is None:
        warn_foreign(path)
    elif verify_base:
        must_be_base(cache.names, saved, cache.fingerprints)
    return folder.plan()


class _Match:
    """A folder on its way onto a model. Each step reads what those before it filled in, and adds its problems."""

    def __init__(self, saved: AdapterFiles, names: Names, problems: list[str], *, by_peft_rules: bool) -> None:
        """``by_peft_rules``: another library wrote it, so that PEFT says what its tensors mean."""
        self.saved, self.names, self.problems, self.by_peft_rules = saved, names, problems, by_peft_rules
        self.layers: dict[ParamRef, peft.PeftLayer] = {}
        self.low: tuple[LowRankPlan, ...] = ()
        self.adapter_parameters: dict[ParamRef, dict[str, Tensor]] = {}
        self.full: dict[str, dict[str, Tensor]] = {}
        #: the parameters among these
        self.full_names: dict[str, tuple[str, ...]] = {}

    def problem(self, found: str, expected: str, do: str = "load it on the model that it was trained on") -> None:
        self.problems.append(sentence(found, expected, do))

    def lacks(self, at: str, path: str) -> None:
        nearby = nearest(path, self.names.modules)
        self.problem(f"a change of {at!r}, which this model lacks{nearby}", "the same modules")

    def match_modules(self) -> None:
        """Find the weight of the model that each change of the file is of."""
        for file_path, entry in throttled(self.saved.low.items()):
            ref = ref_at(self.names, file_path, self.saved.peft_config)
            if ref is None:
                self.lacks(entry.at, entry.at)
                continue
            if ref in self.layers:
                found = f"two changes of {parameter_path(*ref)!r} in {self.saved.path}"
                self.problem(found, "one", "get the whole file again")
            self.layers[ref] = self.with_strength(ref, file_path, entry)

    def with_strength(self, ref: ParamRef, file_path: str, entry: peft.PeftLayer) -> peft.PeftLayer:
        """A change with the rank, alpha and scale that the config means for this weight; it is a problem if PEFT would
        do something else with it than change the weight."""
        names, config = self.names, self.saved.peft_config
        parameter = means_parameter(names, ref, config)
        nested = attention_above(names, ref) if peft.attention_of(file_path) is not None else None
        module = names.modules[ref[0]]
        several = len(kind_for(module, ref[1]).weights(module)) > 1
        at = parameter_path(*ref) if parameter or several else ref[0] if nested is None else nested
        rank, alpha, scale = peft.strength(config, at)
        if self.by_peft_rules:
            reason = differs(names, ref, parameter, nested)
            if nested is not None:
                alpha, scale = peft.TIMES * alpha, peft.TIMES * scale
                reason = peft.unsure(config) if reason is None else reason
            if reason is not None:
                found = f"a change of {entry.at!r} that PEFT applies in another way: {reason}"
                self.problem(found, "a change of the weight", "use PEFT for it")
        return replace(entry, rank=rank, alpha=alpha, scale=scale)

    def plan_low_rank(self, cache: MatchCache) -> None:
        """Plan every change, as the record or else the file says, and take its adapter parameters."""
        saved, layers = self.saved, self.layers
        recorded = saved.metadata.get("changes")
        if recorded is None:
            specs = {ref: TargetSpec(entry.rank, entry.alpha) for ref, entry in layers.items()}
        else:
            specs = self.recorded(recorded)
        self.low = cache.plan(specs, self.problems)
        self.adapter_parameters = {
            entry.ref: parameters_of(self.names, entry, layers, saved, self.problems) for entry in throttled(self.low)
        }
        if recorded is not None:
            meant = {ref for entry in self.low for ref in entry.holders} | set(specs)
            unknown = [parameter_path(*ref) for ref in layers if ref not in meant]
            unknown += sorted(saved.adapter_parameters.keys() - recorded.keys())
            if unknown:
                found = f"changes that the record does not know: {listing(unknown)}"
                self.problem(found, "the files as they were saved", "get another copy of the folder")

    def recorded(self, changes: Mapping[str, Any]) -> dict[ParamRef, TargetSpec]:
        """What the record says of each change."""
        specs: dict[ParamRef, TargetSpec] = {}
        for at, described in changes.items():
            above, _, name = at.rpartition(".")
            path = self.names.canonical.get(above)
            if path is None or name not in own_parameters(self.names.modules[path]):
                self.lacks(at, above)
            else:
                specs[path, name] = TargetSpec(described["rank"], described["alpha"], described.get("rows"))
        return specs

    def plan_full(self) -> None:
        """Find the parameters and buffers that the folder holds in full: no such one, another shape and what is not to
        be trained are problems."""
        names = self.names
        for file_path, tensors in self.saved.full.items():
            self.full.setdefault(module_at(names, file_path), {}).update(tensors)
        for entry in self.low:
            self.take_base_weight(entry)
        for path, tensors in self.full.items():
            module = names.modules.get(path)
            there = {**module._parameters, **module._buffers} if module is not None else {}
            for key, tensor in tensors.items():
                if there.get(key) is None:
                    found = f"a tensor for {path}.{key}, which this model lacks"
                    self.problem(found, "the same modules", "use its model")
                elif there[key].shape != tensor.shape:
                    found = f"{path}.{key} of shape {tuple(tensor.shape)}"
                    self.problem(found, f"{tuple(there[key].shape)}", "use the model that it was trained on")
            if module is not None:
                self.full_names[path] = tuple(key for key in tensors if key in module._parameters)
        check_full(names, self.full_names, self.problems)
        self.problems += overlaps(names, changed_refs(self.low, self.full_names))

    def take_base_weight(self, entry: LowRankPlan) -> None:
        """PEFT writes the frozen weight of an adapted embedding or head along (``save_embedding_layers``). It is no
        part of the change; it tells whether this is the base."""
        weight = weight_of(self.names.modules[entry.path], entry.weight)
        for holder, name in entry.holders:
            written = self.full.get(holder, {}).pop(name, None)
            if written is not None and fingerprint(written) != fingerprint(entry.storage.dense(weight)):
                found = f"another weight of {holder!r} in {self.saved.path} than in this model"
                raise BaseMismatchError(sentence(found, "the base that it was trained on", "load that base"))

    def check_complete(self) -> None:
        """A file without a record may be cut short at a whole tensor: is there one for every target of its config?"""
        if self.saved.record is not None:
            return
        names, config = self.names, self.saved.peft_config
        modules = {path: kind.weight for path, module in names.modules.items() if (kind := kind_of(module)) is not None}
        expected = {(path, modules[path]) for path in peft.expected_paths(config, modules) or ()}
        expected = {ref for ref in expected if weight_of(names.modules[ref[0]], ref[1]) is not None}
        expected |= {ref for ref in all_refs(names) if means_parameter(names, ref, config)}
        lacking = sorted(parameter_path(*ref) for ref in expected - self.layers.keys())
        if lacking:
            self.problem(f"no tensors for {listing(lacking)}", "those of every target", "get the whole file")

    def plan(self) -> LoadPlan:
        """What came of it, once there are no problems."""
        names, full = self.names, self.full
        whole = frozenset(path for path, tensors in full.items() if names.modules[path]._buffers.keys() & tensors)
        readers = full_readers(names, self.full_names)
        plans = Plans(self.saved.config, self.low, self.full_names, whole, readers, apart(names, full))
        return LoadPlan(self.saved, plans, self.adapter_parameters, full)
