"""What loops over numbers have in common that numba compiles: bfloat16 as its bits, sums of free
order, addresses."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

#: a bfloat16 that is no number, by its bits
NAN = np.uint16(0x7FC0)
WORD = ir.IntType(32)


def sources() -> str:
    """What the code of all kernels comes to. numba keeps a compiled loop under its name until its
    own file changes, whatever becomes of the functions that it calls from others; so this is part
    of the name."""
    whole = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def compiled(loop: Any) -> Any:
    """``loop``, compiled once for each machine and kind of arguments; other threads run beside
    it."""
    loop.__qualname__ += f"_{sources()}"
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(**options)(loop)


def raised(builder: Any, value: Any) -> Any:
    """The bits of a float32, raised so that their upper half is the nearest bfloat16, ties to
    even."""
    bits = builder.bitcast(value, WORD)
    odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
    return builder.add(builder.add(bits, WORD(0x7FFF)), odd)


@intrinsic
def as_float(context: Any, bits: Any):
    """32 bits as the float32 that they are."""
    return numba.float32(numba.uint32), lambda _, builder, __, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def as_bits(context: Any, value: Any):
    """A float32 as its 32 bits."""
    return numba.uint32(numba.float32), lambda _, builder, __, args: builder.bitcast(args[0], WORD)


@intrinsic
def plus(context: Any, one: Any, other: Any):
    """A sum in float32 that may be taken in any order."""

    def code(_, builder: Any, __, args: Any):
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return numba.float32(numba.float32, numba.float32), code


@intrinsic
def wide(context: Any, stored: Any):
    """A stored number (float32, or bfloat16 as its bits) as float32."""

    def code(_, builder: Any, __, args: Any):
        if stored == numba.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], WORD), WORD(16))
        return builder.bitcast(bits, ir.FloatType())

    return numba.float32(stored), code


@intrinsic
def at(context: Any, address: Any, like: Any):
    """A pointer to numbers of the kind of ``like``, a number or an array of such."""
    pointer = types.CPointer(getattr(like, "dtype", like))

    def code(target: Any, builder: Any, _, args: Any):
        return builder.inttoptr(args[0], target.get_value_type(pointer))

    return pointer(types.int64, like), code


@intrinsic
def narrow(context: Any, value: Any, like: Any):
    """A float32 as a number is stored that is ``like`` this one: itself, or the bits of the nearest
    bfloat16."""

    def code(_, builder: Any, __, args: Any):
        if like == numba.float32:
            return args[0]
        nearest = builder.lshr(raised(builder, args[0]), WORD(16))
        number = builder.fcmp_ordered("ord", args[0], args[0])
        return builder.trunc(builder.select(number, nearest, WORD(int(NAN))), ir.IntType(16))

    return like(value, like), code
