"""Combine parameters that several adapters train in full: P = P₀ + Σ wᵢ (Pᵢ − P₀).

P₀ is the base's value, Pᵢ that of adapter i, wᵢ the weight of adapter i. If the wᵢ add up to 1, P₀
cancels and no base is needed. The merge methods (such as TIES) merge the differences Pᵢ − P₀ as
they merge the changes ΔWᵢ of weights, and always need the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import AdapterError, BaseMismatchError, listing, raise_all, sentence
from veneer.fileio.hashing import digest
from veneer.formats import peft_paths
from veneer.layers import parameter_path
from veneer.tools.compose.align import AlignedWeight
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.compose.merge_methods import MERGE_METHODS, merge_vectors
from veneer.tools.compose.weighted_sum import ComposeOptions

#: maps (names of a layer or parameter, index of an adapter) to the coefficient wᵢ of the adapter
WeighAdapter = Callable[[Sequence[str], int], float]


def combine_full_params(
    source_adapters: Sequence[AdapterFiles],
    aligned_weights: Sequence[AlignedWeight],
    weigh_adapter: WeighAdapter,
    options: ComposeOptions,
    base_weights: FrozenWeights,
) -> dict[str, dict[str, Tensor]]:
    """The combined values of the parameters and running statistics that adapters train in full:
    {path of the module in the new folder: {name: value}}. A parameter whose coefficients wᵢ are all
    0 is left out. ``aligned_weights``: the low-rank changes of the same adapters.

    Raises:
        AdapterError: the base is missing and needed, shapes differ, or a running variance would be
            negative (the error lists every problem); or one adapter trains in full what another
            changes at a low rank.
        BaseMismatchError: the adapters store different values of the same frozen weight.
    """
    tensors_by_parameter, folder_paths = _collect_params(source_adapters)
    low_rank_paths = _require_one_form(source_adapters, tensors_by_parameter, aligned_weights)
    combined_params: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    missing_in_base: list[str] = []
    for (module_path, name), tensors in tensors_by_parameter.items():
        path = parameter_path(module_path, name)
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            problems.append(
                sentence(
                    f"{path!r} in several shapes", "one parameter", "leave one of the adapters out"
                )
            )
        elif path in low_rank_paths:
            # PEFT stores the frozen weight of an adapted embedding together with its change. It is
            # no trained value, so it is copied.
            first_tensor, *other_tensors = tensors.values()
            if not all(torch.equal(tensor, first_tensor) for tensor in other_tensors):
                raise BaseMismatchError(
                    f"different frozen weights of {path!r}", "one base", "leave one out"
                )
            combined_params.setdefault(folder_paths[module_path], {})[name] = first_tensor
        else:
            coefficients = {
                source_index: coefficient
                for source_index in tensors
                if (coefficient := weigh_adapter((module_path, path), source_index))
            }
            combined_param = _combine_param(
                path, tensors, coefficients, options, base_weights, problems, missing_in_base
            )
            if combined_param is not None:
                combined_params.setdefault(folder_paths[module_path], {})[name] = combined_param
    if missing_in_base:
        problem = f"no base values of {listing(missing_in_base)}, which are trained in full"
        problem += (
            "" if options.method in MERGE_METHODS else " with weights that do not add up to 1"
        )
        fix = (
            "pass the base (--base on the command line), or give these layers other weights (0"
            " leaves them out)"
        )
        problems.append(sentence(problem, "the base, from which their changes are counted", fix))
    raise_all(AdapterError, "What these adapters train in full cannot be combined", problems)
    return combined_params


def _require_one_form(
    source_adapters: Sequence[AdapterFiles],
    tensors_by_parameter: Mapping[tuple[str, str], Mapping[int, Tensor]],
    aligned_weights: Sequence[AlignedWeight],
) -> set[str]:
    """The paths of the parameters that adapters change at a low rank. ``AdapterError``: an adapter
    changes a parameter at a low rank, and another stores it without such a change, so that it
    trains it in full."""
    low_rank_changes = {
        change.model_path: change.layers for change in aligned_weights if change.is_parameter
    } | {
        parameter_path(change.model_path, "weight"): change.layers
        for change in aligned_weights
        if not change.is_parameter
    }
    for (module_path, name), tensors in tensors_by_parameter.items():
        path = parameter_path(module_path, name)
        layers = low_rank_changes.get(path, tensors)
        if full_indices := tensors.keys() - layers.keys():
            raise AdapterError(
                f"{path!r}, trained in full in {source_adapters[min(full_indices)].path} and"
                f" changed at a low rank in {source_adapters[min(layers)].path}",
                "one of the two",
                "leave one of the adapters out",
            )
    return set(low_rank_changes)


def _collect_params(
    source_adapters: Sequence[AdapterFiles],
) -> tuple[dict[tuple[str, str], dict[int, Tensor]], dict[str, str]]:
    """(the parameters that adapters train in full: {(module path, name): {index of the adapter:
    tensor}}, the path of each module in the new folder: {module path: path}). The path has the
    segments ``base_layer`` of PEFT's wrappers if it has them in every adapter."""
    tensors_by_parameter: dict[tuple[str, str], dict[int, Tensor]] = {}
    folder_paths: dict[str, str] = {}
    for source_index, source_adapter in enumerate(source_adapters):
        for path, tensors in source_adapter.full.items():
            module_path = peft_paths.strip_wrappers(path)[0]
            folder_paths[module_path] = (
                path if folder_paths.get(module_path, path) == path else module_path
            )
            for name, tensor in tensors.items():
                tensors_by_parameter.setdefault((module_path, name), {})[source_index] = tensor
    return tensors_by_parameter, folder_paths


