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

#: the prefixes of fingerprints, which tell the hash function; those of SHA-256 have no prefix. XXH3
#: hashes as fast as memory can be read. It detects accidents and edits. No hash in the record (the
#: metadata of an adapter folder) protects against an attacker, who would rewrite the record too.
XXH3, SHA256 = "xxh3:", ""
#: the number of values that are rounded and hashed at a time. CPU_BLOCK values fit into the cache,
#: and torch rounds so few in the calling thread, without its pool. DEVICE_BLOCK is larger, because
#: each copy from another device has a fixed cost.
CPU_BLOCK, DEVICE_BLOCK = 1 << 15, 1 << 24


def digest(tensor: Tensor) -> str:
    """Return the hash of a tensor's dtype and values."""
    hasher = hashlib.sha256(str(tensor.dtype).encode())
    values = tensor.detach().contiguous().cpu()
    hasher.update(memory_of(values))
    return hasher.hexdigest()


def fingerprint(weight: Tensor, like: str = XXH3) -> str:
    """Return the hash of a weight's shape and values as "xxh3:" and 32 hexadecimal digits.

    Floating-point values are rounded to bfloat16 first, because a base may be published in float32
    and loaded in bfloat16, or the reverse. Integers and booleans are hashed unchanged.

    Args:
        like: the hash function: XXH3, SHA256, or that of a fingerprint to compare with. Earlier
            versions of Veneer wrote the first 128 bits of SHA-256, without a prefix."""
    return fingerprint_of(weight.shape, [weight], like)


def fingerprint_of(shape: Sequence[int], blocks: Iterable[Tensor], like: str = XXH3) -> str:
    """Return the ``fingerprint`` of a weight that is given in parts. ``blocks``: its consecutive
    blocks along the first axis. ``like``: as in ``fingerprint``."""
    from xxhash import xxh3_128

    hash_kind = kind_of(like)
    hasher = xxh3_128() if hash_kind == XXH3 else hashlib.sha256()
    hasher.update(str(tuple(shape)).encode())
    for block in blocks:
        _update_hash(hasher, block.detach())
    return hash_kind + hasher.hexdigest()[:32]


def fingerprint_without_rows(weight: Tensor, row_indices: Sequence[int], like: str = XXH3) -> str:
    """Return the ``fingerprint`` of a weight without some rows of its first axis.

    ``row_indices`` ascend; indices beyond the end are ignored. For an embedding that grew
    by these rows, the result is the fingerprint of the original embedding. ``like``: as in
    ``fingerprint``."""
    block_ends = [*(row for row in row_indices if row < len(weight)), len(weight)]
    block_starts = [0, *(row + 1 for row in block_ends[:-1])]
    shape = len(weight) - len(block_ends) + 1, *weight.shape[1:]
    return fingerprint_of(
        shape,
        (
            weight[start:end]
            for start, end in zip(block_starts, block_ends, strict=True)
            if start < end
        ),
        like,
    )


def kind_of(fingerprint: str) -> str:
    """Return which hash function computed a fingerprint: XXH3 or SHA256."""
    return XXH3 if fingerprint.startswith(XXH3) else SHA256


def _update_hash(hasher: Any, tensor: Tensor) -> None:
    """Add the values of a tensor to ``hasher`` block by block, floating-point values as
    bfloat16."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    flat_values = tensor.reshape(-1)
    if tensor.device.type == "cpu" and tensor.dtype != dtype:
        # convert through a small buffer that stays in the CPU's cache, which is faster
        buffer = torch.empty(min(CPU_BLOCK, len(flat_values)), dtype=torch.bfloat16)
        buffer_bytes = memory_of(buffer)
        for block in flat_values.split(CPU_BLOCK) if len(flat_values) else ():
            buffer[: len(block)].copy_(block)
            hasher.update(buffer_bytes[: 2 * len(block)])
        return
    block_size = DEVICE_BLOCK if tensor.device.type != "cpu" else max(1, len(flat_values))
    for start in range(0, len(flat_values), block_size):
        block = flat_values[start : start + block_size].to(dtype).cpu().contiguous()
        hasher.update(memory_of(block))


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy. The caller must keep the tensor
    alive as long as it uses the bytes.

    Rejected: ``tensor.numpy()``. torch refuses to resize a storage that numpy has seen, and FSDP1
    resizes the storage of gathered weights to free it."""
    byte_count = tensor.numel() * tensor.element_size()
    return (
        memoryview((ctypes.c_ubyte * byte_count).from_address(tensor.data_ptr()))
        if byte_count
        else memoryview(b"")
    )


def recorded_fingerprints(base_entry: Mapping[str, Any]) -> dict[str, str]:
    """Return all fingerprints of base weights by the weight's name. ``base_entry``: the entry
    "base" of a record (the metadata of an adapter folder)."""
    return {**(base_entry.get("rest") or {}), **(base_entry.get("weights") or {})}


def recorded_hash_kind(base_entry: Mapping[str, Any]) -> str:
    """Return the hash function (XXH3 or SHA256) of all fingerprints in ``base_entry``, the entry
    "base" of a record (the metadata of an adapter folder); XXH3 if it has no fingerprint."""
    return kind_of(next(iter(recorded_fingerprints(base_entry).values()), XXH3))


def coverage(base_entry: Mapping[str, Any] | None) -> str:
    """Describe how many of the base's weights have a fingerprint in a record (the metadata of an
    adapter folder). ``base_entry``: the record's entry "base"; None for a folder without a record.
    """
    if not base_entry or "weights" not in base_entry:
        return "nothing (written by another library)"
    changed_count, unchanged_fingerprints = len(base_entry["weights"]), base_entry.get("rest")
    if unchanged_fingerprints is None:
        return f"adapted layers only ({changed_count} tensors)"
    counts_text = (
        f"{changed_count} that it changes, {len(unchanged_fingerprints)} that it only computes with"
    )
    return f"{changed_count + len(unchanged_fingerprints)} tensors ({counts_text})"


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value. The order of the keys of its objects does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
