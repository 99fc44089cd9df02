"""Align several adapters: find which of their changes apply to the same weight.

    align(saved adapters) -> an AlignedWeight for each weight that any of the adapters changes

Changes are matched by ``PeftLayer.target_path``, the module path without PEFT's wrappers. A folder
has an entry for each name of a tied weight; the record lists the first name. The other entries are
its aliases: the same product, transposed if the module uses the transposed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import peft, peft_behaviour, peft_paths
from veneer.layers import parameter_path
from veneer.lowrank import LowRank


@dataclass(frozen=True)
class AlignedWeight:
    """One weight with the changes of all adapters."""

    model_path: str  # path of its module, or of the parameter (``PeftLayer.target_path``)
    entry_path: str  # path in an adapter folder with all the changes
    parameter: bool  # whether the entry names the parameter, not its module
    weight: str | None  # the path of the weight, if a record has it
    # the change by the number of the adapter
    layers: Mapping[int, peft.PeftLayer]
    # (model path, transposed) of the weight that it is tied to, if that weight comes first
    alias_of: tuple[str, bool] | None = None

    @property
    def template(self) -> peft.PeftLayer:
        """One of the changes, for its shapes and suffixes."""
        return next(iter(self.layers.values()))


#: (path of a module) -> names of its parameters in the order of the model
ParameterOrder = Callable[[str], Sequence[str]]
#: (path in the adapter folder, change) by model path and number of the adapter
ChangesByPath = Mapping[str, Mapping[int, tuple[str, peft.PeftLayer]]]


def align(
    saved_adapters: Sequence[AdapterFiles], order: ParameterOrder | None = None
) -> list[AlignedWeight]:
    """The weights that these adapters change, in the order of the first adapter.

    Raises:
        AdapterError: shapes differ, a weight is tied in one adapter only, one adapter changes a
            module and another its parameter, or the order of a module's parameters is unknown. The
            error lists every problem.
    """
    problems: list[str] = []
    changes: dict[str, dict[int, tuple[str, peft.PeftLayer]]] = {}
    for number, saved in enumerate(saved_adapters):
        for path, layer in saved.low.items():
            changes.setdefault(layer.target_path, {})[number] = path, layer
    parameters = {
        model_path
        for model_path, entries in changes.items()
        if any(peft.targets_parameter(*entry) for entry in entries.values())
    }
    problems += _mismatch_problems(saved_adapters, changes, parameters)
    weights, aliases = _find_weights_and_aliases(saved_adapters, problems)
    paths = _entry_paths(changes, parameters, order, problems)
    raise_all(AdapterError, "These adapters cannot be put side by side", problems)
    return [
        AlignedWeight(
            model_path,
            paths[model_path],
            model_path in parameters,
            weights.get(model_path),
            {number: layer for number, (_, layer) in changes[model_path].items()},
            aliases.get(model_path),
        )
        for model_path in paths
    ]


def _mismatch_problems(
    saved_adapters: Sequence[AdapterFiles], changes: ChangesByPath, parameters: set[str]
) -> Iterator[str]:
    """Problems with changes under one model path that cannot apply to one weight."""
    for model_path, entries in changes.items():
        shapes: dict[tuple, int] = {}
        for number, (path, layer) in entries.items():
            form = (
                layer.suffixes,
                peft.targets_parameter(path, layer),
                layer.dims,
                layer.A.shape[1:],
            )
            shapes.setdefault(form, number)
        if len(shapes) > 1:
            sizes = [(form[2], saved_adapters[number].path) for form, number in shapes.items()]
            descriptions = [f"(groups, out, in) = {dims} in {path}" for dims, path in sizes]
            yield sentence(
                f"changes of {model_path!r} of {listing(descriptions, 3)}",
                "changes of one weight",
                "leave one of them out",
            )
    for model_path in parameters:
        module_path = model_path.rpartition(".")[0]
        if module_path in changes and module_path not in parameters:
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
    """(the path of each recorded weight, the alias of each tied one), by model path."""
    weights: dict[str, str] = {}
    candidates: dict[str, dict[tuple[str, bool], None]] = {}
    layers_by_path = [
        {layer.target_path: layer for layer in saved.low.values()} for saved in saved_adapters
    ]
    for saved, layers in zip(saved_adapters, layers_by_path, strict=True):
        # the weights in the record by model path
        recorded_weights = {
            weight if weight in layers else weight.rpartition(".")[0]: weight
            for weight in saved.metadata.get("changes", {})
        }
        weights |= recorded_weights
        for model_path in (
            layers.keys() - recorded_weights.keys() if saved.record is not None else ()
        ):
            ties = {
                (tied_path, transposed): None
                for tied_path in recorded_weights
                if tied_path in layers
                for transposed in _tie_orientations(layers[model_path], layers[tied_path])
            }
            candidates[model_path] = {
                candidate: None
                for candidate in candidates.get(model_path, ties)
                if candidate in ties
            }
    aliases: dict[str, tuple[str, bool]] = {}
    for model_path, ties in candidates.items():
        # if several match, their changes are equal in every adapter, so any of them will do
        for tied_path, transposed in ties:
            # every adapter must change both weights by one product, or neither
            pairs = [(layers.get(model_path), layers.get(tied_path)) for layers in layers_by_path]
            if all(transposed in _tie_orientations(a, b) if a and b else a is b for a, b in pairs):
                aliases[model_path] = tied_path, transposed
                break
        else:
            problem = (
                f"a change of {model_path!r}, tied to another weight in one adapter and not in"
                " another"
            )
            problems.append(sentence(problem, "adapters of one model", "leave one of them out"))
    return weights, aliases


def _tie_orientations(first: peft.PeftLayer, second: peft.PeftLayer) -> Iterator[bool]:
    for transposed in (False, True):
        low = second.low.T if transposed else second.low
        if (
            first.scale == second.scale
            and torch.equal(first.low.A, low.A)
            and torch.equal(first.low.B, low.B)
        ):
            yield transposed


def _entry_paths(
    changes: ChangesByPath, parameters: set[str], order: ParameterOrder | None, problems: list[str]
) -> dict[str, str]:
    """The path of each change in a folder that holds all changes, with PEFT's wrappers of
    modules."""
    parameters_by_module: dict[str, list[str]] = {}
    for model_path in filter(parameters.__contains__, changes):
        parameters_by_module.setdefault(model_path.rpartition(".")[0], []).append(model_path)
    wrapper_counts = {
        module: len(parameter_paths) for module, parameter_paths in parameters_by_module.items()
    }
    paths: dict[str, str] = {}
    for model_path, entries in changes.items():
        module_path, _, leaf_name = model_path.rpartition(".")
        if model_path in parameters:
            ordered = _order_parameters(
                module_path, parameters_by_module.pop(module_path, []), changes, order, problems
            )
            for number, parameter in enumerate(ordered, 1):
                wrappers = ["base_layer"] * (len(ordered) - number)
                paths[parameter] = ".".join(
                    [
                        *(
                            [peft_paths.add_wrappers(module_path, wrapper_counts)]
                            if module_path
                            else []
                        ),
                        *wrappers,
                    ]
                )
        elif any(peft.attention_of(path) is not None for path, _ in entries.values()):
            path = peft_paths.add_wrappers(model_path, wrapper_counts)
            paths[model_path] = f"{path.removesuffix(leaf_name)}base_layer.{leaf_name}"
        else:
            paths[model_path] = peft_paths.add_wrappers(model_path, wrapper_counts)
    return paths


def _order_parameters(
    module: str,
    parameter_paths: list[str],
    changes: ChangesByPath,
    order: ParameterOrder | None,
    problems: list[str],
) -> list[str]:
    """The parameters of one module in the order of the model, in which PEFT wraps them. Without a
    model the order follows from the nesting in a folder: the first parameter is nested deepest."""
    if len(parameter_paths) < 2:
        return parameter_paths
    if order is not None:
        return sorted(
            parameter_paths, key=[parameter_path(module, name) for name in order(module)].index
        )
    for number in {number for path in parameter_paths for number in changes[path]}:
        depths = {
            path: peft_paths.strip_wrappers(changes[path][number][0])[1]
            for path in parameter_paths
            if number in changes[path]
        }
        if len(depths) == len(parameter_paths):
            return sorted(parameter_paths, key=lambda path: -depths[path])
    problem = (
        f"parameters of {module!r} ({listing(parameter_paths)}) that no one adapter changes all of"
    )
    expected = "their order in the model, in which PEFT nests them"
    problems.append(sentence(problem, expected, "pass the model (--base on the command line)"))
    return parameter_paths


def applied_products(saved: AdapterFiles) -> dict[str, LowRank]:
    """The product of each change by model path, scaled as the library that wrote it applies it:
    PEFT adds the change of an attention's out-projection ``peft_behaviour.OUT_PROJ_REPEATS`` times.

    Raises:
        AdapterError: the behaviour of that PEFT version is unknown.
    """
    products = {}
    for path, layer in saved.low.items():
        twice = saved.record is None and peft_paths.attention_of(path) is not None
        if twice and (reason := peft_behaviour.out_proj_problem(saved.peft_config)) is not None:
            problem = f"a change of {layer.target_path!r} in {saved.path}: {reason}"
            raise AdapterError(problem, "a known meaning", "use PEFT for it")
        products[layer.target_path] = (
            replace(layer.low, scale=layer.scale * peft_behaviour.OUT_PROJ_REPEATS)
            if twice
            else layer.low
        )
    return products