def _combine_param(
    path: str,
    tensors_by_adapter: Mapping[int, Tensor],
    coefficients: Mapping[int, float],
    options: ComposeOptions,
    base_weights: FrozenWeights,
    problems: list[str],
    missing_in_base: list[str],
) -> Tensor | None:
    """The combined value of the parameter at ``path``, in the dtype of the adapters' values.

    Args:
        tensors_by_adapter: the value in each adapter, by the adapter's index.
        coefficients: the coefficients wᵢ other than 0, by the adapter's index.
        problems: gets an error text if the shapes or the combined value are invalid.
        missing_in_base: gets ``path`` if the base's value is needed and missing.

    Returns:
        None if ``coefficients`` is empty, the base's value is missing, or its shape differs.
    """
    if not coefficients:
        return None  # the new adapter leaves this parameter at the base's value
    merge_method = MERGE_METHODS.get(options.method)
    first_tensor = tensors_by_adapter[next(iter(coefficients))]
    if merge_method is None and list(coefficients.values()) == [1.0]:
        return first_tensor
    base_tensor = base_weights.get(path)
    base_cancels = math.isclose(sum(coefficients.values()), 1.0, rel_tol=1e-12)
    if base_tensor is None and (merge_method is not None or not base_cancels):
        missing_in_base.append(path)
        return None
    if base_tensor is not None and base_tensor.shape != first_tensor.shape:
        problem = (
            f"{path!r} of shape {tuple(first_tensor.shape)},"
            f" in the base of {tuple(base_tensor.shape)}"
        )
        problems.append(sentence(problem, "one shape", "pass the base that the adapters are of"))
        return None
    base_value = (
        torch.zeros(first_tensor.shape, dtype=torch.float64)
        if base_tensor is None
        else base_tensor.double()
    )
    if merge_method is None:
        # Without a base, the coefficients add up to 1, so that the base's value cancels. The 0 in
        # its place does not affect the sum.
        combined_param = base_value + torch.stack(
            [
                coefficient * (tensors_by_adapter[index].double() - base_value)
                for index, coefficient in coefficients.items()
            ]
        ).sum(0)
    else:
        # The seed depends on the values, so that DARE drops the same entries under each name of a
        # tied parameter.
        seed = "/".join(
            [str(options.seed), *(digest(tensors_by_adapter[index]) for index in coefficients)]
        )
        task_vector_functions = [
            lambda index=index: tensors_by_adapter[index].double() - base_value
            for index in coefficients
        ]
        combined_param = base_value + merge_vectors(
            merge_method, task_vector_functions, list(coefficients.values()), options.density, seed
        )
    if path.endswith("running_var") and (combined_param < 0).any():
        problem = f"a variance below 0 in {path!r}"
        problems.append(sentence(problem, "a variance", "give this layer weights that add up to 1"))
    dtype = reduce(torch.promote_types, (tensors_by_adapter[index].dtype for index in coefficients))
    return combined_param.to(dtype) if dtype.is_floating_point else combined_param.round().to(dtype)
