"""A registry of named entries, for the packages ``layers``, ``variants``, ``bases``, ``formats``
and ``train.tasks``.

Such a package imports all of its submodules, and each submodule registers its entries when it is
imported. So a new entry, such as a variant, needs one new file, and no list has to be changed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from veneer.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of type ``T``, in the order in which they were registered."""

    def __init__(self, entry_label: str) -> None:
        self.entry_label = entry_label  # what error messages call an entry, such as "variant"
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` under ``name`` and return it.

        Raises:
            ConfigError: another entry has this name already.
        """
        if name in self._entries:
            raise ConfigError(
                f"a second {self.entry_label} named {name!r}", "a new name", "choose another name"
            )
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(
                f"{self.entry_label} {name!r}{nearest(name, self._entries)}",
                f"one of {', '.join(self._entries)}",
                f"choose a {self.entry_label} that exists",
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)


def lazy_submodules(package: str, submodule_names: Iterable[str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for ``package``, which imports a submodule when it is first used as
    an attribute of the package."""
    lazy_names = frozenset(submodule_names)

    def import_submodule(name: str) -> Any:
        if name not in lazy_names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return import_submodule


def import_all(package: str, search_path: list[str]) -> None:
    """Import all submodules of ``package`` in alphabetical order. ``search_path`` is the package's
    ``__path__``."""
    for submodule_name in sorted(module.name for module in pkgutil.iter_modules(search_path)):
        importlib.import_module(f"{package}.{submodule_name}")
