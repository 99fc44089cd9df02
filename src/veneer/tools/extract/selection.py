"""Decide how an extraction writes each changed parameter: as a low-rank product, in full, or not
at all (the parameter is then lost).

``exclude``, ``keep`` and ``targets`` are arguments of ``extract``. The first line that applies to a
parameter decides:

lost      ``exclude`` matches it
full      a pattern in ``keep`` matches it
low_rank  it is a matrix, which can have a low-rank change, and ``targets`` matches it
full      it is a vector or a buffer, and ``keep`` does not contain "none"
lost      every other parameter; the report gives the reason

``extract`` then chooses the ranks. If ``keep`` contains "lossy", it writes a weight in full after
all whose product is too large or keeps too little of the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from veneer.attach import (
    ModelIndex,
    Plans,
    TargetSpec,
    adapters_of,
    complete_plans,
    excluded_refs,
    is_matrix,
    name_problems,
    plan_low,
    target_refs,
    with_ties,
)
from veneer.bases import own_parameters
from veneer.config import LoraConfig, Targets, bad_regex
from veneer.errors import ConfigError, TargetError, raise_all, sentence
from veneer.layers import ParamRef
from veneer.tools.extract.weight_pairs import WeightPair

#: the words that have a meaning of their own in ``keep``, which otherwise contains patterns
AUTO, NONE, LOSSY = KEEP_WORDS = ("auto", "none", "lossy")

#: reasons in the report: why a parameter is written in full, and why it is not written
REQUESTED, VECTOR, LOSSY_PRODUCT = "asked for", "no low-rank change", "lossy as a product"
NO_TARGET, EXCLUDED, NOT_KEPT = "no target", "excluded", "no low-rank change, and keep says none"


class Selection(NamedTuple):
    """The changed weights by how they are written: as a product (``low_rank``), in full (``full``),
    or not at all (``lost``). ``full`` and ``lost`` give a reason with each weight."""

    low_rank: tuple[WeightPair, ...]
    full: tuple[tuple[WeightPair, str], ...]
    lost: tuple[tuple[WeightPair, str], ...]


def select_weights(
    model_index: ModelIndex,
    changed_pairs: Sequence[WeightPair],
    targets: Targets,
    exclude: str | Sequence[str],
    keep_entries: Sequence[str],
    adapter_name: str,
) -> Selection:
    """Decide how to write each changed weight, by the rules in the docstring of this module.

    Args:
        targets, exclude: as for ``extract``; ``keep_entries`` is its argument ``keep``.
        adapter_name: the name under which the adapter will be installed on the base.

    Raises:
        TargetError: a pattern matches nothing, or an adapter cannot hold the change of a weight.
            The error lists every problem.
    """
    config = LoraConfig(rank=1, targets=targets, exclude=exclude)
    keep_patterns = [pattern for pattern in keep_entries if pattern not in KEEP_WORDS]
    problems = bad_regex(
        LoraConfig(rank=1, targets=targets, exclude=[*config.exclude, *keep_patterns])
    )
    raise_all(TargetError, "Nothing was extracted", problems)
    problems += name_problems(model_index.model, adapter_name)
    if (
        attached_adapters := adapters_of(model_index.model)
    ) is not None and attached_adapters.merged is not None:
        problem = f"{attached_adapters.merged!r} merged into the weights of the base"
        problems.append(sentence(problem, "an unmerged base", "call veneer.unmerge(model) first"))
    target_ref_list, target_problems = target_refs(model_index, config)
    problems += target_problems
    targeted_refs = set(target_ref_list)
    unwritten_refs = excluded_refs(model_index, config, []) | _matching_refs(
        model_index,
        [pattern for pattern in config.exclude if model_index.modules_matching(pattern)],
        [],
    )
    keep_refs = _matching_refs(model_index, keep_patterns, problems)
    low_rank_pairs, full_pairs, lost_pairs = [], [], []
    for pair in changed_pairs:
        split_names = (path.rpartition(".") for path in pair.model_weight.names)
        # a tied weight has several names; a pattern that matches one of them decides for the weight
        weight_refs = {
            (model_index.canonical[module_path], name) for module_path, _, name in split_names
        }
        if weight_refs & unwritten_refs and not weight_refs & targeted_refs:
            lost_pairs.append((pair, EXCLUDED))
        elif weight_refs & keep_refs:
            full_pairs.append((pair, REQUESTED))
        elif not pair.model_weight.is_buffer and is_matrix(model_index, pair.model_weight.ref):
            low_rank_pairs.append(pair) if weight_refs & targeted_refs else lost_pairs.append(
                (pair, NO_TARGET)
            )
        elif NONE in keep_entries:
            lost_pairs.append((pair, NOT_KEPT))
        else:
            full_pairs.append((pair, VECTOR))
    ranks_by_ref = {pair.model_weight.ref: 1 for pair in low_rank_pairs}
    plan_adapter(model_index, config, ranks_by_ref, [pair for pair, _ in full_pairs], problems)
    if LOSSY in keep_entries:
        plan_adapter(model_index, config, {}, low_rank_pairs, problems)
    raise_all(TargetError, "Nothing was extracted", list(dict.fromkeys(problems)))
    return Selection(tuple(low_rank_pairs), tuple(full_pairs), tuple(lost_pairs))


def plan_adapter(
    model_index: ModelIndex,
    config: LoraConfig,
    ranks_by_ref: Mapping[ParamRef, int],
    full_pairs: Sequence[WeightPair],
    problems: list[str],
) -> Plans:
    """The plan by which the adapter will be installed on the model. It has products of the ranks
    ``ranks_by_ref`` (with alpha = rank, so that the scale is 1) and holds the weights of
    ``full_pairs`` in full. Reasons why the model cannot have this adapter are added to
    ``problems``."""
    low_rank_plans = plan_low(
        model_index,
        {ref: TargetSpec(rank, float(rank)) for ref, rank in ranks_by_ref.items()},
        problems,
    )
    full_names_by_module: dict[str, tuple[str, ...]] = {}
    for pair in full_pairs:
        path, name = pair.model_weight.ref
        full_names_by_module[path] = (
            *full_names_by_module.get(path, ()),
            *(() if pair.model_weight.is_buffer else (name,)),
        )
    buffer_modules = frozenset(
        pair.model_weight.ref[0] for pair in full_pairs if pair.model_weight.is_buffer
    )
    return complete_plans(
        model_index,
        config,
        low_rank_plans,
        with_ties(model_index, full_names_by_module),
        problems,
        full_modules=buffer_modules,
    )


def keep_options(keep: str | Sequence[str]) -> tuple[str, ...]:
    """The argument ``keep`` as a tuple. ``ConfigError``: a pattern is empty or not a string, or
    ``keep`` contains both "auto" and "none"."""
    keep_entries = (keep,) if isinstance(keep, str) else tuple(keep)
    if not all(isinstance(entry, str) and entry for entry in keep_entries):
        raise ConfigError(
            f"keep={keep!r}",
            "patterns of parameters or modules, 'auto', 'none' or 'lossy'",
            "name what is to be written whole",
        )
    if AUTO in keep_entries and NONE in keep_entries:
        raise ConfigError("keep with 'auto' and 'none'", "one of them", "leave one out")
    return keep_entries


def _matching_refs(
    model_index: ModelIndex, patterns: Sequence[str], problems: list[str]
) -> set[ParamRef]:
    """The parameters and buffers that patterns match. A pattern that matches modules selects
    everything in them and in their submodules; any other pattern selects the parameters whose own
    paths it matches. For a pattern that matches nothing, an error text is added to ``problems``."""
    refs: set[ParamRef] = set()
    for pattern in patterns:
        module_paths = [
            child
            for path in model_index.modules_matching(pattern)
            for child in model_index.subtree_paths(path)
        ]
        matching_refs = [
            (path, name)
            for path in module_paths
            for name in (
                *own_parameters(model_index.modules[path]),
                *model_index.modules[path]._buffers,
            )
        ] or model_index.parameters_matching(pattern)
        if not matching_refs:
            problem = f"keep pattern {pattern!r} matches no parameter{model_index.suggest(pattern)}"
            problems.append(sentence(problem, "a name of this model", "correct or remove it"))
        refs.update(matching_refs)
    return refs
