"""Functions that the loops compiled by numba share: a decorator that compiles a loop, and functions
that read and write bfloat16 numbers, which numba lacks, as 16-bit words.

An ``@intrinsic`` function receives the numba types of its arguments, and returns a signature and a
function that generates LLVM code. The operations on integers are written as LLVM code for 32-bit
words, because numba would compute integer sums in 64 bits, and a vector register holds only half as
many 64-bit integers.

Rejected: C, because it must be built for every system, and torch.compile, because it needs a C++
compiler at run time.
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
    """A decorator that compiles a function by numba, to run without the GIL. The compiled code is
    cached on disk, so that it is compiled once for each machine and signature. ``fastmath``: LLVM's
    fast-math flags that the compiler may use, such as "contract" (fuse a product and a sum)."""

    def compile_function(loop_function: Any) -> Any:
        options: dict[str, Any] = {
            "nogil": True,
            "fastmath": {*fastmath},
            "error_model": "numpy",
        }
        try:
            return numba.njit(cache=True, **options)(loop_function)
        except RuntimeError:  # numba found no folder for its cache, so compile in each process
            return numba.njit(**options)(loop_function)

    return compile_function


def _build_rounding(builder: Any, number: Any) -> Any:
    """LLVM code that rounds a float32 ``number`` to bfloat16, ties to even. The result is in the
    upper 16 of the 32 bits that it returns. Added are 0x7FFF, just under half a step of bfloat16,
    and the lowest bit that is kept. The sum carries into the upper half if the number must be
    rounded up; for a tie (a number halfway between two bfloat16), only if that bit is 1."""
    bits = builder.bitcast(number, INT32)
    lowest_kept_bit = builder.and_(builder.lshr(bits, INT32(16)), INT32(1))
    return builder.add(builder.add(bits, INT32(0x7FFF)), lowest_kept_bit)


def _build_upper_half(builder: Any, bits: Any) -> Any:
    return builder.trunc(builder.lshr(bits, INT32(16)), ir.IntType(16))


@intrinsic
def to_float32(_typing_context: Any, stored_type: Any):
    """A stored number as float32. The argument is a float32, or a uint16 that holds the bits of a
    bfloat16."""

    def generate_code(_, builder: Any, __, args: Any):
        if stored_type == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], INT32), INT32(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(stored_type), generate_code


@intrinsic
def to_bfloat16_bits(_typing_context: Any, number_type: Any):
    """A uint32 whose upper half holds the bits of the bfloat16 nearest to a float32, ties to even.
    Its lower half is meaningless. For a NaN, all 32 bits are meaningless."""
    signature = types.uint32(types.float32)
    return signature, lambda _, builder, __, args: _build_rounding(builder, args[0])


@intrinsic
def upper_half(_typing_context: Any, bits_type: Any):
    """The upper 16 bits of a uint32, as uint16."""
    signature = types.uint16(types.uint32)
    return signature, lambda _, builder, __, args: _build_upper_half(builder, args[0])


@intrinsic
def to_stored(_typing_context: Any, stored_type: Any, number_type: Any):
    """The second argument, a float32, in the type of the first: unchanged for float32; for uint16,
    the bits of the nearest bfloat16. Only the type of the first argument is used."""

    def generate_code(_, builder: Any, __, args: Any):
        if stored_type == types.float32:
            return args[1]
        bits = _build_upper_half(builder, _build_rounding(builder, args[1]))
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.select(is_nan, ir.IntType(16)(int(NAN_BITS)), bits)

    return stored_type(stored_type, types.float32), generate_code
