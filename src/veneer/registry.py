"""The registry of named values that layers, variants, bases and formats use.

A package with a registry imports all of its submodules, and each submodule registers its value when
it is imported. So a new layer, variant or storage is one new file; no other line changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from veneer.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named values of one kind, in the order in which they were registered."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        """Register ``value`` and return it.

        Raises:
            ConfigError: the name is taken. So no file silently replaces the value of another.
        """
        if name in self._values:
            raise ConfigError(
                f"a second {self.kind} named {name!r}", "a new name", "choose another name"
            )
        self._values[name] = value
        return value

    def remove(self, name: str) -> None:
        del self._values[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            problem = f"{self.kind} {name!r}{nearest(name, self._values)}"
            raise ConfigError(
                problem, f"one of {', '.join(self._values)}", f"choose a {self.kind} that exists"
            )
        return self._values[name]

    def __iter__(self) -> Iterator[T]:
        return iter(self._values.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._values)


def lazy_submodules(package: str, names: Iterable[str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package. It imports each of these submodules when the submodule is
    first used as an attribute."""
    submodules = frozenset(names)

    def import_submodule(name: str) -> Any:
        if name not in submodules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return import_submodule


def import_all(package: str, path: list[str]) -> None:
    """Import all submodules of a package, in alphabetical order."""
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")
