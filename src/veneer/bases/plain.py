"""A plain floating-point ``nn.Parameter``: float64, float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._base import BASES, Storage, register
from veneer.distributed import full_tensor
from veneer.kernels.reference import round_once

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@register
class Plain(Storage):
    name = "plain"
    dense_name = "values"

    def holds(self, weight: object) -> bool:
        # Tensor subclasses that torch defines (FSDP2's DTensor, fake tensors) are plain. A subclass
        # of another library may hold packed values although it reports a floating-point dtype, so
        # it is left to the storage of that library.
        if not isinstance(weight, nn.Parameter) or weight.dtype not in DTYPES:
            return False
        if type(weight).__module__.partition(".")[0] != "torch":
            return False
        return not any(storage.holds(weight) for storage in BASES if storage is not self)

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        return {"values": weight}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        # FSDP2 shards a weight as a DTensor and gathers it only during a forward, so gather it here
        values = stored["values"]
        return values if type(values) is nn.Parameter else full_tensor(values)

    def dtype(self, weight: Any) -> torch.dtype:
        return weight.dtype

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        return {"values": round_once(values, weight.dtype)}

    def examples(self) -> Iterator[nn.Module]:
        for dtype in DTYPES:
            yield nn.Linear(4, 3, dtype=dtype)
