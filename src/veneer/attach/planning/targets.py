"""Find the weights that the targets of a config select. Targets are patterns for module paths and
words such as "all-linear"; ``exclude`` and ``layers`` (indices of repeated blocks) narrow them.

A pattern selects modules. If it matches no module, it selects parameters by their own paths
("experts.gate_up_proj"). A module that the model holds under several paths counts once, under the
first of them, and matches under each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.attach.layer.model_index import ModelIndex
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


def target_refs(model_index: ModelIndex, config: LoraConfig) -> tuple[list[ParamRef], list[str]]:
    """((path, name) of each parameter that a config targets, in the model's order; error texts for
    targets, excludes and block indices that match nothing)."""
    problems: list[str] = []
    selected_refs = _match_targets(model_index, config.targets, problems)
    excluded = excluded_refs(model_index, config, problems)
    selected_refs = [ref for ref in selected_refs if ref not in excluded]
    if config.layers is not None:
        block_count = _block_count(model_index)
        if bad_indices := [
            index for index in config.layers if not -block_count <= index < block_count
        ]:
            expected = f"block indices in [{-block_count}, {block_count})"
            problems.append(
                sentence(f"layers={bad_indices!r}", expected, f"there are {block_count} blocks")
            )
        else:
            block_indices = {index % block_count for index in config.layers}
            selected_refs = [ref for ref in selected_refs if _block_index(ref[0]) in block_indices]
    # with ``targets=()``, the adapter only trains the rows of ``trainable_tokens``: no problem
    if not selected_refs and not problems and config.targets != ():
        problem = f"no module left after exclude={list(config.exclude)!r}, layers={config.layers!r}"
        problems.append(sentence(problem, "at least one target", "exclude less"))
    return selected_refs, problems


def excluded_refs(
    model_index: ModelIndex, config: LoraConfig, problems: list[str]
) -> set[ParamRef]:
    """(path, name) of each parameter that ``config.exclude`` excludes. A pattern that matches
    modules excludes all parameters of these modules and of the modules below them. Any other
    pattern excludes the parameters whose own paths it matches. An error text for each pattern that
    matches nothing is added to ``problems``."""
    excluded: set[ParamRef] = set()
    for pattern in config.exclude:
        parameter_refs = (
            []
            if pattern in WORDS or model_index.modules_matching(pattern)
            else model_index.parameters_matching(pattern)
        )
        if parameter_refs:
            excluded.update(parameter_refs)
            continue
        for path in _matching_modules(model_index, pattern, "exclude", problems):
            for path_below in model_index.subtree_paths(path):
                excluded.update(
                    (path_below, name) for name in own_parameters(model_index.modules[path_below])
                )
    return excluded


#: matches the name of a bias: "bias", "in_proj_bias", "bias_ih_l0", "bias_k" …, but not those that
#: balance the load of experts, which get no gradient
_BIAS_NAME = re.compile(r"(?!expert_|\w*correction_)(\w+_)?bias(_[kuv]|_(ih|hh)_l\d+(_reverse)?)?")


def bias_refs(
    model_index: ModelIndex, config: LoraConfig, low_rank_paths: Sequence[str]
) -> list[ParamRef]:
    """(path, name) of each bias that ``config.bias`` selects. "targets": the parameter "bias" of
    the modules ``low_rank_paths``. "all": also parameters such as "in_proj_bias" or "bias_ih_l0",
    of all modules, but for those that ``config.exclude`` excludes."""
    if config.bias != "all":
        paths = low_rank_paths if config.bias == "targets" else ()
        return [
            (path, "bias")
            for path in paths
            if model_index.modules[path]._parameters.get("bias") is not None
        ]
    excluded = excluded_refs(model_index, config, [])
    return [
        (path, name)
        for path, module in model_index.modules.items()
        for name, parameter in module._parameters.items()
        if _BIAS_NAME.fullmatch(name) and parameter is not None and (path, name) not in excluded
    ]


def value_for(
    model_index: ModelIndex,
    refs: Sequence[ParamRef],
    value_by_pattern: Mapping[str, Any],
    default: Any,
) -> Any:
    """The value in ``value_by_pattern`` of the first pattern that matches one of ``refs``, the
    (path, name) of every module that holds one weight; ``default`` if no pattern matches."""
    return next(
        (
            value
            for pattern, value in value_by_pattern.items()
            if matches_any(model_index, pattern, refs)
        ),
        default,
    )


def matches_any(model_index: ModelIndex, pattern: str, refs: Iterable[ParamRef]) -> bool:
    """Whether ``pattern``, which is not a word of ``WORDS``, matches the path of the module or of
    the parameter for one of ``refs``, under any path of the module."""
    is_match = path_test(pattern)
    return any(
        is_match(alias) or is_match(f"{alias}.{name}".lstrip("."))
        for path, name in refs
        for alias in model_index.aliases[path]
    )


def unmatched_pattern_problems(
    model_index: ModelIndex, patterns: Iterable[str], field_name: str, targeted_refs: list[ParamRef]
) -> list[str]:
    """An error text for each pattern that matches none of the parameters ``targeted_refs`` under
    any of their names. ``field_name`` is the config field that holds the patterns, such as
    "ranks"."""
    patterns = tuple(patterns)
    if not patterns:
        return []
    paths = dict.fromkeys(path for path, _ in targeted_refs)
    refs_by_id = model_index.refs_by_parameter_id()
    holders = [
        holder for ref in targeted_refs for holder in model_index.holders_of(ref, refs_by_id)
    ]
    return [
        sentence(
            f"{field_name} pattern {pattern!r} matches no"
            f" target{model_index.suggest(pattern, paths)}",
            "a pattern that matches one",
            f"name one of {listing(paths)}",
        )
        for pattern in patterns
        if not matches_any(model_index, pattern, holders)
    ]


def expand_patterns(
    model_index: ModelIndex, patterns: Iterable[str], field_name: str, problems: list[str]
) -> list[str]:
    """The paths of the modules that the patterns match and of all modules below them, without those
    that hold no parameters themselves. Error texts for patterns without such a module are added to
    ``problems``; they name the config field ``field_name``."""
    module_paths: dict[str, None] = {}
    for pattern in patterns:
        matching_paths = _matching_modules(model_index, pattern, field_name, problems)
        paths_below = [
            path
            for path_above in matching_paths
            for path in model_index.subtree_paths(path_above)
            if model_index.modules[path]._parameters
        ]
        if matching_paths and not paths_below:
            problem = f"{field_name} pattern {pattern!r} matches modules without parameters"
            problems.append(sentence(problem, "something to train", "remove it"))
        module_paths.update(dict.fromkeys(paths_below))
    return list(module_paths)


def _matching_modules(
    model_index: ModelIndex, pattern: str, field_name: str, problems: list[str]
) -> list[str]:
    """The paths of the modules that ``pattern``, which may be a word of ``WORDS``, matches. If none
    match, an error text that names the config field ``field_name`` is added to ``problems``."""
    matching_paths = (
        _word_modules(model_index, pattern)
        if pattern in WORDS
        else model_index.modules_matching(pattern)
    )
    if not matching_paths:
        examples_text = listing(
            dict.fromkeys(path.rpartition(".")[2] for path in model_index.modules if path), limit=12
        )
        problem = (
            f"{field_name} pattern {pattern!r} matches no module{model_index.suggest(pattern)}"
        )
        problems.append(
            sentence(
                problem, f"a name of this model, such as {examples_text}", "correct or remove it"
            )
        )
    return matching_paths


def _match_targets(index: ModelIndex, targets: Targets, problems: list[str]) -> list[ParamRef]:
    """(path, name) of each parameter that the ``targets`` of a config select, in the model's order.
    An error text for each pattern that selects nothing is added to ``problems``."""
    if callable(targets):
        paths = [
            path
            for path, module in index.modules.items()
            if kind_of(module) and targets(path, module)
        ]
        if not paths:
            advice = f"choose among {index.last_components_text()}"
            problems.append(sentence("targets callable chose no module", "at least one", advice))
        return [ref for path in paths for ref in index.adaptable_refs(path)]
    selected_refs: set[ParamRef] = set()
    for pattern in pattern_list(targets):
        matches = (
            _word_modules(index, pattern) if pattern in WORDS else index.modules_matching(pattern)
        )
        refs = [ref for path in matches for ref in index.adaptable_refs(path)]
        if not matches and pattern not in WORDS:
            refs = index.parameters_matching(pattern)
        if not refs and matches:
            types = listing({type(index.modules[path]).__name__ for path in matches})
            problem = (
                f"targets pattern {pattern!r} matches {types}, without parameters of their own"
            )
            advice = (
                f"name layers such as {index.last_components_text()}, or use {pattern + '.*'!r}"
            )
            reasons = [reason for path in matches if (reason := unreadable(index.modules[path]))]
            if reasons:
                reason, fix = reasons[0]
                problem, advice = f"{problem}, {reason}", f"{fix}, or leave them out"
            problems.append(sentence(problem, "modules or parameters", advice))
        elif not refs and pattern in WORDS:
            problem = (
                f"targets {pattern!r} means {_WORD_MEANINGS[pattern]}, of which this model has"
                f" none, but {_count_types(index)}"
            )
            advice = f'use targets="all", or name layers such as {index.last_components_text()}'
            problems.append(sentence(problem, "at least one such layer", advice))
        elif not refs:
            problem = f"targets pattern {pattern!r} matches nothing{index.suggest(pattern)}"
            expected = (
                f"a word ({', '.join(WORDS)}) or names such as {index.last_components_text()}"
            )
            problems.append(sentence(problem, expected, "correct it"))
        selected_refs.update(refs)
    module_order = {path: position for position, path in enumerate(index.modules)}
    order_in_module = {
        ref: position
        for path in index.modules
        for position, ref in enumerate(index.adaptable_refs(path))
        if ref[0] == path
    }
    last_index = len(order_in_module)
    return sorted(
        selected_refs,
        key=lambda ref: (module_order[ref[0]], order_in_module.get(ref, last_index), ref[1]),
    )


def _count_types(model_index: ModelIndex) -> str:
    """How many layers of each class an adapter can be attached to, as a text for messages: "2
    Conv2d, 1 BatchNorm2d"."""
    count_by_class = Counter(
        base_class(model_index.modules[path]).__name__
        for path in _word_modules(model_index, "all")
        if model_index.adaptable_refs(path)
    )
    return listing(f"{count} {class_name}" for class_name, count in count_by_class.most_common())


