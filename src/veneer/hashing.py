"""Hashes of tensors and of JSON values, and the fingerprint of a base weight."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype and bytes."""
    return _hash(str(tensor.dtype), tensor)


def fingerprint(weight: Tensor) -> str:
    """The first 128 bits of the SHA-256 of a weight's shape and of its values rounded to bfloat16, in hex.

    A base is published in float32 or bfloat16 and loaded in either; the rounding makes it recognisable in both.
    """
    return _hash(str(tuple(weight.shape)), weight.detach().to(torch.bfloat16))[:32]


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(prefix: str, tensor: Tensor) -> str:
    whole = hashlib.sha256(prefix.encode())
    whole.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
