"""Adapter folders: what a trained adapter is on the disk, and the way from a folder to a model and back.

    folder              one folder, read and checked, without a model        AdapterFiles
    record              what veneer.json says: its hashes, and whether the files are still those
    peft_mapping        a model's modules in PEFT's terms
    match_model         a folder against a model: does it fit, and what would be installed
    match_parameters    the adapter parameters of one weight out of the files
    match_base          is the model the base that it was trained on
    base_proof          fingerprints of every tensor of a base
    save_load           a model's adapter into a folder, a folder's onto a model
    derived_folder      folders made of other folders (compose, convert)
    model_card          README.md of a folder
    save_pretrained     a model with adapters saved by transformers, or by a trainer
    verify              what can be proven of a folder
    base_weights        the weights of a base by path, for verify

In: a path, or a model with adapters. Out: ``AdapterFiles``, or a folder written in one step.
"""

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.match_base import UnverifiedAdapter
from veneer.adapter_files.save_load import install_from, save

__all__ = ["AdapterFiles", "UnverifiedAdapter", "install_from", "read", "save"]
