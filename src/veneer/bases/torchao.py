"""Weights that ``torchao.quantization.quantize_`` made tensor subclasses: integers or float8 with
one scale per block.

    W[o, i] = (qdata[o, i] - zero_point[b]) · scale[b]
    b: the block of [o, i]: a row, a group of a row, or the whole weight

The module stays an ``nn.Linear``; its ``Parameter`` is a ``torchao`` tensor that holds ``qdata``
(int8 or float8, of the weight's shape) and ``scale`` (and ``zero_point``), one per block. Every
such tensor that can be decoded can be adapted. Merging writes ``Int8Tensor``,
``IntxUnpackedToInt8Tensor`` (1 to 8 bits) and ``Float8Tensor``; other layouts belong to the kernels
of one kind of GPU, and a merge refuses them.

Weights that also quantise x at run time (``act_quant_kwargs``, ``activation_quantization``) are not
supported: torchao's kernel passes no gradient to x, so layers below would silently get a wrong one.

**Merging** gives each block its old scale or a new one by torchao's own rule, whichever comes
closer to
W + ΔW, and rounds with it: new scales everywhere would change all elements of a block, and shrink a
decoded int4 one by a fifteenth. Faithful rounding then chooses among the numbers that these scales
allow.
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

WRITABLE = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
#: the tensors that a merge replaces; others (the scales of x) stay
REPLACED = ("qdata", "scale", "zero_point")


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
            [name for name in names if name in REPLACED]
            if type(weight).__name__ in WRITABLE
            else names
        )
        return {name: getattr(weight, name) for name in replaced}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        names, attributes = weight.__tensor_flatten__()
        tensors = {name: getattr(weight, name) for name in names} | dict(stored)
        if type(weight).__name__ in WRITABLE:
            # the result of dequantize, which is rounded once
            attributes = {
                **attributes,
                "dtype": torch.float32,
            }
        dense = type(weight).__tensor_unflatten__(tensors, attributes, None, None).dequantize()
        # a scale of x, and so of the columns of W
        scale = getattr(weight, "act_pre_scale", None)
        return dense if scale is None else dense * scale.float()

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        kind = type(weight).__name__
        if kind not in WRITABLE:
            problem = f"a weight of torchao's type {kind}, whose layout Veneer cannot write"
            do = (
                "keep the adapter unmerged, or merge it into the model before quantize_ and "
                "quantise that"
            )
            raise MergeError(problem, f"one of {', '.join(WRITABLE)}", do)
        old = self.stored_tensors(weight)
        unscaled = _divide_by_input_scale(weight, values)
        candidates = [
            _quantised(weight, unscaled, old),
            _quantised(weight, unscaled, _parameters(weight, unscaled, old)),
        ]
        old_error, new_error = (
            _sums((self.decode(weight, each) - values).square(), old["scale"].shape)
            for each in candidates
        )
        keep = old_error <= new_error  # one decision per block
        each = {name: _spread(keep, values.shape) if name == "qdata" else keep for name in old}
        return {
            name: torch.where(each[name], *(candidate[name] for candidate in candidates))
            for name in old
        }

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        numbers, shape = stored["qdata"], weight.shape
        columns, zero = getattr(weight, "act_pre_scale", None), stored.get("zero_point")
        scale = _spread(stored["scale"].float(), shape)
        scale = scale if columns is None else scale * columns.float()
        return Grid(
            _levels(weight).to(numbers.device),
            scale,
            None if zero is None else _spread(zero.float(), shape),
        )

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        return _quantised(weight, _divide_by_input_scale(weight, values), stored)

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32 if type(weight).__name__ in WRITABLE else weight.dtype

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
        groups = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))
        for dtype in (torch.float32, torch.bfloat16):
            for config in (Int8WeightOnlyConfig(), groups, Float8WeightOnlyConfig()):
                linear = nn.Linear(64, 32, dtype=dtype)
                quantize_(linear, config)
                yield linear


def _grid(shape: torch.Size, blocks: torch.Size) -> list[int]:
    """[b₀, n₀/b₀, b₁, n₁/b₁, …]: the shape in which every second axis is within a block."""
    return [size for n, b in zip(shape, blocks, strict=True) for size in (b, n // b)]


def _sums(values: Tensor, blocks: torch.Size) -> Tensor:
    return values.reshape(_grid(values.shape, blocks)).sum(list(range(1, 2 * values.dim(), 2)))


def _spread(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Expand one value per block to one per element."""
    for axis, (n, b) in enumerate(zip(shape, blocks.shape, strict=True)):
        blocks = blocks.repeat_interleave(n // b, axis)
    return blocks


def _range(weight: Any) -> tuple[int, int]:
    """The lowest and the highest integer of an integer weight."""
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    bits -= bool(getattr(weight, "reduce_range", False))
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _levels(weight: Any) -> Tensor:
    """The values that ``qdata`` can hold, ascending: integers or finite float8 numbers."""
    dtype = weight.qdata.dtype
    if not dtype.is_floating_point:
        low, high = _range(weight)
        return torch.arange(low, high + 1, dtype=torch.float32)
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    return every[every.isfinite()].unique()


def _divide_by_input_scale(weight: Any, values: Tensor) -> Tensor:
    """Dense values in the form that ``qdata`` and its scales represent: divided by the scale of x,
    if there is one."""
    scale = getattr(weight, "act_pre_scale", None)
    return values if scale is None else values / scale.double()


def _parameters(weight: Any, values: Tensor, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New scales (and zero points) for all blocks. Integers stay symmetric unless an old zero point
    shows that they are not; in float8, a block's largest magnitude becomes the type's largest
    finite number."""
    blocks, eps = old["scale"].shape, torch.finfo(torch.float32).eps
    if old["qdata"].dtype.is_floating_point:
        inside = list(range(1, 2 * values.dim(), 2))
        largest = values.abs().reshape(_grid(values.shape, blocks)).amax(inside)
        return {
            "scale": (
                (largest / torch.finfo(old["qdata"].dtype).max)
                .clamp_min(eps)
                .to(old["scale"].dtype)
            )
        }
    primitives: Any = sys.modules["torchao.quantization.quant_primitives"]
    zero = old.get("zero_point")
    symmetric = zero is None or not zero.any()
    scale, zero_point = primitives.choose_qparams_affine(
        values.float(),
        primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC,
        weight.block_size,
        torch.int8,
        *_range(weight),
        eps=eps,
        scale_dtype=old["scale"].dtype,
        zero_point_dtype=torch.int8 if zero is None else zero.dtype,
        keepdim=True,
    )
    return {"scale": scale, "zero_point": zero_point}


def _quantised(weight: Any, values: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values quantised with these scales (and zero points), together with them."""
    dtype, zero = weight.qdata.dtype, parameters.get("zero_point")
    numbers = values / _spread(parameters["scale"], values.shape).double()
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return {**parameters, "qdata": numbers.clamp(-largest, largest).float().to(dtype)}
    numbers = numbers.round() if zero is None else numbers.round() + _spread(zero, values.shape)
    return {**parameters, "qdata": numbers.clamp(*_range(weight)).to(dtype)}
