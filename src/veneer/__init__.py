"""Veneer, a LoRA library for PyTorch: it trains, verifies, merges and serves many low-rank
adapters of one frozen base model.

Examples:
    >>> import torch, veneer
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    >>> handle.summary().trainable
    52
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer import adapter_files, errors, optim
    from veneer.adapter_files import UnverifiedAdapter, save
    from veneer.adapter_files.save_load import LoadedElsewhere
    from veneer.adapter_files.ties import TieBroken
    from veneer.attach import (
        MergeReport,
        check,
        detach,
        merge,
        set_default,
        summarise,
        unmerge,
        use,
    )
    from veneer.bank import Bank
    from veneer.config import LoraConfig
    from veneer.errors import FreshWeights, NotQuantized, NotTrained, SkippedLayers, VeneerError
    from veneer.formats.peft_targets import TensorsLeftOut
    from veneer.handle import Handle, attach, load
    from veneer.tools.compare import Difference, compare
    from veneer.tools.compose import ComposeReport, compose
    from veneer.tools.extract import ExtractReport, extract
    from veneer.train.many import Runs, train_many

#: public name -> the module that defines it. The module is imported when the name is first used, so
#: that `import veneer` takes no longer than `import torch`
_LAZY = {
    "Bank": "veneer.bank",
    "ComposeReport": "veneer.tools.compose",
    "Difference": "veneer.tools.compare",
    "ExtractReport": "veneer.tools.extract",
    "FreshWeights": "veneer.errors",
    "Handle": "veneer.handle",
    "LoadedElsewhere": "veneer.adapter_files.save_load",
    "LoraConfig": "veneer.config",
    "MergeReport": "veneer.attach",
    "NotQuantized": "veneer.errors",
    "NotTrained": "veneer.errors",
    "Runs": "veneer.train.many",
    "SkippedLayers": "veneer.errors",
    "TensorsLeftOut": "veneer.formats.peft_targets",
    "TieBroken": "veneer.adapter_files.ties",
    "UnverifiedAdapter": "veneer.adapter_files",
    "VeneerError": "veneer.errors",
    "attach": "veneer.handle",
    "check": "veneer.attach",
    "compare": "veneer.tools.compare",
    "compose": "veneer.tools.compose",
    "detach": "veneer.attach",
    "extract": "veneer.tools.extract",
    "load": "veneer.handle",
    "merge": "veneer.attach",
    "save": "veneer.adapter_files",
    "set_default": "veneer.attach",
    "summarise": "veneer.attach",
    "train_many": "veneer.train.many",
    "unmerge": "veneer.attach",
    "use": "veneer.attach",
}
#: submodules that are imported when they are first used as attributes of the package
_LAZY_MODULES = (
    "adapter_files", "bank", "bases", "config", "errors", "fileio", "formats", "integrations",
    "kernels", "layers", "lowrank", "models", "optim", "serve", "store", "tools", "train",
    "variants",
)  # fmt: skip
#: names of PEFT's package -> what replaces them in Veneer
_PEFT_REPLACEMENTS = {
    "get_peft_model": "veneer.attach(model, veneer.LoraConfig(…))",
    "inject_adapter_in_model": "veneer.attach(model, veneer.LoraConfig(…))",
    "print_trainable_parameters": "print(handle.summary()), or print(veneer.summarise(model))",
    "PeftModel": "the model itself; veneer.load(model, folder) for PeftModel.from_pretrained",
    "PeftModelForCausalLM": "the model itself; veneer.load(model, folder) attaches a saved adapter",
    "AutoPeftModelForCausalLM": "veneer.models.load_base(base), then veneer.load(model, folder)",
    "PeftConfig": "veneer.LoraConfig; LoraConfig.from_peft(…) reads PEFT's",
    "get_peft_config": "veneer.LoraConfig.from_peft(fields)",
    "TaskType": "nothing: the task follows from the model",
    "prepare_model_for_kbit_training": "nothing: veneer.attach freezes the base",
    "get_peft_model_state_dict": "dict(handle.named_parameters()), or handle.save(folder)",
    "set_peft_model_state_dict": "veneer.load(model, folder)",
    "merge_and_unload": "handle.merge(), then handle.detach(keep_merged=True)",
}
# Both a subpackage and a function have the name ``veneer.attach``. Python assigns an imported
# subpackage to this attribute of its parent, and a later import would overwrite the function there.
# So import the subpackage now and delete the attribute; ``__getattr__`` then returns the function.
importlib.import_module("veneer.attach")
globals().pop("attach")

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
    "NotTrained",
    "Runs",
    "SkippedLayers",
    "TensorsLeftOut",
    "TieBroken",
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
    "set_default",
    "summarise",
    "train_many",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        attribute = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        attribute = importlib.import_module(f"veneer.{name}")
    elif name in _PEFT_REPLACEMENTS:
        from veneer.errors import MethodError

        raise MethodError(
            f"veneer.{name}, PEFT's name", "Veneer's", f"use {_PEFT_REPLACEMENTS[name]}"
        )
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = attribute
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
