"""How a layer uses its weight: one file a kind of layer, found through the registry ``LAYERS``."""

from veneer.layers._base import (
    LAYERS,
    Dims,
    Layer,
    ParamRef,
    kind_for,
    kind_of,
    parameter_path,
    register,
)
from veneer.registry import import_all

import_all(__name__, list(__path__))

#: the kind of everything that has parameters of its own and no kind of its own
GENERAL_KIND: Layer = LAYERS["parameter"]

__all__ = [
    "GENERAL_KIND",
    "LAYERS",
    "Dims",
    "Layer",
    "ParamRef",
    "kind_for",
    "kind_of",
    "parameter_path",
    "register",
]
