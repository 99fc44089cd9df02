"""Adapter folders: a trained adapter on disk, saved from a model and loaded onto a model.

``read`` turns a folder into ``AdapterFiles``; ``save`` writes an adapter of a model as a folder, in
one atomic step. ``folder`` and ``record`` handle files without a model; ``match_*`` compare them
with a model; ``peft_mapping`` translates paths and shapes between a model and PEFT's files;
``save_load`` saves and installs adapters; ``verify`` runs all checks of a folder and reports the
result of each.
"""

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import UnverifiedAdapter
from veneer.adapter_files.save_load import install_from, save
from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("verify",))

__all__ = ["AdapterFiles", "UnverifiedAdapter", "install_from", "read", "save"]
