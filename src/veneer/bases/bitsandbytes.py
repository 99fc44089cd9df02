"""Weights that bitsandbytes stores in 8 or 4 bits: ``Int8Params`` (LLM.int8()) and ``Params4bit``
(QLoRA's nf4 and fp4).

**8 bits.** Each row has one scale, the largest magnitude in the row:

    W[o, i] = values[o, i] · scale[o] / 127      values: int8 [out, in]    scale: float32 [out]

The first call of a ``Linear8bitLt`` moves the scale from the parameter (``weight.SCB``) to the
module (``module.state.SCB``), so that the parameter alone no longer holds the weight. ``prepare``
therefore stores the scale in both.

**4 bits.** The weight is flattened by rows and divided into blocks of 64 elements. A block has one
scale, its largest magnitude, and its elements are indices into a table of 16 levels. A byte holds
two of these indices, the first in its upper half:

    W[64 b + j] = level[index[b, j]] · absmax[b]
    packed: bytes [out · in / 2]    absmax: float32 [blocks]

With ``compress_statistics`` the scales are themselves stored in 8 bits, in blocks of 256, around
their mean (``offset``). Byte k of nested block c is an index into the table ``nested_code``:

    absmax[256 c + k] = nested_code[byte[c, k]] · nested_absmax[c] + offset

``quant_storage`` is only the dtype as which the bytes are viewed; ``stored_tensors`` always returns
bytes.

On a CPU with AVX512-BF16, a call of ``Linear4bit`` in evaluation mode repacks the weight in place.
This permanently rounds the scales to bfloat16 and drops the nested scales, and later calls pass no
gradient to x (bitsandbytes 0.50). ``prepare`` undoes the repacking and prevents the module from
repeating it. The fingerprint of a weight uses the rounded scales (``after_first_call``), so that it
is the same for a new base and for a base that has run.

**Merging** chooses the scale of each row or block: the old scale, or the largest magnitude of
W + ΔW in it, whichever gives the smaller rounding error. The old scale has the advantage that
elements with ΔW = 0 keep their stored integers. Each element is then rounded with the chosen scale:
to the nearest representable number or, with faithful rounding, to one of the two representable
numbers around it (``kernels/error_feedback.py``).

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

#: how many block scales share one nested scale, if the block scales are stored in 8 bits
SCALES_PER_NESTED_BLOCK = 256


def _imported_classes(*names: str) -> tuple[type, ...]:
    """The bitsandbytes layer classes with these names that exist in the installed version. Returns
    none if bitsandbytes has not been imported, because then no model can hold an instance."""
    library_module = sys.modules.get("bitsandbytes.nn.modules")
    return tuple(getattr(library_module, name) for name in names if hasattr(library_module, name))


@register
class Bitsandbytes8bit(GridStorage):
    name = "bitsandbytes_8bit"

    def holds(self, weight: object) -> bool:
        # This tests attributes, not the class, because unpickling an Int8Params gives a plain
        # Parameter with these attributes. The result is False for a weight that is not quantised
        # yet, and for one with has_fp16_weights=True, which stays a floating-point Parameter.
        return (
            isinstance(weight, nn.Parameter)
            and weight.dtype == torch.int8
            and hasattr(weight, "SCB")
        )

    def prepare(self, module: Any) -> None:
        """Move the int8 values and the scale to ``module.state`` as the module's first call would,
        and keep both in the weight too, so that the weight alone can be decoded. The next ``write``
        puts the weight back into its state before the first call."""
        weight, matmul_state = module.weight, getattr(module, "state", None)
        if matmul_state is not None and weight.CB is not None:
            module.init_8bit_state()
        if matmul_state is not None and matmul_state.CB is not None:
            weight.data, weight.SCB = matmul_state.CB, matmul_state.SCB

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

        old_scale, new_scale = self.stored_tensors(weight)["scale"], values.abs().amax(1).float()
        scale = torch.where(
            squared_error(old_scale) <= squared_error(new_scale), old_scale, new_scale
        )
        return self.onto(weight, {"scale": scale}, values)

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        scale = (stored["scale"] * (1 / 127))[:, None].expand_as(weight)
        return Grid(torch.arange(-127.0, 128, device=scale.device), scale)

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        integers = values * _reciprocal_or_zero(stored["scale"])[:, None] * 127
        qdata = integers.round().clamp(-127, 127).to(torch.int8)
        return {"values": qdata, "scale": stored["scale"]}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            weight.data.copy_(stored["values"])
        # Setting CB and SCB puts the weight into its state before the module's first call. The
        # module's next call therefore takes the new values and scale from the weight, and drops the
        # old ones that it holds in ``module.state``.
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
        return _imported_classes("Linear8bitLt", "Embedding8bit")


@register
class Bitsandbytes4bit(GridStorage):
    name = "bitsandbytes_4bit"

    def holds(self, weight: object) -> bool:
        return isinstance(weight, nn.Parameter) and getattr(weight, "quant_state", None) is not None

    def prepare(self, module: Any) -> None:
        """Undo the AVX512-BF16 repacking of the weight, if a call has done it, and prevent the
        module from repacking it again, because repacking rounds the scales permanently."""
        weight = module.weight
        if _is_repacked(weight.quant_state):
            self.write(weight, self.stored_tensors(weight))
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__.setdefault("_veneer_repacks", module.support_avx512bf16_for_cpu)
            module.support_avx512bf16_for_cpu = False

    def release(self, module: Any) -> None:
        """Restore the flag by which the module decides whether to repack its weight for
        AVX512-BF16, as it was before ``prepare``."""
        if "_veneer_repacks" in module.__dict__:
            module.support_avx512bf16_for_cpu = module.__dict__.pop("_veneer_repacks")

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        quant_state = weight.quant_state
        if _is_repacked(quant_state):
            return {
                "packed": _byte_view(_undo_repacking(weight)),
                "absmax": quant_state.absmax.mT.float().flatten(),
            }
        tensors = {"packed": _byte_view(weight.data), "absmax": quant_state.absmax}
        if quant_state.nested:
            tensors |= {
                "offset": quant_state.offset,
                "nested_absmax": quant_state.state2.absmax,
                "nested_code": quant_state.state2.code,
            }
        return tensors

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors as a call on a CPU with AVX512-BF16 would leave them: the scales are
        rounded to bfloat16 and not nested. Computed in this way on every device, so that the
        fingerprint of a weight does not depend on the device."""
        return {"packed": stored["packed"], "absmax": _scales(stored).bfloat16().float()}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        quant_state, packed = weight.quant_state, stored["packed"].view(-1, 1)
        return torch.ops.bitsandbytes.dequantize_4bit(
            packed,
            _scales(stored),
            quant_state.blocksize,
            quant_state.quant_type,
            quant_state.shape,
            torch.float32,
        )

    def library_misreads(self, weight: Any) -> bool:
        quant_state = weight.quant_state
        if weight.device.type != "cpu" or quant_state.shape[-1] % quant_state.blocksize == 0:
            return False
        stored = self.stored_tensors(weight)
        indices = torch.stack([stored["packed"] >> 4, stored["packed"] & 15], 1).flatten()[
            : quant_state.shape.numel()
        ]
        expected = (
            quant_state.code[indices.int()].view(quant_state.shape)
            * self.grid(weight, stored).scale
        )
        return not torch.allclose(self.decode(weight, stored), expected, rtol=1e-5)

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        quant_state, stored = weight.quant_state, self.stored_tensors(weight)
        rows, columns = quant_state.shape if len(quant_state.shape) == 2 else (1, 0)
        block_rows = -(-rows // count)
        # Each piece must start at the border of a quantisation block, because the kernel below
        # decodes complete blocks.
        while block_rows < rows and block_rows * columns % quant_state.blocksize:
            block_rows += 1
        if not columns or block_rows >= rows:
            yield self.dense(weight)
            return
        packed_bytes, scales = stored["packed"].view(-1, 1), _scales(stored)
        for first_row in range(0, rows, block_rows):
            row_count = min(block_rows, rows - first_row)
            first_element, end_element = first_row * columns, (first_row + row_count) * columns
            block_range = slice(
                first_element // quant_state.blocksize, -(-end_element // quant_state.blocksize)
            )
            yield torch.ops.bitsandbytes.dequantize_4bit(
                packed_bytes[first_element // 2 : -(-end_element // 2)],
                scales[block_range],
                quant_state.blocksize,
                quant_state.quant_type,
                (row_count, columns),
                torch.float32,
            )

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        quant_state, encoded = weight.quant_state, self.stored_tensors(weight)
        old_scales, block_size = _scales(encoded), quant_state.blocksize
        blocks = _split_into_blocks(values, block_size)  # [blocks, 64]
        old_blocks = _split_into_blocks(self.decode(weight, encoded), block_size)
        is_block_same = (blocks == old_blocks).all(1)  # [blocks]

        def level_indices(scales: Tensor) -> Tensor:
            return _nearest_level(blocks * _reciprocal_or_zero(scales)[:, None], quant_state.code)

        def squared_error(scales: Tensor) -> Tensor:
            levels = quant_state.code[level_indices(scales).int()]
            return (levels * scales[:, None] - blocks).square().sum(1)

        largest_scales = blocks.abs().amax(1).float()
        keeps_old = is_block_same | (squared_error(old_scales) <= squared_error(largest_scales))
        scales = torch.where(keeps_old, old_scales, largest_scales)
        if "nested_code" in encoded:
            encoded |= _quantise_scales(scales, scales == old_scales, encoded)
            scales = _scales(encoded)
        else:
            encoded["absmax"] = scales
        packed = _pack_pairs(level_indices(scales))
        old_packed = _split_into_blocks(encoded["packed"], block_size // 2)
        keeps_bytes = is_block_same & (scales == old_scales)
        packed = torch.where(keeps_bytes[:, None], old_packed, packed)
        encoded["packed"] = packed.flatten()[: encoded["packed"].numel()]
        return {name: encoded[name] for name in self.stored_tensors(weight)}

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        quant_state = weight.quant_state
        scale = _scales(stored).repeat_interleave(quant_state.blocksize)[
            : quant_state.shape.numel()
        ]
        return Grid(quant_state.code.float().unique(), scale.view(quant_state.shape))

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        quant_state, old_packed = weight.quant_state, stored["packed"]
        indices = _nearest_level(
            _split_into_blocks(values, quant_state.blocksize)
            * _reciprocal_or_zero(_scales(stored))[:, None],
            quant_state.code,
        )
        old_indices = torch.stack([old_packed >> 4, old_packed & 15], 1).view(-1)
        indices = indices.view(-1)[: len(old_indices)]
        # A level may occur twice in the table. Keep the old index if it stands for the same level,
        # so that the bytes of unchanged elements stay the same.
        is_same_level = quant_state.code[indices.int()] == quant_state.code[old_indices.int()]
        packed = _pack_pairs(torch.where(is_same_level, old_indices, indices).view(-1, 2)).flatten()
        return {**stored, "packed": packed}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        quant_state = weight.quant_state
        with torch.no_grad():
            if _is_repacked(quant_state):
                weight.data = _undo_repacking(weight)
                quant_state.dtype, quant_state.packing_format_for_cpu = (
                    quant_state.original_dtype,
                    False,
                )
            _byte_view(weight.data).copy_(stored["packed"])
            quant_state.absmax, quant_state.nested = (
                stored["absmax"].detach().clone(),
                "nested_code" in stored,
            )
            if quant_state.nested:
                quant_state.offset = stored["offset"].detach().clone()
                scales = {"absmax": stored["nested_absmax"], "code": stored["nested_code"]}
                scales = {name: values.detach().clone() for name, values in scales.items()}
                quant_state.state2 = type(quant_state)(
                    **scales, blocksize=SCALES_PER_NESTED_BLOCK, dtype=torch.float32
                )
            else:
                quant_state.offset = quant_state.state2 = None

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
        return _imported_classes(
            "Linear4bit", "LinearNF4", "LinearFP4", "Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"
        )


def _is_repacked(quant_state: Any) -> bool:
    """Whether a call has repacked the weight with this quantisation state into the layout of
    bitsandbytes' AVX512-BF16 kernel."""
    return bool(getattr(quant_state, "packing_format_for_cpu", False))


def _undo_repacking(weight: Any) -> Tensor:
    """The packed bytes of a weight that was repacked for AVX512-BF16, in the order that all other
    kernels expect. Repacking only changes the order of the bytes. Does not modify the weight."""
    state_copy = copy.copy(weight.quant_state)
    state_copy.original_nested = False  # so ``undo`` skips quantising the scales, which are unused
    undo = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    return undo(weight.data, state_copy)[0]


def _byte_view(data: Tensor) -> Tensor:
    """A view of a contiguous tensor as flat uint8, which shares its memory."""
    return data.detach().view(torch.uint8).view(-1)


def _split_into_blocks(values: Tensor, width: int) -> Tensor:
    """The flattened values as a matrix [blocks, ``width``], padded with zeros at the end."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width)


def _pack_pairs(indices: Tensor) -> Tensor:
    """Pack every two neighbouring 4-bit indices into one byte, the first in the upper half: uint8
    [n, width] to uint8 [n, width / 2]."""
    return indices[:, ::2] << 4 | indices[:, 1::2]


def _reciprocal_or_zero(scale: Tensor) -> Tensor:
    """1 / scale in float64, and 0 where the scale is 0 (a row or block of zeros)."""
    return torch.where(scale == 0, 0.0, 1 / scale.double())


def _scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The float32 scales of the blocks of a 4-bit weight, [blocks], dequantised if ``stored`` holds
    them in 8 bits."""
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


def _quantise_scales(
    scales: Tensor, is_scale_same: Tensor, old_stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Quantise the scales of a 4-bit weight's blocks to 8 bits, around the offset of
    ``old_stored``, with one nested scale per 256 scales (a nested block).

    Args:
        scales: float32 [blocks].
        is_scale_same: bool [blocks], whether a scale equals its old value. A nested block in which
            all do keeps its bytes and its nested scale, so that it decodes to the same scales.
        old_stored: the stored tensors of the weight before the change.

    Returns:
        The stored tensors ``absmax`` (uint8 indices) and ``nested_absmax``.
    """
    centred = scales.double() - old_stored["offset"].double()
    nested_blocks = _split_into_blocks(centred, SCALES_PER_NESTED_BLOCK)  # [c, 256]
    is_block_same = (_split_into_blocks((~is_scale_same).byte(), SCALES_PER_NESTED_BLOCK) == 0).all(
        1
    )  # [c]
    nested_absmax = torch.where(
        is_block_same, old_stored["nested_absmax"], nested_blocks.abs().amax(1).float()
    )
    indices = _nearest_level(
        nested_blocks * _reciprocal_or_zero(nested_absmax)[:, None], old_stored["nested_code"]
    )
    indices = torch.where(
        is_block_same[:, None],
        _split_into_blocks(old_stored["absmax"], SCALES_PER_NESTED_BLOCK),
        indices,
    )
    return {"absmax": indices.flatten()[: scales.numel()], "nested_absmax": nested_absmax}


def _nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """For each value, the index in ``levels`` (unsorted, at most 256) of the nearest level, as
    uint8. If the nearest level occurs twice in ``levels``, the result is its first index."""
    ordered, original_index = levels.double().sort(stable=True)
    first_occurrence = torch.searchsorted(ordered, ordered)
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    return original_index[first_occurrence].to(torch.uint8)[torch.bucketize(values, midpoints)]
