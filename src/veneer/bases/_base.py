"""The contract of a storage: read a frozen weight as dense numbers, and write a merged one back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from veneer.registry import Registry


class Storage(ABC):
    """One way to store a weight. Final subclasses only, without state."""

    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_named, (self.name,)

    @abstractmethod
    def holds(self, weight: object) -> bool:
        """Whether ``weight`` (what the module keeps under the weight's name) is stored this way."""

    @abstractmethod
    def dense(self, weight: Tensor) -> Tensor:
        """The weight as a floating-point tensor, exactly."""

    @abstractmethod
    def encode(self, weight: Tensor, values: Tensor) -> Tensor:
        """float64 ``values`` as this storage would hold them, rounded once; nothing is written."""

    @abstractmethod
    def write(self, weight: Tensor, encoded: Tensor) -> None:
        """Put what ``encode`` gave into ``weight`` in place: the parameter keeps its identity, and so its ties."""

    @abstractmethod
    def examples(self) -> Iterator[nn.Parameter]:
        """Small weights that are stored this way."""


BASES: Registry[Storage] = Registry("storage")


def storage_named(name: str):
    """The registered storage of this name; a pickle holds this call, so that a copy is the one instance."""
    return BASES[name]


def register(storage: type[Storage]) -> type[Storage]:
    BASES.add(storage.name, storage())
    return storage


def storage_of(weight: object) -> Storage | None:
    """The storage that holds ``weight``, the one registered last first."""
    return next((storage for storage in reversed(tuple(BASES)) if storage.holds(weight)), None)
