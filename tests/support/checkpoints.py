"""Small checkpoints on the disk, and their merges in memory."""

from __future__ import annotations

import torch
from tests.support.tiny import tiny_tokenizer, write_tiny
from tests.support.toys import randomise

import veneer
from veneer.models.safetensors_dir import open_checkpoint


def trained(model, path, size=0.05, **config):
    """A saved adapter with changes that are not zero; the model is as it was."""
    config = veneer.LoraConfig(**{"rank": 2, "targets": "all", **config})
    handle = veneer.attach(model, config)
    randomise(handle, size)
    handle.save(path)
    handle.detach()
    return path


def written(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def in_memory(model, adapter, folder):
    """What the live merge and save_pretrained make of it."""
    handle = veneer.load(model, adapter)
    handle.merge(keep=False)
    veneer.detach(model, keep_merged=True)
    return tensors(written(model, folder))


def tensors(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.where}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def tiny(folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    write_tiny(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    written(model, folder, max_shard_size="30KB", **options)
    (folder / "model.safetensors").unlink(missing_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval(), folder
