"""Random numbers of samples: those of sample i of a seed, whoever shares its batch.

    seed, i → sample_seed → a generator of the sample's own → exponential numbers E_v → argmax of
    p_v / E_v

The seeds of a sampler are hashed. With seed + i, sample 1 of seed 5 would be sample 0 of seed 6,
and the answers of neighbouring seeds would not be independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_seed(seed: int, index: int) -> int:
    """The seed of a sample's generator: the first 63 bits of the SHA-256 of the text
    "seed:index"."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def perturb(scores: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
    """Log-probabilities [rows, vocabulary], of which the argmax is a draw: each row draws from its
    own generator."""
    clocks = torch.empty_like(scores, dtype=torch.float32)
    for clock, generator in zip(clocks, rows, strict=True):
        clock.exponential_(generator=generator)
    return scores.float() - clocks.clamp_min_(torch.finfo(torch.float32).tiny).log_()
