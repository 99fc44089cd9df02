"""GGUF blocks that stay packed in memory: ``GGUFParameter`` of diffusers, in its ``GGUFLinear``.

A row of the weight is divided into blocks of ``block`` elements. Each block is stored in ``size``
bytes: its scales, then the integers of its elements. Q8_0, for example, has block = 32, size = 34:

    byte      0  1 | 2 … 33              W[o, 32 b + j] = d[o, b] · q[o, b, j]
    meaning   d    | q₀ … q₃₁            d: float16, q: int8

The parameter holds the bytes [out, in / block · size], and ``quant_type`` is their GGUF type. Two
libraries convert these types in both directions: ``gguf.quants`` (numpy), and diffusers' port of it
to torch, which is preferred if it has the type, because it also runs on a GPU. Reading is exact in
float32.

**Merging** quantises W + ΔW with the same type. A block keeps its old bytes if they are closer to
W + ΔW. The k-quants and i-quants (Q4_K, Q6_K, IQ4_NL, …) have no quantiser in ``gguf``, so a merge
refuses them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._base import Storage, register
from veneer.errors import MergeError


def _diffusers() -> Any:
    """The module of diffusers with the GGUF classes, if it has been imported."""
    return sys.modules.get("diffusers.quantizers.gguf.utils")


@register
class Gguf(Storage):
    name = "gguf"

    def holds(self, weight: object) -> bool:
        module = _diffusers()
        return module is not None and isinstance(weight, module.GGUFParameter)

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        return {"blocks": weight.as_tensor().detach()}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        import gguf

        kind, packed = weight.quant_type, stored["blocks"]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        port = _diffusers().dequantize_functions.get(kind)
        if port is None:
            return torch.from_numpy(gguf.quants.dequantize(packed.cpu().numpy(), kind)).to(
                packed.device
            )
        return port(packed.reshape(-1, size), block, size, dtype=torch.float32).view(
            self.shape(weight)
        )

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        import gguf
        import numpy

        kind, old = weight.quant_type, self.stored_tensors(weight)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            # values too large for a float16 scale become infinite
            with numpy.errstate(all="ignore"):
                quantised = gguf.quants.quantize(values.float().cpu().numpy(), kind)
        except NotImplementedError as error:
            raise MergeError(
                f"a weight of GGUF type {kind.name}, which gguf can read but not write",
                "a type that it writes, such as Q8_0 or Q4_0",
                "keep the adapter unmerged, or merge it into the model from which the file was "
                "quantised",
            ) from error
        new = {"blocks": torch.from_numpy(quantised).to(old["blocks"].device)}
        old_error, new_error = (
            (self.decode(weight, stored) - values).square().view(-1, block).sum(1)
            for stored in (old, new)
        )
        blocks = torch.where(
            (old_error <= new_error)[:, None],
            *(stored["blocks"].reshape(-1, size) for stored in (old, new)),
        )
        return {"blocks": blocks.view(old["blocks"].shape)}

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("gguf") is None or find_spec("diffusers") is None:
            return
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        kinds = gguf.GGMLQuantizationType
        for kind in (kinds.Q8_0, kinds.Q4_0, kinds.Q4_1, kinds.Q5_1, kinds.BF16):
            linear: Any = GGUFLinear(64, 32, bias=True, compute_dtype=torch.float32)
            blocks = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
            linear.weight = GGUFParameter(torch.from_numpy(blocks), quant_type=kind)  # pyright: ignore[reportCallIssue]
            yield linear

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size(weight.quant_shape)

    def modules(self) -> tuple[type[nn.Module], ...]:
        module = _diffusers()
        return (module.GGUFLinear,) if module else ()
