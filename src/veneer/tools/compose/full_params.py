"""What several adapters train in full, combined: P = P₀ + Σ wᵢ (Pᵢ − P₀), with P₀ the base's.

Where the weights of the adapters that have a parameter add up to 1, P₀ cancels and no base is
needed. The merge methods (TIES and the like) take Pᵢ − P₀ as they take ΔWᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.attach.lookup import parameter_path
from veneer.errors import AdapterError, BaseMismatchError, listing, raise_all, sentence
from veneer.fileio.hashing import digest
from veneer.formats import peft_paths
from veneer.tools.compose.align import AlignedWeight
from veneer.tools.compose.blend import ComposeOptions
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.compose.merge_methods import MERGE_METHODS, merged_vector

#: (names of a parameter, number of an adapter) -> its weight there
Weigh = Callable[[Sequence[str], int], float]


def combined(
    sources: Sequence[AdapterFiles], aligned_weights: Sequence[AlignedWeight], weigh: Weigh, how: ComposeOptions,
    base_weights: FrozenWeights,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """The parameters and running statistics by path in a file and name. ``AdapterError``: the base
    is needed and not there, shapes differ, or a running variance would be negative; with every
    problem at once. ``BaseMismatchError``: adapters that carry frozen weights along carry different
    ones."""
    params: dict[tuple[str, str], dict[int, Tensor]] = {}
    where: dict[str, str] = {}
    for number, source in enumerate(sources):
        for path, tensors in source.full.items():
            at = peft_paths.strip_wrappers(path)[0]
            where[at] = path if where.get(at, path) == path else at
            for name, tensor in tensors.items():
                params.setdefault((at, name), {})[number] = tensor
    changed = {aligned.at for aligned in aligned_weights if not aligned.parameter}
    full: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    lacking: list[str] = []
    for (at, name), tensors in params.items():
        path = parameter_path(at, name)
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            problems.append(
                sentence(
                    f"{path!r} in several shapes", "one parameter", "leave one of the adapters out"
                )
            )
        elif name == "weight" and at in changed:
            # a base weight that PEFT writes along with its change
            first, *others = tensors.values()
            if not all(torch.equal(tensor, first) for tensor in others):
                raise BaseMismatchError(
                    f"different frozen weights of {path!r}", "one base", "leave one out"
                )
            full.setdefault(where[at], {})[name] = first
        else:
            weights = {
                number: weight for number in tensors if (weight := weigh((at, path), number))
            }
            value = _combined(path, tensors, weights, how, base_weights, problems, lacking)
            if value is not None:
                full.setdefault(where[at], {})[name] = value
    if lacking:
        found = f"no base values of {listing(lacking)}, which are trained in full"
        found += "" if how.method in MERGE_METHODS else " with weights that do not add up to 1"
        do = (
            "pass the base (--base on the command line), or give these layers other weights (0"
            " leaves them out)"
        )
        problems.append(sentence(found, "the base, from which their changes are counted", do))
    raise_all(AdapterError, "What these adapters train in full cannot be combined", problems)
    return full


def _combined(
    path: str, tensors: Mapping[int, Tensor], weights: Mapping[int, float], how: ComposeOptions,
    base_weights: FrozenWeights, problems: list[str], lacking: list[str],
) -> Tensor | None:  # fmt: skip
    """The value of one parameter, or None where its weights are 0 or there is a problem (then
    added)."""
    if not weights:
        return None  # its layer has the weight 0: the base's own
    merge_method, like = MERGE_METHODS.get(how.method), tensors[next(iter(weights))]
    if merge_method is None and list(weights.values()) == [1.0]:
        return like
    base = base_weights.get(path)
    cancels = math.isclose(sum(weights.values()), 1.0, rel_tol=1e-12)
    if base is None and (merge_method is not None or not cancels):
        lacking.append(path)
        return None
    if base is not None and base.shape != like.shape:
        problem = f"{path!r} of shape {tuple(like.shape)}, in the base of {tuple(base.shape)}"
        problems.append(sentence(problem, "one shape", "pass the base that the adapters are of"))
        return None
    start = torch.zeros(like.shape, dtype=torch.float64) if base is None else base.double()
    if merge_method is None:
        # without a base P₀ cancels, so that 0 serves as well
        value = start + torch.stack(
            [weight * (tensors[n].double() - start) for n, weight in weights.items()]
        ).sum(0)
    else:
        # of a tie both names draw the same entries, as the seed is the content's
        seed = "/".join([str(how.seed), *(digest(tensors[number]) for number in weights)])
        vectors = [lambda number=number: tensors[number].double() - start for number in weights]
        value = start + merged_vector(
            merge_method, vectors, list(weights.values()), how.density, seed
        )
    if path.endswith("running_var") and (value < 0).any():
        problem = f"a variance below 0 in {path!r}"
        problems.append(sentence(problem, "a variance", "give this layer weights that add up to 1"))
    dtype = reduce(torch.promote_types, (tensors[number].dtype for number in weights))
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)
