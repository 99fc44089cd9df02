"""How a layer uses its weight: one file for similar kinds, all registered in ``LAYERS``."""

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

#: the kind of all modules that have parameters, but no kind of their own
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
