"""The interface of a storage: read a frozen weight as dense numbers, and write a merged one back.

A weight is the object that a module has under the weight's name: a ``Parameter`` (plain or packed),
the ``ParametrizationList`` that computes it, or the module itself if nothing else can read it
(``opaque.py``). ``stored_tensors`` returns the tensors that hold the weight, ``decode`` the dense
weight that they represent; a merge writes other tensors of the same names, and an unmerge writes
the original ones.
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
    #: only the module's own forward can read the weight, so the weight is represented by the module
    #: itself
    opaque: bool = False
    #: reading the weight is a computation that may change state, so the module's own forward must
    #: not run it
    computed: bool = False
    #: the name under which ``encode`` returns the dense values if it only rounds them to the dtype
    #: of the dense weight; None if it changes them further
    dense_name: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_named, (self.name,)

    @abstractmethod
    def holds(self, weight: object) -> bool:
        """Whether ``weight`` is stored this way."""

    @abstractmethod
    def stored_tensors(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that ``write`` replaces, by names without dots that are this storage's; not
        copied."""

    @abstractmethod
    def decode(self, weight: Any, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense floating-point weight that these stored tensors represent, exactly."""

    @abstractmethod
    def encode(self, weight: Any, values: Tensor) -> dict[str, Tensor]:
        """Dense float64 ``values`` in the form of this storage, rounded once; nothing is
        written."""

    @abstractmethod
    def examples(self) -> Iterator[nn.Module]:
        """Small linear layers (16-divisible sizes where packing needs it) whose ``weight`` is
        stored this way."""

    def write(self, weight: Any, stored: Mapping[str, Tensor]) -> None:
        """Write stored tensors into ``weight`` in place, so that it keeps its identity and ties.
        Writing the earlier result of ``stored_tensors`` restores every bit."""
        tensors = self.stored_tensors(weight)
        with torch.no_grad():
            for name, values in stored.items():
                tensors[name].copy_(values)

    def dense(self, weight: Any) -> Tensor:
        """The weight as a dense floating-point tensor, exactly."""
        return self.decode(weight, self.stored_tensors(weight))

    def pieces(self, weight: Any, count: int) -> Iterator[Tensor]:
        """The dense weight in about ``count`` pieces of rows if it can be read in pieces, else as
        one."""
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
        """The device of the weight."""
        return getattr(weight, "device", None) or self.dense(weight).device

    def prepare(self, module: Any) -> None:  # noqa: B027 (most storages have nothing to do)
        """Bring a module's weight into the form that the other methods read, without changing its
        values. Called when an adapter is attached and after every ``write``; calling it again does
        nothing."""

    def after_first_call(self, weight: Any, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stored tensors in the state in which the library leaves them after a call, if a call
        changes them permanently. Fingerprints are computed from this result, which is the same
        before and after the call."""
        return stored

    def release(self, module: Any) -> None:  # noqa: B027
        """Undo ``prepare``, when the module is detached."""

    def misread(self, weight: Any) -> bool:
        """Whether the library itself decodes other numbers than those that were stored, in
        ``decode`` and in its own forward."""
        return False

    def modules(self) -> tuple[type[nn.Module], ...]:
        """Module classes whose own forward equals their stock layer's on ``dense(weight)``, so that
        the factored form is right: y = forward(x) + op(x; ΔW)."""
        return ()


class GridStorage(Storage):
    """A storage whose numbers are levels times a scale; faithful rounding chooses among them."""

    @abstractmethod
    def grid(self, weight: Any, stored: Mapping[str, Tensor]) -> Grid:
        """The numbers, in the dense weight's shape, that can be stored with the scales of
        ``stored_tensors``."""

    @abstractmethod
    def onto(self, weight: Any, stored: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """Dense ``values``, each rounded to the nearest number of ``grid`` under ``stored``."""


BASES: Registry[Storage] = Registry("storage")


def storage_named(name: str):
    """The registered storage of this name. Pickles contain this call, so that a copy is the same
    instance."""
    return BASES[name]


def register(storage: type[Storage]) -> type[Storage]:
    """Class decorator: register one instance. Storages that are registered later take
    precedence."""
    BASES.add(storage.name, storage())
    return storage


def storage_of(weight: object) -> Storage | None:
    """The storage that holds ``weight``; a storage that was registered later takes precedence."""
    return next((storage for storage in reversed(tuple(BASES)) if storage.holds(weight)), None)
