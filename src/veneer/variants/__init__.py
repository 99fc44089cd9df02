"""How adapter parameters become ΔW: one file for each variant, all registered in ``VARIANTS``."""

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
    """The names of all registered variants."""
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
