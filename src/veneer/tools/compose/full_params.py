"""Combine parameters that several adapters train in full: P = P₀ + Σ wᵢ (Pᵢ − P₀), P₀ the base's.

If the weights of the adapters with a parameter add up to 1, P₀ cancels and no base is needed. The
merge methods (such as TIES) treat Pᵢ − P₀ like ΔWᵢ.
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

#: (names of a layer or parameter, number of an adapter) -> weight of the adapter there
Weigh = Callable[[Sequence[str], int], float]


def combine_full_params(
    sources: Sequence[AdapterFiles],
    aligned_weights: Sequence[AlignedWeight],
    weigh: Weigh,
    options: ComposeOptions,
    base_weights: FrozenWeights,
) -> dict[str, dict[str, Tensor]]:
    """The combined parameters and running statistics, by path in the folder and name.

    Raises:
        AdapterError: a base is needed, shapes differ, or a running variance would be negative. The
            error lists every problem.
        BaseMismatchError: the adapters store different values of one frozen weight.
    """
    params: dict[tuple[str, str], dict[int, Tensor]] = {}
    entry_paths: dict[str, str] = {}
    for number, source in enumerate(sources):
        for path, tensors in source.full.items():
            module_path = peft_paths.strip_wrappers(path)[0]
            entry_paths[module_path] = (
                path if entry_paths.get(module_path, path) == path else module_path
            )
            for name, tensor in tensors.items():
                params.setdefault((module_path, name), {})[number] = tensor
    changed = {aligned.model_path for aligned in aligned_weights if not aligned.parameter}
    full: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    lacking: list[str] = []
    for (module_path, name), tensors in params.items():
        path = parameter_path(module_path, name)
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            problems.append(
                sentence(
                    f"{path!r} in several shapes", "one parameter", "leave one of the adapters out"
                )
            )
        elif name == "weight" and module_path in changed:
            # a frozen weight that PEFT stores along with its change
            first, *copies = tensors.values()
            if not all(torch.equal(tensor, first) for tensor in copies):
                raise BaseMismatchError(
                    f"different frozen weights of {path!r}", "one base", "leave one out"
                )
            full.setdefault(entry_paths[module_path], {})[name] = first
        else:
            weights = {
                number: weight
                for number in tensors
                if (weight := weigh((module_path, path), number))
            }
            value = _combine_param(path, tensors, weights, options, base_weights, problems, lacking)
            if value is not None:
                full.setdefault(entry_paths[module_path], {})[name] = value
    if lacking:
        problem = f"no base values of {listing(lacking)}, which are trained in full"
        problem += (
            "" if options.method in MERGE_METHODS else " with weights that do not add up to 1"
        )
        do = (
            "pass the base (--base on the command line), or give these layers other weights (0"
            " leaves them out)"
        )
        problems.append(sentence(problem, "the base, from which their changes are counted", do))
    raise_all(AdapterError, "What these adapters train in full cannot be combined", problems)
    return full


def _combine_param(
    path: str,
    tensors: Mapping[int, Tensor],
    weights: Mapping[int, float],
    options: ComposeOptions,
    base_weights: FrozenWeights,
    problems: list[str],
    lacking: list[str],
) -> Tensor | None:
    """The combined value of one parameter; None if its weights are 0, or after adding to
    ``problems`` or ``lacking``."""
    if not weights:
        return None  # the layer has weight 0: keep the base's value
    merge_method, first_tensor = MERGE_METHODS.get(options.method), tensors[next(iter(weights))]
    if merge_method is None and list(weights.values()) == [1.0]:
        return first_tensor
    base = base_weights.get(path)
    cancels = math.isclose(sum(weights.values()), 1.0, rel_tol=1e-12)
    if base is None and (merge_method is not None or not cancels):
        lacking.append(path)
        return None
    if base is not None and base.shape != first_tensor.shape:
        problem = (
            f"{path!r} of shape {tuple(first_tensor.shape)}, in the base of {tuple(base.shape)}"
        )
        problems.append(sentence(problem, "one shape", "pass the base that the adapters are of"))
        return None
    base_value = (
        torch.zeros(first_tensor.shape, dtype=torch.float64) if base is None else base.double()
    )
    if merge_method is None:
        # without a base P₀ cancels and 0 stands in for it
        value = base_value + torch.stack(
            [weight * (tensors[n].double() - base_value) for n, weight in weights.items()]
        ).sum(0)
    else:
        # seeded by content, so that both names of a tied parameter drop the same entries
        seed = "/".join([str(options.seed), *(digest(tensors[number]) for number in weights)])
        vectors = [
            lambda number=number: tensors[number].double() - base_value for number in weights
        ]
        value = base_value + merge_vectors(
            merge_method, vectors, list(weights.values()), options.density, seed
        )
    if path.endswith("running_var") and (value < 0).any():
        problem = f"a variance below 0 in {path!r}"
        problems.append(sentence(problem, "a variance", "give this layer weights that add up to 1"))
    dtype = reduce(torch.promote_types, (tensors[number].dtype for number in weights))
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
