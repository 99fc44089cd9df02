"""Routes and models that a folder beside the server's core adds to a service.

``start(settings, keys, plugin)`` asks the plugin for its extension once the base is loaded. The
core then calls the extension at the places listed here and knows nothing else of it, so that the
core imports no extension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from veneer.serve import limits
from veneer.serve.access import Key


class Extension(ABC):
    """One addition to a running service.

    Attributes:
        routers: its routes.
        path_prefix: routes below it need a key, but for those below ``public_paths``.
        secret_path: the segment after it is a secret, which the log leaves out.
        key_prefix: what its clients put before a key; it is taken off.
        max_body: bytes of a body below ``path_prefix``, from a client with a key.
        model_prefix: how the names of its models begin; ``resolve_model`` gets them.
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
        """Whether it can take requests."""

    @abstractmethod
    async def resolve_model(self, key: Key, model: str) -> dict[str, float]:
        """The bank's adapters, by weight, that a model name means. ``Refusal``: there is none that
        the key may use."""

    @abstractmethod
    async def reserve_tokens(self, key: Key, count: int) -> Callable[[int], None]:
        """Count tokens that a completion may take at most. The returned function is called with the
        number that it took. ``Refusal``: they exceed the key's quota."""

    @abstractmethod
    def drain(self) -> None:
        """Finish what runs and take no more."""

    @abstractmethod
    def close(self) -> None:
        """Stop its threads and close its files."""


class Plugin(Protocol):
    """Creates an extension when a service starts."""

    @property
    def turn(self) -> AbstractContextManager[Any]:
        """Held around each step of the engine, and by the extension while it changes the model's
        layers."""
        ...

    def extend(self, service: Any, model: Any) -> Extension:
        """The extension of a service. ``ConfigError``: the service cannot be extended."""
        ...
