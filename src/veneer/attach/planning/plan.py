"""Plan an adapter: which weight gets which rank, which modules read it, and which parameters are
trained in full.

plan(model, config, name) -> Plans      changes nothing; collects every problem, then raises once
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from veneer.attach.layer.names import Names
from veneer.attach.layer.state import one_thread_at_a_time
from veneer.attach.planning import refusals, token_targets
from veneer.attach.planning import targets as targeting
from veneer.attach.planning.shared_memory import overlaps
from veneer.attach.planning.targets import WORDS
from veneer.attach.source.weight_readers import WeightReader, weight_readers
from veneer.bases import Storage, storage_of, weight_of
from veneer.config import LoraConfig, bad_regex, pattern_list
from veneer.distributed import base_class
from veneer.errors import ConfigError, SkippedLayers, TargetError, raise_all, sentence
from veneer.layers import GENERAL_KIND, Dims, Layer, ParamRef, kind_for, kind_of, parameter_path
from veneer.variants import VARIANTS


@dataclass(frozen=True)
class LowRankPlan:
    """The low-rank change of one weight.

    Fields:
        path, weight: the module that owns the weight, and the name of the parameter.
        holders: every module that holds the parameter, the owner first.
        weight_readers: the methods of other modules that read it directly.
        rows: the outputs to change; None for all of them.
        tokens: the rows of an embedding or head that are trained in full, beside a change of this
            rank, or alone (rank 0).
        module_only: other modules read the weight unchanged, as in PEFT, so there are no
            ``weight_readers``.
    """

    path: str
    weight: str
    layer: Layer
    storage: Storage
    dims: Dims
    rank: int
    alpha: float
    holders: tuple[ParamRef, ...]
    weight_readers: tuple[WeightReader, ...] = ()
    rows: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    module_only: bool = False

    @property
    def ref(self) -> ParamRef:
        return self.path, self.weight

    @property
    def full_path(self) -> str:
        return parameter_path(*self.ref)

    @property
    def start_dims(self) -> Dims:
        """The dimensions of the trained factors: those of the weight, or of the chosen rows."""
        return self.dims if self.rows is None else self.dims._replace(out=len(self.rows))


@dataclass(frozen=True)
class Plans:
    """Everything that one adapter changes.

    Fields:
        low: the low-rank changes.
        full: the parameters that are trained in full: {path of the module: names}.
        full_modules: the modules of ``train_also``, whose buffers the adapter keeps too.
        full_readers: the methods that read parameters of ``full`` directly, past their modules.
        split_ties: tied parameters for which this adapter has a value of their own.
    """

    config: LoraConfig
    low: tuple[LowRankPlan, ...]
    full: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    full_modules: frozenset[str] = frozenset()
    full_readers: tuple[WeightReader, ...] = ()
    split_ties: frozenset[ParamRef] = frozenset()


@one_thread_at_a_time
def plan(model: nn.Module, config: LoraConfig, name: str) -> Plans:
    """The plan of ``config`` for ``model``, which is not changed. Raises a TargetError that lists
    every problem."""
    if not isinstance(config, LoraConfig):
        raise _not_a_config(config)
    problems, unusable = list(refusals.name_problems(model, name)), bad_regex(config)
    raise_all(TargetError, "Nothing was attached", [*problems, *unusable] if unusable else [])

    planner = _Planner(model, config, problems)
    names, targets, head = planner.names, *planner.targets()
    specs = planner.specs(targets)
    vectors = [ref for ref in (*head, *targets) if ref not in specs]
    low = plan_low(names, planner.with_tokens(specs), problems)
    full = planner.full(vectors, [entry.path for entry in low])
    plans = complete_plans(
        names,
        config,
        low,
        full,
        problems,
        full_modules=frozenset(planner.also),
        frozen=planner.frozen,
    )
    for path, name in {ref for entry in low for ref in entry.holders}:
        if name in full.get(path, ()):
            problem = (
                f"{parameter_path(path, name)!r} to be changed and, through a tie, trained in full"
            )
            problems.append(
                sentence(problem, "one of them", "leave one of the tied modules out of train_also")
            )
    raise_all(TargetError, "Nothing was attached", problems)
    if callable(config.targets):
        chosen = tuple(dict.fromkeys(path for path, _ in targets))
        plans = replace(plans, config=replace(config, targets=chosen))
    return plans


def complete_plans(
    names: Names,
    config: LoraConfig,
    low: Sequence[LowRankPlan],
    full: Mapping[str, tuple[str, ...]],
    problems: list[str],
    *,
    full_modules: frozenset[str] = frozenset(),
    split_ties: frozenset[ParamRef] = frozenset(),
    frozen: Set[int] = frozenset(),
) -> Plans:
    """The plans of an adapter with the changes ``low`` (``plan_low``). Adds to ``problems``.

    Args:
        full, full_modules, split_ties: as in ``Plans``.
        frozen: parameters that the user froze, by ``id``.
    """
    refusals.check_full(names, full, problems, frozen)
    problems += overlaps(names, _changed_refs(low, full))
    if config.invocation_tokens:
        problems += refusals.invocation_problems(names, low, full)
    readers = () if problems else _full_readers(names, full)
    return Plans(config, tuple(low), full, full_modules, readers, split_ties)


def _not_a_config(config: Any) -> ConfigError:
    if not hasattr(config, "peft_type"):
        do = "use LoraConfig(…), or LoraConfig.from_dict for a mapping"
        return ConfigError(f"config={config!r}", "a veneer.LoraConfig", do)
    do = "pass veneer.LoraConfig.from_peft(config)"
    try:
        do = f"{do}, which is {LoraConfig.from_peft(config)}"
    except ConfigError as error:
        do = f"{do} once these are mended: {error}"
    return ConfigError(f"a {type(config).__name__} of PEFT", "a veneer.LoraConfig", do)


class _Planner:
    """The steps of ``plan``; each adds its problems to ``problems``."""

    def __init__(self, model: nn.Module, config: LoraConfig, problems: list[str]) -> None:
        self.names, self.config, self.problems = Names(model), config, problems
        self.frozen = refusals.frozen_on_purpose(self.names)
        self.words = [] if callable(config.targets) else pattern_list(config.targets)
        self.also: list[str] = []

    def targets(self) -> tuple[list[ParamRef], list[ParamRef]]:
        """(the targets of the config, the parameters of an untrained head, which are trained in
        full)."""
        names, config = self.names, self.config
        targets, more = targeting.target_refs(names, config)
        self.problems += more
        self.also = targeting.expand(names, config.train_also, "train_also", self.problems)
        explicit = callable(config.targets) or any(word not in WORDS for word in self.words)
        for path in (
            dict.fromkeys(path for path, _ in targets if path in self.also) if explicit else ()
        ):
            problem = f"{path!r} in targets and in train_also"
            self.problems.append(sentence(problem, "one of them", "leave it out of the other"))
        head = [] if explicit else self.untrained_head()
        targets = [ref for ref in targets if ref[0] not in self.also and ref not in head]
        targets = self.attachable(targets) if "all" in self.words else targets
        for field_name, patterns in (
            ("ranks", config.ranks),
            ("alphas", config.alphas),
            ("slices", config.slices),
        ):
            self.problems += targeting.unmatched_pattern_problems(
                names, patterns, field_name, targets
            )
        return targets, head

    def untrained_head(self) -> list[ParamRef]:
        """With "all-linear", the parameters of a task head that no checkpoint held. They are
        trained in full: a ΔW of random values would be useless to anyone who loads the adapter."""
        if "all-linear" not in self.words:
            return []
        fresh = self.names.fresh_parameters()
        left_out = targeting.excluded_refs(self.names, self.config, [])
        trainable = [ref for key, ref in fresh.items() if key not in self.frozen]
        head = targeting.fresh_head(self.names, trainable)
        return [ref for ref in head if ref not in left_out]

    def attachable(self, targets: list[ParamRef]) -> list[ParamRef]:
        """The targets that can carry an adapter. A warning names the others, as "all" means every
        layer that can."""
        by_identity = self.names.holders()
        without = {
            path: module for path, module in self.names.modules.items() if kind_of(module) is None
        }
        refused = {
            (path, ""): problem
            for path, module in without.items()
            if (problem := refusals.unreadable_problem(path, module))
        }
        for ref in targets:
            reasons = list(refusals.refusals_of(self.names, ref, by_identity))
            if not reasons and not is_matrix(self.names, ref):
                refusals.check_full(self.names, {ref[0]: (ref[1],)}, reasons, self.frozen)
            if reasons:
                refused[ref] = reasons[0]
        if refused:
            lines = "\n".join(f"  {reason}" for reason in refused.values())
            warnings.warn(
                f'targets="all" leaves out {len(refused)} weights\n{lines}',
                SkippedLayers,
                stacklevel=5,
            )
        return [ref for ref in targets if ref not in refused]

    def specs(self, targets: Sequence[ParamRef]) -> dict[ParamRef, TargetSpec]:
        """Rank, alpha and slices of each target that takes a low-rank change."""
        names, config = self.names, self.config
        variant = VARIANTS[config.variant]
        alpha = variant.default_alpha if config.alpha is None else config.alpha
        return {
            ref: TargetSpec(
                int(targeting.value_for(names, ref, config.ranks, config.rank)),
                targeting.value_for(names, ref, config.alphas, alpha),
                targeting.value_for(names, ref, config.slices, None),
                # "all" takes as much as each layer allows; a rank that the config sets for a layer
                # by name must fit
                clamp="all" in self.words
                and targeting.value_for(names, ref, config.ranks, None) is None,
            )
            for ref in targets
            if is_matrix(names, ref)
        }

    def with_tokens(self, specs: Mapping[ParamRef, TargetSpec]) -> dict[ParamRef, TargetSpec]:
        """``specs`` with the trained tokens: of a target, or (rank 0) of a weight that is no
        target."""
        tokens, by_identity = (
            token_targets.token_ids_by_weight(
                self.names, self.config.trainable_tokens, self.problems
            ),
            None,
        )
        with_tokens = dict(specs)
        for ref, spec in specs.items() if tokens else ():
            by_identity = by_identity or self.names.holders()
            owner = self.names.holders_of(ref, by_identity)[0]
            with_tokens[ref] = replace(spec, tokens=tokens.pop(owner, None))
            if with_tokens[ref].tokens and self.config.dropout:
                problem = (
                    f"dropout={self.config.dropout} with trainable_tokens and a low-rank change of"
                    f" {owner[0]!r}"
                )
                do = "use dropout=0, or exclude it from the targets"
                self.problems.append(
                    sentence(problem, "one of them: trained rows are never dropped", do)
                )
        return with_tokens | {
            owner: TargetSpec(0, 1.0, tokens=ids) for owner, ids in tokens.items()
        }

    def full(self, vectors: Sequence[ParamRef], low: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The parameters that are trained in full, {path: names}: those of ``train_also``, targets
        without two axes (``vectors``), biases (of the modules ``low`` or of all modules), and all
        that are tied to them."""
        names, bias = self.names, self.config.bias
        full = {
            path: [n for n, p in names.modules[path]._parameters.items() if p is not None]
            for path in self.also
        }
        left_out = {
            *((path, "bias") for path in self.also),
            *targeting.excluded_refs(names, self.config, []),
        }
        bias_paths = [path for path in names.modules if (path, "bias") not in left_out]
        candidates = {"none": (), "targets": low, "all": bias_paths}[bias]
        biases = [
            (path, "bias")
            for path in candidates
            if names.modules[path]._parameters.get("bias") is not None
        ]
        if bias != "none" and not biases:
            problem = f"bias={bias!r} and no bias there"
            self.problems.append(sentence(problem, "at least one bias to train", 'use bias="none"'))
        for path, name in (*vectors, *biases):
            full.setdefault(path, []).append(name)
        return with_ties(names, full)


