"""DoRA with the scale of rsLoRA: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖ for each output row, with ΔW =
alpha / √rank · B @ A. In PEFT: ``use_dora`` and ``use_rslora`` together. Liu et al. 2024,
arXiv:2402.09353; Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

from veneer.variants._base import register
from veneer.variants.dora import DORA
from veneer.variants.rslora import RSLORA

register(
    DORA,
    name="dora_rslora",
    paper="Liu et al. 2024, arXiv:2402.09353; Kalajdzievski 2023, arXiv:2312.03732",
    default_alpha=RSLORA.default_alpha,
    scale=RSLORA.scale,
    peft={**(DORA.peft or {}), **(RSLORA.peft or {})},
)
