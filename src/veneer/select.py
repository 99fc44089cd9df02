"""Which adapter a call uses: ``with veneer.use(model, "a"): model(x)``.

The selection belongs to the ``with`` block in its thread or asyncio task (see ``veneer.context``), never to the
model: two threads may use two adapters of one model at once. Activation checkpointing runs layers again during
backward, so keep the backward pass inside the block too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from veneer import context
from veneer.adapted import BASE
from veneer.attach import need_group, unwrap
from veneer.errors import SelectionError, sentence
from veneer.kernels import plan
from veneer.rows import by_rows


class use:
    """A context manager that selects the adapter ``name`` of ``model``, or the base alone with None.

    A sequence of names selects one for each row of the batch: ``with veneer.use(model, ["a", None, "b"]):``. Every
    layer then runs once for each distinct name.

    Args:
        path: "factored" or "materialised" overrides what ``Handle.plan`` says for the layers that have both; None
            leaves it to the plan.

    Raises:
        SelectionError: there is no such adapter, or no such path.
    """

    def __init__(self, model: nn.Module, name: str | Sequence[str | None] | None, *, path: str | None = None) -> None:
        if path not in (None, plan.FACTORED, plan.MATERIALISED):
            found = f"path={path!r}"
            do = f"use {plan.FACTORED!r}, {plan.MATERIALISED!r} or None"
            raise SelectionError(sentence(found, "a way to compute an adapted layer", do))
        self._path = {} if path is None else {"path": path}
        group = need_group(model, walk=False)
        self._uid = group.uid
        self._name = name
        if name is None or isinstance(name, str):
            self._selected = BASE if name is None else need_group(model, name, walk=False).selections[name]
        else:
            for one in name:
                need_group(model, one, walk=False)
            self._selected = by_rows(unwrap(model), group, name)
        self._entered = False

    def __enter__(self) -> None:
        self._entered = True
        context.enter(selection={**context.current.selection, self._uid: self._selected}, **self._path)

    def __exit__(self, *_: object) -> None:
        context.leave()

    def __del__(self) -> None:
        # A bare call looks like a switch that stays on, and would silently do nothing.
        if not getattr(self, "_entered", True):
            warnings.warn(
                f"veneer.use(…, {self._name!r}) selects only inside a `with` block; this call did nothing", stacklevel=2
            )
