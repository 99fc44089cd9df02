"""One call of an adapted module, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.attach.layer.state import LayerState
from veneer.context import Context


class Call(NamedTuple):
    """A call of the forward of an adapted module, or of another method that reads adapted weights.

    What an ``ActiveAdapter`` has for a layer computes it by ``run(call)``.

    Fields:
        base: the class of the module before it was adapted.
        context: the context of the call.
        share: whether layers that read the same input may be computed together.
        seed: the dropout seed; None draws one.
    """

    module: Any
    base: Any
    layer_state: LayerState
    args: tuple
    kwargs: Mapping[str, Any]
    context: Context
    method: str = "forward"
    share: bool = True
    seed: int | None = None

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))
