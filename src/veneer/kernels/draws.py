"""Random numbers for sampling answers. Each sample of a request has its own generator, seeded by
the request's seed and the sample's index, so an answer does not depend on the rest of its batch.

    seed, index → sample_seed → generator → exponential numbers E_v → argmax over v of p_v / E_v

v is a token, p_v its probability, and E_v an exponential random number of rate 1. This argmax draws
each token with its probability (the Gumbel-max trick). Seed and index are hashed together: with
seed + index, sample 1 of seed 5 would equal sample 0 of seed 6, and samples of neighbouring seeds
would be dependent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer import precision


def sample_seed(seed: int, index: int) -> int:
    """The seed of a sample's generator: the first 63 bits of the SHA-256 of "seed:index"."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def log_exponentials(
    row_generators: Sequence[torch.Generator], count: int, device: torch.device
) -> Tensor:
    """Logarithms of exponential random numbers of rate 1, [rows, ``count``] in float32. Each row
    uses its own generator.

    An exponential number is computed as −log of a uniform one, which takes a quarter of the time of
    ``Tensor.exponential_`` on a CPU. The uniform numbers are float64 on devices that have float64.
    In float32 they are multiples of 2⁻²⁴, so tokens that are less likely than 2⁻²⁴ would never be
    drawn."""
    dtype = torch.float64 if precision.has_float64(device) else torch.float32
    log_samples = torch.empty(len(row_generators), count, device=device)
    # a single row stays in the cache of a CPU; on a GPU, all rows together need the fewest launches
    rows_at_once = 1 if device.type == "cpu" else len(row_generators)
    uniforms = torch.empty(rows_at_once, count, dtype=dtype, device=device)
    for first in range(0, len(row_generators), max(1, rows_at_once)):
        for row, generator in zip(
            uniforms, row_generators[first : first + rows_at_once], strict=True
        ):
            row.uniform_(generator=generator)
        log_samples[first : first + rows_at_once] = uniforms.log_().neg_()
    return log_samples.log_()


def perturb(log_probabilities: Tensor, row_generators: Sequence[torch.Generator]) -> Tensor:
    """Add random noise to ``log_probabilities`` [rows, vocabulary], so that the argmax of a row is
    a sample from its distribution. Each row uses its own generator."""
    noise = log_exponentials(row_generators, log_probabilities.shape[-1], log_probabilities.device)
    return torch.sub(log_probabilities, noise, out=noise)
