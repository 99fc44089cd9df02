"""Adapter folders: what a trained adapter is on the disk, and the way from a folder to a model and
back.

In: a path, or a model with adapters. Out: ``AdapterFiles``, or a folder written in one step.
``folder`` and ``record`` know files alone; ``match_*`` hold them against a model, ``peft_mapping``
in PEFT's terms; ``save_load`` is the way from one to the other, and ``verify`` tells everything
that can be proven of a folder.
"""

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import UnverifiedAdapter
from veneer.adapter_files.save_load import install_from, save
from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("verify",))

__all__ = ["AdapterFiles", "UnverifiedAdapter", "install_from", "read", "save"]
