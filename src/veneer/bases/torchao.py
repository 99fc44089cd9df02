"""Weights that ``torchao.quantization.quantize_`` has turned into tensor subclasses: integers or
float8 numbers, with one scale for each block.

    W[o, i] = (qdata[o, i] - zero_point[b]) · scale[b]
    b: the block that contains [o, i]: a row, a group of columns of a row, or the whole weight

The module stays an ``nn.Linear``; its ``Parameter`` is a ``torchao`` tensor that holds ``qdata``
(int8 or float8, of the weight's shape) and, for each block, ``scale`` (and ``zero_point``). An
adapter can be attached to every torchao tensor that has ``dequantize``. A merge can write
``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` (1 to 8 bits) and ``Float8Tensor``. All other classes
have layouts for the kernels of one type of GPU, so a merge into them is refused.

Weights that also quantise x at run time (``act_quant_kwargs``, ``activation_quantization``) are not
supported: torchao's kernel passes no gradient to x, so the layers below would silently get a wrong
gradient.

**Merging** chooses the scale of each block: the old scale, or the scale that torchao would compute
for W + ΔW, whichever gives the smaller rounding error. Each element is then rounded with the chosen
scale: to the nearest representable number or, with faithful rounding, to one of the two
representable numbers around it. Rejected: new scales for all blocks, because a new scale changes
every element of a block, even where ΔW = 0. For an int4 block that is already quantised, for
example, torchao's rule may give a scale that is smaller by a fifteenth.
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
#: the inner tensors of a ``WRITABLE_CLASSES`` weight that a merge replaces; it keeps all others,
#: such as the scales of the layer's input
REPLACED_TENSORS = ("qdata", "scale", "zero_point")


@register
class Torchao(GridStorage):
    name = "torchao"

    def holds(self, weight: object) -> bool:
        torchao_utils = sys.modules.get("torchao.utils")
        if (
            torchao_utils is None
            or not isinstance(weight, nn.Parameter)
            or not isinstance(weight, torchao_utils.TorchAOBaseTensor)
        ):
            return False
        quantises_x = any(
            getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")
        )
        return (
            # torchao's int4 types define none, and torch's of any tensor is for its own types
            type(weight).dequantize is not Tensor.dequantize
            and hasattr(weight, "tensor_data_names")
            and not quantises_x
        )

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        tensor_names, _ = weight.__tensor_flatten__()
        replaced_names = (
            [name for name in tensor_names if name in REPLACED_TENSORS]
            if type(weight).__name__ in WRITABLE_CLASSES
            else tensor_names
        )
        return {name: getattr(weight, name) for name in replaced_names}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        tensor_names, attributes = weight.__tensor_flatten__()
        tensors = {name: getattr(weight, name) for name in tensor_names} | dict(stored)
        if type(weight).__name__ in WRITABLE_CLASSES:
            # so that ``dequantize`` computes in float32, and does not round to the weight's dtype
            attributes = {**attributes, "dtype": torch.float32}
        dense = type(weight).__tensor_unflatten__(tensors, attributes, None, None).dequantize()
        # torchao multiplies the features of the layer's input x by ``act_pre_scale``, which equals
        # multiplying the columns of W
        input_scale = getattr(weight, "act_pre_scale", None)
        return dense if input_scale is None else dense * input_scale.float()

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        type_name = type(weight).__name__
        if type_name not in WRITABLE_CLASSES:
            raise MergeError(
                f"a weight of torchao's type {type_name}, whose layout Veneer cannot write",
                f"one of {', '.join(WRITABLE_CLASSES)}",
                "keep the adapter unmerged, or merge it into the model before quantize_ and "
                "quantise that",
            )
        old_stored = self.stored_tensors(weight)
        unscaled_values = _divide_by_input_scale(weight, values)
        candidates = [
            _quantise(weight, unscaled_values, old_stored),
            _quantise(weight, unscaled_values, _fit_scales(weight, unscaled_values, old_stored)),
        ]
        old_error, new_error = (
            _block_sums(
                (self.decode(weight, candidate) - values).square(), old_stored["scale"].shape
            )
            for candidate in candidates
        )
        keeps_old_scale = old_error <= new_error  # for each block
        keeps_old = {
            name: _expand_to_elements(keeps_old_scale, values.shape)
            if name == "qdata"
            else keeps_old_scale
            for name in old_stored
        }
        return {
            name: torch.where(keeps_old[name], *(candidate[name] for candidate in candidates))
            for name in old_stored
        }

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        qdata, shape = stored["qdata"], weight.shape
        input_scale, zero_point = getattr(weight, "act_pre_scale", None), stored.get("zero_point")
        scale = _expand_to_elements(stored["scale"].float(), shape)
        scale = scale if input_scale is None else scale * input_scale.float()
        return Grid(
            _representable_values(weight).to(qdata.device),
            scale,
            None if zero_point is None else _expand_to_elements(zero_point.float(), shape),
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


def _block_shape(element_shape: torch.Size, block_counts: torch.Size) -> list[int]:
    """The shape [b₀, n₀/b₀, b₁, n₁/b₁, …] for n₀, n₁, … elements and b₀, b₁, … blocks along each
    axis. In a tensor of this shape, every second axis runs over the elements of one block, so that
    reducing these axes gives one value per block."""
    return [size for n, b in zip(element_shape, block_counts, strict=True) for size in (b, n // b)]


def _block_sums(element_values: Tensor, block_counts: torch.Size) -> Tensor:
    """The sum of the elements of each block, in the shape ``block_counts`` (the number of blocks
    along each axis)."""
    axes_within_block = list(range(1, 2 * element_values.dim(), 2))
    return element_values.reshape(_block_shape(element_values.shape, block_counts)).sum(
        axes_within_block
    )


def _expand_to_elements(block_values: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the value of each block for all elements of the block. ``block_values`` has as many
    entries along each axis as there are blocks; the result has the given ``shape``."""
    for axis, (n, b) in enumerate(zip(shape, block_values.shape, strict=True)):
        block_values = block_values.repeat_interleave(n // b, axis)
    return block_values


def _integer_range(weight: Any) -> tuple[int, int]:
    """The lowest and the highest integer that ``qdata`` of a weight with 1 to 8 bits can hold."""
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    bits -= bool(getattr(weight, "reduce_range", False))
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _representable_values(weight: Any) -> Tensor:
    """The values that ``qdata`` can hold, ascending, float32 [levels]: integers, or all finite
    float8 numbers."""
    dtype = weight.qdata.dtype
    if not dtype.is_floating_point:
        low, high = _integer_range(weight)
        return torch.arange(low, high + 1, dtype=torch.float32)
    all_numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    return all_numbers[all_numbers.isfinite()].unique()


def _divide_by_input_scale(weight: Any, dense_values: Tensor) -> Tensor:
    """``dense_values`` [out, in], divided by torchao's scale of each input feature if the weight
    has one. ``qdata`` and the block scales represent this quotient, and ``decode`` multiplies it by
    the input scale again."""
    input_scale = getattr(weight, "act_pre_scale", None)
    return dense_values if input_scale is None else dense_values / input_scale.double()


def _fit_scales(
    weight: Any, dense_values: Tensor, old_stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scales (and zero points) that torchao would choose for ``dense_values``, for all blocks.
    Integer weights are quantised symmetrically (zero point 0), unless a zero point in
    ``old_stored`` is not 0. In float8, the scale maps a block's largest magnitude to the largest
    finite number."""
    block_counts, eps = old_stored["scale"].shape, torch.finfo(torch.float32).eps
    if old_stored["qdata"].dtype.is_floating_point:
        axes_within_block = list(range(1, 2 * dense_values.dim(), 2))
        largest_magnitudes = (
            dense_values.abs()
            .reshape(_block_shape(dense_values.shape, block_counts))
            .amax(axes_within_block)
        )
        scale = (largest_magnitudes / torch.finfo(old_stored["qdata"].dtype).max).clamp_min(eps)
        return {"scale": scale.to(old_stored["scale"].dtype)}
    primitives: Any = sys.modules["torchao.quantization.quant_primitives"]
    old_zero_point = old_stored.get("zero_point")
    is_symmetric = old_zero_point is None or not old_zero_point.any()
    scale, zero_point = primitives.choose_qparams_affine(
        dense_values.float(),
        primitives.MappingType.SYMMETRIC if is_symmetric else primitives.MappingType.ASYMMETRIC,
        weight.block_size,
        torch.int8,
        *_integer_range(weight),
        eps=eps,
        scale_dtype=old_stored["scale"].dtype,
        zero_point_dtype=torch.int8 if old_zero_point is None else old_zero_point.dtype,
        keepdim=True,
    )
    return {"scale": scale, "zero_point": zero_point}


def _quantise(weight: Any, dense_values: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors for ``dense_values``: ``qdata``, rounded to the nearest representable
    number, and all entries of ``scales``, which holds "scale" and perhaps "zero_point" for each
    block."""
    dtype, zero_point = weight.qdata.dtype, scales.get("zero_point")
    scaled_values = dense_values / _expand_to_elements(scales["scale"], dense_values.shape).double()
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return {**scales, "qdata": scaled_values.clamp(-largest, largest).float().to(dtype)}
    scaled_values = (
        scaled_values.round()
        if zero_point is None
        else scaled_values.round() + _expand_to_elements(zero_point, dense_values.shape)
    )
    return {**scales, "qdata": scaled_values.clamp(*_integer_range(weight)).to(dtype)}
