"""What holds for one call: which adapter each model uses, and which arithmetic.

The state is an immutable value in a ``ContextVar``, so it belongs to the running thread or asyncio task. It is read as
``context.current``, an attribute of the module (PEP 562) and no function: ``torch.compile`` cannot trace
``ContextVar.get``, but guards module attributes, and reads this one afresh before each run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch


@dataclass(frozen=True)
class Context:
    """``selection``: by model's id what it uses (``ActiveAdapter``; missing: its default). ``path`` forces "factored"
    or "materialised". ``reached`` collects what runs, for ``check``. ``outer`` is what holds after the block."""

    selection: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    reached: set[Any] | None = None
    outer: Context | None = field(default=None, repr=False, compare=False)


_NOTHING = Context()
_CONTEXT: ContextVar[Context] = ContextVar("veneer", default=_NOTHING)

if TYPE_CHECKING:
    current: Context


def __getattr__(name: str) -> Context:
    if name != "current":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = _CONTEXT.get()
    if own is not _NOTHING or torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls("context"):
        return own
    # A GPU's part of backward runs in threads of torch's own, which have no context of ours; activation checkpointing
    # runs layers again there. torch hands them a copy of the context of whoever called ``backward``.
    return torch._C._get_obj_in_tls("context").get(_CONTEXT, _NOTHING)


def enter(**changes: Any) -> None:
    """Replace fields of the current context, until ``leave``."""
    now = _CONTEXT.get()
    _CONTEXT.set(replace(now, **changes, outer=now))


def leave() -> None:
    """Restore what was before the last ``enter`` in this thread or task."""
    outer = _CONTEXT.get().outer
    assert outer is not None, "left more often than entered"
    _CONTEXT.set(outer)


@contextmanager
def changed(**changes: Any) -> Iterator[None]:
    """``enter`` and ``leave`` around a block, also when it raises."""
    enter(**changes)
    try:
        yield
    finally:
        leave()
