"""Adapter folders: the form of a trained adapter on disk, and the way from a model to a folder and
back.

In: a path, or a model with adapters. Out: ``AdapterFiles``, or a folder written in one step.
``folder`` and ``record`` handle files without a model; ``match_*`` compare them with a model, and
``peft_mapping`` maps them to PEFT's files; ``save_load`` saves and installs adapters; ``verify``
reports everything that can be checked of a folder.
"""

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import UnverifiedAdapter
from veneer.adapter_files.save_load import install_from, save
from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("verify",))

__all__ = ["AdapterFiles", "UnverifiedAdapter", "install_from", "read", "save"]
