"""The proof of a base: the fingerprint of every tensor that an adapted model computes with.

    base.weights    of the weights that the adapter changes at a low rank, by path
    base.rest       of every other parameter and lasting buffer, but those that the adapter replaces, by each name
    base.fresh      those that no checkpoint ever held (a head that was initialised at loading), by path

What is no part of it: buffers that the model computes itself (they are in no state dict), and what
the adapter holds a copy of, such as running statistics.

A fingerprint is kept as long as its weight lives, and holds while that has the same memory, shape
and type, torch counts no write to it, and a sample of its elements is the same. Writes of few
elements through ``.data`` are not seen; ``forget`` is for whoever does that. Rejected: the count
alone, as torch does not count what is written through ``.data``, which is how much code initialises
or adds to a weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from veneer.attach.adapted_module import state_of
from veneer.bases import Storage
from veneer.fileio import hashing
from veneer.fileio.hashing import XXH3, fingerprint, memory_of
from veneer.models.base_weights import ModuleWeight

#: elements of a weight that are looked at to tell whether it was written to
SAMPLE = 1024


@dataclass(frozen=True)
class Content:
    """The values of one weight: what ``storage`` makes of the tensors that it stored, or ``anchor``
    itself. ``anchor`` lives as long as these."""

    weight: Any
    storage: Storage | None
    stored: Mapping[str, Tensor]
    anchor: Any

    def dense(self, as_loaded: bool = False) -> Tensor:
        """The weight as its storage settles it, or ``as_loaded``, which is what an earlier Veneer
        took prints of."""
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
        whole = getattr(dense, "full_tensor", None)  # of a weight that is spread over processes
        return dense if whole is None else whole()

    def stamp(self) -> tuple[Any, ...] | None:
        """What differs once it was written to; None where nothing tells."""
        own = [self.anchor]
        if isinstance(self.anchor, nn.Module):
            # below such a module are its adapters alone
            deep = self.storage is None or not self.storage.opaque
            own = [*self.anchor.parameters(deep), *self.anchor.buffers(deep)]
        tensors = {id(tensor): tensor for tensor in (*own, *self.stored.values())}.values()
        # one that only stands for others, packed or in other processes, has no memory of its own
        lie = (
            t for t in tensors if not is_traceable_wrapper_subclass(t) and t.layout == torch.strided
        )
        return tuple(map(_stamp, lie)) or None


def _content(weight: ModuleWeight, bits: Mapping[int, Mapping[str, Tensor]]) -> Content:
    """The values of a weight; those that it had before, which ``bits`` has by identity, if an
    adapter is merged into it. The storage must be prepared."""
    before = bits.get(id(weight.weight))
    if before:
        return Content(weight.weight, weight.storage, dict(before), next(iter(before.values())))
    stored = {} if weight.storage is None else weight.storage.stored_tensors(weight.weight)
    return Content(weight.weight, weight.storage, stored, weight.weight)


#: {(kind, as it was loaded): (stamp, fingerprint)} by the identity of the tensor
_KNOWN: Any = WeakIdKeyDictionary()
#: threads that hash take turns, so that none computes what another is about to know
_HASHING = threading.RLock()


def fingerprints_of(
    tensors: Sequence[ModuleWeight],
    bits: Mapping[int, Mapping[str, Tensor]] | None = None,
    kind: str = XXH3,
    as_loaded: bool = False,
) -> list[str]:
    """The fingerprint of each tensor, computed for those alone that changed since they were last
    asked for. ``bits``: what merged weights held before, by identity (``merge.kept_bits``).
    ``kind``: XXH3, or SHA256 to compare with a record that has fingerprints of that kind.
    ``as_loaded``: as ``Content.dense`` has it."""
    with _HASHING, _prepared(tensors):
        contents = [_content(tensor, bits or {}) for tensor in tensors]
        stamps = [content.stamp() for content in contents]
        found: list[str] = []
        for content, stamp in zip(contents, stamps, strict=True):
            then, value = _KNOWN.get(content.anchor, {}).get((kind, as_loaded), (None, ""))
            if stamp is None or then != stamp:
                value = fingerprint(content.dense(as_loaded), kind)
                # nobody has written to it meanwhile
                if stamp is not None and content.stamp() == stamp:
                    _KNOWN.setdefault(content.anchor, {})[kind, as_loaded] = stamp, value
            found.append(value)
        return found


def settling(tensors: Sequence[ModuleWeight]) -> list[ModuleWeight]:
    """Those that are packed in a way which a call may change for good."""
    return [
        one
        for one in tensors
        if one.storage is not None
        and type(one.storage).after_first_call is not Storage.after_first_call
    ]


def earlier_fingerprints(tensors: Sequence[ModuleWeight], kind: str = XXH3) -> dict[str, str]:
    """By name, the fingerprints that an earlier Veneer took of packed weights which a call may
    change: as loaded."""
    packed = settling(tensors)
    fingerprints = zip(packed, fingerprints_of(packed, kind=kind, as_loaded=True), strict=True)
    return {name: fingerprint for tensor, fingerprint in fingerprints for name in tensor.names}


def has_settled(tensor: ModuleWeight) -> bool:
    """Whether a call has changed it so already: nobody can tell how it was loaded."""
    with _HASHING, _prepared([tensor]):
        content = _content(tensor, {})
        return torch.equal(content.dense(), content.dense(as_loaded=True))


def fingerprint_beside(
    tensor: ModuleWeight,
    rows: Sequence[int],
    bits: Mapping[int, Mapping[str, Tensor]] | None = None,
    kind: str = XXH3,
) -> str:
    """The fingerprint of a weight without some of its rows, ascending: those that an adapter puts
    in their place."""
    with _HASHING, _prepared([tensor]):
        return hashing.fingerprint_beside(_content(tensor, bits or {}).dense(), rows, kind)


def forget() -> None:
    """Forget every fingerprint: the next save or load hashes its base anew."""
    with _HASHING:
        _KNOWN.clear()


@contextmanager
def _prepared(tensors: Sequence[ModuleWeight]) -> Iterator[None]:
    """A block in which the storages can read. A module without adapters is then as it was."""
    packed = [tensor for tensor in tensors if tensor.storage is not None]
    try:
        for tensor in packed:
            tensor.storage.prepare(tensor.module)  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for tensor in packed:
            if state_of(tensor.module) is None:
                tensor.storage.release(tensor.module)  # pyright: ignore[reportOptionalMemberAccess]


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return *place, 0 if tensor.is_inference() else tensor._version, _sample(tensor)


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    """Some elements from all over the memory of a tensor, and all of a small one."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not tensor.numel():
        return b""
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    # odd: an even one may be a multiple of the width, and see few columns
    step = max(1, span // SAMPLE) | 1
    with torch._C.DisableTorchFunctionSubclass():  # of a parameter that is packed, the bytes
        some = tensor.as_strided((-(-span // step),), (step,), tensor.storage_offset()).cpu()
        some = some.contiguous()
        return bytes(memory_of(some))


def record_of(
    tensors: Sequence[ModuleWeight],
    changed: Mapping[str, ModuleWeight],
    left_out: Collection[int],
    fingerprints_of_all: Callable[[Sequence[ModuleWeight]], Sequence[str | None]],
) -> dict[str, dict[str, str]]:
    """The fingerprints of a record, "weights" and "rest". ``changed``: what the adapter changes at
    a low rank, by path. ``left_out``: the identities of what is neither: what the adapter replaces.
    ``fingerprints_of_all``: the fingerprint of each tensor, None of one of which nobody knows."""
    own = {id(tensor.weight) for tensor in changed.values()}.union(left_out)
    rest = [tensor for tensor in tensors if id(tensor.weight) not in own and tensor.is_readable]
    found = fingerprints_of_all([*changed.values(), *rest])
    others = zip(rest, found[len(changed) :], strict=True)
    return {
        "weights": {
            at: value for at, value in zip(changed, found, strict=False) if value is not None
        },
        "rest": {
            name: value for tensor, value in others for name in tensor.names if value is not None
        },
    }
