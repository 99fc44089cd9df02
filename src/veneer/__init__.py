"""Veneer: one frozen base, many thin low-rank adapters. Train them, prove them, merge them, serve them.

>>> import torch, veneer
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> handle = veneer.attach(model, veneer.LoraConfig(rank=2))
>>> handle.summary().trainable
52
"""

from veneer import adapter_files, errors, optim
from veneer.adapter_files import UnverifiedAdapter, save
from veneer.adapter_files.save_pretrained import LoadedElsewhere
from veneer.attach.check import check
from veneer.attach.fresh_weights import FreshWeights
from veneer.attach.install import detach
from veneer.attach.merge import MergeReport, merge, unmerge
from veneer.attach.plan import SkippedLayers
from veneer.attach.qconfig import NotQuantized
from veneer.attach.select import use
from veneer.attach.summary import summarise
from veneer.bank import Bank
from veneer.config import LoraConfig
from veneer.errors import VeneerError
from veneer.handle import Handle, attach, load
from veneer.tools.compare import Difference, compare
from veneer.tools.compose import ComposeReport, compose
from veneer.tools.extract import ExtractReport, extract

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
