"""The interface through which other packages add routes and models to a service.

``start(settings, keys, plugin)`` asks the plugin for its extension after the base is loaded. The
server calls an extension only through the methods below, so it need not import the package of any
extension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from veneer.serve import limits
from veneer.serve.access import Key


class Extension(ABC):
    """An extension of a running service.

    Attributes:
        routers: FastAPI routers with the extension's routes.
        path_prefix: the beginning of the URL paths of its routes. Requests for these paths need a
            key, except for paths that begin with one of ``public_paths``.
        secret_path: the beginning of paths whose next segment is a secret, which the log masks.
        key_prefix: a prefix that clients put before their key in the header X-API-Key; the server
            removes it.
        max_body: the most bytes of a request body for its routes, if the request has a valid key.
        model_prefix: model names that begin with it are resolved by ``resolve_model``.
    """

    routers: Sequence[Any] = ()
    path_prefix: str
    public_paths: tuple[str, ...] = ()
    secret_path: str
    key_prefix: str
    max_body: int = limits.BODY
    model_prefix: str

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether the extension can take requests."""

    @abstractmethod
    async def resolve_model(self, key: Key, model: str) -> dict[str, float]:
        """The weights of the bank's adapters that a model name stands for, by adapter name.
        ``Refusal``: there is no such model, or the key may not use it."""

    @abstractmethod
    def check_model(self, key: Key, model: str) -> None:
        """Check a model name without resolving it. ``Refusal``: there is no such model, or the key
        may not use it."""

    @abstractmethod
    async def reserve_tokens(self, key: Key, count: int) -> Callable[[int], None]:
        """Reserve ``count`` tokens of the key's quota: the most that the answers to an HTTP request
        can use, prompts included. The caller calls the returned function with the number that was
        used. ``Refusal``: the quota does not have so many tokens left."""

    @abstractmethod
    def drain(self) -> None:
        """Finish the work that runs, and refuse new requests."""

    @abstractmethod
    def close(self) -> None:
        """Stop the extension's threads and close its files."""


class Plugin(Protocol):
    """Creates an extension when a service starts."""

    @property
    def model_lock(self) -> AbstractContextManager[Any]:
        """A lock. The engine holds it during each step, and the extension while it changes the
        model's layers."""
        ...

    def extend(self, service: Any, model: Any) -> Extension:
        """Create the extension of a service. ``ConfigError``: the service cannot be extended."""
        ...
