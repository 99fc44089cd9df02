"""Veneer: one frozen base, many thin low-rank adapters. Train them, prove them, merge them, serve them.

>>> import torch, veneer
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> handle = veneer.attach(model, veneer.LoraConfig(rank=2))
>>> handle.summary().trainable
52
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veneer import errors
from veneer.attach.fresh_weights import FreshWeights
from veneer.attach.install import detach
from veneer.attach.merge import MergeReport, merge, unmerge
from veneer.attach.plan import SkippedLayers
from veneer.attach.qconfig import NotQuantized
from veneer.attach.select import use
from veneer.attach.summary import summarise
from veneer.config import LoraConfig
from veneer.errors import VeneerError
from veneer.handle import Handle, attach, load

if TYPE_CHECKING:
    from veneer import adapter_files, optim
    from veneer.adapter_files import UnverifiedAdapter, save
    from veneer.adapter_files.save_pretrained import LoadedElsewhere
    from veneer.attach.check import check
    from veneer.bank import Bank
    from veneer.tools.compare import Difference, compare
    from veneer.tools.compose import ComposeReport, compose
    from veneer.tools.extract import ExtractReport, extract

#: public name -> the module that holds it, imported when the name is first used: few programs need these, and
#: `import veneer` takes little longer than `import torch` without them
_LAZY = {
    "Bank": "veneer.bank",
    "ComposeReport": "veneer.tools.compose",
    "Difference": "veneer.tools.compare",
    "ExtractReport": "veneer.tools.extract",
    "LoadedElsewhere": "veneer.adapter_files.save_pretrained",
    "UnverifiedAdapter": "veneer.adapter_files",
    "check": "veneer.attach.check",
    "compare": "veneer.tools.compare",
    "compose": "veneer.tools.compose",
    "extract": "veneer.tools.extract",
    "save": "veneer.adapter_files",
}
#: submodules that are imported when first used as an attribute
_LAZY_MODULES = ("adapter_files", "bank", "fileio", "formats", "models", "optim", "tools")

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "ComposeReport",
    "Difference",
    "ExtractReport",
    "FreshWeights",
    "Handle",
    "LoadedElsewhere",
    "LoraConfig",
    "MergeReport",
    "NotQuantized",
    "SkippedLayers",
    "UnverifiedAdapter",
    "VeneerError",
    "adapter_files",
    "attach",
    "check",
    "compare",
    "compose",
    "detach",
    "errors",
    "extract",
    "load",
    "merge",
    "optim",
    "save",
    "summarise",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f"veneer.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
