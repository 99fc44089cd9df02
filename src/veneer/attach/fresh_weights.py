"""Weights that no checkpoint held, such as a new classification head: transformers initialises them
at random. An adapter that neither trains nor stores them is worth little to whoever loads it, as
the next load makes other ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from veneer.attach.targets import Names, ParamRef
from veneer.distributed import is_sharded
from veneer.errors import listing


class FreshWeights(UserWarning):
    """Parameters that neither the checkpoint nor the adapter holds: who loads the adapter gets
    other numbers there."""


def fresh(names: Names) -> dict[int, ParamRef]:
    """The parameters that a checkpoint did not hold, where each is first met, by identity.
    transformers marks what it loads; of a model without such marks nothing is known, nor of weights
    that are spread over processes once they have been moved, by which all of them lose theirs."""
    found: dict[int, ParamRef] = {}
    own = [(is_sharded(parameter), ref, parameter) for ref, parameter in names.parameters()]
    marked = {
        spread for spread, _, parameter in own if getattr(parameter, "_is_hf_initialized", False)
    }
    for spread, ref, parameter in own:
        if spread in marked and not getattr(parameter, "_is_hf_initialized", False):
            found.setdefault(id(parameter), ref)
    return found


def has_head(model: nn.Module) -> bool:
    """Whether a model of transformers is a head on a base model, rather than that base model
    itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)


def warn_fresh(lost: Collection[ParamRef], when: str, *, stacklevel: int) -> None:
    """Warn of fresh parameters that an adapter does not hold."""
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
