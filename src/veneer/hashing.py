"""Hashes of tensors and of JSON values, and the fingerprint of a base weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype and bytes."""
    return _hash(str(tensor.dtype), [tensor])


def fingerprint(weight: Tensor) -> str:
    """The first 128 bits of the SHA-256 of a weight's shape and of its values rounded to bfloat16, in hex.

    A base is published in float32 or bfloat16 and loaded in either; the rounding makes it recognisable in both.
    """
    return fingerprint_of(weight.shape, [weight])


def fingerprint_of(shape: Sequence[int], parts: Iterable[Tensor]) -> str:
    """The ``fingerprint`` of a weight of this shape that is given in parts, one after the other along its first
    axis."""
    return _hash(str(tuple(shape)), (part.detach().to(torch.bfloat16) for part in parts))[:32]


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(prefix: str, tensors: Iterable[Tensor]) -> str:
    whole = hashlib.sha256(prefix.encode())
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
