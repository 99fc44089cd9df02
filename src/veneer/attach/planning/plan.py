"""Plan an adapter: which weight gets which rank, which modules read it, and which parameters are
trained in full.

plan(model, config, name) -> Plans      does not change the model; one error lists every problem
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from veneer.attach.layer.model_index import ModelIndex
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
        path, weight: the path of the first module that holds the weight, and the weight's name.
        layer, storage: the kind of that module, and the way in which the weight is stored.
        dims: (groups, out, in) of the weight. ``groups`` is 1 for a linear layer.
        holders: (path, name) of the weight in every module that holds it; several if tied.
        weight_readers: the methods that read the weight without calling a module that holds it.
        rows: the indices of the output rows to change; None for all of them.
        tokens: the ids of the tokens whose rows of an embedding or head are trained in full; None
            for none. If ``rank`` is 0, nothing else changes.
        module_only: whether code that does not call such a module gets the unchanged weight, as in
            PEFT. Then ``weight_readers`` is empty.
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
        """(groups, out, in) of the trained change: those of the weight, or of its ``rows``."""
        return self.dims if self.rows is None else self.dims._replace(out=len(self.rows))


@dataclass(frozen=True)
class Plans:
    """Everything that one adapter changes.

    Fields:
        low_rank_plans: the plans of the low-rank changes.
        full: the names of the parameters that are trained in full, by the path of their module.
        full_modules: the paths of the modules that ``config.train_also`` matches. The adapter also
            has copies of their buffers, such as running statistics.
        full_readers: the methods that read parameters of ``full`` without a call of the module that
            holds them.
        split_ties: (path, name) of tied parameters that get a value of their own at this name.
    """

    config: LoraConfig
    low_rank_plans: tuple[LowRankPlan, ...]
    full: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    full_modules: frozenset[str] = frozenset()
    full_readers: tuple[WeightReader, ...] = ()
    split_ties: frozenset[ParamRef] = frozenset()


@one_thread_at_a_time
def plan(model: nn.Module, config: LoraConfig, name: str) -> Plans:
    """The plan of ``config`` for ``model``, which is not changed. Raises a TargetError that lists
    every problem, or a ConfigError if ``config`` is no ``LoraConfig``."""
    if not isinstance(config, LoraConfig):
        raise _not_a_config(config)
    problems, regex_problems = list(refusals.name_problems(model, name)), bad_regex(config)
    raise_all(
        TargetError, "Nothing was attached", [*problems, *regex_problems] if regex_problems else []
    )

    planner = _Planner(model, config, problems)
    model_index, targets, head_refs = planner.model_index, *planner.find_targets()
    specs = planner.specs(targets)
    full_refs = [ref for ref in (*head_refs, *targets) if ref not in specs]
    low_rank_plans = plan_low(model_index, planner.with_tokens(specs), problems)
    full_params = planner.find_full_params(
        full_refs, [weight_plan.path for weight_plan in low_rank_plans]
    )
    plans = complete_plans(
        model_index,
        config,
        low_rank_plans,
        full_params,
        problems,
        full_modules=frozenset(planner.train_also_paths),
        frozen_ids=planner.frozen_ids,
    )
    for path, weight_name in {ref for weight_plan in low_rank_plans for ref in weight_plan.holders}:
        if weight_name in full_params.get(path, ()):
            problem = (
                f"{parameter_path(path, weight_name)!r} to be changed and, through a tie, trained"
                " in full"
            )
            problems.append(
                sentence(problem, "one of them", "leave one of the tied modules out of train_also")
            )
    raise_all(TargetError, "Nothing was attached", problems)
    if callable(config.targets):
        # the chosen paths as regular expressions, because a plain path could be taken for a word
        # such as "all", or match the end of another path
        patterns = tuple(dict.fromkeys(f"re:{re.escape(path)}" for path, _ in targets))
        plans = replace(plans, config=replace(config, targets=patterns))
    return plans


def complete_plans(
    model_index: ModelIndex,
    config: LoraConfig,
    low_rank_plans: Sequence[LowRankPlan],
    full_params: Mapping[str, tuple[str, ...]],
    problems: list[str],
    *,
    full_modules: frozenset[str] = frozenset(),
    split_ties: frozenset[ParamRef] = frozenset(),
    frozen_ids: Set[int] = frozenset(),
) -> Plans:
    """The plans of an adapter with ``low_rank_plans`` (results of ``plan_low``) that trains
    ``full_params``, {module path: parameter names}, in full. Reasons against them are added to
    ``problems``. ``frozen_ids``: the ``id`` of parameters that the user froze. ``full_modules`` and
    ``split_ties`` are described in ``Plans``."""
    refusals.check_full(model_index, full_params, problems, frozen_ids)
    problems += overlaps(model_index, _changed_refs(low_rank_plans, full_params))
    if config.invocation_tokens:
        problems += refusals.invocation_problems(model_index, low_rank_plans, full_params)
    readers = () if problems else _direct_readers(model_index, _changed_refs((), full_params))
    return Plans(config, tuple(low_rank_plans), full_params, full_modules, readers, split_ties)


def _not_a_config(config: Any) -> ConfigError:
    """The error of ``plan`` for a ``config`` that is not a ``LoraConfig``."""
    if not hasattr(config, "peft_type"):
        advice = "use LoraConfig(…), or LoraConfig.from_dict for a mapping"
        return ConfigError(f"config={config!r}", "a veneer.LoraConfig", advice)
    advice = "pass veneer.LoraConfig.from_peft(config)"
    try:
        advice = f"{advice}, which is {LoraConfig.from_peft(config)}"
    except ConfigError as error:
        advice = f"{advice} once these are mended: {error}"
    return ConfigError(f"a {type(config).__name__} of PEFT", "a veneer.LoraConfig", advice)


class _Planner:
    """The steps of ``plan``. Each step adds the problems that it finds to ``problems``.

    Fields:
        frozen_ids: the ``id`` of each parameter that the user froze.
        words: the patterns of ``config.targets``, some of which may be words such as "all-linear".
        train_also_paths: the paths of the modules that ``config.train_also`` matches.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, problems: list[str]) -> None:
        self.model_index, self.config, self.problems = ModelIndex(model), config, problems
        self.frozen_ids = refusals.frozen_on_purpose(self.model_index)
        self.words = [] if callable(config.targets) else pattern_list(config.targets)
        self.train_also_paths: list[str] = []

    def find_targets(self) -> tuple[list[ParamRef], list[ParamRef]]:
        """((path, name) of each parameter that the config targets; those of a head that was not in
        the checkpoint, which are trained in full). Sets ``train_also_paths``."""
        model_index, config = self.model_index, self.config
        targets, target_problems = targeting.target_refs(model_index, config)
        self.problems += target_problems
        self.train_also_paths = targeting.expand_patterns(
            model_index, config.train_also, "train_also", self.problems
        )
        has_explicit_targets = callable(config.targets) or any(
            word not in WORDS for word in self.words
        )
        paths_in_both = dict.fromkeys(
            path for path, _ in targets if path in self.train_also_paths and has_explicit_targets
        )
        for path in paths_in_both:
            problem = f"{path!r} in targets and in train_also"
            self.problems.append(sentence(problem, "one of them", "leave it out of the other"))
        head_refs = self.untrained_head()
        targets = [
            ref for ref in targets if ref[0] not in self.train_also_paths and ref not in head_refs
        ]
        targets = self.attachable(targets) if "all" in self.words else targets
        for field_name, patterns in (
            ("ranks", config.ranks),
            ("alphas", config.alphas),
            ("slices", config.slices),
        ):
            self.problems += targeting.unmatched_pattern_problems(
                model_index, patterns, field_name, targets
            )
        return targets, head_refs

    def untrained_head(self) -> list[ParamRef]:
        """With targets="all-linear", the parameters of a task head that were not in the checkpoint,
        which are trained in full: a ΔW would not fit the random values of another model."""
        if "all-linear" not in self.words:
            return []
        fresh_parameters = self.model_index.fresh_parameters()
        excluded_refs = targeting.excluded_refs(self.model_index, self.config, [])
        trainable_refs = [
            ref for param_id, ref in fresh_parameters.items() if param_id not in self.frozen_ids
        ]
        head_refs = targeting.fresh_head(self.model_index, trainable_refs)
        return [ref for ref in head_refs if ref not in excluded_refs]

    def attachable(self, targets: list[ParamRef]) -> list[ParamRef]:
        """The ``targets`` that an adapter can change. A ``SkippedLayers`` warning names the others:
        with targets="all" they are no error."""
        refs_by_id = self.model_index.refs_by_parameter_id()
        modules_without_kind = {
            p: module for p, module in self.model_index.modules.items() if kind_of(module) is None
        }
        problem_by_ref = {
            (path, ""): problem
            for path, module in modules_without_kind.items()
            if (problem := refusals.unreadable_problem(path, module))
        }
        for ref in targets:
            reasons = list(refusals.refusals_of(self.model_index, ref, refs_by_id))
            if not reasons and not is_matrix(self.model_index, ref):
                refusals.check_full(self.model_index, {ref[0]: (ref[1],)}, reasons, self.frozen_ids)
            if reasons:
                problem_by_ref[ref] = reasons[0]
        if problem_by_ref:
            lines = "\n".join(f"  {reason}" for reason in problem_by_ref.values())
            warnings.warn(
                f'targets="all" leaves out {len(problem_by_ref)} weights\n{lines}',
                SkippedLayers,
                stacklevel=5,
            )
        return [ref for ref in targets if ref not in problem_by_ref]

    def specs(self, targets: Sequence[ParamRef]) -> dict[ParamRef, TargetSpec]:
        """Rank, alpha and slices of each target that is a matrix; other targets are trained in
        full. A tied weight has the same settings under each of its names."""
        model_index, config = self.model_index, self.config
        variant = VARIANTS[config.variant]
        alpha = variant.default_alpha if config.alpha is None else config.alpha
        refs_by_id = model_index.refs_by_parameter_id()
        specs: dict[ParamRef, TargetSpec] = {}
        for ref in targets:
            if not is_matrix(model_index, ref):
                continue
            holders = model_index.holders_of(ref, refs_by_id)
            rank = targeting.value_for(model_index, holders, config.ranks, None)
            specs[ref] = TargetSpec(
                int(config.rank if rank is None else rank),
                targeting.value_for(model_index, holders, config.alphas, alpha),
                targeting.value_for(model_index, holders, config.slices, None),
                # "all" lowers the rank to what each layer allows, but a rank that ``config.ranks``
                # sets for a layer must fit
                clamp="all" in self.words and rank is None,
            )
        return specs

    def with_tokens(self, specs: Mapping[ParamRef, TargetSpec]) -> dict[ParamRef, TargetSpec]:
        """``specs`` with the token ids of ``config.trainable_tokens``, whose rows are trained in
        full. A weight with such rows that is no target gets a spec of rank 0."""
        ids_by_weight = token_targets.token_ids_by_weight(
            self.model_index, self.config.trainable_tokens, self.problems
        )
        refs_by_id = self.model_index.refs_by_parameter_id() if ids_by_weight else {}
        specs_with_tokens = dict(specs)
        for ref, spec in specs.items() if ids_by_weight else ():
            first_ref = self.model_index.holders_of(ref, refs_by_id)[0]
            specs_with_tokens[ref] = replace(spec, tokens=ids_by_weight.pop(first_ref, None))
            if specs_with_tokens[ref].tokens and self.config.dropout:
                problem = (
                    f"dropout={self.config.dropout} with trainable_tokens and a low-rank change of"
                    f" {first_ref[0]!r}"
                )
                advice = "use dropout=0, or exclude it from the targets"
                self.problems.append(
                    sentence(problem, "one of them: trained rows are never dropped", advice)
                )
        return specs_with_tokens | {
            first_ref: TargetSpec(0, 1.0, tokens=ids) for first_ref, ids in ids_by_weight.items()
        }

    def find_full_params(
        self, full_refs: Sequence[ParamRef], low_rank_paths: Sequence[str]
    ) -> dict[str, tuple[str, ...]]:
        """{module path: names} of the parameters that are trained in full: those of ``train_also``,
        ``full_refs``, the biases that ``config.bias`` selects ("targets": those of the modules
        ``low_rank_paths``), and all parameters that are tied to these."""
        model_index, bias = self.model_index, self.config.bias
        full_params = {
            path: [n for n, p in model_index.modules[path]._parameters.items() if p is not None]
            for path in self.train_also_paths
        }
        biases = [
            ref
            for ref in targeting.bias_refs(model_index, self.config, low_rank_paths)
            if ref[0] not in self.train_also_paths
        ]
        if bias != "none" and not biases:
            problem = f"bias={bias!r} and no bias there"
            self.problems.append(sentence(problem, "at least one bias to train", 'use bias="none"'))
        for path, name in (*full_refs, *biases):
            full_params.setdefault(path, []).append(name)
        return with_ties(model_index, full_params)


