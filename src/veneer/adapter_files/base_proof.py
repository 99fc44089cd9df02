"""The fingerprints of a base model's tensors, by which a later load can check that a model is the
base that an adapter was trained on.

A fingerprint is a hash of a tensor's shape and values, rounded to bfloat16 (``fileio/hashing.py``).
The record of an adapter folder holds the fingerprints in three fields:

    base.weights    the fingerprints of the weights that the adapter changes at a low rank, by path
    base.rest       the fingerprints of every other parameter and persistent buffer, under each of
                    its names, except those that the adapter replaces
    base.fresh      the paths of parameters that no checkpoint ever held (a head that was
                    initialised when the model was loaded)

No fingerprint is recorded for non-persistent buffers, which the model computes itself, and for
tensors that the adapter replaces by its own copy, such as running statistics.

A fingerprint is cached until its weight is garbage-collected. It is used while the weight has the
same memory, shape and dtype, torch's version counter has not moved, and a sample of the weight's
elements is unchanged. The cache does not notice a write to a few elements through ``.data``.
Rejected: to rely on the version counter alone. Torch does not count writes through ``.data``, which
much code uses to initialise weights or to add to them.
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

from veneer.attach import layer_states, state_of
from veneer.bases import Storage, weight_of
from veneer.fileio import hashing
from veneer.fileio.hashing import XXH3, fingerprint, memory_of
from veneer.models.base_weights import ModuleWeight

#: about how many elements of a weight are sampled, to detect writes that torch does not count
SAMPLE_SIZE = 1024


@dataclass(frozen=True)
class WeightValues:
    """The values of one weight of a model.

    Fields:
        weight: the parameter, or the packed weight of a quantised layer.
        storage: decodes the values from the tensors ``stored``; None if ``anchor`` is the dense
            tensor itself.
        stored: the tensors that make up a packed weight, such as codes and scales, by name.
        anchor: an object that lives as long as the values do. The cache of fingerprints has it as
            a weak key.
    """

    weight: Any
    storage: Storage | None
    stored: Mapping[str, Tensor]
    anchor: Any

    def dense(self, as_loaded: bool = False) -> Tensor:
        """The weight as a dense tensor.

        Some packed weights round their scales permanently in the first forward call. The result
        has the values after that call, even if it has not run yet. With ``as_loaded`` it has the
        values before that call, whose fingerprints earlier releases of Veneer recorded."""
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
        """A value that differs after a write to the weight (see ``_tensor_version``). None if the
        weight has no plain tensor to observe; its fingerprint must then not be cached."""
        held_tensors = [self.anchor]
        if isinstance(self.anchor, nn.Module):
            # with an opaque storage, which only the module's own forward can decode, the tensors of
            # the module itself are the weight, and its submodules are only adapters
            recurse = self.storage is None or not self.storage.opaque
            held_tensors = [*self.anchor.parameters(recurse), *self.anchor.buffers(recurse)]
        tensors = {id(tensor): tensor for tensor in (*held_tensors, *self.stored.values())}.values()
        # a wrapper subclass of Tensor (packed or sharded) has no memory of its own to compare
        plain_tensors = (
            tensor
            for tensor in tensors
            if not is_traceable_wrapper_subclass(tensor) and tensor.layout == torch.strided
        )
        return tuple(map(_tensor_version, plain_tensors)) or None


def _values_of(
    module_weight: ModuleWeight, stored_before_merge: Mapping[int, Mapping[str, Tensor]]
) -> WeightValues:
    """The values of a weight. If an adapter is merged into the weight, they are the values from
    before the merge.

    Args:
        module_weight: the weight, whose storage must be prepared (``_prepare_storages``).
        stored_before_merge: {``id`` of a merged weight: the tensors that stored it before the
            merge, by name}.
    """
    stored_tensors = stored_before_merge.get(id(module_weight.weight))
    if stored_tensors:
        anchor = next(iter(stored_tensors.values()))
        return WeightValues(
            module_weight.weight, module_weight.storage, dict(stored_tensors), anchor
        )
    stored_now = (
        {}
        if module_weight.storage is None
        else module_weight.storage.stored_tensors(module_weight.weight)
    )
    return WeightValues(
        module_weight.weight, module_weight.storage, stored_now, module_weight.weight
    )


#: the cached fingerprints of each weight, by ``WeightValues.anchor``: {(hash kind, as_loaded):
#: (the weight's version when it was hashed, fingerprint)}
_CACHE: Any = WeakIdKeyDictionary()
#: held while hashing, so that two threads do not compute the same fingerprint
_HASHING_LOCK = threading.RLock()


def fingerprints_of(
    module_weights: Sequence[ModuleWeight],
    stored_before_merge: Mapping[int, Mapping[str, Tensor]] | None = None,
    hash_kind: str = XXH3,
    as_loaded: bool = False,
) -> list[str]:
    """The fingerprint of each weight or buffer, from the cache if its values have not changed.

    Args:
        stored_before_merge: the tensors that held each merged weight before the merge, by name, by
            the ``id`` of the weight (``stored_weights.bits_before_merge``). The fingerprints of
            these weights are those from before the merge.
        hash_kind: the hash, XXH3 or SHA256. Only fingerprints of one hash can be compared.
        as_loaded: whether to hash packed weights as they are before their first forward call, which
            may round their scales, instead of after it.
    """
    with _HASHING_LOCK, _prepare_storages(module_weights):
        all_values = [
            _values_of(module_weight, stored_before_merge or {}) for module_weight in module_weights
        ]
        versions = [values.version() for values in all_values]
        fingerprints: list[str] = []
        for values, version in zip(all_values, versions, strict=True):
            cached_version, digest = _CACHE.get(values.anchor, {}).get(
                (hash_kind, as_loaded), (None, "")
            )
            if version is None or cached_version != version:
                digest = fingerprint(values.dense(as_loaded), hash_kind)
                # another thread may have written to the weight while it was hashed: then the
                # fingerprint may be of mixed values, and is not cached
                if version is not None and values.version() == version:
                    _CACHE.setdefault(values.anchor, {})[hash_kind, as_loaded] = version, digest
            fingerprints.append(digest)
        return fingerprints


def call_modified_weights(module_weights: Sequence[ModuleWeight]) -> list[ModuleWeight]:
    """The weights among ``module_weights`` whose values the first forward call may change for good,
    such as bitsandbytes' 4-bit weights, whose scales it rounds on some processors."""
    return [
        module_weight
        for module_weight in module_weights
        if module_weight.storage is not None
        and type(module_weight.storage).after_first_call is not Storage.after_first_call
    ]