def layers_left_out(model_index: ModelIndex, config: LoraConfig) -> str:
    """How many layers of each class "all-linear" leaves out although they multiply their inputs by
    a matrix (stacks of experts, convolutions, recurrent layers, but not embeddings), as a text such
    as "2 Conv2d". Layers that the config excludes, that ``train_also`` trains or that are in none
    of the blocks ``layers`` do not count. The text is empty if the targets are not "all-linear"."""
    if callable(config.targets) or [*pattern_list(config.targets)] != ["all-linear"]:
        return ""
    excluded_weights = excluded_refs(model_index, config, [])
    output_head = _output_head(model_index)
    train_also_paths = {*expand_patterns(model_index, config.train_also, "train_also", [])}
    block_count = _block_count(model_index)
    block_indices = {index % block_count for index in config.layers or () if block_count}
    count_by_class: Counter[str] = Counter()
    for path, module in model_index.modules.items():
        kind: Any = kind_of(module)
        if kind is None or kind.linear or module is output_head or path in train_also_paths:
            continue
        if config.layers is not None and _block_index(path) not in block_indices:
            continue
        matrices = [
            weight_name
            for weight_name in kind.weights(module)
            if (path, weight_name) not in excluded_weights
        ]
        count_by_class[base_class(module).__name__] += any(
            _multiplies_inputs(kind, module, weight_name) for weight_name in matrices
        )
    return ", ".join(
        f"{count} {class_name}" for class_name, count in count_by_class.most_common() if count
    )


