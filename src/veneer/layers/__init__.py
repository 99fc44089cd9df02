"""How a layer uses its weight: one file a kind of layer, found through the registry ``LAYERS``."""

from veneer.layers._base import LAYERS, Dims, Layer, kind_of, register
from veneer.registry import import_all

import_all(__name__, list(__path__))

__all__ = ["LAYERS", "Dims", "Layer", "kind_of", "register"]
