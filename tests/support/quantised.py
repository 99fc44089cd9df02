"""Linear layers quantised as other libraries do for transformers. They come from the library itself
if it runs on this machine, else from a stand-in with the same module, class, attributes and byte
layout, whose forward dequantises and multiplies.

    libraries("gptq") -> (module, the dequantised W in float64)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.support import compressed
from torch import Tensor, nn

IN, OUT, GROUP = 64, 32, 32
#: by name of a format, the library that must be installed for its own layers
REAL = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq", "w4a16": "compressed_tensors",
    "w8a8": "compressed_tensors",
}  # fmt: skip
#: formats with classes of transformers whose kernels need a GPU; the kernels are replaced
KERNELS = ("fp8", "fp8 per tensor", "fbgemm", "compressed-tensors fp8")
#: formats of compressed-tensors, after the first call of the model; w8a8 rounds each token of x too
COMPRESSED = ("w4a16", "w8a8")
FORMATS = (*REAL, *KERNELS)


def quantize_4_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a weight [out, in] to asymmetric 4-bit integers [out, in], with scales and zeros
    [out, in / group]."""
    blocks = weight.view(len(weight), -1, group)
    minimum, maximum = blocks.amin(2), blocks.amax(2)
    scale = ((maximum - minimum) / 15).half()
    zero = (-minimum / scale).round().clamp(0, 15).int()
    integers = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, 15).int()
    return integers.view_as(weight), scale, zero


