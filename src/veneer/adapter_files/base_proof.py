"""The proof of a base: the fingerprint of every tensor that an adapted model computes with.

The record of an adapter folder holds the proof in three fields:

    base.weights    the fingerprints of the weights that the adapter changes at a low rank, by path
    base.rest       the fingerprints of every other parameter and persistent buffer, under each of
                    its names, except those that the adapter replaces
    base.fresh      the paths of parameters that no checkpoint ever held (a head that was
                    initialised when the model was loaded)

The proof leaves out buffers that the model computes itself (no state dict holds them), and tensors
that the adapter has a copy of, such as running statistics.

A fingerprint is cached until its weight is garbage-collected. It is valid while the weight has the
same memory, shape and dtype, torch's version counter has not moved, and a sample of the weight's
elements is unchanged. The cache does not notice a write to a few elements through ``.data``.
Rejected: the version counter alone. Torch does not count writes through ``.data``, which much code
uses to initialise weights or to add to them.
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

#: the number of elements of a weight that are sampled to detect a write
SAMPLE_SIZE = 1024


@dataclass(frozen=True)
class WeightValues:
    """The values of one weight of a model.

    Fields:
        weight: the parameter, or the packed weight of a quantised layer.
        storage: decodes the values from the tensors ``stored``; None if ``anchor`` is the dense
            tensor itself.
        stored: the tensors that make up a packed weight, such as codes and scales, by name.
        anchor: an object that lives as long as the values do: the key in the cache of fingerprints.
    """

    weight: Any
    storage: Storage | None
    stored: Mapping[str, Tensor]
    anchor: Any

    def dense(self, as_loaded: bool = False) -> Tensor:
        """The weight as a dense tensor.

        Some packed weights round their scales in the first forward call. The tensor is the weight
        after this call, or before it if ``as_loaded``: earlier releases of Veneer took the
        fingerprints before the call."""
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
        full_tensor = getattr(dense, "full_tensor", None)  # a sharded weight has this method
        return dense if full_tensor is None else full_tensor()

    def version(self) -> tuple[Any, ...] | None:
        """A value that changes with every write to the weight; None if no write can be detected."""
        sources = [self.anchor]
        if isinstance(self.anchor, nn.Module):
            # an opaque storage has the weight in the module itself; submodules are only adapters
            recurse = self.storage is None or not self.storage.opaque
            sources = [*self.anchor.parameters(recurse), *self.anchor.buffers(recurse)]
        tensors = {id(tensor): tensor for tensor in (*sources, *self.stored.values())}.values()
        # a wrapper subclass of Tensor (packed or sharded) has no memory of its own
        plain_tensors = (
            tensor
            for tensor in tensors
            if not is_traceable_wrapper_subclass(tensor) and tensor.layout == torch.strided
        )
        return tuple(map(_tensor_version, plain_tensors)) or None


def _values_of(
    weight: ModuleWeight, stored_before_merge: Mapping[int, Mapping[str, Tensor]]
) -> WeightValues:
    """The values of a weight. If an adapter is merged into the weight, they are the values from
    before the merge: ``stored_before_merge`` has its stored tensors by the ``id`` of the weight.
    The weight's storage must be prepared (``_prepare_storages``)."""
    old_stored = stored_before_merge.get(id(weight.weight))
    if old_stored:
        anchor = next(iter(old_stored.values()))
        return WeightValues(weight.weight, weight.storage, dict(old_stored), anchor)
    stored = {} if weight.storage is None else weight.storage.stored_tensors(weight.weight)
    return WeightValues(weight.weight, weight.storage, stored, weight.weight)


#: the fingerprints {(hash kind, as_loaded): (version, fingerprint)}, by ``WeightValues.anchor``
_CACHE: Any = WeakIdKeyDictionary()
#: held while hashing, so that two threads do not compute the same fingerprint
_HASHING_LOCK = threading.RLock()


