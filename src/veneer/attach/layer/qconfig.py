"""A warning that torch's quantisation skips adapted layers.

``torch.ao.quantization`` replaces layers by their exact class. An adapted layer has another class,
so it silently stays in floating point, merged or not. torch sets the attribute ``qconfig`` of every
layer before it looks at the layer's class, so a descriptor of that name can warn. Rejected:
pretending to have the exact class. The int8 layer that torch would create from the adapted layer
would lose its adapters.
"""

from __future__ import annotations

from typing import Any

from veneer.errors import NotQuantized, sentence, warn_caller


class Qconfig:
    """A descriptor for the attribute ``qconfig`` of adapted layers. It behaves like an ordinary
    attribute, but warns (``NotQuantized``) when it is set."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Any, value: Any) -> None:
        # torch sets the attribute to None on a class that it does not know. If None were stored, it
        # would remain on the layer after detach.
        if value is None:
            module.__dict__.pop("qconfig", None)
        else:
            module.__dict__["qconfig"] = value
        warning_text = sentence(
            "adapted layers, which torch.ao.quantization leaves in floating point: it goes by the"
            " exact class",
            "plain layers to quantise",
            "merge, and then handle.detach(keep_merged=True), which leaves the merged weights in a"
            " plain model",
        )
        # The warning names the first caller outside of these packages. typing_extensions is one of
        # them because torch decorates its quantisation functions with its ``deprecated``.
        warn_caller(warning_text, NotQuantized, within=("veneer", "torch", "typing_extensions"))

    def __delete__(self, module: Any) -> None:
        del module.__dict__["qconfig"]
