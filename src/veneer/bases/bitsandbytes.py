"""Weights that bitsandbytes stores in 8 or 4 bits: ``Int8Params`` (LLM.int8()) and ``Params4bit``
(QLoRA's nf4 and fp4).

**8 bits.** Each row has one scale, the largest magnitude in the row:

    W[o, i] = values[o, i] · scale[o] / 127      values: int8 [out, in]    scale: float32 [out]

The first call of a ``Linear8bitLt`` moves the scale from the parameter (``weight.SCB``) to the
module (``module.state.SCB``), so that the parameter alone no longer holds the weight. ``prepare``
keeps the scale in both.

**4 bits.** The weight is flattened by rows and divided into blocks of 64 elements. A block has one
scale, its largest magnitude, and its elements are indices into a table of 16 levels. A byte holds
two of these indices, the first in its upper half:

    W[64 b + j] = level[index[b, j]] · absmax[b]
    packed: bytes [out · in / 2]    absmax: float32 [blocks]

With ``compress_statistics`` the scales are themselves stored in 8 bits, in blocks of 256, around
their mean:

    absmax[256 c + k] = nested_code[byte[c, k]] · nested_absmax[c] + offset

``quant_storage`` is only the dtype as which the bytes are viewed; ``stored_tensors`` always returns
bytes.

On a CPU with AVX512-BF16, a call of ``Linear4bit`` in evaluation mode repacks the weight in place.
This permanently rounds the scales to bfloat16 and drops the nested scales, and later calls pass no
gradient to x (bitsandbytes 0.50). ``prepare`` undoes the repacking and prevents the module from
repeating it. The fingerprint of a weight uses the rounded scales (``after_first_call``), so that it
is the same for a new base and for a base that has run.

**Merging** gives each row or block its old scale or its new largest magnitude, whichever comes
closer to W + ΔW. With the old scale, the integers of elements that do not change stay the same.
With these scales, each element is rounded to nearest or, with faithful rounding, to one of its two
neighbours (``kernels/error_feedback.py``).

Dettmers et al. 2022, "LLM.int8()"; Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.bases._base import GridStorage, register
from veneer.errors import TargetError
from veneer.kernels.grid import Grid

#: how many scales of blocks share one nested scale
SCALES_PER_NESTED_BLOCK = 256


def _classes(*names: str) -> tuple[type, ...]:
    """The classes of bitsandbytes with these names; none if it has not been imported, because then
    no model can hold an instance."""
    module = sys.modules.get("bitsandbytes.nn.modules")
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


@register
class Bitsandbytes8bit(GridStorage):
    name = "bitsandbytes_8bit"

    def holds(self, weight: object) -> bool:
        # This tests attributes, not the class, because unpickling gives a plain Parameter with
        # these attributes. False for a weight that is not yet quantised, and for a weight with
        # has_fp16_weights=True, of which the module caches a quantised copy.
        return (
            isinstance(weight, nn.Parameter)
            and weight.dtype == torch.int8
            and hasattr(weight, "SCB")
        )

    def prepare(self, module: Any) -> None:
        """Move the scale to the module as the first call would, and keep it in the weight too. The
        next ``write`` undoes this."""
        weight, state = module.weight, getattr(module, "state", None)
        if state is not None and weight.CB is not None:
            module.init_8bit_state()
        if state is not None and state.CB is not None:
            weight.data, weight.SCB = state.CB, state.SCB

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        if weight.SCB is None:
            raise TargetError(
                "an 8-bit weight of bitsandbytes without its scale, which the first call moves "
                "into its module",
                "weight.SCB",
                "call BASES['bitsandbytes_8bit'].prepare(module) first",
            )
        return {"values": weight.data, "scale": weight.SCB}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["values"].float() * (stored["scale"] * (1 / 127))[:, None]

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        def squared_error(scale: Tensor) -> Tensor:
            encoded = self.onto(weight, {"scale": scale}, values)
            return (self.decode(weight, encoded) - values).square().sum(1)

        old, new = self.stored_tensors(weight)["scale"], values.abs().amax(1).float()
        scale = torch.where(squared_error(old) <= squared_error(new), old, new)
        return self.onto(weight, {"scale": scale}, values)

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        scale = (stored["scale"] * (1 / 127))[:, None].expand_as(weight)
        return Grid(torch.arange(-127.0, 128, device=scale.device), scale)

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        integers = values * _inverse(stored["scale"])[:, None] * 127
        qdata = integers.round().clamp(-127, 127).to(torch.int8)
        return {"values": qdata, "scale": stored["scale"]}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            weight.data.copy_(stored["values"])
        # Now the weight is as before the module's first call. In its next call, the module takes
        # both tensors from the weight, in place of those that it holds.
        weight.CB, weight.SCB = weight.data, stored["scale"].detach().clone()

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("bitsandbytes") is None:
            return
        from bitsandbytes.nn.modules import Linear8bitLt

        for dtype in (torch.float32, torch.bfloat16):
            yield Linear8bitLt(64, 32, has_fp16_weights=False).to(dtype).to("cpu")
        called = Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        called(torch.ones(1, 64))
        self.prepare(called)
        yield called

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32

    def modules(self) -> tuple[type[nn.Module], ...]:
        return _classes("Linear8bitLt", "Embedding8bit")


@register
class Bitsandbytes4bit(GridStorage):
    name = "bitsandbytes_4bit"

    def holds(self, weight: object) -> bool:
        return isinstance(weight, nn.Parameter) and getattr(weight, "quant_state", None) is not None

    def prepare(self, module: Any) -> None:
        """Convert the weight to the layout that all devices share, and prevent its module from
        repacking it (see the module's docstring)."""
        weight = module.weight
        if _is_repacked(weight.quant_state):
            self.write(weight, self.stored_tensors(weight))
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__.setdefault("_veneer_repacks", module.support_avx512bf16_for_cpu)
            module.support_avx512bf16_for_cpu = False

    def release(self, module: Any) -> None:
        """Let the module repack its weight again, if it did before ``prepare``."""
        if "_veneer_repacks" in module.__dict__:
            module.support_avx512bf16_for_cpu = module.__dict__.pop("_veneer_repacks")

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        state = weight.quant_state
        if _is_repacked(state):
            return {
                "packed": _bytes(_undo_repacking(weight)),
                "absmax": state.absmax.mT.float().flatten(),
            }
        tensors = {"packed": _bytes(weight.data), "absmax": state.absmax}
        if state.nested:
            tensors |= {
                "offset": state.offset,
                "nested_absmax": state.state2.absmax,
                "nested_code": state.state2.code,
            }
        return tensors

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors with the scales as the AVX512-BF16 layout has them, rounded to
        bfloat16 and not nested. The result is the same on every device."""
        return {"packed": stored["packed"], "absmax": _scales(stored).bfloat16().float()}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        state, packed = weight.quant_state, stored["packed"].view(-1, 1)
        return torch.ops.bitsandbytes.dequantize_4bit(
            packed, _scales(stored), state.blocksize, state.quant_type, state.shape, torch.float32
        )

    def library_misreads(self, weight: Any) -> bool:
        state = weight.quant_state
        if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            return False
        stored = self.stored_tensors(weight)
        indices = torch.stack([stored["packed"] >> 4, stored["packed"] & 15], 1).flatten()[
            : state.shape.numel()
        ]
        expected = state.code[indices.int()].view(state.shape) * self.grid(weight, stored).scale
        return not torch.allclose(self.decode(weight, stored), expected, rtol=1e-5)

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        state, stored = weight.quant_state, self.stored_tensors(weight)
        rows, columns = state.shape if len(state.shape) == 2 else (1, 0)
        block_rows = -(-rows // count)
        # the rows must consist of complete quantisation blocks
        while block_rows < rows and block_rows * columns % state.blocksize:
            block_rows += 1
        if not columns or block_rows >= rows:
            yield self.dense(weight)
            return
        packed, scales = stored["packed"].view(-1, 1), _scales(stored)
        for first in range(0, rows, block_rows):
            row_count = min(block_rows, rows - first)
            start, end = first * columns, (first + row_count) * columns
            blocks = slice(start // state.blocksize, -(-end // state.blocksize))
            yield torch.ops.bitsandbytes.dequantize_4bit(
                packed[start // 2 : -(-end // 2)],
                scales[blocks],
                state.blocksize,
                state.quant_type,
                (row_count, columns),
                torch.float32,
            )

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        state, encoded = weight.quant_state, self.stored_tensors(weight)
        old_scales, block_size = _scales(encoded), state.blocksize
        blocks = _blocks(values, block_size)  # [blocks, 64]
        old_blocks = _blocks(self.decode(weight, encoded), block_size)
        is_same = (blocks == old_blocks).all(1)  # [blocks]

        def level_indices(scales: Tensor) -> Tensor:
            return _nearest_level(blocks * _inverse(scales)[:, None], state.code)

        def squared_error(scales: Tensor) -> Tensor:
            levels = state.code[level_indices(scales).int()]
            return (levels * scales[:, None] - blocks).square().sum(1)

        largest = blocks.abs().amax(1).float()
        keeps_old = is_same | (squared_error(old_scales) <= squared_error(largest))
        scales = torch.where(keeps_old, old_scales, largest)
        if "nested_code" in encoded:
            encoded |= _nest(scales, scales == old_scales, encoded)
            scales = _scales(encoded)
        else:
            encoded["absmax"] = scales
        packed = _pack(level_indices(scales))
        old_packed = _blocks(encoded["packed"], block_size // 2)
        keeps_bytes = is_same & (scales == old_scales)
        packed = torch.where(keeps_bytes[:, None], old_packed, packed)
        encoded["packed"] = packed.flatten()[: encoded["packed"].numel()]
        return {name: encoded[name] for name in self.stored_tensors(weight)}

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        state = weight.quant_state
        scale = _scales(stored).repeat_interleave(state.blocksize)[: state.shape.numel()]
        return Grid(state.code.float().unique(), scale.view(state.shape))

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        state, old = weight.quant_state, stored["packed"]
        indices = _nearest_level(
            _blocks(values, state.blocksize) * _inverse(_scales(stored))[:, None], state.code
        )
        old_indices = torch.stack([old >> 4, old & 15], 1).view(-1)
        indices = indices.view(-1)[: len(old_indices)]
        # a level that occurs twice in the table keeps its index
        is_same_level = state.code[indices.int()] == state.code[old_indices.int()]
        packed = _pack(torch.where(is_same_level, old_indices, indices).view(-1, 2)).flatten()
        return {**stored, "packed": packed}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        state = weight.quant_state
        with torch.no_grad():
            if _is_repacked(state):
                weight.data = _undo_repacking(weight)
                state.dtype, state.packing_format_for_cpu = state.original_dtype, False
            _bytes(weight.data).copy_(stored["packed"])
            state.absmax, state.nested = stored["absmax"].detach().clone(), "nested_code" in stored
            if state.nested:
                state.offset = stored["offset"].detach().clone()
                scales = {"absmax": stored["nested_absmax"], "code": stored["nested_code"]}
                scales = {name: values.detach().clone() for name, values in scales.items()}
                state.state2 = type(state)(
                    **scales, blocksize=SCALES_PER_NESTED_BLOCK, dtype=torch.float32
                )
            else:
                state.offset = state.state2 = None

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("bitsandbytes") is None:
            return
        from bitsandbytes.nn.modules import Linear4bit

        for quant_type in ("nf4", "fp4"):
            for nested in (False, True):
                linear = Linear4bit(64, 32, compress_statistics=nested, quant_type=quant_type)
                yield linear.to("cpu")
        for quant_storage in (torch.bfloat16, torch.float32):
            yield (
                Linear4bit(64, 32, quant_type="nf4", quant_storage=quant_storage)
                .to(torch.bfloat16)
                .to("cpu")
            )

    def dtype(self, weight: Any) -> torch.dtype:
        return torch.float32

    def shape(self, weight: Any) -> torch.Size:
        return torch.Size(weight.quant_state.shape)

    def modules(self) -> tuple[type[nn.Module], ...]:
        return _classes(
            "Linear4bit", "LinearNF4", "LinearFP4", "Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"
        )


def _is_repacked(state: Any) -> bool:
    """Whether a call has put this weight into the layout of the AVX512-BF16 kernel."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _undo_repacking(weight: Any) -> Tensor:
    """The packed bytes of a repacked weight, in the layout that all devices share. They differ from
    the repacked bytes only in their order."""
    state = copy.copy(weight.quant_state)
    state.original_nested = False  # keeps the inverse from quantising scales, which are not needed
    inverse = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    return inverse(weight.data, state)[0]


def _bytes(data: Tensor) -> Tensor:
    """The flat bytes of a tensor."""
    return data.detach().view(torch.uint8).view(-1)


def _blocks(values: Tensor, width: int) -> Tensor:
    """The flattened values in rows of ``width``, the last row filled with zeros."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width)


def _pack(indices: Tensor) -> Tensor:
    """Pack two indices into a byte, [n, width] to [n, width / 2]."""
    return indices[:, ::2] << 4 | indices[:, 1::2]


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float64, and 0 for a scale of 0."""
    return torch.where(scale == 0, 0.0, 1 / scale.double())


def _scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The float32 scales of the blocks, [blocks]."""
    if "nested_code" not in stored:
        return stored["absmax"]
    arguments = (
        stored["absmax"],
        stored["nested_absmax"],
        stored["nested_code"],
        SCALES_PER_NESTED_BLOCK,
        torch.float32,
    )
    return torch.ops.bitsandbytes.dequantize_blockwise(*arguments) + stored["offset"]


def _nest(scales: Tensor, is_same: Tensor, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store scales in 8 bits, around the offset of ``old``. If all scales of a nested block are the
    same as before (``is_same``), it keeps its bytes and its nested scale."""
    centred = scales.double() - old["offset"].double()
    blocks = _blocks(centred, SCALES_PER_NESTED_BLOCK)  # [c, 256]
    is_unchanged = (_blocks((~is_same).byte(), SCALES_PER_NESTED_BLOCK) == 0).all(1)  # [c]
    absmax = torch.where(is_unchanged, old["nested_absmax"], blocks.abs().amax(1).float())
    indices = _nearest_level(blocks * _inverse(absmax)[:, None], old["nested_code"])
    indices = torch.where(
        is_unchanged[:, None], _blocks(old["absmax"], SCALES_PER_NESTED_BLOCK), indices
    )
    return {"absmax": indices.flatten()[: scales.numel()], "nested_absmax": absmax}


def _nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """For each value, the index of the nearest level, as uint8. If the nearest level occurs twice
    in ``levels``, the result is its first index."""
    ordered, order = levels.double().sort(stable=True)
    first_occurrence = torch.searchsorted(ordered, ordered)
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    return order[first_occurrence].to(torch.uint8)[torch.bucketize(values, midpoints)]
