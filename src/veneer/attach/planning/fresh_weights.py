"""Warn about weights that are in no checkpoint, such as a new classification head.

transformers initialises these weights at random. If an adapter neither trains nor stores them, it
cannot be reproduced: the next load of the model initialises other numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from veneer.attach.layer.names import ParamRef
from veneer.errors import FreshWeights, listing


def has_head(model: nn.Module) -> bool:
    """Whether a transformers model has a head on top of a base model, rather than being that base
    model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)


def warn_fresh(lost: Collection[ParamRef], when: str, *, stacklevel: int) -> None:
    """Warn (``FreshWeights``) of fresh parameters that an adapter does not store."""
    if lost:
        paths = [f"{path}.{name}".lstrip(".") for path, name in lost]
        modules = list(dict.fromkeys(path or name for path, name in lost))
        warnings.warn(
            f"{when}, {len(paths)} parameters were not in the checkpoint, and the adapter does not"
            f" hold them either: {listing(paths, 4)}. They were initialised at random as the model"
            " was loaded; the next load makes others. Train them in full"
            f" (train_also={modules[:4]!r}), unless nothing that you use reads them.",
            FreshWeights,
            stacklevel=stacklevel,
        )
