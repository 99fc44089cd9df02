"""How a frozen weight is stored: one file for each storage, registered in ``BASES``."""

from veneer.bases._base import BASES, GridStorage, Storage, register, storage_of
from veneer.bases.opaque import (
    is_opaque,
    is_storage_detail,
    own_parameters,
    unreadable,
    weight_of,
    without_gradient,
)
from veneer.registry import import_all

import_all(__name__, list(__path__))

__all__ = [
    "BASES",
    "GridStorage",
    "Storage",
    "is_opaque",
    "is_storage_detail",
    "own_parameters",
    "register",
    "storage_of",
    "unreadable",
    "weight_of",
    "without_gradient",
]
