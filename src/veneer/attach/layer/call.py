"""One call of an adapted module, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.attach.layer.state import LayerState
from veneer.context import Context


class Call(NamedTuple):
    """A call of the forward of an adapted module, or of another method that reads adapted weights.

    An ``ActiveAdapter`` maps the key of a layer to an object, such as a ``LayerAdapter``, whose
    ``run(call)`` computes the output of the call.

    Fields:
        base_cls: the class of the module before it was adapted.
        args, kwargs: the arguments of the call, without ``self``.
        context: the context of the call.
        method: the name of the called method.
        may_share: whether layers that read the same input may be computed together.
        seed: the dropout seed. If it is None, a seed is drawn.
    """

    module: Any
    base_cls: Any
    layer_state: LayerState
    args: tuple
    kwargs: Mapping[str, Any]
    context: Context
    method: str = "forward"
    may_share: bool = True
    seed: int | None = None

    @property
    def x(self) -> Any:
        """The first argument of the call."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))
