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
#: the dtypes of changes, and further dtypes that modules trained in full may have
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def number_problems(tensors: Mapping[str, Tensor], do: str) -> Iterator[str]:
    """The error texts for tensors with an unknown dtype, or with values that are not finite or
    above ``MAX_MAGNITUDE``. ``do``: the advice in the error."""
    bad_dtypes = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if tensor.dtype not in (*FLOAT_DTYPES, *INTEGER_DTYPES)
    }
    dtype_names = listing(sorted(set(map(str, bad_dtypes.values()))))
    floats = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.dtype in FLOAT_DTYPES and tensor.numel()
    }
    # one pass over the values: the largest magnitude is not finite if any value is not finite
    largest_magnitudes = {
        key: max(map(abs, map(float, tensor.aminmax()))) for key, tensor in throttle(floats.items())
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
        (nonfinite_keys, "numbers that are not finite", "finite ones", do),
        (
            oversized_keys,
            f"numbers beyond {MAX_MAGNITUDE:.0e}",
            "an adapter that did not diverge",
            do,
        ),
    ]
    for keys, problem, expected, advice in checks:
        if keys:
            yield sentence(f"{problem} in {listing(keys)}", expected, advice)


def change_problems(low: Mapping[str, peft.PeftLayer]) -> Iterator[str]:
    """The error texts for low-rank changes by path: factors that are not stored as floating-point
    numbers, and changes with an upper bound of ‖scale · B A‖ above ``MAX_MAGNITUDE``."""
    for path, layer in throttle(low.items()):
        factors = {"A": layer.A, "B": layer.B, **layer.extras}
        bad_dtypes = {
            name: tensor.dtype
            for name, tensor in factors.items()
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
        norm = abs(layer.scale) * layer.A.double().norm().item() * layer.B.double().norm().item()
        if not norm <= MAX_MAGNITUDE:
            problem = f"a change of norm up to {norm:.1e} at {path!r} (scale {layer.scale:g})"
            yield sentence(
                problem,
                f"one of at most {MAX_MAGNITUDE:.0e}",
                "get another copy; its alpha or numbers are damaged",
            )


def variance_problems(full: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """The error texts for negative values in running variances, of which a norm layer would take
    the square root."""
    for path, tensors in full.items():
        variance = tensors.get("running_var")
        if variance is not None and variance.dtype in FLOAT_DTYPES and bool((variance < 0).any()):
            yield sentence(
                f"a variance below zero in {path}.running_var", "variances", "get the file again"
            )
