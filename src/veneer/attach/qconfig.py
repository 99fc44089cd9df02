"""A word where torch's quantisation would pass an adapted layer by.

``torch.ao.quantization`` swaps layers by their exact class, which an adapted layer no longer has:
it stays in floating point, merged or not, and nothing says so. Whatever of that package looks at a
layer first gives it an attribute ``qconfig``; that is where an adapted layer speaks. Rejected: to
answer to the exact class. A layer of int8 made from one would lose its adapters with everything
else.
"""

from __future__ import annotations

from typing import Any

from veneer.errors import sentence, warn_caller


class NotQuantized(UserWarning):
    """Adapted layers that ``torch.ao.quantization`` leaves in floating point."""


class Qconfig:
    """The attribute ``qconfig`` of adapted layers: as any other is, but that setting it warns."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Any, value: Any) -> None:
        # what torch gives a class that it does not know; kept, it would hold for the plain layer
        # too
        if value is None:
            module.__dict__.pop("qconfig", None)
        else:
            module.__dict__["qconfig"] = value
        problem = (
            "adapted layers, which torch.ao.quantization leaves in floating point: it goes by the"
            " exact class"
        )
        do = (
            "merge, and then handle.detach(keep_merged=True), which leaves the merged weights in a"
            " plain model"
        )
        text = sentence(problem, "plain layers to quantise", do)
        # torch's own wrapper
        warn_caller(text, NotQuantized, within=("veneer", "torch", "typing_extensions"))

    def __delete__(self, module: Any) -> None:
        del module.__dict__["qconfig"]