def pack_words(integers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack eight 4-bit integers of the last axis into an int32. Integer ``order[i]`` has the bits
    4 i to 4 i + 3."""
    words = torch.zeros(*integers.shape[:-1], integers.shape[-1] // 8, dtype=torch.int64)
    for nibble, source in enumerate(order):
        words |= integers[..., source::8].long() << 4 * nibble
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_words(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    integers = torch.empty(*words.shape, 8, dtype=torch.int64, device=words.device)
    for nibble, source in enumerate(order):
        integers[..., source] = words.long() >> 4 * nibble & 15
    return integers.flatten(-2)


class BaseQuantLinear(nn.Module):
    """The base of gptqmodel's classes: it holds sizes, and buffers instead of parameters."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = IN, OUT, 4, GROUP
        self.register_buffer("bias", torch.randn(OUT).half() if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dequantized_weight().to(x.dtype).mT
        return y if self.bias is None else y + self.bias.to(x.dtype)


class GptqLinear(BaseQuantLinear):
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]."""

    def __init__(self, weight: Tensor, bias: bool) -> None:
        super().__init__(bias)
        integers, scale, zero = quantize_4_bits(weight, GROUP)
        self.register_buffer("qweight", pack_words(integers).mT.contiguous())
        self.register_buffer("qzeros", pack_words(zero.mT))
        self.register_buffer("scales", scale.mT.contiguous())
        self.register_buffer("g_idx", torch.arange(IN) // GROUP)

    def dequantized_weight(self) -> Tensor:
        zeros, integers = (
            unpack_words(self.qzeros)[self.g_idx],
            unpack_words(self.qweight.mT).mT,
        )  # [in, out]
        return ((integers - zeros) * self.scales[self.g_idx]).mT


class AwqLinear(BaseQuantLinear):
    """qweight [in, out / 8], qzeros [groups, out / 8], both in AWQ's order; scales [groups,
    out]."""

    ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def __init__(self, weight: Tensor, bias: bool) -> None:
        super().__init__(bias)
        integers, scale, zero = quantize_4_bits(weight, GROUP)
        self.register_buffer("qweight", pack_words(integers.mT, self.ORDER))
        self.register_buffer("qzeros", pack_words(zero.mT, self.ORDER))
        self.register_buffer("scales", scale.mT.contiguous())

    def dequantized_weight(self) -> Tensor:
        zeros, integers = (
            unpack_words(self.qzeros, self.ORDER),
            unpack_words(self.qweight, self.ORDER),
        )
        groups = torch.arange(IN) // GROUP
        return ((integers - zeros[groups]) * self.scales[groups]).mT


class HQQLinear(nn.Module):
    """W_q holds two integers in each byte; the first half of the groups is in the upper four bits.
    ``meta`` has their scales and zeros, and the bias is no parameter."""

    def __init__(self, weight: Tensor, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype, self.device = (
            IN,
            OUT,
            torch.float32,
            "cpu",
        )
        integers, scale, zero = quantize_4_bits(weight, GROUP)
        upper, lower = integers.view(-1, GROUP).to(torch.uint8).chunk(2)
        self.W_q = nn.Parameter(upper << 4 | lower, requires_grad=False)
        self.meta = {
            "scale": scale.float().view(-1, 1),
            "zero": zero.float().view(-1, 1),
            "shape": weight.shape,
        }
        self.bias = torch.randn(OUT) if bias else None

    def dequantize(self) -> Tensor:
        integers = torch.cat([self.W_q >> 4, self.W_q & 15]).float()
        return ((integers - self.meta["zero"]) * self.meta["scale"]).view(self.meta["shape"])

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dequantize().to(x.dtype).mT
        return y if self.bias is None else y + self.bias.to(x.dtype)


@torch.no_grad()
def _gptqmodel_layer(weight: Tensor, bias: bool, kind: str) -> tuple[nn.Module, Tensor]:
    """(a layer that gptqmodel packs, the weight that gptqmodel dequantises from it)."""
    linear = nn.Linear(IN, OUT, bias=bias)
    linear.weight.data = weight
    _, scale, zero = quantize_4_bits(weight, GROUP)
    settings = {
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "desc_act": False,
        "in_features": IN,
        "out_features": OUT,
    }
    if kind == "awq":
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # pyright: ignore[reportMissingImports]

        layer = AwqTorchLinear(**settings, bias=bias)
        layer.pack(linear, scale, zero)
        layer.post_init()
        return layer, layer._dequantize_weight_for_inference(
            torch.zeros(1, IN), dtype=torch.float16
        ).mT
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]

    layer = TorchLinear(**settings, bias=bias)
    layer.pack_block(linear, scale, zero, torch.arange(IN, dtype=torch.int32) // GROUP)
    layer.post_init()
    return layer, layer.dequantize_weight().mT


@torch.no_grad()
def _hqq_layer(weight: Tensor, bias: bool) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # pyright: ignore[reportMissingImports]

    linear = nn.Linear(IN, OUT, bias=bias)
    linear.weight.data = weight
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def _float8_layer(weight: Tensor, bias: bool, kind: str) -> tuple[nn.Module, Tensor]:
    """(a layer of transformers as its loader leaves it, the weight that it holds)."""
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    from transformers.integrations.finegrained_fp8 import FP8Linear

    blocks = (16, 32) if kind == "fp8" else (OUT, IN) if kind == "fp8 per tensor" else (1, IN)
    grid = weight.view(OUT // blocks[0], blocks[0], IN // blocks[1], blocks[1])
    scale = grid.abs().amax((1, 3)) / 448
    bytes_ = (grid / scale[:, None, :, None]).view(OUT, IN).to(torch.float8_e4m3fn)
    dense = (bytes_.float().view_as(grid) * scale[:, None, :, None]).view(OUT, IN)
    if kind == "fbgemm":
        layer: nn.Module = FbgemmFp8Linear(IN, OUT, bias)
        layer.weight_scale.data = scale
    elif kind == "compressed-tensors fp8":
        layer = CompressedTensorsFP8Linear(IN, OUT, bias)
        layer.weight_scale.data = scale.mT.contiguous()
    else:
        layer = FP8Linear(IN, OUT, blocks if kind == "fp8" else None, has_bias=bias)
        layer.weight_scale_inv.data = scale if kind == "fp8" else scale.view(())
    layer.weight.data = bytes_
    if bias:
        layer.bias.data = torch.randn(OUT)
    return layer, dense


@torch.no_grad()
def _scaled_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias without gradients, as of a kernel; ``scale``: a factor for each row of W."""
    return F.linear(x.float(), weight.float() * scale.float().view(-1, 1), bias).to(x.dtype)


