"""The interface of a storage: read a frozen weight as a dense tensor, and write a merged one back.

The methods take a weight as the object that stores it: a ``Parameter`` (plain or packed), the
``ParametrizationList`` that computes it, or the whole module if only the module's own forward can
read it (``opaque.py``). ``stored_tensors`` returns the tensors that hold the weight (for example
integers and scales), and ``decode`` computes the dense weight from them. A merge writes the tensors
from ``encode``; an unmerge writes the original tensors again.
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
    #: whether the module computes the weight at each access. The access may change buffers
    #: (spectral norm updates its vectors), so an adapted layer does not run the module's own
    #: forward but computes with the result of ``dense``
    computed: bool = False
    #: the name of the stored tensor that is the dense weight itself, rounded to the weight's dtype;
    #: None for a storage that packs the weight
    dense_name: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_named, (self.name,)

    @abstractmethod
    def holds(self, weight: object) -> bool:
        """Whether ``weight`` is stored in this storage."""

    @abstractmethod
    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that hold the weight and that ``write`` replaces, by names that this storage
        chooses, without dots. They are the weight's own tensors, not copies, so copy them before a
        ``write`` that is to be undone."""

    @abstractmethod
    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense floating-point weight that these stored tensors represent, exactly."""

    @abstractmethod
    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        """The stored tensors for the dense float64 ``values``, rounded once. Does not change
        ``weight``.

        Raises:
            MergeError: this storage cannot write the format of ``weight``.
        """

    @abstractmethod
    def examples(self) -> Iterator[nn.Module]:
        """Small linear layers whose ``weight`` is in this storage, for tests, with sizes that are
        multiples of 16 if packing needs it. Yields none if the storage's library is missing."""

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        """Write stored tensors into ``weight`` in place: it stays the same object, so modules that
        share it see the new values. Writing a copy of an earlier ``stored_tensors`` restores every
        bit."""
        tensors = self.stored_tensors(weight)
        with torch.no_grad():
            for name, values in stored.items():
                tensors[name].copy_(values)

    def dense(self, weight: Any) -> Tensor:
        """The weight as a dense floating-point tensor."""
        return self.decode(weight, self.stored_tensors(weight))

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        """The dense weight in about ``count`` consecutive blocks of rows, so that little of it is
        in memory at a time; in one block if the storage cannot decode some rows alone."""
        yield self.dense(weight)

    def dtype(self, weight: Any) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.dense(weight).dtype

    def shape(self, weight: Any) -> torch.Size:
        """The shape of the dense weight."""
        return weight.shape

    def label(self, weight: Any) -> str:
        """The name of this weight's format for error messages and reports, such as "HQQ"."""
        return self.name

    def device(self, weight: Any) -> torch.device:
        """The device of the weight."""
        return getattr(weight, "device", None) or self.dense(weight).device

    def prepare(self, module: Any) -> None:  # noqa: B027 (most storages have nothing to do)
        """Convert a module's weight to the layout that the other methods read. The dense weight
        stays the same. Called when an adapter is attached and after every ``write``. Calling it
        again changes nothing."""

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors as they are after the module's first call. Some libraries change them
        permanently in this call. Fingerprints of the base are computed from this result, so that a
        base has the same fingerprint before and after the call."""
        return stored

    def release(self, module: Any) -> None:  # noqa: B027
        """Undo ``prepare``. Called when the adapter is detached."""

    def library_misreads(self, weight: Any) -> bool:
        """Whether a known bug of the library makes it dequantise this weight wrongly, both in
        ``decode`` and in the module's own forward."""
        return False

    def modules(self) -> tuple[type[nn.Module], ...]:
        """The module classes for weights in this storage. Their forward must compute what the plain
        class (such as ``nn.Linear``) computes with ``dense(weight)``, because an adapted layer
        computes y = forward(x) + op(x; ΔW), where op is the plain class's operation without bias
        (such as x ΔWᵀ). Classes of libraries that have not been imported are left out."""
        return ()


class GridStorage(Storage):
    """A quantised storage in which each element is a level (an integer or an entry of a table)
    times a scale. The numbers that an element can take, given its scale, are its grid. A merge with
    faithful rounding chooses among them when it rounds W + ΔW."""

    @abstractmethod
    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        """The numbers that each element of the dense weight can take if the scales remain those in
        ``stored``."""

    @abstractmethod
    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """Dense ``values`` as stored tensors, each value rounded to the nearest number of
        ``grid(weight, stored)``. The scales remain those in ``stored``."""


BASES: Registry[Storage] = Registry("storage")


def storage_named(name: str):
    """The registered storage with this name. ``Storage.__reduce__`` makes pickle store a call of
    this function, so that unpickling returns the registered instance and not a second one."""
    return BASES[name]


def register(storage: type[Storage]) -> type[Storage]:
    """Class decorator: add one instance of a storage class to ``BASES``. If several storages hold a
    weight, ``storage_of`` returns the one that was registered last."""
    BASES.add(storage.name, storage())
    return storage


def storage_of(weight: object) -> Storage | None:
    """The storage that holds ``weight``, the last registered one if there are several. None if no
    storage holds it, so that the weight cannot be adapted."""
    return next((storage for storage in reversed(tuple(BASES)) if storage.holds(weight)), None)
