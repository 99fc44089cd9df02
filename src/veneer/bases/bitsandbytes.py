"""Weights that bitsandbytes stores in 8 or 4 bits: ``Int8Params`` (LLM.int8()) and ``Params4bit``
(QLoRA's nf4 and fp4).

**8 bits.** One scale per row, the row's largest magnitude:

    W[o, i] = values[o, i] · scale[o] / 127      values: int8 [out, in]    scale: float32 [out]

The first call of a ``Linear8bitLt`` moves the scale from the parameter (``weight.SCB``) to the
module (``module.state.SCB``), where it cannot be found from the weight; ``prepare`` keeps it at
both.

**4 bits.** The weight is flattened by rows and divided into blocks (of 64). A block has one scale,
its
largest magnitude, and its elements are indices of 16 levels. A byte holds two of them, the earlier
one in the upper half:

    W[64 b + j] = level[number[b, j]] · absmax[b]
    packed: bytes [out · in / 2]    absmax: float32 [blocks]

With ``compress_statistics`` the scales are themselves stored in 8 bits, in blocks of 256, around
their mean:

    absmax[256 c + k] = nested_code[byte[c, k]] · nested_absmax[c] + offset

``quant_storage`` is only the dtype with which the bytes are labelled; ``stored_tensors`` always
returns bytes.

On a CPU with AVX512-BF16, a call of ``Linear4bit`` in evaluation mode repacks the weight in place.
This permanently rounds the scales to bfloat16, drops the nested ones, and passes no gradient to x
any more (bitsandbytes 0.50). ``prepare`` undoes the layout and prevents the module from repacking.
The fingerprint of a weight uses the rounded scales (``after_first_call``), which are the same for a
new base and for one that has run.

**Merging** gives each row or block its old scale or its new largest magnitude, whichever comes
closer
to W + ΔW: with the old scale, unchanged numbers stay the same. With these scales, each number is
rounded to nearest, or to one of its two neighbours (``kernels/error_feedback.py``).

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

NESTED_BLOCK = 256


def _classes(*names: str) -> tuple[type, ...]:
    """Classes of bitsandbytes, if it has been imported: a model that holds an instance has imported
    it."""
    module = sys.modules.get("bitsandbytes.nn.modules")
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


@register
class Bitsandbytes8bit(GridStorage):
    name = "bitsandbytes_8bit"

    def holds(self, weight: object) -> bool:
        # Test attributes, because pickling makes it a plain Parameter that keeps them. Not held: a
        # weight that is not yet quantised, or one with has_fp16_weights=True, whose quantised form
        # the module caches.
        return (
            isinstance(weight, nn.Parameter)
            and weight.dtype == torch.int8
            and hasattr(weight, "SCB")
        )

    def prepare(self, module: Any) -> None:
        """Move the scale to the module as the first call would, and keep it at the weight too,
        until the next ``write``."""
        weight, state = module.weight, getattr(module, "state", None)
        if state is not None and weight.CB is not None:
            module.init_8bit_state()
        if state is not None and state.CB is not None:
            weight.data, weight.SCB = state.CB, state.SCB

    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        if weight.SCB is None:
            problem = (
                "an 8-bit weight of bitsandbytes without its scale, which the first call moves "
                "into its module"
            )
            raise TargetError(
                problem, "weight.SCB", "call BASES['bitsandbytes_8bit'].prepare(module) first"
            )
        return {"values": weight.data, "scale": weight.SCB}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["values"].float() * (stored["scale"] * (1 / 127))[:, None]

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        def miss(scale: Tensor) -> Tensor:
            return (
                (self.decode(weight, self.onto(weight, {"scale": scale}, values)) - values)
                .square()
                .sum(1)
            )

        old, new = self.stored_tensors(weight)["scale"], values.abs().amax(1).float()
        return self.onto(weight, {"scale": torch.where(miss(old) <= miss(new), old, new)}, values)

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        scale = (stored["scale"] * (1 / 127))[:, None].expand_as(weight)
        return Grid(torch.arange(-127.0, 128, device=scale.device), scale)

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        numbers = values * _inverse(stored["scale"])[:, None] * 127
        return {"values": numbers.round().clamp(-127, 127).to(torch.int8), "scale": stored["scale"]}

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            weight.data.copy_(stored["values"])
        # As before the first call: the module takes both from the weight, replacing any that it
        # holds.
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
        """Keep the weight in the layout that all devices share, and prevent its module from
        repacking it (see above)."""
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
        """The stored tensors with the scales of the AVX512-BF16 layout, on any device."""
        return {"packed": stored["packed"], "absmax": _scales(stored).bfloat16().float()}

    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        state, packed = weight.quant_state, stored["packed"].view(-1, 1)
        return torch.ops.bitsandbytes.dequantize_4bit(
            packed, _scales(stored), state.blocksize, state.quant_type, state.shape, torch.float32
        )

    def misread(self, weight: Any) -> bool:
        state = weight.quant_state
        if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            return False
        stored = self.stored_tensors(weight)
        numbers = torch.stack([stored["packed"] >> 4, stored["packed"] & 15], 1).flatten()[
            : state.shape.numel()
        ]
        meant = state.code[numbers.int()].view(state.shape) * self.grid(weight, stored).scale
        return not torch.allclose(self.decode(weight, stored), meant, rtol=1e-5)

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        state, stored = weight.quant_state, self.stored_tensors(weight)
        rows, columns = state.shape if len(state.shape) == 2 else (1, 0)
        step = -(-rows // count)
        # a piece must consist of complete blocks
        while step < rows and step * columns % state.blocksize:
            step += 1
        if not columns or step >= rows:
            yield self.dense(weight)
            return
        packed, scales = stored["packed"].view(-1, 1), _scales(stored)
        for first in range(0, rows, step):
            size = min(step, rows - first)
            start, end = first * columns, (first + size) * columns
            blocks = slice(start // state.blocksize, -(-end // state.blocksize))
            yield torch.ops.bitsandbytes.dequantize_4bit(
                packed[start // 2 : -(-end // 2)],
                scales[blocks],
                state.blocksize,
                state.quant_type,
                (size, columns),
                torch.float32,
            )

    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        state, new = weight.quant_state, self.stored_tensors(weight)
        old_scales, width = _scales(new), state.blocksize
        blocks = _blocks(values, width)  # [blocks, 64]
        same = (blocks == _blocks(self.decode(weight, new), width)).all(1)  # [blocks]

        def numbers(scales: Tensor) -> Tensor:
            return _nearest(blocks * _inverse(scales)[:, None], state.code)

        def miss(scales: Tensor) -> Tensor:
            return (state.code[numbers(scales).int()] * scales[:, None] - blocks).square().sum(1)

        largest = blocks.abs().amax(1).float()
        scales = torch.where(same | (miss(old_scales) <= miss(largest)), old_scales, largest)
        if "nested_code" in new:
            new |= _nested(scales, scales == old_scales, new)
            scales = _scales(new)
        else:
            new["absmax"] = scales
        packed, old = _packed(numbers(scales)), _blocks(new["packed"], width // 2)
        packed = torch.where((same & (scales == old_scales))[:, None], old, packed)
        new["packed"] = packed.flatten()[: new["packed"].numel()]
        return {name: new[name] for name in self.stored_tensors(weight)}

    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        state = weight.quant_state
        scale = _scales(stored).repeat_interleave(state.blocksize)[: state.shape.numel()]
        return Grid(state.code.float().unique(), scale.view(state.shape))

    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        state, old = weight.quant_state, stored["packed"]
        numbers = _nearest(
            _blocks(values, state.blocksize) * _inverse(_scales(stored))[:, None], state.code
        )
        old_numbers = torch.stack([old >> 4, old & 15], 1).view(-1)
        numbers = numbers.view(-1)[: len(old_numbers)]  # a level that occurs twice keeps its index
        alike = state.code[numbers.int()] == state.code[old_numbers.int()]
        packed = _packed(torch.where(alike, old_numbers, numbers).view(-1, 2)).flatten()
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
                state.state2 = type(state)(**scales, blocksize=NESTED_BLOCK, dtype=torch.float32)
            else:
                state.offset = state.state2 = None

    def examples(self) -> Iterator[nn.Module]:
        if find_spec("bitsandbytes") is None:
            return
        from bitsandbytes.nn.modules import Linear4bit

        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                yield Linear4bit(64, 32, compress_statistics=nested, quant_type=kind).to("cpu")
        for label in (torch.bfloat16, torch.float32):
            yield (
                Linear4bit(64, 32, quant_type="nf4", quant_storage=label)
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
    """The packed numbers of a repacked weight in the layout that all devices share. Only the order
    changes."""
    state = copy.copy(weight.quant_state)
    state.original_nested = False  # the scales are read beside this, as they are
    inverse = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    return inverse(weight.data, state)[0]


def _bytes(data: Tensor) -> Tensor:
    return data.detach().view(torch.uint8).view(-1)


def _blocks(values: Tensor, width: int) -> Tensor:
    """The flattened values in rows of ``width``, the last one filled with zeros."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width)