def _changed_refs(low: Sequence[LowRankPlan], full: Mapping[str, Sequence[str]]) -> list[ParamRef]:
    """(path, name) of every parameter that an adapter changes or replaces; a tied parameter under
    each of its names."""
    in_full = [(path, name) for path, parameters in full.items() for name in parameters]
    return [*(ref for entry in low for ref in entry.holders), *in_full]


def with_ties(names: Names, full: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """``full`` with every other module that holds the same parameters: tied parameters are trained
    as one."""
    by_identity = names.holders()
    tied = {path: dict.fromkeys(parameters) for path, parameters in full.items()}
    for path, name in _changed_refs((), full):
        for holder, holder_name in by_identity.get(
            id(names.modules[path]._parameters.get(name)), ()
        ):
            tied.setdefault(holder, {})[holder_name] = None
    return {path: tuple(parameters) for path, parameters in tied.items()}


def _full_readers(names: Names, full: Mapping[str, Sequence[str]]) -> tuple[WeightReader, ...]:
    """The methods that read parameters of ``full`` directly, past the modules that hold them."""
    refs = _changed_refs((), full)
    return tuple(
        dict.fromkeys(
            weight_reader for ref in refs for weight_reader in weight_readers(names, *ref)
        )
    )


def is_matrix(names: Names, ref: ParamRef) -> bool:
    """Whether a parameter can take a low-rank change: its module's kind says so, or it has two axes
    of more than one entry."""
    path, name = ref
    module = names.modules[path]
    kind = kind_of(module)
    if kind is not None and (name in kind.weights(module) or name in kind.vectors(module)):
        return name in kind.weights(module)
    return "bias" not in name and name in GENERAL_KIND.weights(module)


@dataclass(frozen=True)
class TargetSpec:
    """The settings of the config for one weight.

    Fields:
        rank: 0 trains only ``tokens``.
        slices: (start, stop) ranges of its outputs, or a bool for each of its equal slices.
        clamp: lower the rank to what the shape allows, instead of an error.
        tokens, module_only: as in ``LowRankPlan``.
    """

    rank: int
    alpha: float
    slices: Sequence[Any] | None = None
    clamp: bool = False
    tokens: tuple[int, ...] | None = None
    module_only: bool = False


def plan_low(
    names: Names, specs: Mapping[ParamRef, TargetSpec], problems: list[str]
) -> list[LowRankPlan]:
    """A plan for each weight in ``specs``, with every module that holds or reads it. Adds to
    ``problems``."""
    by_identity = names.holders()
    plans: dict[ParamRef, LowRankPlan] = {}
    for ref, spec in specs.items():
        reasons = list(refusals.refusals_of(names, ref, by_identity))
        problems += reasons
        entry = (
            None
            if reasons
            else _low_plan(names, names.holders_of(ref, by_identity), spec, problems)
        )
        if entry is not None:
            plans.setdefault(entry.ref, entry)
    return list(plans.values())


def _low_plan(
    names: Names, refs: list[ParamRef], spec: TargetSpec, problems: list[str]
) -> LowRankPlan | None:
    path, name = refs[0]
    module = names.modules[path]
    layer, weight = kind_for(module, name), weight_of(module, name)
    storage: Any = storage_of(weight)
    description = f"{parameter_path(path, name)!r} ({base_class(module).__name__})"
    dims = layer.dims(module, storage.shape(weight))
    rows = None
    if spec.slices is not None:
        rows = _rows(spec.slices, dims)
        if rows is None:
            problem = (
                f"slices {list(spec.slices)!r} for {description}, which has {dims.out} outputs"
            )
            expected = "a bool for each of its equal parts, or (start, stop) ranges of its outputs"
            problems.append(
                sentence(problem, expected, "correct them, for instance [True, False, True]")
            )
            return None
    if spec.tokens is not None:
        token_problems = list(token_targets.token_problems(names, refs[0], spec.tokens, refs))
        problems += token_problems
        if token_problems:
            return None
    largest = min(dims.max_rank, len(rows)) if rows else dims.max_rank
    rank = min(spec.rank, largest) if spec.clamp else spec.rank
    if rank > largest:
        problem = f"rank {rank} for {description}, (groups, out, in) = {tuple(dims)}"
        do = f"lower the rank, set ranks={{{path!r}: {largest}}} or exclude it"
        problems.append(sentence(problem, f"at most {largest}, what its weight allows", do))
        return None
    readers = (weight_reader for ref in refs for weight_reader in weight_readers(names, *ref))
    other_readers = () if spec.module_only else tuple(dict.fromkeys(readers))
    return LowRankPlan(
        path,
        name,
        layer,
        storage,
        dims,
        rank,
        spec.alpha,
        tuple(refs),
        other_readers,
        rows,
        spec.tokens,
        spec.module_only,
    )


def _rows(slices: Sequence[Any], dims: Dims) -> tuple[int, ...] | None:
    """The outputs that ``slices`` choose, ascending in each; None if they do not fit the weight."""
    if all(isinstance(choice, bool) for choice in slices):
        size, rest = divmod(dims.out, len(slices))
        ranges = [(size * number, size * (number + 1)) for number, on in enumerate(slices) if on]
        fits = not rest
    else:
        ranges = [tuple(bounds) for bounds in slices]
        fits = all(len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= dims.out for bounds in ranges)
    rows = tuple(row for start, stop in ranges for row in range(start, stop)) if fits else ()
    return rows if rows and len(set(rows)) == len(rows) and dims.groups == 1 else None
