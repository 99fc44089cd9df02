"""Weights and changes for tests of rounding, and their exact sums."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from veneer.lowrank import LowRank

HALF = (torch.bfloat16, torch.float16)


def exact(weight, low_rank, gain=None):
    """gain ⊙ (weight + ΔW) [g, out, in] in float64."""
    merged_weight = weight.double() + low_rank.delta(torch.float64)
    return (
        merged_weight if gain is None else merged_weight * gain.double().view(*weight.shape[:2], 1)
    )


def make_change(shape, ratio=1e-3, rank=4, dtype=torch.bfloat16, seed=0):
    """A random weight in ``dtype``, and a change with ``ratio`` times its norm."""
    generator = torch.Generator().manual_seed(seed)
    groups, out, in_ = shape
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    A, B = (
        torch.randn(groups, *sizes, generator=generator) for sizes in ((rank, in_), (out, rank))
    )
    scale = ratio * weight.double().norm().item() / LowRank(A, B, 1.0).norm()
    return weight, LowRank(A, B, scale)


def same_bits(first, second):
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


@st.composite
def ties(draw):
    """A weight and a change whose sum lies halfway between two 16-bit numbers, or slightly above or
    below, at any exponent."""
    dtype = draw(st.sampled_from(HALF))
    digits, lowest, highest = (7, -133, 126) if dtype == torch.bfloat16 else (10, -24, 14)
    size = draw(st.integers(1, 40))
    exponents = torch.tensor(
        draw(st.lists(st.integers(lowest, highest), min_size=size, max_size=size))
    )
    fractions = torch.tensor(
        draw(st.lists(st.integers(0, 2**digits - 1), min_size=size, max_size=size))
    )
    signs = torch.tensor(draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=size, max_size=size)))
    weight = (signs.double() * (1 + fractions.double() / 2**digits) * 2.0 ** exponents.double()).to(
        dtype
    )[None, None]
    # half a step of the 16-bit grid, and an amount far below the last bit of the sum in float32
    half = 2.0 ** (exponents.clamp_min(-126 if digits == 7 else -14).double() - digits - 1)
    tiny_shift = draw(
        st.sampled_from([0.0, 2.0**-20, -(2.0**-20), 2.0**-30, -(2.0**-30), 2.0**-44, -(2.0**-44)])
    )
    factor = torch.tensor(
        draw(st.lists(st.sampled_from([-1.0, 1.0, 3.0, 0.0]), min_size=size, max_size=size))
    ).double()
    A = torch.stack([half * factor, half * tiny_shift])[None]
    return weight, LowRank(A, torch.ones(1, 1, 2, dtype=torch.float64), 1.0)
