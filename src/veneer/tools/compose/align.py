"""Align several adapters: find which of their changes belong to the same weight of the model.

    align(saved_adapters) -> [AlignedWeight], one for each weight that any of the adapters changes

Changes are matched by ``PeftLayer.target_path``, the module path without the segments
``base_layer`` of PEFT's wrappers. If a weight is tied, the adapter folder has an entry for each of
its names, and the adapter's record lists the first name only. The entries of the other names are
called aliases here. An alias holds the same change as the first entry, transposed if its module
uses the transposed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_mapping import means_parameter, ref_at
from veneer.attach import ModelIndex
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import peft, peft_behaviour, peft_paths
from veneer.layers import parameter_path
from veneer.lowrank import LowRank


@dataclass(frozen=True)
class AlignedWeight:
    """One weight, with its change in each adapter that changes it."""

    model_path: str  # the path of its module or of the weight itself, without PEFT's wrappers
    entry_path: str  # the path, with PEFT's wrappers, in a folder with all adapters' changes
    is_parameter: bool  # whether ``model_path`` is the path of the parameter, not of its module
    weight_path: str | None  # the path of the weight; None if no adapter's record has it
    # the change in each adapter, by the adapter's index
    layers: Mapping[int, peft.PeftLayer]
    # for an alias: (model path of the first name, whether the alias is transposed)
    alias_of: tuple[str, bool] | None = None

    @property
    def any_layer(self) -> peft.PeftLayer:
        """The change in one of the adapters. All of them have equal shapes and key suffixes, so any
        one tells these."""
        return next(iter(self.layers.values()))


#: maps the path of a module to the names of its parameters, in the order of the module
ParameterOrder = Callable[[str], Sequence[str]]
#: {model path: {index of the adapter: (path in its folder, change)}}
ChangesByPath = Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]]


def align(
    saved_adapters: Sequence[AdapterFiles], parameter_order: ParameterOrder | None = None
) -> list[AlignedWeight]:
    """The weights that these adapters change: first those of the first adapter, in its order.
    ``parameter_order`` is needed if a module has several changed parameters and no adapter changes
    all of them; None if the model is unknown.

    Raises:
        AdapterError: changes of one weight have different shapes, a weight is tied in one adapter
            and not in another, one adapter changes a module and another its parameter, or the order
            of a module's parameters is unknown. The error lists every problem.
    """
    problems: list[str] = []
    changes_by_path: dict[str, dict[int, tuple[str, peft.PeftLayer]]] = {}
    for adapter_index, saved_adapter in enumerate(saved_adapters):
        for path, layer in saved_adapter.low.items():
            changes_by_path.setdefault(layer.target_path, {})[adapter_index] = path, layer
    parameter_paths = {
        model_path
        for model_path, entries_by_adapter in changes_by_path.items()
        if any(peft.targets_parameter(*entry) for entry in entries_by_adapter.values())
    }
    problems += _mismatch_problems(saved_adapters, changes_by_path, parameter_paths)
    weight_paths, aliases = _find_weights_and_aliases(saved_adapters, problems)
    entry_paths = _entry_paths(changes_by_path, parameter_paths, parameter_order, problems)
    raise_all(AdapterError, "These adapters cannot be put side by side", problems)
    return [
        AlignedWeight(
            model_path,
            entry_paths[model_path],
            model_path in parameter_paths,
            weight_paths.get(model_path),
            {index: layer for index, (_, layer) in changes_by_path[model_path].items()},
            aliases.get(model_path),
        )
        for model_path in entry_paths
    ]


def _mismatch_problems(
    saved_adapters: Sequence[AdapterFiles],
    changes_by_path: ChangesByPath,
    parameter_paths: set[str],
) -> Iterator[str]:
    """The error texts for changes with one model path that cannot belong to one weight, because
    their shapes differ, or because one is of a module and another of the module's parameter.
    ``parameter_paths``: the model paths of the changes that PEFT targets as parameters."""
    for model_path, entries_by_adapter in changes_by_path.items():
        index_by_shape: dict[tuple, int] = {}
        for adapter_index, (path, layer) in entries_by_adapter.items():
            shape_key = (
                layer.suffixes,
                peft.targets_parameter(path, layer),
                layer.dims,
                layer.A.shape[1:],
            )
            index_by_shape.setdefault(shape_key, adapter_index)
        if len(index_by_shape) > 1:
            descriptions = [
                f"(groups, out, in) = {dims} in {saved_adapters[index].path}"
                for (_, _, dims, _), index in index_by_shape.items()
            ]
            yield sentence(
                f"changes of {model_path!r} of {listing(descriptions, 3)}",
                "changes of one weight",
                "leave one of them out",
            )
    for model_path in parameter_paths:
        module_path = model_path.rpartition(".")[0]
        if module_path in changes_by_path and module_path not in parameter_paths:
            problem = (
                f"a change of the module {module_path!r} in one adapter and of its parameter"
                f" {model_path!r} in another"
            )
            yield sentence(
                problem,
                "one of the two",
                "load one on its model, attach it by the other name and save it",
            )


def _find_weights_and_aliases(
    saved_adapters: Sequence[AdapterFiles], problems: list[str]
) -> tuple[dict[str, str], dict[str, tuple[str, bool]]]:
    """Find the changes that are stored under further names of a tied weight (aliases). If one
    adapter ties two weights, and another changes only one of them or changes them differently, an
    error text is added to ``problems``.

    Returns:
        {model path: path of the weight} for each weight that a record lists; {model path of an
        alias: (model path of the weight's first name, whether the alias is transposed)}.
    """
    weight_paths: dict[str, str] = {}
    candidates_by_path: dict[str, dict[tuple[str, bool], None]] = {}
    layers_per_adapter = [
        {layer.target_path: layer for layer in saved_adapter.low.values()}
        for saved_adapter in saved_adapters
    ]
    for saved_adapter, layers_by_path in zip(saved_adapters, layers_per_adapter, strict=True):
        # The paths of the weights in the record, by model path. A change of the folder that the
        # record does not list belongs to an alias.
        recorded_weights = {
            path if path in layers_by_path else path.rpartition(".")[0]: path
            for path in saved_adapter.metadata.get("changes", {})
        }
        weight_paths |= recorded_weights
        for model_path in (
            layers_by_path.keys() - recorded_weights.keys()
            if saved_adapter.record is not None
            else ()
        ):
            tie_candidates = {
                (tied_path, is_transposed): None
                for tied_path in recorded_weights
                if tied_path in layers_by_path
                for is_transposed in _tie_orientations(
                    layers_by_path[model_path], layers_by_path[tied_path]
                )
            }
            candidates_by_path[model_path] = {
                candidate: None
                for candidate in candidates_by_path.get(model_path, tie_candidates)
                if candidate in tie_candidates
            }
    aliases: dict[str, tuple[str, bool]] = {}
    for model_path, tie_candidates in candidates_by_path.items():
        # Several recorded weights can match. Their changes are then equal in every adapter, so it
        # makes no difference which of them is taken as the first name.
        for tied_path, is_transposed in tie_candidates:
            # every adapter must change both weights equally, or neither of them
            layer_pairs = [
                (layers_by_path.get(model_path), layers_by_path.get(tied_path))
                for layers_by_path in layers_per_adapter
            ]
            if all(
                is_transposed in _tie_orientations(alias_layer, tied_layer)
                if alias_layer and tied_layer
                else alias_layer is tied_layer
                for alias_layer, tied_layer in layer_pairs
            ):
                aliases[model_path] = tied_path, is_transposed
                break
        else:
            problem = (
                f"a change of {model_path!r}, tied to another weight in one adapter and not in"
                " another"
            )
            problems.append(sentence(problem, "adapters of one model", "leave one of them out"))
    return weight_paths, aliases


def _tie_orientations(first_layer: peft.PeftLayer, second_layer: peft.PeftLayer) -> Iterator[bool]:
    """Yield False if ``first_layer`` equals ``second_layer``, and True if it equals the transpose
    of ``second_layer``. Nothing is yielded if the changes differ."""
    for is_transposed in (False, True):
        second_low_rank = second_layer.low.T if is_transposed else second_layer.low
        if (
            first_layer.scale == second_layer.scale
            and torch.equal(first_layer.low.A, second_low_rank.A)
            and torch.equal(first_layer.low.B, second_low_rank.B)
        ):
            yield is_transposed


def _entry_paths(
    changes_by_path: ChangesByPath,
    parameter_paths: set[str],
    parameter_order: ParameterOrder | None,
    problems: list[str],
) -> dict[str, str]:
    """The path of each change in a folder that holds the changes of all adapters, by model path.
    The path has a segment ``base_layer`` for each module that PEFT wraps around an adapted module.
    ``parameter_paths``: the model paths of the changes that PEFT targets as parameters. Modules
    whose order of parameters is unknown are added to ``problems``."""
    parameters_by_module: dict[str, list[str]] = {}
    for model_path in filter(parameter_paths.__contains__, changes_by_path):
        parameters_by_module.setdefault(model_path.rpartition(".")[0], []).append(model_path)
    wrapper_counts = {
        module_path: len(parameters_of_module)
        for module_path, parameters_of_module in parameters_by_module.items()
    }
    entry_paths: dict[str, str] = {}
    for model_path, entries_by_adapter in changes_by_path.items():
        module_path, _, leaf_name = model_path.rpartition(".")
        if model_path in parameter_paths:
            ordered_paths = _order_parameters(
                module_path,
                parameters_by_module.pop(module_path, []),
                changes_by_path,
                parameter_order,
                problems,
            )
            for position, ordered_path in enumerate(ordered_paths, 1):
                wrapper_segments = ["base_layer"] * (len(ordered_paths) - position)
                entry_paths[ordered_path] = ".".join(
                    [
                        *(
                            [peft_paths.add_wrappers(module_path, wrapper_counts)]
                            if module_path
                            else []
                        ),
                        *wrapper_segments,
                    ]
                )
        elif any(peft.attention_of(path) is not None for path, _ in entries_by_adapter.values()):
            path = peft_paths.add_wrappers(model_path, wrapper_counts)
            entry_paths[model_path] = f"{path.removesuffix(leaf_name)}base_layer.{leaf_name}"
        else:
            entry_paths[model_path] = peft_paths.add_wrappers(model_path, wrapper_counts)
    return entry_paths


def _order_parameters(
    module_path: str,
    parameter_paths: list[str],
    changes_by_path: ChangesByPath,
    parameter_order: ParameterOrder | None,
    problems: list[str],
) -> list[str]:
    """Sort the changed parameters of one module by their order in the model, because PEFT nests
    their wrappers in this order. Without ``parameter_order`` (no model is known), the order comes
    from an adapter folder that changes all of them: the first parameter has the most wrappers in
    its path. If there is no such folder, an error text is added to ``problems``."""
    if len(parameter_paths) < 2:
        return parameter_paths
    if parameter_order is not None:
        return sorted(
            parameter_paths,
            key=[parameter_path(module_path, name) for name in parameter_order(module_path)].index,
        )
    for adapter_index in {index for path in parameter_paths for index in changes_by_path[path]}:
        wrapper_depths = {
            path: peft_paths.strip_wrappers(changes_by_path[path][adapter_index][0])[1]
            for path in parameter_paths
            if adapter_index in changes_by_path[path]
        }
        if len(wrapper_depths) == len(parameter_paths):
            return sorted(parameter_paths, key=lambda path: -wrapper_depths[path])
    problem = (
        f"parameters of {module_path!r} ({listing(parameter_paths)}) that no one adapter changes"
        " all of"
    )
    expected = "their order in the model, in which PEFT nests them"
    problems.append(sentence(problem, expected, "pass the model (--base on the command line)"))
    return parameter_paths


def order_parameters(saved_adapter: AdapterFiles, model_index: ModelIndex | None) -> AdapterFiles:
    """The adapter with each change of ``unordered_modules`` at the parameter that it belongs to in
    the model, with this parameter's rank and alpha. ``AdapterError``: there are such modules, and
    no model is known (``model_index`` is None), or it lacks one of them."""
    if not saved_adapter.unordered_modules or model_index is None:
        saved_adapter.require_parameter_order()
        return saved_adapter
    peft_config, ordered_layers = saved_adapter.peft_config, dict(saved_adapter.low)
    for path, layer in saved_adapter.low.items():
        module_path = peft_paths.strip_wrappers(path)[0]
        if module_path not in saved_adapter.unordered_modules:
            continue
        ref = ref_at(model_index, path, peft_config)
        if ref is None:
            raise AdapterError(
                f"a change of {module_path!r} in {saved_adapter.path}, which the model lacks",
                "the same modules",
                "pass the model that it was made for",
            )
        is_parameter = means_parameter(model_index, ref, peft_config)
        target_path = parameter_path(module_path, ref[1]) if is_parameter else module_path
        rank, alpha, scale = peft_paths.rank_alpha_scale(peft_config, target_path)
        ordered_layers[path] = replace(
            layer, target_path=target_path, rank=rank, alpha=alpha, scale=scale
        )
    return replace(saved_adapter, low=ordered_layers, has_model_order=True)


def effective_changes(saved_adapter: AdapterFiles) -> dict[str, LowRank]:
    """The low-rank product of each change, by model path, with the scale at which the library that
    wrote the folder applies it. PEFT adds the change of an attention's out-projection
    ``peft_behaviour.OUT_PROJ_REPEATS`` times, so for PEFT's folders the scale of such a change is
    multiplied by this number.

    Raises:
        AdapterError: it is unknown how the PEFT version that wrote the folder applies a change, or
            only the model tells which parameter a change belongs to.
    """
    saved_adapter.require_parameter_order()
    changes_by_path = {}
    for path, layer in saved_adapter.low.items():
        is_repeated = saved_adapter.record is None and peft_paths.attention_of(path) is not None
        if (
            is_repeated
            and (reason := peft_behaviour.out_proj_problem(saved_adapter.peft_config)) is not None
        ):
            raise AdapterError(
                f"a change of {layer.target_path!r} in {saved_adapter.path}: {reason}",
                "a known meaning",
                "use PEFT for it",
            )
        changes_by_path[layer.target_path] = (
            replace(layer.low, scale=layer.scale * peft_behaviour.OUT_PROJ_REPEATS)
            if is_repeated
            else layer.low
        )
    return changes_by_path
