"""QA-LoRA: ΔW = alpha / rank · B A P with A [r, in / L], and P [in / L, in], which pools L inputs
that follow one another into one: their mean, times in / L. Xu et al. 2023, arXiv:2309.14717; PEFT's
``use_qalora``.

So ΔW is the same number for all L inputs of a group, and A has fewer. In the paper a group is one
of the quantised weight, whose zero point takes the change in; Veneer merges as it merges every
change. L is 16, as PEFT's default is, or the largest divisor of the inputs below.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, kaiming_uniform, register
from veneer.variants.lora import LORA

#: how many inputs are pooled
GROUP = 16


def init(start: InitContext) -> dict[str, Tensor]:
    """A1 [g, r, in / L], the equation's A, Kaiming, B [g, out, r] zero, and frozen pool [g, L]:
    what each input of a group counts for, 1. B has a gradient at the first step, A1 from the
    second."""
    size = next(size for size in range(min(GROUP, start.in_), 0, -1) if start.in_ % size == 0)
    pooled = start.in_ // size
    A = kaiming_uniform(replace(start, in_=pooled, fan_in=pooled))
    return {
        "A1": A,
        "B": A.new_zeros(start.groups, start.out, start.rank),
        "pool": A.new_ones(start.groups, size),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A, pool = parameters["A1"], parameters["pool"]
    factor = A.shape[-1] / pool.shape[-1]
    A_of_inputs = (A[..., None] * (factor * pool[:, None, None, :])).flatten(2)  # [g, r, in]
    return LowRank(A_of_inputs, parameters["B"], scale), None


register(
    LORA,
    name="qalora",
    paper="Xu et al. 2023, arXiv:2309.14717",
    init=init,
    resolve=resolve,
    frozen=frozenset({"pool"}),
)