def earlier_fingerprints(
    module_weights: Sequence[ModuleWeight], hash_kind: str = XXH3
) -> dict[str, str]:
    """The fingerprints, by name, that earlier releases of Veneer recorded for packed weights: those
    of the values before the first forward call, which may change them. Weights that no forward call
    changes are left out."""
    packed_weights = call_modified_weights(module_weights)
    fingerprints = zip(
        packed_weights,
        fingerprints_of(packed_weights, hash_kind=hash_kind, as_loaded=True),
        strict=True,
    )
    return {
        name: fingerprint
        for module_weight, fingerprint in fingerprints
        for name in module_weight.names
    }


def was_modified_by_call(module_weight: ModuleWeight) -> bool:
    """Whether a forward call has changed the packed weight already, so that the values as they were
    loaded are lost. This is the case if rounding the weight as the first call does has no effect on
    its present values."""
    with _HASHING_LOCK, _prepare_storages([module_weight]):
        values = _values_of(module_weight, {})
        return torch.equal(values.dense(), values.dense(as_loaded=True))


def fingerprint_without_rows(
    module_weight: ModuleWeight,
    rows: Sequence[int],
    stored_before_merge: Mapping[int, Mapping[str, Tensor]] | None = None,
    hash_kind: str = XXH3,
) -> str:
    """The fingerprint of a weight without the ``rows`` that an adapter replaces, so that their
    values in the base do not matter.

    Args:
        rows: the indices of the rows, ascending.
        stored_before_merge, hash_kind: as in ``fingerprints_of``.
    """
    with _HASHING_LOCK, _prepare_storages([module_weight]):
        return hashing.fingerprint_without_rows(
            _values_of(module_weight, stored_before_merge or {}).dense(), rows, hash_kind
        )


@contextmanager
def _prepare_storages(module_weights: Sequence[ModuleWeight]) -> Iterator[None]:
    """Prepare the storages of packed weights for reading inside the block. Afterwards the storages
    of modules without adapters are released; adapters need theirs prepared."""
    packed_weights = [weight for weight in module_weights if weight.storage is not None]
    try:
        for weight in packed_weights:
            weight.storage.prepare(weight.module)  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for weight in packed_weights:
            if state_of(weight.module) is None:
                weight.storage.release(weight.module)  # pyright: ignore[reportOptionalMemberAccess]


def _tensor_version(tensor: Tensor) -> tuple[Any, ...]:
    """A value that differs after the tensor has moved to other memory, torch has counted a write to
    it, or one of its sampled elements has changed."""
    memory_layout = (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )
    return *memory_layout, 0 if tensor.is_inference() else tensor._version, _sample(tensor)


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    """The bytes of about SAMPLE_SIZE elements at even distances in the memory of a tensor, or of
    all its elements if there are fewer."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not tensor.numel():
        return b""
    element_span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    # the step is made odd, because an even step is more often a multiple of the matrix width, with
    # which all samples would lie in one column
    sample_step = max(1, element_span // SAMPLE_SIZE) | 1
    with torch._C.DisableTorchFunctionSubclass():  # so that no packed parameter is decoded
        sample = tensor.as_strided(
            (-(-element_span // sample_step),), (sample_step,), tensor.storage_offset()
        ).cpu()
        sample = sample.contiguous()
        return bytes(memory_of(sample))


def base_record(
    changed_weights: Mapping[str, ModuleWeight],
    unchanged_weights: Sequence[ModuleWeight],
    fingerprints: Sequence[str | None],
) -> dict[str, dict[str, str]]:
    """The fields "weights" and "rest" of the entry "base" in an adapter's record: fingerprints by
    path or name. Unknown fingerprints are left out.

    Args:
        changed_weights: the weights that the adapter changes at a low rank, by path.
        unchanged_weights: all other parameters and buffers of the base that the adapter does not
            replace. Each fingerprint is recorded under all names of its tensor.
        fingerprints: the fingerprint of each of ``changed_weights`` and then of each of
            ``unchanged_weights``; None if it is unknown.
    """
    unchanged_fingerprints = zip(
        unchanged_weights, fingerprints[len(changed_weights) :], strict=True
    )
    return {
        "weights": {
            path: digest
            for path, digest in zip(changed_weights, fingerprints, strict=False)
            if digest is not None
        },
        "rest": {
            name: digest
            for module_weight, digest in unchanged_fingerprints
            for name in module_weight.names
            if digest is not None
        },
    }


def changed_weight_ids(model: nn.Module, adapter_name: str) -> set[int]:
    """The ``id`` of each weight that the adapter changes at a low rank, under every name of a tied
    weight, which another adapter may have untied."""
    layer_adapters = [
        (module, layer_state.get(adapter_name)) for _, module, layer_state in layer_states(model)
    ]
    return {
        id(weight_of(module, weight_name))
        for module, layer_adapter in layer_adapters
        for weight_name in (() if layer_adapter is None else layer_adapter.changes)
    }
