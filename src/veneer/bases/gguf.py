"""GGUF blocks that stay packed in memory: ``GGUFParameter`` of diffusers, in its ``GGUFLinear``.

A row of the weight is divided into blocks of ``block_length`` elements. Each block is stored in
``block_bytes`` bytes: its scales, then the integers of its elements. Q8_0, for example, has
block_length = 32 and block_bytes = 34:

    byte      0  1 | 2 … 33              W[o, 32 b + j] = d[o, b] · q[o, b, j]
    meaning   d    | q₀ … q₃₁            d: float16, q: int8

The parameter holds the bytes [out, in / block_length · block_bytes], and ``quant_type`` is their
GGUF type. Two libraries dequantise the blocks: ``gguf.quants`` (numpy), and diffusers' port of it
to torch. The port is preferred if it supports the type, because it also runs on a GPU. Both compute
in float32, so ``decode`` is exact. Only ``gguf.quants`` quantises.

**Merging** quantises W + ΔW to the same GGUF type. A block keeps its old bytes if these are at
least as close to W + ΔW as the new ones. The k-quants and i-quants (Q4_K, Q6_K, IQ4_NL, …) have no
quantiser in ``gguf``, so a merge refuses them.
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


def _diffusers_gguf_module() -> Any:
    """The Python module of diffusers that defines ``GGUFParameter`` and ``GGUFLinear``; None if it
    has not been imported, because then no model can hold an instance."""
    return sys.modules.get("diffusers.quantizers.gguf.utils")


@register
class Gguf(Storage):
    name = "gguf"

    def holds(self, weight: object) -> bool:
        gguf_module = _diffusers_gguf_module()
        return gguf_module is not None and isinstance(weight, gguf_module.GGUFParameter)

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        return {"blocks": weight.as_tensor().detach()}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        import gguf

        gguf_type, packed = weight.quant_type, stored["blocks"]
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[gguf_type]
        torch_dequantize = _diffusers_gguf_module().dequantize_functions.get(gguf_type)
        if torch_dequantize is None:
            return torch.from_numpy(gguf.quants.dequantize(packed.cpu().numpy(), gguf_type)).to(
                packed.device
            )
        return torch_dequantize(
            packed.reshape(-1, block_bytes), block_length, block_bytes, dtype=torch.float32
        ).view(self.shape(weight))

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        import gguf
        import numpy

        gguf_type, old_stored = weight.quant_type, self.stored_tensors(weight)
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[gguf_type]
        try:
            # numpy would warn of overflows: a value too large for a float16 scale becomes infinite
            with numpy.errstate(all="ignore"):
                quantised = gguf.quants.quantize(values.float().cpu().numpy(), gguf_type)
        except NotImplementedError as error:
            raise MergeError(
                f"a weight of GGUF type {gguf_type.name}, which gguf can read but not write",
                "a type that it writes, such as Q8_0 or Q4_0",
                "keep the adapter unmerged, or merge it into the model from which the file was "
                "quantised",
            ) from error
        new_stored = {"blocks": torch.from_numpy(quantised).to(old_stored["blocks"].device)}
        old_error, new_error = (
            (self.decode(weight, stored) - values).square().view(-1, block_length).sum(1)
            for stored in (old_stored, new_stored)
        )
        blocks = torch.where(
            (old_error <= new_error)[:, None],
            *(stored["blocks"].reshape(-1, block_bytes) for stored in (old_stored, new_stored)),
        )
        return {"blocks": blocks.view(old_stored["blocks"].shape)}

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("gguf") is None or find_spec("diffusers") is None:
            return
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        gguf_types = gguf.GGMLQuantizationType
        for gguf_type in (
            gguf_types.Q8_0,
            gguf_types.Q4_0,
            gguf_types.Q4_1,
            gguf_types.Q5_1,
            gguf_types.BF16,
        ):
            linear: Any = GGUFLinear(64, 32, bias=True, compute_dtype=torch.float32)
            blocks = gguf.quants.quantize(linear.weight.detach().numpy(), gguf_type)
            linear.weight = GGUFParameter(torch.from_numpy(blocks), quant_type=gguf_type)  # pyright: ignore[reportCallIssue]
            yield linear

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size(weight.quant_shape)

    def modules(self) -> tuple[type[nn.Module], ...]:
        gguf_module = _diffusers_gguf_module()
        return (gguf_module.GGUFLinear,) if gguf_module else ()
