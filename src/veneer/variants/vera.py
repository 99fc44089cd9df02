"""VeRA: ΔW = alpha · diag(b) B diag(d) A. A and B are random and frozen, and shared by all layers
of the same sizes. Only the vectors d and b are trained. Kopiczko et al. 2023, arXiv:2310.11454.

b starts at zero and d at 0.1. The paper has no scale: alpha itself is the factor and defaults to 1.
A [g, r, in] and B [g, out, r] are uniform with the paper's Kaiming bound √(6 / fan_in). Adapter
files do not contain them, so they must be the same on every device, machine and release, which no
seeded generator guarantees. Each element is therefore a hash of its position. ``init`` returns the
same tensors A and B for equal sizes while any layer uses them. (In the paper and in PEFT, all
layers use slices of one pair of the largest sizes, so the values depend on which layers have an
adapter.)
"""

from __future__ import annotations

import math
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA

#: the initial elements of d
D_START = 0.1

#: the A and B in use, by ("A" or "B", *sizes, device). An entry disappears when no layer uses its
#: tensor any more
_SHARED: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def init(context: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] and B [g, out, r], shared by layers of the same sizes; d [g, r] of 0.1; and b
    [g, out] of zeros. In the first training step, only b has a non-zero gradient."""
    d = torch.full((context.groups, context.rank), D_START)
    sizes = (context.groups, context.out, context.in_, context.rank, context.fan_in, d.device)
    A, B = _SHARED.get(("A", *sizes)), _SHARED.get(("B", *sizes))
    if A is None or B is None:
        A = _hash_uniform((context.groups, context.rank, context.in_), context.fan_in, 0, d.device)
        B = _hash_uniform((context.groups, context.out, context.rank), context.rank, 1, d.device)
        _SHARED[("A", *sizes)], _SHARED[("B", *sizes)] = A, B
    return {"A": A, "B": B, "d": d, "b": torch.zeros(context.groups, context.out)}


def _hash_uniform(shape: tuple[int, ...], fan_in: int, stream: int, device: torch.device) -> Tensor:
    """A float32 tensor of this shape with pseudorandom numbers, uniform in ±√(6 / fan_in) and the
    same on every device: each is made from the upper 24 bits of a hash of its position and of
    ``stream`` (0 or 1, for two independent tensors). The hash is Wellons' 32-bit mixer, with
    constants below 2³¹, so that no product overflows an int64."""
    hashes = torch.arange(math.prod(shape), dtype=torch.int64, device=device) * 2 + stream
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        hashes = ((hashes ^ (hashes >> shift)) * multiplier) & 0xFFFFFFFF
    return (
        (((hashes >> 8).to(torch.float32) + 0.5) / 2**23 - 1)
        .mul_(math.sqrt(6 / fan_in))
        .view(shape)
    )


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    B = parameters["b"][:, :, None] * parameters["B"] * parameters["d"][:, None, :]
    return LowRank(parameters["A"].to(B.dtype), B, scale), None


register(
    LORA,
    name="vera",
    paper="Kopiczko et al. 2023, arXiv:2310.11454",
    default_alpha=1,
    scale=lambda alpha, rank: alpha,
    init=init,
    resolve=resolve,
    frozen=frozenset({"A", "B"}),
    derived=frozenset({"A", "B"}),
)
