"""The proof of a base: the fingerprint of every tensor that an adapted model computes with.

    base.weights    of the weights that the adapter changes at a low rank, by path
    base.rest       of every other parameter and lasting buffer, but those that the adapter
                    replaces, by each name
    base.fresh      those that no checkpoint ever held (a head that was initialised at loading), by
                    path

The proof leaves out buffers that the model computes itself (no state dict holds them), and tensors
that the adapter holds a copy of, such as running statistics.

A fingerprint is cached as long as its weight lives. It is valid while the weight has the same
memory, shape and dtype, torch's version counter has not moved, and a sample of its elements is
unchanged. The cache misses writes of a few elements through ``.data``; code that does so calls
``clear_fingerprints``. Rejected: the version counter alone, as torch does not count writes through
``.data``, which much code uses to initialise weights or to add to them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from veneer.attach import state_of
from veneer.bases import Storage
from veneer.fileio import hashing
from veneer.fileio.hashing import XXH3, fingerprint, memory_of
from veneer.models.base_weights import ModuleWeight

#: elements of a weight that are sampled to detect a write
SAMPLE = 1024


@dataclass(frozen=True)
class Content:
    """The values of one weight: ``storage`` decodes them from ``stored``; without a storage they
    are ``anchor`` itself. ``anchor`` lives as long as the values do and keys the cache."""

    weight: Any
    storage: Storage | None
    stored: Mapping[str, Tensor]
    anchor: Any

    def dense(self, as_loaded: bool = False) -> Tensor:
        """The weight in dense form after its first call, or ``as_loaded``: earlier releases of
        Veneer took fingerprints of that form. (Some packed weights round their scales in the first
        call.)"""
        with torch.no_grad():
            if self.storage is None:
                dense = self.anchor
            else:
                stored = (
                    self.stored
                    if as_loaded
                    else self.storage.after_first_call(self.weight, self.stored)
                )
                dense = self.storage.decode(self.weight, stored)
        full_tensor = getattr(dense, "full_tensor", None)  # of a sharded weight
        return dense if full_tensor is None else full_tensor()

    def version(self) -> tuple[Any, ...] | None:
        """A value that changes with every write to the weight; None if no write can be detected."""
        sources = [self.anchor]
        if isinstance(self.anchor, nn.Module):
            # an opaque storage has only its adapters below the module
            deep = self.storage is None or not self.storage.opaque
            sources = [*self.anchor.parameters(deep), *self.anchor.buffers(deep)]
        tensors = {id(tensor): tensor for tensor in (*sources, *self.stored.values())}.values()
        # wrapper subclasses (packed or sharded tensors) have no memory themselves
        lie = (
            t for t in tensors if not is_traceable_wrapper_subclass(t) and t.layout == torch.strided
        )
        return tuple(map(_tensor_version, lie)) or None


def _content(weight: ModuleWeight, bits: Mapping[int, Mapping[str, Tensor]]) -> Content:
    """The values of a weight, or, if an adapter is merged into it, its values before the merge,
    which ``bits`` holds by the identity of the weight. The storage must be prepared."""
    before = bits.get(id(weight.weight))
    if before:
        return Content(weight.weight, weight.storage, dict(before), next(iter(before.values())))
    stored = {} if weight.storage is None else weight.storage.stored_tensors(weight.weight)
    return Content(weight.weight, weight.storage, stored, weight.weight)


#: {(kind, as_loaded): (version, fingerprint)} by the identity of the tensor
_CACHE: Any = WeakIdKeyDictionary()
#: threads hash one after another, so that no fingerprint is computed twice
_HASHING = threading.RLock()


def fingerprints_of(
    tensors: Sequence[ModuleWeight],
    bits: Mapping[int, Mapping[str, Tensor]] | None = None,
    kind: str = XXH3,
    as_loaded: bool = False,
) -> list[str]:
    """The fingerprint of each tensor, from the cache where the tensor has not changed.

    Args:
        bits: the values of merged weights before the merge, by identity
            (``stored_weights.bits_before_merge``).
        kind: XXH3, or SHA256 to compare with a record that has fingerprints of that kind.
        as_loaded: as in ``Content.dense``.
    """
    with _HASHING, _prepare_storages(tensors):
        contents = [_content(tensor, bits or {}) for tensor in tensors]
        versions = [content.version() for content in contents]
        fingerprints: list[str] = []
        for content, version in zip(contents, versions, strict=True):
            cached_version, value = _CACHE.get(content.anchor, {}).get(
                (kind, as_loaded), (None, "")
            )
            if version is None or cached_version != version:
                value = fingerprint(content.dense(as_loaded), kind)
                # cache it unless another thread wrote to the weight meanwhile
                if version is not None and content.version() == version:
                    _CACHE.setdefault(content.anchor, {})[kind, as_loaded] = version, value
            fingerprints.append(value)
        return fingerprints


def call_modified_weights(tensors: Sequence[ModuleWeight]) -> list[ModuleWeight]:
    """The weights whose packed values the first call may change permanently."""
    return [
        tensor
        for tensor in tensors
        if tensor.storage is not None
        and type(tensor.storage).after_first_call is not Storage.after_first_call
    ]


def earlier_fingerprints(tensors: Sequence[ModuleWeight], kind: str = XXH3) -> dict[str, str]:
    """The fingerprints, by name, that earlier releases of Veneer took of packed weights: of the
    values as loaded, before the first call may change them."""
    packed = call_modified_weights(tensors)
    fingerprints = zip(packed, fingerprints_of(packed, kind=kind, as_loaded=True), strict=True)
    return {name: fingerprint for tensor, fingerprint in fingerprints for name in tensor.names}


def was_modified_by_call(tensor: ModuleWeight) -> bool:
    """Whether a call has changed the packed weight already, so that its values as loaded are
    lost."""
    with _HASHING, _prepare_storages([tensor]):
        content = _content(tensor, {})
        return torch.equal(content.dense(), content.dense(as_loaded=True))


def fingerprint_without_rows(
    tensor: ModuleWeight,
    rows: Sequence[int],
    bits: Mapping[int, Mapping[str, Tensor]] | None = None,
    kind: str = XXH3,
) -> str:
    """The fingerprint of a weight without the ``rows`` (ascending) that an adapter replaces."""
    with _HASHING, _prepare_storages([tensor]):
        return hashing.fingerprint_without_rows(_content(tensor, bits or {}).dense(), rows, kind)


def clear_fingerprints() -> None:
    """Empty the cache: the next save or load hashes its base anew."""
    with _HASHING:
        _CACHE.clear()


@contextmanager
def _prepare_storages(tensors: Sequence[ModuleWeight]) -> Iterator[None]:
    """Prepare the storages for reading; afterwards release those of modules without adapters."""
    packed = [tensor for tensor in tensors if tensor.storage is not None]
    try:
        for tensor in packed:
            tensor.storage.prepare(tensor.module)  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for tensor in packed:
            if state_of(tensor.module) is None:
                tensor.storage.release(tensor.module)  # pyright: ignore[reportOptionalMemberAccess]


def _tensor_version(tensor: Tensor) -> tuple[Any, ...]:
    layout = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return *layout, 0 if tensor.is_inference() else tensor._version, _sample(tensor)


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    """The bytes of elements sampled evenly over the memory of a tensor; of all if it is small."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not tensor.numel():
        return b""
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    # odd: an even step may be a multiple of the width and sample few columns
    step = max(1, span // SAMPLE) | 1
    with torch._C.DisableTorchFunctionSubclass():  # read the bytes of packed parameters
        some = tensor.as_strided((-(-span // step),), (step,), tensor.storage_offset()).cpu()
        some = some.contiguous()
        return bytes(memory_of(some))


def base_record(
    changed: Mapping[str, ModuleWeight],
    rest: Sequence[ModuleWeight],
    fingerprints: Sequence[str | None],
) -> dict[str, dict[str, str]]:
    """The fingerprints of a record, as "weights" and "rest".

    Args:
        changed: the weights that the adapter changes at a low rank, by path.
        rest: the other tensors of the base that the adapter does not replace.
        fingerprints: of ``changed`` and of ``rest``; None where it is unknown.
    """
    rest_fingerprints = zip(rest, fingerprints[len(changed) :], strict=True)
    return {
        "weights": {
            path: value
            for path, value in zip(changed, fingerprints, strict=False)
            if value is not None
        },
        "rest": {
            name: value
            for tensor, value in rest_fingerprints
            for name in tensor.names
            if value is not None
        },
    }
