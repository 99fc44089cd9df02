"""rsLoRA: ΔW = alpha / √rank · B @ A, so that the size of updates does not depend on the rank.
Kalajdzievski 2023, arXiv:2312.03732. alpha defaults to 8, which gives the same scale as ``lora`` at
the default rank of 16.
"""

from __future__ import annotations

import math

from veneer.variants._base import register
from veneer.variants.lora import LORA

RSLORA = register(
    LORA,
    name="rslora",
    paper="Kalajdzievski 2023, arXiv:2312.03732",
    default_alpha=8,
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
    peft={"use_rslora": True},
)