@torch.no_grad()
def _compress_layer(weight: Tensor, bias: bool, kind: str, real: bool) -> nn.Module:
    linear = nn.Linear(IN, OUT, bias=bias)
    linear.weight.data = weight
    if not real:
        module = compressed.quantised(linear, rounds_x=kind == "w8a8")
        compressed.decompress_module(module)
        return module
    from compressed_tensors.compressors.base import (  # pyright: ignore[reportMissingImports]
        compress_module,
        decompress_module,
    )
    from compressed_tensors.quantization import preset_name_to_scheme  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization.lifecycle.initialize import (  # pyright: ignore[reportMissingImports]
        initialize_module_for_quantization,
    )

    scheme = preset_name_to_scheme(kind.upper(), ["Linear"])
    if kind == "w4a16":
        scheme.weights.group_size = GROUP
    initialize_module_for_quantization(linear, scheme)
    groups = weight.view(*linear.weight_scale.shape, -1)
    linear.weight_scale.data = groups.abs().amax(-1) / (7 if kind == "w4a16" else 127)
    compress_module(linear)
    decompress_module(linear)
    return linear


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[nn.Module, Tensor]]:
    """A function ``(kind, bias=True, real=False)`` that returns a layer of a format and its
    dequantised weight in float64. ``real``: use the library instead of a stand-in."""

    def fp8_linear(x, weight, scale, block, bias=None, activation_scale=None, allow_deepgemm=True):
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        return F.linear(x, _dequantize_fp8_weight(weight, scale, block, x.dtype), bias)

    def stand_in(kind: str) -> None:
        if kind in KERNELS:
            import transformers.integrations.compressed_tensors as tensors
            import transformers.integrations.fbgemm_fp8 as fbgemm
            import transformers.integrations.finegrained_fp8 as fine

            monkeypatch.setattr(fine, "fp8_linear", fp8_linear)
            unrounded = lambda x, scale_ub=None: (x, torch.ones(len(x)))  # noqa: E731 (rows that are not rounded)
            monkeypatch.setattr(fbgemm, "quantize_fp8_per_row", unrounded, raising=False)
            monkeypatch.setattr(tensors, "quantize_fp8_per_row", unrounded, raising=False)
            rowwise = lambda x, w, sx, sw, **_: _scaled_product(x, w, sw, None)  # noqa: E731
            monkeypatch.setattr(
                torch.ops, "fbgemm", SimpleNamespace(f8f8bf16_rowwise=rowwise), raising=False
            )

            def product(x, w, scale_a, scale_b, out_dtype, bias):
                return _scaled_product(x, w.mT, scale_b, bias)

            monkeypatch.setattr(tensors, "_scaled_mm_rowwise", product)
            return
        if kind in COMPRESSED:
            compressed.instead_of_the_library(monkeypatch)
            return
        module_name, cls = ("hqq.core.quantize", HQQLinear) if kind == "hqq" else (
            "gptqmodel.nn_modules.qlinear", BaseQuantLinear)  # fmt: skip
        module = ModuleType(module_name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, module_name, module)

    def layer(kind: str, bias: bool = True, real: bool = False) -> tuple[nn.Module, Tensor]:
        weight = torch.randn(OUT, IN) * 0.1
        if not real:
            stand_in(kind)
        if kind in KERNELS:
            module, dense = _float8_layer(weight, bias, kind)
        elif kind == "hqq":
            module = _hqq_layer(weight, bias) if real else HQQLinear(weight, bias)
            dense = module.dequantize()
        elif kind in COMPRESSED:
            module = _compress_layer(weight, bias, kind, real)
            dense = module.weight.detach()
        elif real:
            module, dense = _gptqmodel_layer(weight, bias, kind)
        else:
            module = GptqLinear(weight, bias) if kind == "gptq" else AwqLinear(weight, bias)
            dense = module.dequantized_weight()
        return module, dense.double()

    return layer


def variants_of(kinds: tuple[str, ...] = FORMATS) -> list:
    """pytest's parameters: each format with a stand-in, and with its library if installed."""
    cells = [
        pytest.param(kind, False, id=f"{kind}-stand-in" if kind in REAL else kind) for kind in kinds
    ]
    for kind in kinds:
        if kind in REAL:
            skip_mark = pytest.mark.skipif(
                find_spec(REAL[kind]) is None, reason=f"{REAL[kind]} is not installed"
            )
            cells.append(pytest.param(kind, True, id=f"{kind}-{REAL[kind]}", marks=skip_mark))
    return cells