def fingerprints_of(
    tensors: Sequence[ModuleWeight],
    stored_before_merge: Mapping[int, Mapping[str, Tensor]] | None = None,
    hash_kind: str = XXH3,
    as_loaded: bool = False,
) -> list[str]:
    """The fingerprint of each tensor, from the cache if the tensor has not changed.

    Args:
        stored_before_merge: the stored tensors of merged weights before the merge, by the ``id`` of
            the weight (``stored_weights.bits_before_merge``).
        hash_kind: the hash, XXH3 or SHA256. Only fingerprints of one hash can be compared.
        as_loaded: see ``WeightValues.dense``.
    """
    with _HASHING_LOCK, _prepare_storages(tensors):
        all_values = [_values_of(tensor, stored_before_merge or {}) for tensor in tensors]
        versions = [values.version() for values in all_values]
        fingerprints: list[str] = []
        for values, version in zip(all_values, versions, strict=True):
            cached_version, digest = _CACHE.get(values.anchor, {}).get(
                (hash_kind, as_loaded), (None, "")
            )
            if version is None or cached_version != version:
                digest = fingerprint(values.dense(as_loaded), hash_kind)
                # do not cache if another thread wrote to the weight while it was hashed
                if version is not None and values.version() == version:
                    _CACHE.setdefault(values.anchor, {})[hash_kind, as_loaded] = version, digest
            fingerprints.append(digest)
        return fingerprints


def call_modified_weights(tensors: Sequence[ModuleWeight]) -> list[ModuleWeight]:
    """The packed weights of which the first forward call may change the values permanently."""
    return [
        tensor
        for tensor in tensors
        if tensor.storage is not None
        and type(tensor.storage).after_first_call is not Storage.after_first_call
    ]


def earlier_fingerprints(tensors: Sequence[ModuleWeight], hash_kind: str = XXH3) -> dict[str, str]:
    """The fingerprints, by name, that earlier releases of Veneer took of packed weights: before the
    first forward call, which may change the values."""
    packed = call_modified_weights(tensors)
    fingerprints = zip(
        packed, fingerprints_of(packed, hash_kind=hash_kind, as_loaded=True), strict=True
    )
    return {name: fingerprint for tensor, fingerprint in fingerprints for name in tensor.names}


def was_modified_by_call(tensor: ModuleWeight) -> bool:
    """Whether a forward call has changed the packed weight already, so that the values as they were
    loaded are lost. It has if the change of the first call would have no effect any more."""
    with _HASHING_LOCK, _prepare_storages([tensor]):
        values = _values_of(tensor, {})
        return torch.equal(values.dense(), values.dense(as_loaded=True))


def fingerprint_without_rows(
    tensor: ModuleWeight,
    rows: Sequence[int],
    stored_before_merge: Mapping[int, Mapping[str, Tensor]] | None = None,
    hash_kind: str = XXH3,
) -> str:
    """The fingerprint of a weight without the ``rows`` (ascending) that an adapter replaces."""
    with _HASHING_LOCK, _prepare_storages([tensor]):
        return hashing.fingerprint_without_rows(
            _values_of(tensor, stored_before_merge or {}).dense(), rows, hash_kind
        )


@contextmanager
def _prepare_storages(tensors: Sequence[ModuleWeight]) -> Iterator[None]:
    """Prepare the storages of the tensors for reading, and release them afterwards if their modules
    have no adapters."""
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
    """A value that changes when the tensor moves or its content changes."""
    layout = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return *layout, 0 if tensor.is_inference() else tensor._version, _sample(tensor)


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    """The bytes of elements at even distances in the memory of a tensor, of all elements if there
    are few."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not tensor.numel():
        return b""
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    # odd: an even step may be a multiple of the matrix width, and would then sample few columns
    step = max(1, span // SAMPLE_SIZE) | 1
    with torch._C.DisableTorchFunctionSubclass():  # else a packed parameter would be decoded
        sample = tensor.as_strided((-(-span // step),), (step,), tensor.storage_offset()).cpu()
        sample = sample.contiguous()
        return bytes(memory_of(sample))


def base_record(
    changed_weights: Mapping[str, ModuleWeight],
    unchanged_tensors: Sequence[ModuleWeight],
    fingerprints: Sequence[str | None],
) -> dict[str, dict[str, str]]:
    """The fields "weights" and "rest" of a record: fingerprints by path or name.

    Args:
        changed_weights: the weights that the adapter changes at a low rank, by path.
        unchanged_tensors: all other tensors of the base that the adapter does not replace.
        fingerprints: the fingerprint of each of ``changed_weights`` and then of each of
            ``unchanged_tensors``; None if it is unknown.
    """
    unchanged_fingerprints = zip(
        unchanged_tensors, fingerprints[len(changed_weights) :], strict=True
    )
    return {
        "weights": {
            path: digest
            for path, digest in zip(changed_weights, fingerprints, strict=False)
            if digest is not None
        },
        "rest": {
            name: digest
            for tensor, digest in unchanged_fingerprints
            for name in tensor.names
            if digest is not None
        },
    }
