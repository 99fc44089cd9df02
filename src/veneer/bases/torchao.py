"""Weights that ``torchao.quantization.quantize_`` has turned into tensor subclasses: integers or
float8 numbers, with one scale for each block.

    W[o, i] = (qdata[o, i] - zero_point[b]) · scale[b]
    b: the block that contains [o, i]: a row, a group of columns of a row, or the whole weight

The module stays an ``nn.Linear``; its ``Parameter`` is a ``torchao`` tensor that holds ``qdata``
(int8 or float8, of the weight's shape) and, for each block, ``scale`` (and ``zero_point``). Every
such tensor that can be decoded can be adapted. Merging writes ``Int8Tensor``,
``IntxUnpackedToInt8Tensor`` (1 to 8 bits) and ``Float8Tensor``. Other layouts belong to the kernels
of one type of GPU, and a merge refuses them.

Weights that also quantise x at run time (``act_quant_kwargs``, ``activation_quantization``) are not
supported: torchao's kernel passes no gradient to x, so the layers below would silently get a wrong
gradient.

**Merging** gives each block its old scale, or a new scale by torchao's own rule, whichever comes
closer to W + ΔW. Elements are then rounded with this scale: to nearest or, with faithful rounding,
to one of the two neighbours that the scale allows. Rejected: new scales for all blocks. They would
change every element: for an int4 block of numbers that are already rounded, for example, torchao's
rule may give a scale that is smaller by a fifteenth.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._base import GridStorage, register
from veneer.errors import MergeError
from veneer.kernels.grid import Grid

WRITABLE_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
#: the tensors that a merge replaces; other tensors, such as the scales of x, stay
REPLACED_TENSORS = ("qdata", "scale", "zero_point")


@register
class Torchao(GridStorage):
    name = "torchao"

    def holds(self, weight: object) -> bool:
        utils = sys.modules.get("torchao.utils")
        if (
            utils is None
            or not isinstance(weight, nn.Parameter)
            or not isinstance(weight, utils.TorchAOBaseTensor)
        ):
            return False
        quantises_x = any(
            getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")
        )
        return (
            hasattr(weight, "dequantize")
            and hasattr(weight, "tensor_data_names")
            and not quantises_x
        )

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        names, _ = weight.__tensor_flatten__()
        replaced = (
            [name for name in names if name in REPLACED_TENSORS]
            if type(weight).__name__ in WRITABLE_CLASSES
            else names
        )
        return {name: getattr(weight, name) for name in replaced}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        names, attributes = weight.__tensor_flatten__()
        tensors = {name: getattr(weight, name) for name in names} | dict(stored)
        if type(weight).__name__ in WRITABLE_CLASSES:
            # so that ``dequantize`` rounds once, to float32
            attributes = {**attributes, "dtype": torch.float32}
        dense = type(weight).__tensor_unflatten__(tensors, attributes, None, None).dequantize()
        # torchao scales the features of x by this, which equals scaling the columns of W
        scale = getattr(weight, "act_pre_scale", None)
        return dense if scale is None else dense * scale.float()

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        type_name = type(weight).__name__
        if type_name not in WRITABLE_CLASSES:
            raise MergeError(
                f"a weight of torchao's type {type_name}, whose layout Veneer cannot write",
                f"one of {', '.join(WRITABLE_CLASSES)}",
                "keep the adapter unmerged, or merge it into the model before quantize_ and "
                "quantise that",
            )
        old = self.stored_tensors(weight)
        unscaled = _divide_by_input_scale(weight, values)
        candidates = [
            _quantise(weight, unscaled, old),
            _quantise(weight, unscaled, _new_scales(weight, unscaled, old)),
        ]
        old_error, new_error = (
            _sums((self.decode(weight, candidate) - values).square(), old["scale"].shape)
            for candidate in candidates
        )
        keeps_old = old_error <= new_error  # for each block
        choices = {
            name: _expand(keeps_old, values.shape) if name == "qdata" else keeps_old for name in old
        }
        return {
            name: torch.where(choices[name], *(candidate[name] for candidate in candidates))
            for name in old
        }

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        qdata, shape = stored["qdata"], weight.shape
        input_scale, zero = getattr(weight, "act_pre_scale", None), stored.get("zero_point")
        scale = _expand(stored["scale"].float(), shape)
        scale = scale if input_scale is None else scale * input_scale.float()
        return Grid(
            _levels(weight).to(qdata.device),
            scale,
            None if zero is None else _expand(zero.float(), shape),
        )

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        return _quantise(weight, _divide_by_input_scale(weight, values), stored)

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32 if type(weight).__name__ in WRITABLE_CLASSES else weight.dtype

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("torchao") is None:
            return
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        int4_by_group = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))
        for dtype in (torch.float32, torch.bfloat16):
            for config in (Int8WeightOnlyConfig(), int4_by_group, Float8WeightOnlyConfig()):
                linear = nn.Linear(64, 32, dtype=dtype)
                quantize_(linear, config)
                yield linear


def _block_shape(shape: torch.Size, blocks: torch.Size) -> list[int]:
    """[b₀, n₀/b₀, b₁, n₁/b₁, …] for n₀, n₁, … elements and b₀, b₁, … blocks on each axis: the shape
    in which every second axis runs within a block."""
    return [size for n, b in zip(shape, blocks, strict=True) for size in (b, n // b)]


def _sums(values: Tensor, blocks: torch.Size) -> Tensor:
    """The sum of each block."""
    within_block = list(range(1, 2 * values.dim(), 2))
    return values.reshape(_block_shape(values.shape, blocks)).sum(within_block)


def _expand(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Expand one value per block to one per element."""
    for axis, (n, b) in enumerate(zip(shape, blocks.shape, strict=True)):
        blocks = blocks.repeat_interleave(n // b, axis)
    return blocks


def _range(weight: Any) -> tuple[int, int]:
    """The lowest and the highest integer that an integer weight can hold."""
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    bits -= bool(getattr(weight, "reduce_range", False))
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _levels(weight: Any) -> Tensor:
    """The values that ``qdata`` can hold, ascending: integers or finite float8 numbers."""
    dtype = weight.qdata.dtype
    if not dtype.is_floating_point:
        low, high = _range(weight)
        return torch.arange(low, high + 1, dtype=torch.float32)
    all_numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    return all_numbers[all_numbers.isfinite()].unique()


def _divide_by_input_scale(weight: Any, values: Tensor) -> Tensor:
    """Dense values divided by the scale of x, if there is one. ``qdata`` and the scales of the
    blocks represent this quotient."""
    scale = getattr(weight, "act_pre_scale", None)
    return values if scale is None else values / scale.double()


def _new_scales(weight: Any, values: Tensor, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New scales (and zero points) for all blocks. Integers stay symmetric, unless a zero point of
    ``old`` shows that they are not. In float8, a block's largest magnitude becomes the largest
    finite number of the dtype."""
    blocks, eps = old["scale"].shape, torch.finfo(torch.float32).eps
    if old["qdata"].dtype.is_floating_point:
        within_block = list(range(1, 2 * values.dim(), 2))
        largest = values.abs().reshape(_block_shape(values.shape, blocks)).amax(within_block)
        scale = (largest / torch.finfo(old["qdata"].dtype).max).clamp_min(eps)
        return {"scale": scale.to(old["scale"].dtype)}
    primitives: Any = sys.modules["torchao.quantization.quant_primitives"]
    zero = old.get("zero_point")
    is_symmetric = zero is None or not zero.any()
    scale, zero_point = primitives.choose_qparams_affine(
        values.float(),
        primitives.MappingType.SYMMETRIC if is_symmetric else primitives.MappingType.ASYMMETRIC,
        weight.block_size,
        torch.int8,
        *_range(weight),
        eps=eps,
        scale_dtype=old["scale"].dtype,
        zero_point_dtype=torch.int8 if zero is None else zero.dtype,
        keepdim=True,
    )
    return {"scale": scale, "zero_point": zero_point}


def _quantise(weight: Any, values: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors for ``values``: ``qdata``, rounded to nearest with these ``scales`` (and zero
    points), and the scales."""
    dtype, zero = weight.qdata.dtype, scales.get("zero_point")
    numbers = values / _expand(scales["scale"], values.shape).double()
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return {**scales, "qdata": numbers.clamp(-largest, largest).float().to(dtype)}
    numbers = numbers.round() if zero is None else numbers.round() + _expand(zero, values.shape)
    return {**scales, "qdata": numbers.clamp(*_range(weight)).to(dtype)}
