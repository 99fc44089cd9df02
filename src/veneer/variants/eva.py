"""EVA: ΔW = alpha / rank · B @ A, where the rows of A start as the r leading right singular vectors
of the layer's inputs x, which are the leading eigenvectors of Σ xᵀx. Paischer et al. 2024,
arXiv:2410.07170.

B starts at zero. A row of A has norm 1, where LoRA's Kaiming initialisation gives about 1 / √3. The
paper may also move ranks from some layers to others; here every layer keeps the rank that the
config gives it. PEFT subtracts the mean of the inputs first; here it is not subtracted.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import copy_float32, principal_triplets
from veneer.variants.lora import LORA


def init(context: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] with orthonormal rows, and B [g, out, r] of zeros. In the first training step,
    only B has a non-zero gradient."""
    _, _, Vh = principal_triplets(context.inputs(), context.rank)
    A = copy_float32(Vh)
    return {"A": A, "B": A.new_zeros(context.groups, context.out, context.rank)}


register(
    LORA,
    name="eva",
    paper="Paischer et al. 2024, arXiv:2410.07170",
    init=init,
    needs=frozenset({"inputs"}),
)
