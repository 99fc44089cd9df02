"""A plain floating-point ``nn.Parameter``: float64, float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.bases._base import Storage, register
from veneer.kernels.reference import round_once

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@register
class Plain(Storage):
    name = "plain"

    def holds(self, weight: object) -> bool:
        return isinstance(weight, nn.Parameter) and weight.dtype in DTYPES

    def dense(self, weight: Tensor) -> Tensor:
        return weight

    def encode(self, weight: Tensor, values: Tensor) -> Tensor:
        return round_once(values, weight.dtype)

    def write(self, weight: Tensor, encoded: Tensor) -> None:
        with torch.no_grad():
            weight.copy_(encoded)

    def examples(self) -> Iterator[nn.Parameter]:
        for dtype in DTYPES:
            yield nn.Parameter(torch.randn(3, 4).to(dtype))
