"""Write small checkpoints and adapters, and merge them in memory."""

from __future__ import annotations

import copy

import torch
from tests.support.tiny import tiny_tokenizer, write_tiny
from tests.support.toys import calibration, randomise

import veneer
from veneer.models.safetensors_dir import open_checkpoint


def trained(model, path, size=0.05, args=(), **config):
    """Save an adapter of ``model`` with random changes, and return its folder. The model is
    unchanged. ``args``: arguments of a call of the model, for variants that start from
    calibration data."""
    calibration_data = calibration(model, config.get("variant", "lora"), args)
    handle = veneer.attach(
        model, veneer.LoraConfig(**{"rank": 2, "targets": "all", **config}), **calibration_data
    )
    randomise(handle, size)
    handle.save(path)
    handle.detach()
    return path


def merged(model, path):
    """The weights of ``model`` with an adapter folded in, in float64."""
    model_copy = copy.deepcopy(model).double()
    for module in model_copy.modules():
        if getattr(module, "max_norm", None) is not None:
            module.max_norm = None  # forward would rescale rows after the change
    veneer.load(model_copy, path)
    veneer.merge(model_copy)
    veneer.detach(model_copy, keep_merged=True)
    return model_copy.state_dict()


def save_model(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def in_memory(model, adapter, folder):
    """The tensors that ``merge`` in memory and then ``save_pretrained`` write, by name."""
    handle = veneer.load(model, adapter)
    handle.merge(keep=False)
    veneer.detach(model, keep_merged=True)
    return tensors(save_model(model, folder))


def tensors(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.file_of}


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def tiny(folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    write_tiny(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    save_model(model, folder, max_shard_size="30KB", **options)
    (folder / "model.safetensors").unlink(missing_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval(), folder
