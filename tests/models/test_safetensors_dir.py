"""A model as files: headers, shards, which parameter each tensor is, and the model without its
weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support.real_models import REAL, transformers_models
from tests.support.tiny import tiny_model, write_tiny

from veneer import models
from veneer.errors import CheckpointError, ConfigError
from veneer.models.base_weights import _join_rows, checkpoint_weights
from veneer.models.meta import ParamSlice
from veneer.models.safetensors_dir import DTYPES, open_checkpoint


@pytest.mark.parametrize("name", transformers_models())
def test_every_tensor_is_found_in_the_model_and_nothing_is_missed(name, tmp_path):
    model = REAL[name].build()[0]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint, empty = open_checkpoint(tmp_path), models.meta_model(tmp_path)
    assert type(empty) is type(model)
    map_checkpoint_names = models.map_checkpoint_names(empty, checkpoint.file_of)
    state, seen = model.state_dict(), {}
    for tensor, (name, index, within) in (
        (tensor, place) for tensor, own in map_checkpoint_names.items() for place in own
    ):
        part = state[name][index]
        torch.testing.assert_close(
            checkpoint.read(tensor)[within].reshape(part.shape), part, atol=0, rtol=0
        )
        seen.setdefault(name, torch.zeros(state[name].shape, dtype=torch.bool))[index] = True
    tied = {id(value): all(part.flatten()) for path, part in seen.items() for value in [model.get_parameter(path)]
            if path in dict(model.named_parameters(remove_duplicate=False))}  # fmt: skip
    assert all(tied.get(id(value), False) for value in model.parameters())
    for path, weight in checkpoint_weights(empty, checkpoint)[0].items():
        count = weight.shape[0] if weight.shape else 0
        for rows in (None, slice(0, 1), slice(1, 3), slice(count // 2, count)):
            if rows is None or count >= 3:
                expected = state[path] if rows is None else state[path][rows]
                torch.testing.assert_close(weight.read(rows), expected, atol=0, rtol=0)


@given(
    tensors=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    columns=st.booleans(),
    rows=st.tuples(st.integers(0, 15), st.integers(0, 16)),
)
@settings(max_examples=40, deadline=None)
def test_rows_of_a_parameter_that_several_tensors_form(tensors, columns, rows):
    """Concatenated along the rows or the columns."""
    with tempfile.TemporaryDirectory() as folder:
        axis = 1 if columns else 0
        shapes = [(5, size) if columns else (size, 5) for size in tensors]
        values = {f"part{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        save_file(values, Path(folder, "model.safetensors"))
        whole = torch.cat([*values.values()], axis)
        starts = [sum(tensors[:i]) for i in range(len(tensors))]
        slices = [slice(start, start + size) for start, size in zip(starts, tensors, strict=True)]
        parts = [
            (name, ParamSlice("whole", (slice(None), part) if columns else (part,)))
            for name, part in zip(values, slices, strict=True)
        ]
        first, stop = sorted(min(row, len(whole)) for row in rows)
        read = partial(_join_rows, open_checkpoint(folder), parts, tuple(whole.shape), whole.dtype)
        assert torch.equal(read(slice(first, stop)), whole[first:stop])
        assert torch.equal(read(None), whole)


@pytest.mark.parametrize("name", transformers_models())
def test_a_hollow_model_has_the_same_names_shapes_and_ties(name, tmp_path):
    model = REAL[name].build()[0]
    model.save_pretrained(tmp_path)
    empty = models.meta_model(tmp_path)

    def described(some):
        ids: dict[int, int] = {}
        named = some.named_parameters(remove_duplicate=False)
        return [
            (path, value.shape, ids.setdefault(id(value), len(ids)), str(value.device))
            for path, value in named
        ]

    assert described(empty) == described(model)


def test_a_hollow_model_takes_no_memory(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=80,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    models.meta_model(write_tiny(tmp_path / "tiny"))  # what is imported once
    before = resident()
    empty = models.meta_model(tmp_path)
    weight = empty.get_parameter("model.layers.79.mlp.up_proj.weight")
    assert weight.shape == (16384, 4096)
    assert weight[0].abs().sum() == 0
    assert sum(value.numel() for value in empty.parameters()) > 2e10
    assert resident() - before < 50 * 2**20


def test_the_class_is_the_adapter_s_or_the_config_s(tmp_path):
    write_tiny(tmp_path)
    assert type(models.meta_model(tmp_path, "LlamaModel")).__name__ == "LlamaModel"
    for other in (
        "Unheard",
        "TrainingArguments",
        "LlamaConfig",
        "__class__",
    ):  # an adapter's word: models alone are made
        assert type(models.meta_model(tmp_path, other)).__name__ == "LlamaForCausalLM"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(ConfigError, match="Unheard"):
        models.meta_model(tmp_path)


def test_a_hollow_model_runs_no_code_of_the_folder(tmp_path, monkeypatch):
    """transformers would ask whether it may, and the answer may be a slip of a finger."""
    config = {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "code.MineConfig"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MineConfig: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.meta_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_body_s_files_are_found_in_a_model_with_a_head(tmp_path):
    """A checkpoint of LlamaModel has no "model." before its names."""
    tiny_model().model.save_pretrained(tmp_path)
    map_checkpoint_names = models.map_checkpoint_names(
        models.meta_model(tmp_path, "LlamaForCausalLM"), open_checkpoint(tmp_path).file_of
    )
    assert map_checkpoint_names["layers.0.mlp.up_proj.weight"] == (
        models.ParamSlice("model.layers.0.mlp.up_proj.weight"),
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read(dtype, tmp_path):
    values = torch.arange(12).reshape(3, 4).to(dtype)
    save_file(
        {"a": values, "b": values[:0], "c": values[1, 1].clone()}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in {"a": values, "b": values[:0], "c": values[1, 1]}.items():
        found = checkpoint.read(name)
        assert found.dtype == dtype
        assert found.shape == expected.shape == checkpoint.shape(name)
        assert torch.equal(found.float(), expected.float())
    for rows in (slice(1, 3), slice(2, 2), slice(None, 1)):
        assert torch.equal(checkpoint.read("a", rows).float(), values[rows].float())


def shards(folder):
    return write_sharded(
        folder,
        {"a": torch.ones(3), "b": torch.zeros(2)},
        {"a": "x.safetensors", "b": "y.safetensors"},
    )


def write_sharded(folder, tensors, weight_map):
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name, own in weight_map.items() if own == file}, folder / file
        )
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    checkpoint = open_checkpoint(shards(tmp_path))
    assert dict(checkpoint.file_of) == {"a": "x.safetensors", "b": "y.safetensors"}
    assert torch.equal(checkpoint.read("a"), torch.ones(3))


def _break(folder, how):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    match how:
        case "a shard is missing":
            (folder / "y.safetensors").unlink()
        case "a shard is cut short":
            data = (folder / "y.safetensors").read_bytes()
            (folder / "y.safetensors").write_bytes(data[:-3])
        case "the index names another file":
            content["weight_map"]["a"] = "y.safetensors"
        case "the index has them the wrong way round":
            content["weight_map"] = {"a": "y.safetensors", "b": "x.safetensors"}
        case "the index leaves its folder":
            content["weight_map"]["a"] = "../x.safetensors"
        case "the index speaks of a tensor that is nowhere":
            content["weight_map"]["c"] = "x.safetensors"
        case "a shard is a link to elsewhere":
            shutil.move(folder / "y.safetensors", folder.parent / "y.safetensors")
            (folder / "y.safetensors").symlink_to(folder.parent / "y.safetensors")
        case "no index":
            index.unlink()
            return
        case "pickles":
            for file in folder.iterdir():
                file.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
            return
        case "a pickle by the name of a shard":
            (folder / "y.safetensors").write_bytes(b"\x80\x02}q\x00." * 9)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "a shard is missing": "no y.safetensors",
        "a shard is cut short": "y.safetensors",
        "the index names another file": "no a, of which the index speaks",
        "the index has them the wrong way round": "where the index says",
        "the index leaves its folder": r"\.\./x.safetensors",
        "the index speaks of a tensor that is nowhere": "no c",
        "a shard is a link to elsewhere": "outside the folder",
        "no index": "2 files ending in .safetensors",
        "pickles": "which are pickles",
        "a pickle by the name of a shard": "a pickle, which runs code",
    }.items(),
)
def test_what_is_no_checkpoint_is_one_error(how, words, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    _break(shards(folder), how)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a pipe", "a link"])
def test_an_index_is_a_file_of_the_folder(kind, tmp_path):
    """A pipe would be waited for, forever."""
    folder = tmp_path / "model"
    folder.mkdir()
    index = shards(folder) / "model.safetensors.index.json"
    index.rename(tmp_path / index.name)
    if kind == "a pipe":
        os.mkfifo(index)
    else:
        index.symlink_to(tmp_path / index.name)
    with pytest.raises(CheckpointError, match=r"no regular file|outside the folder"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    checkpoint = open_checkpoint(shards(tmp_path))
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="ended within 'a'"):
        checkpoint.read("a")


def test_tensors_of_different_sizes_are_joined(tmp_path):
    """The convolutions of q, k and v of OLMo-Hybrid, as its published files hold them."""
    from safetensors.torch import load_file
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    torch.manual_seed(0)
    config = OlmoHybridConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    OlmoHybridForCausalLM(config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors, prefix = load_file(file), "model.layers.0.linear_attn."
    joined = torch.cat([tensors.pop(f"{prefix}{name}_conv1d.weight") for name in "qkv"])
    key_size = len(joined) // 4
    for name, part in zip("qkv", joined.split([key_size, key_size, 2 * key_size]), strict=True):
        tensors[f"{prefix}{name}_conv1d.weight"] = part.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    weights = checkpoint_weights(models.meta_model(tmp_path), open_checkpoint(tmp_path))[0]
    assert torch.equal(weights[f"{prefix}conv1d.weight"].read(), joined)
    loaded = OlmoHybridForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded[f"{prefix}conv1d.weight"], joined)
