"""Which adapter a call uses: ``with veneer.use(model, "a"): model(x)``.

The selection belongs to the ``with`` block in its thread or asyncio task (see ``veneer.context``), never to the
model: two threads may use two adapters of one model at once. Activation checkpointing runs layers again during
backward, so keep the backward pass inside the block too.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from veneer import context
from veneer.attach import need_group


class use:
    """A context manager that selects the adapter ``name`` of ``model``, or the base alone with None.

    Raises:
        SelectionError: there is no such adapter.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self._uid = need_group(model, name).uid
        self._name = name
        self._tokens: list[Any] = []
        self._entered = False

    def __enter__(self) -> None:
        self._entered = True
        self._tokens.append(context.enter(selection={**context.current.selection, self._uid: self._name}))

    def __exit__(self, *_: object) -> None:
        context.leave(self._tokens.pop())

    def __del__(self) -> None:
        # A bare call looks like a switch that stays on, and would silently do nothing.
        if not getattr(self, "_entered", True):
            warnings.warn(
                f"veneer.use(…, {self._name!r}) selects only inside a `with` block; this call did nothing", stacklevel=2
            )
