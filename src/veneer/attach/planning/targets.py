"""Resolve the targets of a config to weights: patterns over paths, words such as "all-linear", and
indices of blocks.

A pattern selects modules. If it matches no module, it selects parameters by their own paths
("experts.gate_up_proj"). A module with several names counts once, under its first name, and matches
under each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from veneer.attach.layer.names import Names
from veneer.bases import own_parameters, unreadable
from veneer.config import LoraConfig, Targets, path_test, pattern_list
from veneer.distributed import base_class
from veneer.errors import listing, sentence
from veneer.layers import LAYERS, ParamRef, kind_of
from veneer.layers._base import GENERAL
from veneer.layers.parameter import without_unit_axes

_MEANING = {
    "all-linear": "the linear layers outside of an output head",
    "attention": "the linear layers of attention",
    "mlp": "the linear layers of repeated blocks outside of attention",
    "all": "every layer that can be attached to",
    "peft-all-linear": "every nn.Linear and Conv1D but the output embedding",
}
WORDS = tuple(_MEANING)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def target_refs(names: Names, config: LoraConfig) -> tuple[list[ParamRef], list[str]]:
    """(the parameters that a config targets, in the model's order; problems)."""
    problems: list[str] = []
    chosen = _match_targets(names, config.targets, problems)
    left_out = excluded_refs(names, config, problems)
    chosen = [ref for ref in chosen if ref not in left_out]
    if config.layers is not None:
        count = (
            max(
                (block for name in names.modules if (block := _block(name)) is not None), default=-1
            )
            + 1
        )
        if bad := [index for index in config.layers if not -count <= index < count]:
            expected = f"block indices in [{-count}, {count})"
            problems.append(sentence(f"layers={bad!r}", expected, f"there are {count} blocks"))
        else:
            block_indices = {index % count for index in config.layers}
            chosen = [ref for ref in chosen if _block(ref[0]) in block_indices]
    if not chosen and not problems and config.targets != ():  # (): only tokens are trained
        problem = f"no module left after exclude={list(config.exclude)!r}, layers={config.layers!r}"
        problems.append(sentence(problem, "at least one target", "exclude less"))
    return chosen, problems


def excluded_refs(names: Names, config: LoraConfig, problems: list[str]) -> set[ParamRef]:
    """The parameters that ``exclude`` matches: those of modules and all modules below, or by
    path."""
    left_out: set[ParamRef] = set()
    for pattern in config.exclude:
        parameters = (
            []
            if pattern in WORDS or names.matching(pattern)
            else names.parameters_matching(pattern)
        )
        if parameters:
            left_out.update(parameters)
            continue
        for path in _modules(names, pattern, "exclude", problems):
            for below in names.children(path):
                left_out.update((below, name) for name in own_parameters(names.modules[below]))
    return left_out


def value_for(names: Names, ref: ParamRef, values: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern in ``values`` that matches a name of the module or of the
    parameter."""
    return next(
        (value for pattern, value in values.items() if matches_ref(names, pattern, ref)), default
    )


def matches_ref(names: Names, pattern: str, ref: ParamRef) -> bool:
    """Whether a pattern (no word) matches a module or its parameter."""
    test, (path, name) = path_test(pattern), ref
    return any(test(alias) or test(f"{alias}.{name}".lstrip(".")) for alias in names.aliases[path])


def unmatched_pattern_problems(
    names: Names, patterns: Iterable[str], field: str, among: list[ParamRef]
) -> list[str]:
    """A problem for each pattern that matches none of the parameters in ``among``."""
    paths = dict.fromkeys(path for path, _ in among)
    return [
        sentence(
            f"{field} pattern {pattern!r} matches no target{names.suggest(pattern, paths)}",
            "a pattern that matches one",
            f"name one of {listing(paths)}",
        )
        for pattern in patterns
        if not any(matches_ref(names, pattern, ref) for ref in among)
    ]


def expand(names: Names, patterns: Iterable[str], field: str, problems: list[str]) -> list[str]:
    """The modules that patterns of ``train_also`` match, and all modules below them, if they hold
    parameters of their own."""
    module_paths: dict[str, None] = {}
    for pattern in patterns:
        matches = _modules(names, pattern, field, problems)
        below = [
            path
            for above in matches
            for path in names.children(above)
            if names.modules[path]._parameters
        ]
        if matches and not below:
            problem = f"{field} pattern {pattern!r} matches modules without parameters"
            problems.append(sentence(problem, "something to train", "remove it"))
        module_paths.update(dict.fromkeys(below))
    return list(module_paths)


def _modules(names: Names, pattern: str, field: str, problems: list[str]) -> list[str]:
    """The modules that a word or a pattern matches; adds a problem if there are none."""
    matches = _word_modules(names, pattern) if pattern in WORDS else names.matching(pattern)
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
    if callable(targets):
        paths = [
            name
            for name, module in names.modules.items()
            if kind_of(module) and targets(name, module)
        ]
        if not paths:
            do = f"choose among {names.last_names()}"
            problems.append(sentence("targets callable chose no module", "at least one", do))
        return [ref for path in paths for ref in names.refs(path)]
    chosen: set[ParamRef] = set()
    for pattern in pattern_list(targets):
        matches = _word_modules(names, pattern) if pattern in WORDS else names.matching(pattern)
        refs = [ref for path in matches for ref in names.refs(path)]
        if not matches and pattern not in WORDS:
            refs = names.parameters_matching(pattern)
        if not refs and matches:
            types = listing({type(names.modules[path]).__name__ for path in matches})
            problem = (
                f"targets pattern {pattern!r} matches {types}, without parameters of their own"
            )
            do = f"name layers such as {names.last_names()}, or use {pattern + '.*'!r}"
            reasons = [reason for path in matches if (reason := unreadable(names.modules[path]))]
            if reasons:
                reason, fix = reasons[0]
                problem, do = f"{problem}, {reason}", f"{fix}, or leave them out"
            problems.append(sentence(problem, "modules or parameters", do))
        elif not refs and pattern in WORDS:
            problem = (
                f"targets {pattern!r} means {_MEANING[pattern]}, of which this model has none, but"
                f" {_count_types(names)}"
            )
            do = f'use targets="all", or name layers such as {names.last_names()}'
            problems.append(sentence(problem, "at least one such layer", do))
        elif not refs:
            problem = f"targets pattern {pattern!r} matches nothing{names.suggest(pattern)}"
            expected = f"a word ({', '.join(WORDS)}) or names such as {names.last_names()}"
            problems.append(sentence(problem, expected, "correct it"))
        chosen.update(refs)
    order = {path: number for number, path in enumerate(names.modules)}
    rank = {
        ref: number
        for path in names.modules
        for number, ref in enumerate(names.refs(path))
        if ref[0] == path
    }
    return sorted(chosen, key=lambda ref: (order[ref[0]], rank.get(ref, len(rank)), ref[1]))


def _count_types(names: Names) -> str:
    """The layers that can be attached to, by type: "2 Conv2d, 1 BatchNorm2d"."""
    counts = Counter(
        base_class(names.modules[path]).__name__
        for path in _word_modules(names, "all")
        if names.refs(path)
    )
    return listing(f"{count} {name}" for name, count in counts.most_common())


def layers_left_out(names: Names, config: LoraConfig) -> str:
    """The layers with matrices that "all-linear" leaves out and the config does not mention, by
    type: stacks of experts, convolutions, recurrent layers. Embeddings do not count."""
    if callable(config.targets) or [*pattern_list(config.targets)] != ["all-linear"]:
        return ""
    linear, excluded_weights = (
        {*_word_modules(names, "all-linear")},
        excluded_refs(names, config, []),
    )
    head = _output_head(names)
    also = {path for pattern in config.train_also for path in names.matching(pattern)}
    blocks = {_block(path) for path in names.modules} - {None}
    block_indices = (
        blocks
        if config.layers is None
        else {index % len(blocks) for index in config.layers if blocks}
    )
    counts: Counter[str] = Counter()
    for path, module in names.modules.items():
        kind: Any = kind_of(module)
        if kind is None or kind.linear or path in linear or path in also or module is head:
            continue
        if config.layers is not None and _block(path) not in block_indices:
            continue
        matrices = [name for name in kind.weights(module) if (path, name) not in excluded_weights]
        counts[base_class(module).__name__] += any(
            _multiplies_inputs(kind, module, name) for name in matrices
        )
    return ", ".join(f"{count} {name}" for name, count in counts.most_common() if count)


def _multiplies_inputs(kind: Any, module: nn.Module, name: str) -> bool:
    """Whether a module multiplies its inputs by a weight. For the general kind: whether the weight
    is a stack of matrices."""
    if kind.name != GENERAL:
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
    body = _body(names)
    linear = [name for name, kind in attachable.items() if kind.linear and name in body]
    if word == "all-linear":
        return linear
    in_attention = [name for name in linear if _ATTENTION.search(name)]
    if word == "attention":
        return in_attention
    return [name for name in linear if _block(name) is not None and name not in in_attention]


def _body(names: Names) -> set[str]:
    """All paths but those of the output head: transformers' output embedding, and the modules
    outside ``base_model``."""
    prefix = getattr(names.model, "base_model_prefix", "")
    inner = prefix and isinstance(getattr(names.model, prefix, None), nn.Module)
    head = _output_head(names)
    return {
        name
        for name in (names.children(prefix) if inner else names.modules)
        if names.modules[name] is not head
    }


def _output_head(names: Names) -> Any:
    get_head: Any = getattr(names.model, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def fresh_head(names: Names, fresh: Iterable[ParamRef]) -> list[ParamRef]:
    """The parameters in ``fresh`` (held by no checkpoint) of a head or pooler: outside the repeated
    blocks, and no embedding."""
    output, body = _output_head(names), _body(names)
    return [
        (path, name)
        for path, name in fresh
        if names.modules[path] is not output
        and not isinstance(names.modules[path], nn.Embedding)
        and not (path in body and _block(path) is not None)
    ]


def _block(path: str) -> int | None:
    """The index of the repeated block of a path: the first number in it."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