def _changed_refs(
    low_rank_plans: Sequence[LowRankPlan], full_params: Mapping[str, Sequence[str]]
) -> list[ParamRef]:
    """(path, name) of every parameter that an adapter changes at a low rank, under each of its
    names if it is tied, or trains in full (``full_params``, {module path: names})."""
    full_refs = [(path, name) for path, parameters in full_params.items() for name in parameters]
    return [*(ref for weight_plan in low_rank_plans for ref in weight_plan.holders), *full_refs]


def with_ties(
    model_index: ModelIndex, full_params: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """``full_params``, {module path: parameter names}, with every other name of those parameters
    that are tied, because tied parameters are trained as one."""
    refs_by_id = model_index.refs_by_parameter_id()
    names_by_path = {path: dict.fromkeys(parameters) for path, parameters in full_params.items()}
    for path, name in _changed_refs((), full_params):
        for holder_path, holder_name in refs_by_id.get(
            id(model_index.modules[path]._parameters.get(name)), ()
        ):
            names_by_path.setdefault(holder_path, {})[holder_name] = None
    return {path: tuple(parameters) for path, parameters in names_by_path.items()}


def _direct_readers(model_index: ModelIndex, refs: Sequence[ParamRef]) -> tuple[WeightReader, ...]:
    """The methods that read some of these parameters without calling the modules that hold them."""
    return tuple(
        dict.fromkeys(
            weight_reader for ref in refs for weight_reader in weight_readers(model_index, *ref)
        )
    )


def is_matrix(model_index: ModelIndex, ref: ParamRef) -> bool:
    """Whether a parameter can take a low-rank change, as the kind of its module says. One that the
    kind does not list must be no bias and have two axes or more, without leading axes of size 1."""
    path, name = ref
    module = model_index.modules[path]
    kind = kind_of(module)
    if kind is not None and (name in kind.weights(module) or name in kind.vectors(module)):
        return name in kind.weights(module)
    return "bias" not in name and name in GENERAL_KIND.weights(module)


@dataclass(frozen=True)
class TargetSpec:
    """The settings of one weight: those of the config, or those that a file implies.

    Fields:
        rank: the rank of the change; 0 trains only the rows of ``tokens``.
        slices: the output rows to change, as (start, stop) ranges, or as a bool for each of several
            slices of equal size. None changes all rows.
        clamp: whether to lower a rank that the shape does not allow, instead of raising an error.
        tokens, module_only: as in ``LowRankPlan``.
    """

    rank: int
    alpha: float
    slices: Sequence[Any] | None = None
    clamp: bool = False
    tokens: tuple[int, ...] | None = None
    module_only: bool = False


def plan_low(
    model_index: ModelIndex, specs: Mapping[ParamRef, TargetSpec], problems: list[str]
) -> list[LowRankPlan]:
    """A plan for each weight in ``specs``; a tied weight gets one plan. If a weight cannot be
    planned, the reasons are added to ``problems``."""
    refs_by_id = model_index.refs_by_parameter_id()
    plan_by_ref: dict[ParamRef, LowRankPlan] = {}
    for ref, spec in specs.items():
        refusals_of_ref = list(refusals.refusals_of(model_index, ref, refs_by_id))
        problems += refusals_of_ref
        weight_plan = (
            None
            if refusals_of_ref
            else _low_rank_plan(
                model_index, model_index.holders_of(ref, refs_by_id), spec, problems
            )
        )
        if weight_plan is not None:
            plan_by_ref.setdefault(weight_plan.ref, weight_plan)
    return list(plan_by_ref.values())


def _low_rank_plan(
    model_index: ModelIndex, refs: list[ParamRef], spec: TargetSpec, problems: list[str]
) -> LowRankPlan | None:
    """The plan of one weight. ``refs`` are the (path, name) of every module that holds it. None if
    it cannot be planned; then the reason is added to ``problems``."""
    path, name = refs[0]
    module = model_index.modules[path]
    layer, weight = kind_for(module, name), weight_of(module, name)
    storage: Any = storage_of(weight)
    description = f"{parameter_path(path, name)!r} ({base_class(module).__name__})"
    dims = layer.dims(module, storage.shape(weight))
    rows = None
    if spec.slices is not None:
        rows = _changed_rows(spec.slices, dims)
        if rows is None:
            problems.append(
                sentence(
                    f"slices {list(spec.slices)!r} for {description}, which has {dims.out} outputs",
                    "a bool for each of its equal parts, or (start, stop) ranges of its outputs",
                    "correct them, for instance [True, False, True]",
                )
            )
            return None
    if spec.tokens is not None:
        token_problems = list(
            token_targets.token_problems(model_index, refs, spec.tokens, storage.shape(weight)[0])
        )
        problems += token_problems
        if token_problems:
            return None
    max_rank = min(dims.max_rank, len(rows)) if rows else dims.max_rank
    rank = min(spec.rank, max_rank) if spec.clamp else spec.rank
    if rank > max_rank:
        problem = f"rank {rank} for {description}, (groups, out, in) = {tuple(dims)}"
        advice = f"lower the rank, set ranks={{{path!r}: {max_rank}}} or exclude it"
        problems.append(sentence(problem, f"at most {max_rank}, what its weight allows", advice))
        return None
    direct_readers = () if spec.module_only else _direct_readers(model_index, refs)
    return LowRankPlan(
        path,
        name,
        layer,
        storage,
        dims,
        rank,
        spec.alpha,
        tuple(refs),
        direct_readers,
        rows,
        spec.tokens,
        spec.module_only,
    )


def _changed_rows(slices: Sequence[Any], dims: Dims) -> tuple[int, ...] | None:
    """The indices of the output rows that ``slices`` (``TargetSpec.slices``) select. None if they
    do not fit a weight of ``dims``: out of range, overlapping, empty, or several groups."""
    if all(isinstance(is_selected, bool) for is_selected in slices):
        slice_size, remainder = divmod(dims.out, len(slices))
        ranges = [
            (slice_size * index, slice_size * (index + 1))
            for index, is_selected in enumerate(slices)
            if is_selected
        ]
        fits = not remainder
    else:
        ranges = [tuple(bounds) for bounds in slices]
        fits = all(len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= dims.out for bounds in ranges)
    rows = tuple(row for start, stop in ranges for row in range(start, stop)) if fits else ()
    return rows if rows and len(set(rows)) == len(rows) and dims.groups == 1 else None
