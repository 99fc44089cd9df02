"""Decide how to write each changed parameter: as a low-rank product, in full, or not at all.

low      matched by ``targets`` and has a low-rank change; otherwise
whole    matched by ``keep``: by default every vector; otherwise
lost     not written, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from veneer.attach import (
    Names,
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

#: the words of ``keep`` beside patterns
AUTO, NONE, LOSSY = WORDS = ("auto", "none", "lossy")

#: reasons to write a parameter in full, or not at all
ASKED, VECTOR, LITTLE = "asked for", "no low-rank change", "lossy as a product"
NO_TARGET, EXCLUDED, NOT_KEPT = "no target", "excluded", "no low-rank change, and keep says none"


class Selection(NamedTuple):
    """The changed pairs by the way they are written, with the reason."""

    low: tuple[WeightPair, ...]
    whole: tuple[tuple[WeightPair, str], ...]
    lost: tuple[tuple[WeightPair, str], ...]


def select_weights(
    names: Names,
    changed: Sequence[WeightPair],
    targets: Targets,
    exclude: Sequence[str],
    keep: Sequence[str],
    adapter: str,
) -> Selection:
    """Sort the changed pairs. ``adapter``: the name under which the adapter will be installed on
    the model. ``TargetError``: a pattern matches nothing, or a weight cannot carry its change; the
    error lists every problem."""
    config = LoraConfig(rank=1, targets=targets, exclude=exclude)
    patterns = [pattern for pattern in keep if pattern not in WORDS]
    problems = bad_regex(LoraConfig(rank=1, targets=targets, exclude=[*config.exclude, *patterns]))
    raise_all(TargetError, "Nothing was extracted", problems)
    problems += name_problems(names.model, adapter)
    if (attached := adapters_of(names.model)) is not None and attached.merged is not None:
        problem = f"{attached.merged!r} merged into the weights of the base"
        problems.append(sentence(problem, "an unmerged base", "call veneer.unmerge(model) first"))
    selected_refs, target_problems = target_refs(names, config)
    problems += target_problems
    selected = set(selected_refs)
    left_out = excluded_refs(names, config, []) | _matching_refs(
        names, [p for p in config.exclude if names.matching(p)], []
    )
    by_name = _matching_refs(names, patterns, problems)
    low, whole, lost = [], [], []
    for pair in changed:
        split_names = (path.rpartition(".") for path in pair.entry.names)
        # a tied weight has several references
        refs = {(names.canonical[module_path], name) for module_path, _, name in split_names}
        if refs & left_out and not refs & selected:
            lost.append((pair, EXCLUDED))
        elif refs & by_name:
            whole.append((pair, ASKED))
        elif not pair.entry.is_buffer and is_matrix(names, pair.entry.ref):
            low.append(pair) if refs & selected else lost.append((pair, NO_TARGET))
        elif NONE in keep:
            lost.append((pair, NOT_KEPT))
        else:
            whole.append((pair, VECTOR))
    ranks = {pair.entry.ref: 1 for pair in low}
    plan(names, config, ranks, [pair for pair, _ in whole], problems)
    if LOSSY in keep:
        plan(names, config, {}, low, problems)
    raise_all(TargetError, "Nothing was extracted", list(dict.fromkeys(problems)))
    return Selection(tuple(low), tuple(whole), tuple(lost))


def plan(
    names: Names,
    config: LoraConfig,
    ranks: Mapping[ParamRef, int],
    full_pairs: Sequence[WeightPair],
    problems: list[str],
) -> Plans:
    """The plan of an adapter with these ranks (alpha = rank, so that the scale is 1) and with these
    parameters and buffers in full."""
    low = plan_low(
        names, {ref: TargetSpec(rank, float(rank)) for ref, rank in ranks.items()}, problems
    )
    full: dict[str, tuple[str, ...]] = {}
    for pair in full_pairs:
        path, name = pair.entry.ref
        full[path] = (*full.get(path, ()), *(() if pair.entry.is_buffer else (name,)))
    full = {**dict.fromkeys(full, ()), **with_ties(names, full)}
    buffers = frozenset(pair.entry.ref[0] for pair in full_pairs if pair.entry.is_buffer)
    return complete_plans(names, config, low, full, problems, full_modules=buffers)


def keep_options(keep: str | Sequence[str]) -> tuple[str, ...]:
    """``keep`` as a tuple. ``ConfigError``: it holds an invalid pattern or contradictory words."""
    words = (keep,) if isinstance(keep, str) else tuple(keep)
    if not all(isinstance(word, str) and word for word in words):
        problem, expected = (
            f"keep={keep!r}",
            "patterns of parameters or modules, 'auto', 'none' or 'lossy'",
        )
        raise ConfigError(problem, expected, "name what is to be written whole")
    if AUTO in words and NONE in words:
        raise ConfigError("keep with 'auto' and 'none'", "one of them", "leave one out")
    return words


def _matching_refs(names: Names, patterns: Sequence[str], problems: list[str]) -> set[ParamRef]:
    """The parameters and buffers that patterns match: by a module above them, or by their own
    paths."""
    refs: set[ParamRef] = set()
    for pattern in patterns:
        below = [child for path in names.matching(pattern) for child in names.children(path)]
        modules = [(path, names.modules[path]) for path in below]
        matches = [
            (path, name)
            for path, module in modules
            for name in (*own_parameters(module), *module._buffers)
        ]
        matches = matches or names.parameters_matching(pattern)
        if not matches:
            problem = f"keep pattern {pattern!r} matches no parameter{names.suggest(pattern)}"
            problems.append(sentence(problem, "a name of this model", "correct or remove it"))
        refs.update(matches)
    return refs
