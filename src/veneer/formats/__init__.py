"""Other people's file formats: key names and layouts only. A file here registers its format, and ``veneer convert``
finds it."""

from veneer.formats._base import (
    FORMATS,
    Adapter,
    Base,
    Contents,
    Entry,
    Format,
    MisreadElsewhere,
    Options,
    register,
)
from veneer.formats.peft import PeftLayer

__all__ = [
    "FORMATS",
    "Adapter",
    "Base",
    "Contents",
    "Entry",
    "Format",
    "MisreadElsewhere",
    "Options",
    "PeftLayer",
    "register",
]
