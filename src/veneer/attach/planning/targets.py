"""Find the weights that the targets of a config mean. Targets are patterns over paths, words such
as "all-linear", and indices of blocks.

A pattern selects modules. If it matches no module, it selects parameters by their own paths
("experts.gate_up_proj"). A module with several names counts once, under its first name, and matches
under each of its names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.layer.names import Names
from veneer.bases import own_parameters, unreadable
from veneer.config import LoraConfig, Targets, path_test, pattern_list
from veneer.distributed import base_class
from veneer.errors import listing, sentence
from veneer.layers import GENERAL_KIND, LAYERS, ParamRef, kind_of
from veneer.layers.parameter import without_unit_axes

#: the words that ``targets`` may contain in place of a pattern, and their meanings
_WORD_MEANINGS = {
    "all-linear": "the linear layers outside of an output head",
    "attention": "the linear layers of attention",
    "mlp": "the linear layers of repeated blocks outside of attention",
    "all": "every layer that can be attached to",
    "peft-all-linear": "every nn.Linear and Conv1D but the output embedding",
}
WORDS = tuple(_WORD_MEANINGS)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def target_refs(names: Names, config: LoraConfig) -> tuple[list[ParamRef], list[str]]:
    """(the parameters that a config targets, in the model's order; problems)."""
    problems: list[str] = []
    selected_refs = _match_targets(names, config.targets, problems)
    excluded = excluded_refs(names, config, problems)
    selected_refs = [ref for ref in selected_refs if ref not in excluded]
    if config.layers is not None:
        block_count = _block_count(names)
        if bad_indices := [
            index for index in config.layers if not -block_count <= index < block_count
        ]:
            expected = f"block indices in [{-block_count}, {block_count})"
            problems.append(
                sentence(f"layers={bad_indices!r}", expected, f"there are {block_count} blocks")
            )
        else:
            block_indices = {index % block_count for index in config.layers}
            selected_refs = [ref for ref in selected_refs if _block(ref[0]) in block_indices]
    if not selected_refs and not problems and config.targets != ():  # () trains token rows alone
        problem = f"no module left after exclude={list(config.exclude)!r}, layers={config.layers!r}"
        problems.append(sentence(problem, "at least one target", "exclude less"))
    return selected_refs, problems


def excluded_refs(names: Names, config: LoraConfig, problems: list[str]) -> set[ParamRef]:
    """The parameters that ``config.exclude`` excludes. A pattern that matches modules excludes all
    parameters of these modules and of the modules below them. Any other pattern excludes the
    parameters whose own paths it matches."""
    excluded: set[ParamRef] = set()
    for pattern in config.exclude:
        parameters = (
            []
            if pattern in WORDS or names.modules_matching(pattern)
            else names.parameters_matching(pattern)
        )
        if parameters:
            excluded.update(parameters)
            continue
        for path in _modules(names, pattern, "exclude", problems):
            for path_below in names.subtree_paths(path):
                excluded.update(
                    (path_below, name) for name in own_parameters(names.modules[path_below])
                )
    return excluded


def value_for(
    names: Names, refs: Sequence[ParamRef], values: Mapping[str, Any], default: Any
) -> Any:
    """The value of the first pattern in ``values`` that matches one of ``refs``, which are all
    names of one weight."""
    return next(
        (value for pattern, value in values.items() if matches_any(names, pattern, refs)), default
    )


def matches_any(names: Names, pattern: str, refs: Iterable[ParamRef]) -> bool:
    """Whether ``pattern``, which is not a word of ``WORDS``, matches one of ``refs``: the module or
    the parameter, under any name of the module."""
    is_match = path_test(pattern)
    return any(
        is_match(alias) or is_match(f"{alias}.{name}".lstrip("."))
        for path, name in refs
        for alias in names.aliases[path]
    )


def unmatched_pattern_problems(
    names: Names, patterns: Iterable[str], field: str, targets: list[ParamRef]
) -> list[str]:
    """A problem for each pattern that matches none of the parameters ``targets`` under any of their
    names. ``field`` is the name of the config's field with these patterns."""
    patterns = tuple(patterns)
    if not patterns:
        return []
    paths = dict.fromkeys(path for path, _ in targets)
    refs_by_id = names.refs_by_parameter_id()
    holders = [holder for ref in targets for holder in names.holders_of(ref, refs_by_id)]
    return [
        sentence(
            f"{field} pattern {pattern!r} matches no target{names.suggest(pattern, paths)}",
            "a pattern that matches one",
            f"name one of {listing(paths)}",
        )
        for pattern in patterns
        if not matches_any(names, pattern, holders)
    ]


def expand(names: Names, patterns: Iterable[str], field: str, problems: list[str]) -> list[str]:
    """The modules that the patterns match, and all modules below them, if they hold parameters
    themselves. ``field`` is the name of the config's field with these patterns."""
    module_paths: dict[str, None] = {}
    for pattern in patterns:
        matches = _modules(names, pattern, field, problems)
        paths_below = [
            path
            for path_above in matches
            for path in names.subtree_paths(path_above)
            if names.modules[path]._parameters
        ]
        if matches and not paths_below:
            problem = f"{field} pattern {pattern!r} matches modules without parameters"
            problems.append(sentence(problem, "something to train", "remove it"))
        module_paths.update(dict.fromkeys(paths_below))
    return list(module_paths)


def _modules(names: Names, pattern: str, field: str, problems: list[str]) -> list[str]:
    """The modules that a word or a pattern matches. If there are none, the reason is added to
    ``problems``."""
    matches = _word_modules(names, pattern) if pattern in WORDS else names.modules_matching(pattern)
    if not matches:
        examples = listing(
            dict.fromkeys(name.rpartition(".")[2] for name in names.modules if name), limit=12
        )
        problem = f"{field} pattern {pattern!r} matches no module{names.suggest(pattern)}"
        problems.append(
            sentence(problem, f"a name of this model, such as {examples}", "correct or remove it")
        )
    return matches


def _match_targets(names: Names, targets: Targets, problems: list[str]) -> list[ParamRef]:
    """The parameters that the ``targets`` of a config select, in the model's order. Reasons against
    a pattern are added to ``problems``."""
    if callable(targets):
        paths = [
            name
            for name, module in names.modules.items()
            if kind_of(module) and targets(name, module)
        ]
        if not paths:
            do = f"choose among {names.last_components_text()}"
            problems.append(sentence("targets callable chose no module", "at least one", do))
        return [ref for path in paths for ref in names.adaptable_refs(path)]
    selected_refs: set[ParamRef] = set()
    for pattern in pattern_list(targets):
        matches = (
            _word_modules(names, pattern) if pattern in WORDS else names.modules_matching(pattern)
        )
        refs = [ref for path in matches for ref in names.adaptable_refs(path)]
        if not matches and pattern not in WORDS:
            refs = names.parameters_matching(pattern)
        if not refs and matches:
            types = listing({type(names.modules[path]).__name__ for path in matches})
            problem = (
                f"targets pattern {pattern!r} matches {types}, without parameters of their own"
            )
            do = f"name layers such as {names.last_components_text()}, or use {pattern + '.*'!r}"
            reasons = [reason for path in matches if (reason := unreadable(names.modules[path]))]
            if reasons:
                reason, fix = reasons[0]
                problem, do = f"{problem}, {reason}", f"{fix}, or leave them out"
            problems.append(sentence(problem, "modules or parameters", do))
        elif not refs and pattern in WORDS:
            problem = (
                f"targets {pattern!r} means {_WORD_MEANINGS[pattern]}, of which this model has"
                f" none, but {_count_types(names)}"
            )
            do = f'use targets="all", or name layers such as {names.last_components_text()}'
            problems.append(sentence(problem, "at least one such layer", do))
        elif not refs:
            problem = f"targets pattern {pattern!r} matches nothing{names.suggest(pattern)}"
            expected = (
                f"a word ({', '.join(WORDS)}) or names such as {names.last_components_text()}"
            )
            problems.append(sentence(problem, expected, "correct it"))
        selected_refs.update(refs)
    module_order = {path: index for index, path in enumerate(names.modules)}
    order_in_module = {
        ref: index
        for path in names.modules
        for index, ref in enumerate(names.adaptable_refs(path))
        if ref[0] == path
    }
    last_index = len(order_in_module)
    return sorted(
        selected_refs,
        key=lambda ref: (module_order[ref[0]], order_in_module.get(ref, last_index), ref[1]),
    )


def _count_types(names: Names) -> str:
    """The layers that can be attached to, by type: "2 Conv2d, 1 BatchNorm2d"."""
    counts = Counter(
        base_class(names.modules[path]).__name__
        for path in _word_modules(names, "all")
        if names.adaptable_refs(path)
    )
    return listing(f"{count} {name}" for name, count in counts.most_common())


def layers_left_out(names: Names, config: LoraConfig) -> str:
    """The layers with matrices that "all-linear" leaves out and the config does not mention, by
    type: stacks of experts, convolutions, recurrent layers. Embeddings do not count. The result is
    a text such as "2 Conv2d", and empty if the targets are not "all-linear"."""
    if callable(config.targets) or [*pattern_list(config.targets)] != ["all-linear"]:
        return ""
    excluded_weights = excluded_refs(names, config, [])
    head = _output_head(names)
    train_also_paths = {
        path for pattern in config.train_also for path in names.modules_matching(pattern)
    }
    block_count = _block_count(names)
    block_indices = {index % block_count for index in config.layers or () if block_count}
    counts: Counter[str] = Counter()
    for path, module in names.modules.items():
        kind: Any = kind_of(module)
        if kind is None or kind.linear or module is head or path in train_also_paths:
            continue
        if config.layers is not None and _block(path) not in block_indices:
            continue
        matrices = [name for name in kind.weights(module) if (path, name) not in excluded_weights]
        counts[base_class(module).__name__] += any(
            _multiplies_inputs(kind, module, name) for name in matrices
        )
    return ", ".join(f"{count} {name}" for name, count in counts.most_common() if count)


def _multiplies_inputs(kind: Any, module: nn.Module, name: str) -> bool:
    """Whether a module multiplies its inputs by a weight. A weight of the general kind counts if it
    is a stack of matrices."""
    if kind is not GENERAL_KIND:
        return kind.drops_input
    return len(without_unit_axes(module._parameters[name].shape)) == 3  # pyright: ignore[reportOptionalMemberAccess]


def _word_modules(names: Names, word: str) -> list[str]:
    """The modules that a word of ``WORDS`` selects."""
    attachable = {name: kind for name, module in names.modules.items() if (kind := kind_of(module))}
    if word == "all":
        return list(attachable)
    if word == "peft-all-linear":
        head, classes = _output_head(names), (nn.Linear, *LAYERS["conv1d_transformers"].types())
        return [
            name
            for name in attachable
            if isinstance(names.modules[name], classes) and names.modules[name] is not head
        ]
    body_paths = _body_paths(names)
    linear_paths = [name for name, kind in attachable.items() if kind.linear and name in body_paths]
    if word == "all-linear":
        return linear_paths
    attention_paths = [name for name in linear_paths if _ATTENTION.search(name)]
    if word == "attention":
        return attention_paths
    return [
        name for name in linear_paths if _block(name) is not None and name not in attention_paths
    ]


def _body_paths(names: Names) -> set[str]:
    """The paths of all modules that are not part of an output head: not transformers' output
    embeddings, and nothing outside of ``base_model``, if the model has one."""
    prefix = getattr(names.model, "base_model_prefix", "")
    has_base_model = prefix and isinstance(getattr(names.model, prefix, None), nn.Module)
    head = _output_head(names)
    return {
        name
        for name in (names.subtree_paths(prefix) if has_base_model else names.modules)
        if names.modules[name] is not head
    }


def _output_head(names: Names) -> Any:
    """The module that a transformers model gives as its output embeddings, or None."""
    get_head: Any = getattr(names.model, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def fresh_head(names: Names, fresh: Iterable[ParamRef]) -> list[ParamRef]:
    """The parameters in ``fresh`` that belong to a head or pooler: those outside of the repeated
    blocks and of embeddings. ``fresh`` are parameters that were not in the checkpoint."""
    output_head, body_paths = _output_head(names), _body_paths(names)
    return [
        (path, name)
        for path, name in fresh
        if names.modules[path] is not output_head
        and not isinstance(names.modules[path], nn.Embedding)
        and not (path in body_paths and _block(path) is not None)
    ]


def _block_count(names: Names) -> int:
    """One more than the largest index of a repeated block."""
    indices = [index for path in names.modules if (index := _block(path)) is not None]
    return max(indices, default=-1) + 1


def _block(path: str) -> int | None:
    """The index of the repeated block that holds a module: the first number in its path. None if
    there is no number."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
