"""Tensors are read into memory of their own: what happens to the file afterwards is nothing to
them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer.errors import AdapterError
from veneer.fileio.tensors import DTYPES, read_tensors
from veneer.formats._base import read_tensors as read_of_others
from veneer.models.safetensors_dir import open_checkpoint


@pytest.fixture
def adapter(tmp_path) -> Path:
    handle = veneer.attach(nn.Sequential(nn.Linear(16, 16)), veneer.LoraConfig(rank=2))
    for parameter in handle.parameters():
        nn.init.ones_(parameter)
    return handle.save(tmp_path / "adapter")


def values(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


READERS = {
    "an adapter": lambda folder: {
        f"{path}.{part}": getattr(entry, part)
        for path, entry in veneer.adapter_files.read(folder).low.items()
        for part in ("A", "B")
    },
    "tensors": lambda folder: read_tensors(folder / "adapter_model.safetensors")[0],
    "a format of others": lambda folder: read_of_others(folder / "adapter_model.safetensors")[0],
    "a checkpoint": lambda folder: {
        name: checkpoint.read(name)
        for checkpoint in (open_checkpoint(folder),)
        for name in checkpoint.file_of
    },
}


@pytest.mark.parametrize("reader", READERS)
def test_a_later_write_changes_nothing_that_was_read(adapter, reader):
    tensors = READERS[reader](adapter)
    before = values(tensors)
    file = adapter / "adapter_model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(b"\xff" * 64)
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    os.truncate(file, 16)  # whoever reads a mapped page that is gone is ended by the system
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_every_type_of_numbers_is_read_as_the_library_reads_it(tmp_path):
    bits = torch.randint(0, 256, (3, 5, 16), dtype=torch.uint8)
    tensors = {name: bits.view(dtype) for name, dtype in DTYPES.items() if dtype is not torch.bool}
    tensors |= {"BOOL": bits > 100, "empty": torch.empty(0, 3), "scalar": torch.tensor(3.0)}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "file", {"a": "b"}
    )
    read, metadata = read_tensors(tmp_path / "file")
    expected = load_file(tmp_path / "file")
    assert metadata == {"a": "b"}
    assert {name: (one.dtype, one.shape) for name, one in read.items()} == {
        name: (one.dtype, one.shape) for name, one in expected.items()
    }
    for name, tensor in read.items():
        flat, other = (
            one.reshape(-1).view(torch.uint8) if one.numel() else one
            for one in (tensor, expected[name])
        )
        assert torch.equal(flat, other), name


def test_a_file_that_ends_while_it_is_read_is_refused(adapter, monkeypatch):
    file = adapter / "adapter_model.safetensors"
    monkeypatch.setattr("veneer.fileio.tensors.read_bytes", lambda *_: None)
    with pytest.raises(AdapterError, match=r"ended within .*while it was read"):
        read_tensors(file)
