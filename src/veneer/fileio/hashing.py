"""Hashes of tensors and of JSON values, and the fingerprints of base weights in a record."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: prefixes of a fingerprint, by its hash. XXH3 is as fast as memory. It detects accidents and
#: edits; no hash of a record protects against a person who means harm.
XXH3, SHA256 = "xxh3:", ""
#: numbers that are rounded and hashed at once: few enough to stay in the cache in between, and for
#: torch to round them in this thread alone; more from another device, where a transfer has a cost
PIECE, TRANSFER = 1 << 15, 1 << 24


def digest(tensor: Tensor) -> str:
    return _hash(str(tensor.dtype), [tensor])


def fingerprint(weight: Tensor, like: str = XXH3) -> str:
    """The first 128 bits of the hash of a weight's shape and of its values rounded to bfloat16:
    "xxh3:" and 32 hexadecimal digits, or without "xxh3:" as folders hold it that were written
    before (then it is SHA-256). A base is published in float32 or bfloat16 and loaded in either;
    the rounding makes it recognisable in both. Whole numbers and booleans are taken as they are.
    ``like``: the kind, or a fingerprint of it: what the result is to be compared with."""
    return fingerprint_of(weight.shape, [weight], like)


def fingerprint_of(shape: Sequence[int], blocks: Iterable[Tensor], like: str = XXH3) -> str:
    """The ``fingerprint`` of a weight of this shape that comes in blocks, one after the other
    along its first axis."""
    from xxhash import xxh3_128

    kind = kind_of(like)
    hasher = xxh3_128() if kind == XXH3 else hashlib.sha256()
    hasher.update(str(tuple(shape)).encode())
    for block in blocks:
        _feed(hasher, block.detach())
    return kind + hasher.hexdigest()[:32]


def fingerprint_beside(weight: Tensor, rows: Sequence[int], like: str = XXH3) -> str:
    """The ``fingerprint`` of a weight without some rows, ascending, of which those beyond its end
    do not count: an embedding that grew by just these has that of the one from before."""
    ends = [*(row for row in rows if row < len(weight)), len(weight)]
    starts = [0, *(row + 1 for row in ends[:-1])]
    shape = len(weight) - len(ends) + 1, *weight.shape[1:]
    return fingerprint_of(
        shape, (weight[a:b] for a, b in zip(starts, ends, strict=True) if a < b), like
    )


def kind_of(fingerprint: str) -> str:
    """How a fingerprint was made: XXH3 or SHA256."""
    return XXH3 if fingerprint.startswith(XXH3) else SHA256


def _feed(hasher: Any, tensor: Tensor) -> None:
    """Hash the numbers of a tensor, floating-point ones as bfloat16, a piece at a time."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    flat = tensor.reshape(-1)
    if tensor.device.type == "cpu" and tensor.dtype != dtype:
        # a small one, which stays in the cache
        buffer = torch.empty(min(PIECE, len(flat)), dtype=torch.bfloat16)
        raw = memory_of(buffer)
        for piece in flat.split(PIECE) if len(flat) else ():
            buffer[: len(piece)].copy_(piece)
            hasher.update(raw[: 2 * len(piece)])
        return
    step = TRANSFER if tensor.device.type != "cpu" else max(1, len(flat))
    for start in range(0, len(flat), step):
        piece = flat[start : start + step].to(dtype).cpu()
        hasher.update(memory_of(piece))


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, which must outlive the result. Not through
    numpy: torch never again resizes a storage that numpy has seen, and FSDP1 resizes that of
    gathered weights to let go of them."""
    count = tensor.numel() * tensor.element_size()
    return (
        memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr()))
        if count
        else memoryview(b"")
    )


def prints_in(base: Mapping[str, Any]) -> dict[str, str]:
    """Every fingerprint of a record's base, by name."""
    return {**(base.get("rest") or {}), **(base.get("weights") or {})}


def kind_in(base: Mapping[str, Any]) -> str:
    """The kind of a record's fingerprints, which is one for all of them."""
    return kind_of(next(iter(prints_in(base).values()), XXH3))


def coverage(base: Mapping[str, Any] | None) -> str:
    """How much of a base a record proves, in words; None is that of a folder without a record."""
    if not base or "weights" not in base:
        return "nothing (written by another library)"
    changed, rest = len(base["weights"]), base.get("rest")
    if rest is None:
        return f"adapted layers only ({changed} tensors)"
    counts = f"{changed} that it changes, {len(rest)} that it only computes with"
    return f"{changed + len(rest)} tensors ({counts})"


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(prefix: str, tensors: Iterable[Tensor]) -> str:
    hasher = hashlib.sha256(prefix.encode())
    for tensor in tensors:
        values = tensor.detach().contiguous().cpu()
        hasher.update(memory_of(values))
    return hasher.hexdigest()