def _multiplies_inputs(kind: Any, module: nn.Module, weight_name: str) -> bool:
    """Whether a module multiplies its inputs by its weight ``weight_name``. The general kind, for
    modules of unknown classes, does not tell: its weight counts if it is a stack of matrices, as
    in a module of experts."""
    if kind is not GENERAL_KIND:
        return kind.drops_input
    return len(without_unit_axes(module._parameters[weight_name].shape)) == 3  # pyright: ignore[reportOptionalMemberAccess]


def _word_modules(model_index: ModelIndex, word: str) -> list[str]:
    """The paths of the modules that a word of ``WORDS``, such as "all-linear", selects."""
    kind_by_path = {
        path: kind for path, module in model_index.modules.items() if (kind := kind_of(module))
    }
    if word == "all":
        return list(kind_by_path)
    if word == "peft-all-linear":
        output_head, linear_classes = (
            _output_head(model_index),
            (nn.Linear, *LAYERS["conv1d_transformers"].types()),
        )
        return [
            path
            for path in kind_by_path
            if isinstance(model_index.modules[path], linear_classes)
            and model_index.modules[path] is not output_head
        ]
    body_paths = _body_paths(model_index)
    linear_paths = [
        path for path, kind in kind_by_path.items() if kind.linear and path in body_paths
    ]
    if word == "all-linear":
        return linear_paths
    attention_paths = [path for path in linear_paths if _ATTENTION.search(path)]
    if word == "attention":
        return attention_paths
    return [
        path
        for path in linear_paths
        if _block_index(path) is not None and path not in attention_paths
    ]


