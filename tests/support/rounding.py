"""Weights, changes and what rounding them must give."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from veneer.lowrank import LowRank

HALF = (torch.bfloat16, torch.float16)


def exact(weight, low, gain=None):
    values = weight.double() + low.delta(torch.float64)
    return values if gain is None else values * gain.double().view(*weight.shape[:2], 1)


def make_change(shape, ratio=1e-3, rank=4, dtype=torch.bfloat16, seed=0):
    """A weight on the grid of dtype and a change of ``ratio`` times its norm."""
    generator = torch.Generator().manual_seed(seed)
    groups, out, in_ = shape
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    A, B = (torch.randn(groups, *rest, generator=generator) for rest in ((rank, in_), (out, rank)))
    scale = ratio * weight.double().norm().item() / LowRank(A, B, 1.0).norm()
    return weight, LowRank(A, B, scale)


def same_bits(first, second):
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


@st.composite
def ties(draw):
    """A weight and factors whose sum lies on a tie of the 16-bit grid, or a hair beside one, at any
    exponent."""
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
    # Half a step, and what is far below float32's last bit of the sum.
    half = 2.0 ** (exponents.clamp_min(-126 if digits == 7 else -14).double() - digits - 1)
    hair = draw(
        st.sampled_from([0.0, 2.0**-20, -(2.0**-20), 2.0**-30, -(2.0**-30), 2.0**-44, -(2.0**-44)])
    )
    factor = torch.tensor(
        draw(st.lists(st.sampled_from([-1.0, 1.0, 3.0, 0.0]), min_size=size, max_size=size))
    ).double()
    A = torch.stack([half * factor, half * hair])[None]
    return weight, LowRank(A, torch.ones(1, 1, 2, dtype=torch.float64), 1.0)
