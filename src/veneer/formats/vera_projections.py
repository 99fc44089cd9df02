"""VeRA's projections A [r, largest in] and B [largest out, r], which all adapted layers share.

A file holds the projections if its config has save_projection. Otherwise PEFT draws them at random
from the config's projection_prng_key. Each layer uses the first columns of A and the first rows of
B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence

#: a function that takes the name of a parameter of the base and returns its (shape, dtype), with
#: the dtype None if it is stored packed (quantised); None if the base lacks the parameter
WeightLookup = Callable[[str], "tuple[tuple[int, ...], torch.dtype | None] | None"]
#: module path -> (number of outputs, number of inputs, dtype) of the module's weight
_Sizes = dict[str, tuple[int, int, "torch.dtype | None"]]

#: the keys of A and B in a file
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def layer_projections(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tensors_by_module: Mapping[str, Mapping[str, Tensor]],
    weight_lookup: WeightLookup | None,
    problems: list[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) of each module, by path. An error text is added to ``problems`` for
    each misfit. The result is empty if there are problems or ``weight_lookup`` is None.

    Args:
        tensors: all tensors of the file, by key.
        tensors_by_module: the tensors of each module, by suffix.
    """
    if weight_lookup is None:
        return {}
    sizes = _layer_sizes(tensors_by_module, weight_lookup, problems)
    if problems or not sizes:
        return {}
    largest_out = max(out for out, _, _ in sizes.values())
    largest_in = max(in_ for _, in_, _ in sizes.values())
    A, B = (tensors.get(name) for name in PROJECTIONS)
    are_drawn = A is None or B is None
    if A is None or B is None:
        if problem := _drawing_problem(config, tensors):
            problems.append(problem)
            return {}
        A, B = draw_projections(config["projection_prng_key"], config["r"], largest_out, largest_in)
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] < largest_in or B.shape[0] < largest_out:
        problems.append(
            sentence(
                f"projections {tuple(A.shape)} and {tuple(B.shape)}",
                f"at least {largest_in} inputs and {largest_out} outputs",
                "use its base",
            )
        )
        return {}
    projections = {}
    for module_path, (out, in_, dtype) in sizes.items():
        module_pair = A[:, :in_], B[:out]
        # round drawn projections to the base's dtype, as PEFT does
        if are_drawn and dtype is not None:
            module_pair = module_pair[0].to(dtype).to(A.dtype), module_pair[1].to(dtype).to(B.dtype)
        projections[module_path] = module_pair
    return projections


def _layer_sizes(
    tensors_by_module: Mapping[str, Mapping[str, Tensor]],
    weight_lookup: WeightLookup,
    problems: list[str],
) -> _Sizes:
    """(out, in, dtype) of each module's weight in the base, by path. A module whose weight the base
    lacks, or has with other sizes, is left out, and an error text is added to ``problems``."""
    sizes: _Sizes = {}
    for module_path, module_tensors in tensors_by_module.items():
        gains = module_tensors.get("vera_lambda_b")
        out = 0 if gains is None else gains.numel()
        shape, dtype = weight_lookup(f"{module_path}.weight") or (None, None)
        if shape is None or not out or len(shape) != 2 or math.prod(shape) % out:
            base_shape = "none" if shape is None else tuple(shape)
            problems.append(
                sentence(
                    f"{out} outputs at {module_path!r}, where the base has {base_shape}",
                    "a weight with as many outputs",
                    "use its base",
                )
            )
        else:
            sizes[module_path] = out, math.prod(shape) // out, dtype
    return sizes


def _drawing_problem(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """The error text if the projections that the file lacks cannot be drawn from the config; None
    if they can: ``save_projection`` is false and ``projection_prng_key`` is an integer."""
    missing_text = f"no {' and no '.join(key for key in PROJECTIONS if key not in tensors)}"
    if config.get("save_projection", True):
        return sentence(
            f"{missing_text}, and save_projection=True",
            "both projections",
            "get the whole file again",
        )
    if type(config.get("projection_prng_key")) is not int:
        return sentence(
            f"{missing_text}, and no projection_prng_key",
            "the projections, or what they are drawn from",
            "get both files again",
        )
    return None


def draw_projections(seed: int, rank: int, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A [rank, in_] and B [out, rank] as PEFT draws them for VeRA: Kaiming-uniform with gain √2,
    from a torch generator with this seed. The result is float32 and on the CPU, because another
    dtype or device would draw other numbers."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    A, B = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        for shape in ((rank, in_), (out, rank))
    )
    for matrix in (A, B):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B
