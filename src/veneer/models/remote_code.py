"""Python code in a model's folder, which transformers would run or ask at the terminal to run. With
Veneer it runs only if the user has named a base whose code is trusted, and never for an adapter.

    with trust_remote_code("owner/name"):
        base = load_base("owner/name")

``code_options`` returns the arguments for each ``from_pretrained`` and ``from_config`` of
transformers. A config can also name an attention kernel of the hub, which is remote code too:
``refuse_hub_kernel`` and ``without_hub_kernel`` keep it from running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from veneer.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

#: names of the bases whose code may run, within blocks of ``trust_remote_code``
_TRUSTED: ContextVar[frozenset[str]] = ContextVar("veneer_trusted_bases", default=frozenset())


@contextmanager
def trust_remote_code(base: str | Path | None, trusted: bool = True) -> Iterator[None]:
    """A block in which Python code in the folder of ``base`` may run when the base is loaded by
    this name. If ``base`` is None or ``trusted`` is False, the block changes nothing."""
    trusted_names = {str(base)} if trusted and base is not None else set()
    reset_token = _TRUSTED.set(_TRUSTED.get() | trusted_names)
    try:
        yield
    finally:
        _TRUSTED.reset(reset_token)


def with_trust_of_config(
    function: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Decorator: run the function in a block of ``trust_remote_code``. The function's first
    argument must be the configuration of a run, whose field ``trust_remote_code`` says whether code
    of its ``base`` may run."""

    @wraps(function)
    def call(config: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with trust_remote_code(config.base, config.trust_remote_code):
            return function(config, *args, **kwargs)

    return call


def code_options(base: str | Path | None = None) -> dict[str, Any]:
    """The keyword arguments that tell transformers whether Python code in the folder of ``base``
    may run: only within a block of ``trust_remote_code`` for this base. None is for files that
    belong to no base, whose code may never run."""
    return {"trust_remote_code": base is not None and str(base) in _TRUSTED.get()}


def hub_kernel(config: Any) -> str | None:
    """The attention kernel of the Hugging Face hub ("owner/name") that a config of transformers or
    one of its sub-configs names; None if they name none."""
    from transformers import PreTrainedConfig

    implementation = getattr(config, "_attn_implementation", None)
    if isinstance(implementation, str) and "/" in implementation:
        return implementation
    sub_configs = (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))
    return next(
        (kernel for sub_config in sub_configs if (kernel := hub_kernel(sub_config)) is not None),
        None,
    )


def refuse_hub_kernel(config: Any, base: str) -> None:
    """Raise a ``ConfigError`` if the config names an attention kernel of the hub, which
    transformers would download and run. ``base``: the user's name of the base, for the error."""
    if (kernel := hub_kernel(config)) is not None:
        raise ConfigError(
            f"{base}, whose config names the attention {kernel!r}: code that would be fetched from"
            " the hub and run",
            "an attention of transformers' own",
            f'pass --attention sdpa (attention="sdpa"), or --attention {kernel} if you trust that'
            " code",
        )


def without_hub_kernel(config: Any) -> Any:
    """Replace an attention kernel of the hub that the config names by transformers' own attention,
    in place, and return the config."""
    if hub_kernel(config) is not None:
        config._attn_implementation = "sdpa"
    return config
