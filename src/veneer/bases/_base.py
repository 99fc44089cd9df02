"""The interface of a storage: read a frozen weight as a dense tensor, and write a merged one back.

The methods take a weight as the object that a module has under the weight's name: a ``Parameter``
(plain or packed), the ``ParametrizationList`` that computes it, or the module itself if nothing
else can read it (``opaque.py``). ``stored_tensors`` returns the tensors that hold the weight, and
``decode`` the dense weight that they represent. A merge writes new tensors under the same names; an
unmerge writes the original tensors again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.grid import Grid
from veneer.registry import Registry


class Storage(ABC):
    """One way to store a weight. Subclasses are final and have no state."""

    name: str
    #: whether only the module's own forward can read the weight; the methods then take the module
    #: in place of a weight
    opaque: bool = False
    #: whether the module computes the weight at each access, which may change state (spectral norm
    #: does); an adapted layer then computes with ``dense``, not by the module's own forward
    computed: bool = False
    #: the name under which ``encode`` returns the weight as one dense tensor, only rounded to the
    #: weight's dtype; None for a storage that packs the weight
    dense_name: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_named, (self.name,)

    @abstractmethod
    def holds(self, weight: object) -> bool:
        """Whether ``weight`` is stored in this storage."""

    @abstractmethod
    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that ``write`` replaces (themselves, not copies), by names that this storage
        chooses. The names contain no dots."""

    @abstractmethod
    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense floating-point weight that these stored tensors represent, exactly."""

    @abstractmethod
    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        """Dense float64 ``values`` as stored tensors, rounded once. Writes nothing."""

    @abstractmethod
    def examples(self) -> Iterator[nn.Module]:
        """Small linear layers whose ``weight`` is in this storage. Their sizes are multiples of 16
        if packing needs this."""

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        """Write stored tensors into ``weight`` in place, so that it stays the same object and its
        ties remain. Writing a copy of an earlier ``stored_tensors`` restores every bit."""
        tensors = self.stored_tensors(weight)
        with torch.no_grad():
            for name, values in stored.items():
                tensors[name].copy_(values)

    def dense(self, weight: Any) -> Tensor:
        """The weight as a dense floating-point tensor."""
        return self.decode(weight, self.stored_tensors(weight))

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        """The dense weight in about ``count`` blocks of rows if the storage can decode some rows
        alone, else in one block."""
        yield self.dense(weight)

    def dtype(self, weight: Any) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.dense(weight).dtype

    def shape(self, weight: Any) -> torch.Size:
        """The shape of the dense weight."""
        return weight.shape

    def label(self, weight: Any) -> str:
        """The usual name of this storage in error messages and reports."""
        return self.name

    def device(self, weight: Any) -> torch.device:
        """The device of the weight."""
        return getattr(weight, "device", None) or self.dense(weight).device

    def prepare(self, module: Any) -> None:  # noqa: B027 (most storages have nothing to do)
        """Convert a module's weight to the layout that the other methods read, without changing its
        values. Called when an adapter is attached and after every ``write``; a second call does
        nothing."""

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors as the library leaves them after a call of the module, if the call
        changes them permanently. Fingerprints are computed from this result, which is the same
        before and after the call."""
        return stored

    def release(self, module: Any) -> None:  # noqa: B027
        """Undo ``prepare``. Called when the adapter is detached."""

    def library_misreads(self, weight: Any) -> bool:
        """Whether the library has a fault by which it decodes this weight to other numbers than it
        has stored, both in ``decode`` and in its own forward."""
        return False

    def modules(self) -> tuple[type[nn.Module], ...]:
        """Classes of modules that hold such weights and whose forward computes what the layer
        kind's own class (such as ``nn.Linear``) computes with ``dense(weight)``. So the factored
        path, y = forward(x) + op(x; ΔW), is correct for them."""
        return ()


class GridStorage(Storage):
    """A storage in which each element is a level (an integer or a number of a table) times a scale.
    A merge chooses among these numbers when it rounds W + ΔW."""

    @abstractmethod
    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        """The numbers that each element of the dense weight can take if the scales remain those in
        ``stored``."""

    @abstractmethod
    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """Dense ``values`` as stored tensors, each rounded to the nearest number of ``grid``."""


BASES: Registry[Storage] = Registry("storage")


def storage_named(name: str):
    """The registered storage of this name. A pickled storage holds this call, so that unpickling
    gives the registered instance."""
    return BASES[name]


def register(storage: type[Storage]) -> type[Storage]:
    """Class decorator: register one instance. Storages that are registered later take
    precedence."""
    BASES.add(storage.name, storage())
    return storage


def storage_of(weight: object) -> Storage | None:
    """The storage that holds ``weight``; a storage that was registered later takes precedence."""
    return next((storage for storage in reversed(tuple(BASES)) if storage.holds(weight)), None)
