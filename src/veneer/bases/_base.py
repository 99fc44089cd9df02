"""The contract of a storage: read a frozen weight as dense numbers, and write a merged one back.

A weight is what a module keeps under its name: a ``Parameter`` (plain or packed), or the
``ParametrizationList`` that computes it; or the module itself, if it tells nobody (``opaque.py``).
``stored_tensors`` gives the tensors that hold it, ``decode`` the dense weight that they represent;
a merge writes other tensors of the same names, and an unmerge writes the old ones.
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
    """One way to store a weight. Final subclasses only, without state."""

    name: str
    #: nothing but the module's own forward reads or writes the weight, which is then the module
    #: itself
    opaque: bool = False
    #: reading the weight is a computation that may change state, so that the module's own forward
    #: must not do it
    computed: bool = False
    #: the name under which ``encode`` gives the dense values, rounded to the dtype of the dense
    #: weight and nothing
    #: else; None where it makes something else of them
    dense_name: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_named, (self.name,)

    @abstractmethod
    def holds(self, weight: object) -> bool:
        """Whether ``weight`` is stored this way."""

    @abstractmethod
    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that ``write`` replaces, by names of our own without dots; not copied."""

    @abstractmethod
    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense floating-point weight that these stored tensors represent, exactly."""

    @abstractmethod
    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        """Dense float64 ``values`` as this storage would hold them, rounded once; nothing is
        written."""

    @abstractmethod
    def examples(self) -> Iterator[nn.Module]:
        """Small linear layers (16-divisible sizes where packing needs it) whose ``weight`` is
        stored this way."""

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        """Put stored tensors into ``weight`` in place: it keeps its identity, and so its ties.
        Writing what ``stored_tensors`` gave before restores every bit."""
        tensors = self.stored_tensors(weight)
        with torch.no_grad():
            for name, values in stored.items():
                tensors[name].copy_(values)

    def dense(self, weight: Any) -> Tensor:
        """The weight as a dense floating-point tensor, exactly."""
        return self.decode(weight, self.stored_tensors(weight))

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        """The dense weight in about so many pieces of rows, where it can be read in pieces; else as
        a whole."""
        yield self.dense(weight)

    def dtype(self, weight: Any) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.dense(weight).dtype

    def shape(self, weight: Any) -> torch.Size:
        """The shape of the dense weight."""
        return weight.shape

    def label(self, weight: Any) -> str:
        """The usual name of this storage, for messages."""
        return self.name

    def device(self, weight: Any) -> torch.device:
        """Where the weight lies."""
        return getattr(weight, "device", None) or self.dense(weight).device

    def prepare(self, module: Any) -> None:  # noqa: B027 (most storages have nothing to do)
        """Bring a module's weight into the form that the other methods read; its meaning stays.
        Done when it is attached to and after every ``write``; doing it again does nothing."""

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors as the library itself may leave them in a call, where it changes them
        for good: the same before that call and after it. A fingerprint is of these."""
        return stored

    def release(self, module: Any) -> None:  # noqa: B027
        """Undo what ``prepare`` set on the module, when it is detached."""

    def misread(self, weight: Any) -> bool:
        """Whether its library reads other numbers than those that were stored, here and in its own
        forward."""
        return False

    def modules(self) -> tuple[type[nn.Module], ...]:
        """Module classes whose own forward is their stock layer's on ``dense(weight)``, so that the
        factored form is right there: y = forward(x) + op(x; ΔW)."""
        return ()


class GridStorage(Storage):
    """A storage of numbers that are levels times a scale: faithful rounding chooses among them."""

    @abstractmethod
    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        """The numbers, in the dense weight's shape, that can be stored under the scales of
        ``stored_tensors``."""

    @abstractmethod
    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """Dense ``values``, each rounded to the nearest number of ``grid`` under ``stored``."""


BASES: Registry[Storage] = Registry("storage")


def storage_named(name: str):
    """The registered storage of this name; a pickle holds this call, so that a copy is the one
    instance."""
    return BASES[name]


def register(storage: type[Storage]) -> type[Storage]:
    """Class decorator: put one instance into the registry. The storages that are registered last
    are asked first."""
    BASES.add(storage.name, storage())
    return storage


def storage_of(weight: object) -> Storage | None:
    """The storage that holds ``weight``, the one registered last first."""
    return next((storage for storage in reversed(tuple(BASES)) if storage.holds(weight)), None)
