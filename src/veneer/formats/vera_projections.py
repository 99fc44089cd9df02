"""The projections of VeRA: A [r, largest in] and B [largest out, r], which all layers share.

A file holds them if its config has save_projection; otherwise PEFT draws them from the config's
projection_prng_key. Each layer uses the first columns of A and the first rows of B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import sentence

#: the shape and, where it is plain, the dtype of a base's parameter, by its path; None where the
#: base lacks it
Weights = Callable[[str], "tuple[tuple[int, ...], torch.dtype | None] | None"]
#: for each module, the outputs, inputs and dtype of its weight
_Sizes = dict[str, tuple[int, int, "torch.dtype | None"]]

#: the keys of the projections in a file
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def layer_projections(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    by_module: Mapping[str, Mapping[str, Tensor]],
    weights: Weights | None,
    problems: list[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] of each module. Empty without ``weights``, or if there are
    ``problems``, to which this function adds."""
    if weights is None:
        return {}
    sizes = _layer_sizes(by_module, weights, problems)
    if problems or not sizes:
        return {}
    largest_out = max(out for out, _, _ in sizes.values())
    largest_in = max(in_ for _, in_, _ in sizes.values())
    A, B = (tensors.get(name) for name in PROJECTIONS)
    is_drawn = A is None or B is None
    if A is None or B is None:
        if problem := _drawing_problem(config, tensors):
            problems.append(problem)
            return {}
        A, B = drawn_projections(
            config["projection_prng_key"], config["r"], largest_out, largest_in
        )
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
        pair = A[:, :in_], B[:out]
        if is_drawn and dtype is not None:  # PEFT rounds drawn projections to the base's dtype
            pair = pair[0].to(dtype).to(A.dtype), pair[1].to(dtype).to(B.dtype)
        projections[module_path] = pair
    return projections


def _layer_sizes(
    by_module: Mapping[str, Mapping[str, Tensor]], weights: Weights, problems: list[str]
) -> _Sizes:
    """The sizes of each module's weight in the base. Modules that do not fit add a problem."""
    sizes: _Sizes = {}
    for module_path, module_tensors in by_module.items():
        gains = module_tensors.get("vera_lambda_b")
        out = 0 if gains is None else gains.numel()
        shape, dtype = weights(f"{module_path}.weight") or (None, None)
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
    """Why projections that the file lacks cannot be drawn; None if they can."""
    absent = f"no {' and no '.join(key for key in PROJECTIONS if key not in tensors)}"
    if config.get("save_projection", True):
        return sentence(
            f"{absent}, and save_projection=True", "both projections", "get the whole file again"
        )
    if type(config.get("projection_prng_key")) is not int:
        return sentence(
            f"{absent}, and no projection_prng_key",
            "the projections, or what they are drawn from",
            "get both files again",
        )
    return None


def drawn_projections(key: int, rank: int, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A [rank, in_] and B [out, rank] as PEFT draws them for VeRA: Kaiming-uniform with gain √2,
    from torch's generator with this seed. Always float32 on the CPU, because another dtype or
    device would draw other numbers."""
    generator = torch.Generator(device="cpu").manual_seed(key)
    A, B = (
        torch.empty(shape, dtype=torch.float32, device="cpu")
        for shape in ((rank, in_), (out, rank))
    )
    for matrix in (A, B):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return A, B
