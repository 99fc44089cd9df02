"""Hashes of tensors and JSON values, and the fingerprints of base weights in an adapter's
record."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: prefix of a fingerprint -> its hash. XXH3 runs at the speed of memory. It detects accidents and
#: edits; a hash inside of the record cannot protect against an attacker who rewrites both.
XXH3, SHA256 = "xxh3:", ""
#: values per block that is rounded and hashed. PIECE fits into the cache and is small enough for
#: torch to round in this thread; TRANSFER, for other devices, amortises the cost of a copy
PIECE, TRANSFER = 1 << 15, 1 << 24


def digest(tensor: Tensor) -> str:
    """Return the hash of a tensor's dtype and values."""
    return _hash(str(tensor.dtype), [tensor])


def fingerprint(weight: Tensor, like: str = XXH3) -> str:
    """Return the hash of a weight's shape and values as "xxh3:" and 32 hexadecimal digits.

    Floating-point values are rounded to bfloat16 first, because a base may be published in float32
    and loaded in bfloat16, or the reverse. Integers and booleans are hashed unchanged.

    Args:
        like: XXH3, SHA256, or a fingerprint to compare with, whose kind is used. Earlier versions
            of Veneer wrote the first 128 bits of SHA-256, without a prefix."""
    return fingerprint_of(weight.shape, [weight], like)


def fingerprint_of(shape: Sequence[int], blocks: Iterable[Tensor], like: str = XXH3) -> str:
    """Return the ``fingerprint`` of a weight of this shape whose consecutive blocks along the first
    axis are passed one after the other."""
    from xxhash import xxh3_128

    kind = kind_of(like)
    hasher = xxh3_128() if kind == XXH3 else hashlib.sha256()
    hasher.update(str(tuple(shape)).encode())
    for block in blocks:
        _feed(hasher, block.detach())
    return kind + hasher.hexdigest()[:32]


def fingerprint_without_rows(weight: Tensor, rows: Sequence[int], like: str = XXH3) -> str:
    """Return the ``fingerprint`` of a weight without some rows.

    ``rows`` are ascending; those beyond the end are ignored. For an embedding that grew by these
    rows, the result is the fingerprint of the original embedding."""
    ends = [*(row for row in rows if row < len(weight)), len(weight)]
    starts = [0, *(row + 1 for row in ends[:-1])]
    shape = len(weight) - len(ends) + 1, *weight.shape[1:]
    return fingerprint_of(
        shape, (weight[a:b] for a, b in zip(starts, ends, strict=True) if a < b), like
    )


def kind_of(fingerprint: str) -> str:
    """Return the hash of a fingerprint: XXH3 or SHA256."""
    return XXH3 if fingerprint.startswith(XXH3) else SHA256


def _feed(hasher: Any, tensor: Tensor) -> None:
    """Hash the values of a tensor block by block, floating-point values as bfloat16."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    flat = tensor.reshape(-1)
    if tensor.device.type == "cpu" and tensor.dtype != dtype:
        # a small buffer that stays in the cache
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
    """Return the bytes of a contiguous CPU tensor without a copy; the tensor must outlive them.

    Rejected: ``tensor.numpy()``. torch refuses to resize a storage that numpy has seen, and FSDP1
    resizes the storage of gathered weights to free it."""
    count = tensor.numel() * tensor.element_size()
    return (
        memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr()))
        if count
        else memoryview(b"")
    )


def recorded_fingerprints(base: Mapping[str, Any]) -> dict[str, str]:
    """Return all fingerprints in a record's entry of the base: {weight name: fingerprint}."""
    return {**(base.get("rest") or {}), **(base.get("weights") or {})}


def recorded_hash_kind(base: Mapping[str, Any]) -> str:
    """Return the hash of a record's fingerprints, which is the same for all of them."""
    return kind_of(next(iter(recorded_fingerprints(base).values()), XXH3))


def coverage(base: Mapping[str, Any] | None) -> str:
    """Describe how much of the base a record covers; ``base`` is None for a folder without a
    record."""
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
