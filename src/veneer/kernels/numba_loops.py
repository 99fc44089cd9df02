"""Functions that the loops compiled by numba share: to compile a loop, and to read and write
bfloat16 numbers, which numba lacks, as 16-bit words.

The operations on integers are written as LLVM code for 32-bit words, because numba would compute
integer sums in 64 bits, and a vector register holds half as many of these.

Rejected: C, which must be built for every system; torch.compile, which needs a C++ compiler at run
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

#: the bits of a bfloat16 NaN
NAN_BITS = np.uint16(0x7FC0)
INT32 = ir.IntType(32)


def compile_loop(*fastmath: str) -> Callable[[Any], Any]:
    """A decorator that compiles a loop once for each machine and signature. The loop runs without
    the GIL. ``fastmath``: LLVM's names of what the compiler may do with floating-point numbers."""

    def compile_function(loop: Any) -> Any:
        options: dict[str, Any] = {
            "nogil": True,
            "fastmath": {*fastmath},
            "error_model": "numpy",
        }
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:  # numba found no folder that it may use as its cache
            return numba.njit(**options)(loop)

    return compile_function


def _build_rounding(builder: Any, number: Any) -> Any:
    """LLVM code that computes ``to_bfloat16_bits`` of a float32: adds half a step of bfloat16."""
    bits = builder.bitcast(number, INT32)
    odd = builder.and_(builder.lshr(bits, INT32(16)), INT32(1))
    return builder.add(builder.add(bits, INT32(0x7FFF)), odd)


def _build_upper_half(builder: Any, bits: Any) -> Any:
    return builder.trunc(builder.lshr(bits, INT32(16)), ir.IntType(16))


@intrinsic
def to_float32(context: Any, stored: Any):
    """A stored number (float32, or the bits of a bfloat16) as float32."""

    def code(_, builder: Any, __, args: Any):
        if stored == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], INT32), INT32(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(stored), code


@intrinsic
def to_bfloat16_bits(context: Any, number: Any):
    """32 bits of which the upper half is the bfloat16 nearest to a float32, ties to even. The lower
    half is meaningless, and so is all of it for a NaN."""
    signature = types.uint32(types.float32)
    return signature, lambda _, builder, __, args: _build_rounding(builder, args[0])


@intrinsic
def upper_half(context: Any, bits: Any):
    """The upper half of 32 bits."""
    signature = types.uint16(types.uint32)
    return signature, lambda _, builder, __, args: _build_upper_half(builder, args[0])


@intrinsic
def to_stored(context: Any, like: Any, number: Any):
    """A float32 in the type of ``like``: as it is, or the bits of the nearest bfloat16."""

    def code(_, builder: Any, __, args: Any):
        if like == types.float32:
            return args[1]
        bits = _build_upper_half(builder, _build_rounding(builder, args[1]))
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.select(is_nan, ir.IntType(16)(int(NAN_BITS)), bits)

    return like(like, types.float32), code