def _packed(numbers: Tensor) -> Tensor:
    """Two numbers in a byte, [n, width] to [n, width / 2]."""
    return numbers[:, ::2] << 4 | numbers[:, 1::2]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale.double())


def _scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The float32 scales of the blocks, [blocks]."""
    if "nested_code" not in stored:
        return stored["absmax"]
    arguments = (
        stored["absmax"],
        stored["nested_absmax"],
        stored["nested_code"],
        NESTED_BLOCK,
        torch.float32,
    )
    return torch.ops.bitsandbytes.dequantize_blockwise(*arguments) + stored["offset"]


def _nested(scales: Tensor, same: Tensor, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New scales in 8 bits around the old offset; blocks of 256 that are the same keep their
    bits."""
    centred = scales.double() - old["offset"].double()
    blocks = _blocks(centred, NESTED_BLOCK)  # [c, 256]
    unchanged = (_blocks((~same).byte(), NESTED_BLOCK) == 0).all(1)  # [c]
    absmax = torch.where(unchanged, old["nested_absmax"], blocks.abs().amax(1).float())
    numbers = _nearest(blocks * _inverse(absmax)[:, None], old["nested_code"])
    numbers = torch.where(unchanged[:, None], _blocks(old["absmax"], NESTED_BLOCK), numbers)
    return {"absmax": numbers.flatten()[: scales.numel()], "nested_absmax": absmax}


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The number of the level nearest to each value, as uint8; the first number of a level that
    occurs twice."""
    ordered, order = levels.double().sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    between = (ordered[1:] + ordered[:-1]) / 2
    return order[first].to(torch.uint8)[torch.bucketize(values, between)]
