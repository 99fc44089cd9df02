"""Random numbers for samples that do not depend on the batch: sample i of a seed has its own
generator.

    seed, i → sample_seed → the sample's generator → exponential numbers E_v → argmax of p_v / E_v

Seeds are hashed. With seed + i, sample 1 of seed 5 would equal sample 0 of seed 6, and the samples
of neighbouring seeds would not be independent.
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
    """Perturb log-probabilities [rows, vocabulary] so that their argmax is a sample. Each row uses
    its own generator."""
    clocks = torch.empty_like(scores, dtype=torch.float32)
    for clock, generator in zip(clocks, rows, strict=True):
        clock.exponential_(generator=generator)
    return scores.float() - clocks.clamp_min_(torch.finfo(torch.float32).tiny).log_()
