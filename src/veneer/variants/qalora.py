"""QA-LoRA: ΔW = alpha / rank · B A P with A [r, in / L]. P [in / L, in] pools each group of L
neighbouring inputs into their mean, times in / L. Xu et al. 2023, arXiv:2309.14717; PEFT's
``use_qalora``.

ΔW thus has equal columns for all L inputs of a group, and A has only in / L columns. In the paper,
a group is a quantisation group of the weight, so that a merge can add ΔW to the zero points of the
groups. Veneer does not do so: it merges ΔW as for any other variant. L is the largest divisor of
``in`` up to 16, which is also PEFT's default.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, kaiming_uniform, register
from veneer.variants.lora import LORA

#: the largest number L of inputs that are pooled into one
MAX_POOLED_INPUTS = 16


def init(context: InitContext) -> dict[str, Tensor]:
    """A1 [g, r, in / L], Kaiming-uniform; B [g, out, r] of zeros; and a frozen ``pool`` [g, L] of
    ones: the factors of the L neighbouring inputs that are pooled into one. ΔW is scale · B A1 P,
    with P made from ``pool``. In the first training step, only B has a non-zero gradient."""
    pooled_inputs = next(
        pooled_inputs
        for pooled_inputs in range(min(MAX_POOLED_INPUTS, context.in_), 0, -1)
        if context.in_ % pooled_inputs == 0
    )
    pooled_width = context.in_ // pooled_inputs
    A = kaiming_uniform(replace(context, in_=pooled_width, fan_in=pooled_width))
    return {
        "A1": A,
        "B": A.new_zeros(context.groups, context.out, context.rank),
        "pool": A.new_ones(context.groups, pooled_inputs),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A, pool = parameters["A1"], parameters["pool"]
    pool_scale = A.shape[-1] / pool.shape[-1]
    A_of_inputs = (A[..., None] * (pool_scale * pool[:, None, None, :])).flatten(2)  # [g, r, in]
    return LowRank(A_of_inputs, parameters["B"], scale), None


register(
    LORA,
    name="qalora",
    paper="Xu et al. 2023, arXiv:2309.14717",
    init=init,
    resolve=resolve,
    frozen=frozenset({"pool"}),
)
