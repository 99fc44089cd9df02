"""Veneer: one frozen base, many thin low-rank adapters. Train them, prove them, merge them, serve them.

>>> import torch, veneer
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> handle = veneer.attach(model, veneer.LoraConfig(rank=2))
>>> handle.summary().trainable
52
"""

from veneer import adapter, errors, optim
from veneer.adapter import UnverifiedAdapter, save
from veneer.attach import SkippedLayers, detach
from veneer.bank import Bank
from veneer.check import check
from veneer.compare import Difference, compare
from veneer.compose import ComposeReport, compose
from veneer.config import LoraConfig
from veneer.errors import VeneerError
from veneer.extract import ExtractReport, extract
from veneer.handle import Handle, attach, load
from veneer.merge import MergeReport, merge, unmerge
from veneer.pretrained import LoadedElsewhere
from veneer.proof import FreshWeights
from veneer.qconfig import NotQuantized
from veneer.select import use
from veneer.summary import summarise

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
    "adapter",
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
