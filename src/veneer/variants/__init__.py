"""How adapter parameters become ΔW: one file a variant, found through the registry ``VARIANTS``."""

from veneer.registry import import_all
from veneer.variants._base import (
    CALIBRATION,
    VARIANTS,
    Base,
    InitContext,
    Variant,
    kaiming_uniform,
    register,
)

import_all(__name__, list(__path__))


def names() -> tuple[str, ...]:
    """The variants that exist."""
    return VARIANTS.names()


__all__ = [
    "CALIBRATION",
    "VARIANTS",
    "Base",
    "InitContext",
    "Variant",
    "kaiming_uniform",
    "names",
    "register",
]
