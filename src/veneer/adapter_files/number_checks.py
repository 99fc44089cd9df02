"""Checks of the values in an adapter's tensors, without a model: unknown dtypes, values that are
not finite, and changes so large that they would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from veneer.errors import listing, sentence
from veneer.fileio.throttle import throttle
from veneer.formats import peft

#: the largest permitted magnitude of a value in an adapter's tensors, and the largest permitted
#: upper bound of ‖ΔW‖: with larger values, the first matrix products would overflow
MAX_MAGNITUDE = 1e9
#: FLOAT_DTYPES: the permitted dtypes of low-rank changes. INTEGER_DTYPES: further dtypes that the
#: tensors of a module trained in full may have, such as counts of batches
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def number_problems(tensors: Mapping[str, Tensor], advice: str) -> Iterator[str]:
    """The error texts for tensors with an unknown dtype, or with values that are not finite or
    above ``MAX_MAGNITUDE``. ``advice``: what to do about such values, for the texts."""
    bad_dtypes = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if tensor.dtype not in (*FLOAT_DTYPES, *INTEGER_DTYPES)
    }
    dtype_names = listing(sorted(set(map(str, bad_dtypes.values()))))
    float_tensors = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.dtype in FLOAT_DTYPES and tensor.numel()
    }
    # one pass over the values: the largest magnitude is not finite if any value is not finite
    largest_magnitudes = {
        key: max(map(abs, map(float, tensor.aminmax())))
        for key, tensor in throttle(float_tensors.items())
    }
    nonfinite_keys = [
        key for key, magnitude in largest_magnitudes.items() if not math.isfinite(magnitude)
    ]
    oversized_keys = [
        f"{key} ({magnitude:.1e})"
        for key, magnitude in largest_magnitudes.items()
        if MAX_MAGNITUDE < magnitude < math.inf
    ]
    checks = [
        (
            bad_dtypes,
            f"numbers stored as {dtype_names}",
            "float64, float32, bfloat16 or float16",
            "convert them to bfloat16",
        ),
        (nonfinite_keys, "numbers that are not finite", "finite ones", advice),
        (
            oversized_keys,
            f"numbers beyond {MAX_MAGNITUDE:.0e}",
            "an adapter that did not diverge",
            advice,
        ),
    ]
    for keys, problem, expected, check_advice in checks:
        if keys:
            yield sentence(f"{problem} in {listing(keys)}", expected, check_advice)


def change_problems(layers_by_path: Mapping[str, peft.PeftLayer]) -> Iterator[str]:
    """The error texts for low-rank changes whose tensors are not stored as floating-point numbers,
    or for which an upper bound of ‖scale · B A‖ is above ``MAX_MAGNITUDE``. ``layers_by_path``: the
    changes by path in PEFT's file."""
    for path, layer in throttle(layers_by_path.items()):
        tensors = {"A": layer.A, "B": layer.B, **layer.extras}
        bad_dtypes = {
            name: tensor.dtype
            for name, tensor in tensors.items()
            if tensor.dtype not in FLOAT_DTYPES
        }
        if bad_dtypes:
            problem = (
                f"{', '.join(f'{name} stored as {dtype}' for name, dtype in bad_dtypes.items())} at"
                f" {path!r}"
            )
            yield sentence(problem, "floating-point numbers", "get the file again")
            continue
        # an upper bound of the norm of scale · B A
        norm_bound = (
            abs(layer.scale) * layer.A.double().norm().item() * layer.B.double().norm().item()
        )
        if not norm_bound <= MAX_MAGNITUDE:
            problem = f"a change of norm up to {norm_bound:.1e} at {path!r} (scale {layer.scale:g})"
            yield sentence(
                problem,
                f"one of at most {MAX_MAGNITUDE:.0e}",
                "get another copy; its alpha or numbers are damaged",
            )


def variance_problems(full_tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """The error texts for running variances with negative values: a norm layer takes the square
    root of them, which would be NaN. ``full_tensors``: {module path: {name: tensor}}."""
    for path, tensors in full_tensors.items():
        variance = tensors.get("running_var")
        if variance is not None and variance.dtype in FLOAT_DTYPES and bool((variance < 0).any()):
            yield sentence(
                f"a variance below zero in {path}.running_var", "variances", "get the file again"
            )