def _body_paths(model_index: ModelIndex) -> set[str]:
    """The paths of all modules that are not part of an output head. If a transformers model has a
    base model (``base_model_prefix``), all modules outside of the base model are part of the head;
    so are the output embeddings in every case."""
    base_model_name = getattr(model_index.model, "base_model_prefix", "")
    has_base_model = base_model_name and isinstance(
        getattr(model_index.model, base_model_name, None), nn.Module
    )
    output_head = _output_head(model_index)
    return {
        path
        for path in (
            model_index.subtree_paths(base_model_name) if has_base_model else model_index.modules
        )
        if model_index.modules[path] is not output_head
    }


def _output_head(model_index: ModelIndex) -> Any:
    """The module that a transformers model gives as its output embeddings, or None."""
    get_output_head: Any = getattr(model_index.model, "get_output_embeddings", None)
    return get_output_head() if callable(get_output_head) else None


def fresh_head(model_index: ModelIndex, fresh_refs: Iterable[ParamRef]) -> list[ParamRef]:
    """The parameters in ``fresh_refs``, which were not in the checkpoint, that belong to a task
    head or a pooler: those that are in no repeated block of the base model, in no embedding and not
    in the output embeddings."""
    output_head, body_paths = _output_head(model_index), _body_paths(model_index)
    return [
        (path, name)
        for path, name in fresh_refs
        if model_index.modules[path] is not output_head
        and not isinstance(model_index.modules[path], nn.Embedding)
        and not (path in body_paths and _block_index(path) is not None)
    ]


def _block_count(model_index: ModelIndex) -> int:
    """The number of repeated blocks: one more than the largest block index in a module path; 0 if
    there are none."""
    block_indices = [
        block_index
        for path in model_index.modules
        if (block_index := _block_index(path)) is not None
    ]
    return max(block_indices, default=-1) + 1


def _block_index(path: str) -> int | None:
    """The index of the repeated block that holds the module at ``path``: the first number in the
    path ("model.layers.3.mlp": 3). None if there is no number."""
    return next(
        (int(path_component) for path_component in path.split(".") if path_component.isdigit()),
        None,
    )
