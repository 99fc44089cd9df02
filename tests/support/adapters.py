"""Small adapter folders, and ways to damage them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.toys import bits, randomise
from torch import nn

import veneer
from veneer.adapter_files.record import PARAMETERS, hash_record, hash_tensors
from veneer.errors import AdapterError
from veneer.fileio.hashing import hash_json
from veneer.layers.parameter import Experts

TENSORS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "veneer.json"


def numbers(handle) -> dict:
    """Copies of the values that an adapter trained, by path. The column of A of an input that
    never changes (a padding token) is zero in them."""
    values = {}
    for path, change in handle.changes.items():
        for name, value in change.adapter_parameters.items():
            value = value.detach().clone()
            if name == "A" and change.frozen_input is not None:
                value[..., change.frozen_input] = 0
            values[f"{path}.{name}"] = value
    for path, layer_state in handle.layers.items():
        values |= {
            f"{path}.{name}": value.detach().clone()
            for name, value in layer_state.full.state_dict().items()
        }
    return values


def same(first: dict, second: dict) -> None:
    """Assert that tensors by name are equal to the bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


class Small(nn.Module):
    """A linear and a convolutional layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 6, 3, groups=2, padding=1), nn.Linear(6, 9)

    def forward(self, x):
        return self.linear(self.conv(x).mean((-2, -1)))


class Fused(nn.Module):
    """A model with queries, keys and values in one matrix, a head tied to the embedding,
    parameters on the model itself, in a list and in a stack, and torch's attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 7, 8))
        self.tables = nn.ParameterList([torch.randn(8, 8) / 3, torch.randn(8, 8) / 3])
        self.embed = nn.Embedding(11, 8, padding_idx=2)
        self.qkv = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts(3, 8, 8)
        self.second = Experts(3, 8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.attention(x, x, x)[0] @ self.tables[0] + x @ self.tables[1]
        x = self.second(self.experts(x[:, :3].transpose(0, 1))).transpose(0, 1)
        return self.head(self.norm(x))


FUSED_IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))


FUSED = {
    "q and v rows": {"targets": ["qkv"], "slices": {"qkv": [True, False, True]}},
    "rows of a range": {
        "targets": ["qkv", "attention"],
        "slices": {"qkv": [(3, 9)], "in_proj_weight": [(0, 8)]},
    },
    "q and v rows of DoRA": {
        "targets": ["qkv"],
        "slices": {"qkv": [True, False, True]},
        "variant": "dora",
    },
    "q and v rows of LoHa": {
        "targets": ["qkv"],
        "slices": {"qkv": [True, False, True]},
        "variant": "loha",
    },
    "q and v rows of PiSSA": {
        "targets": ["qkv"],
        "slices": {"qkv": [True, False, True]},
        "variant": "pissa",
    },
    "train_also": {"targets": ["qkv"], "train_also": ["norm", "attention"]},
    "bias of targets": {"targets": ["qkv", "attention"], "bias": "targets"},
    "every bias": {"targets": ["qkv"], "bias": "all"},
    "a tie": {"targets": ["head"]},
    "a tie of DoRA": {"targets": ["embed"], "variant": "dora"},
    "a tie of VeRA": {"targets": ["embed"], "variant": "vera"},
    "a tie in full": {"targets": ["qkv"], "train_also": ["head"]},
    "on the root": {"targets": ["position"]},
    "in a list": {"targets": ["tables.0", "tables.1"], "ranks": {"tables.1": 3}},
    "a stack of experts": {"targets": ["experts", "second.proj"], "alphas": {"second.proj": 5}},
    "attention": {"targets": ["attention"], "ranks": {"out_proj": 3}, "alphas": {"out_proj": 7}},
    "attention's out-projection": {"targets": ["attention.out_proj"]},
    "everything": {"targets": "all", "bias": "all"},
    "everything by DoRA": {"targets": "all", "variant": "dora"},
    "norms alone": {"targets": ["norm"]},
}


def fused() -> Fused:
    torch.manual_seed(4)
    return Fused().eval()


def forge(path, tensors=None, record=None, config=None, own=None):
    """Change an adapter folder, and correct every hash in it, as only a program that writes
    folders can. Each argument is a function that changes its data in place: ``tensors`` the main
    tensors, ``record`` the record, ``config`` PEFT's config, ``own`` the tensors of
    veneer.safetensors."""
    main_tensors, folder_record = load_file(path / TENSORS), json.loads((path / RECORD).read_text())
    peft_config = json.loads((path / CONFIG).read_text())
    parameters = load_file(path / PARAMETERS) if (path / PARAMETERS).exists() else {}
    for change, data in (
        (tensors, main_tensors),
        (record, folder_record),
        (config, peft_config),
        (own, parameters),
    ):
        if change is not None:
            change(data)
    folder_record["hashes"] |= {
        "tensors": hash_tensors(main_tensors),
        CONFIG: hash_json(peft_config),
    }
    if parameters:
        folder_record["hashes"][PARAMETERS] = hash_tensors(parameters)
        save_file(parameters, path / PARAMETERS)
    folder_record["hashes"]["record"] = hash_record(folder_record)
    (path / CONFIG).write_text(json.dumps(peft_config))
    (path / RECORD).write_text(json.dumps(folder_record))
    save_file(main_tensors, path / TENSORS, metadata={"veneer": json.dumps(folder_record)})


def put(path, *values):
    """A function that changes a nested mapping: the entry at the keys ``path`` becomes the last
    of ``values``, or is removed if there are no values."""
    *parent_keys, last_key = path

    def change(mapping):
        for key in parent_keys:
            mapping = mapping[key]
        if values:
            mapping[last_key] = values[-1]
        else:
            del mapping[last_key]

    return change


def small(seed=5) -> Small:
    torch.manual_seed(seed)
    return Small().eval()


def small_adapter(path, variant="lora", model=None, **fields):
    config = veneer.LoraConfig(
        **{"rank": 2, "alpha": 3, "targets": "all", "variant": variant, **fields}
    )
    handle = veneer.attach(model or small(), config)
    randomise(handle)
    return handle.save(path)


def refused(model, path, words, kind=AdapterError) -> str:
    """Assert that a folder does not load, and that the model is unchanged: the same modules,
    parameters and classes. Returns the error's text."""
    before, classes = bits(model), [type(module) for module in model.modules()]
    parameter_ids, grad_flags = (
        [id(p) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(kind, match=words) as caught:
        veneer.load(model, path)
    same(bits(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert [id(p) for p in model.parameters()] == parameter_ids
    assert [p.requires_grad for p in model.parameters()] == grad_flags
    assert not any("veneer" in key for key in [*model.state_dict(), *model.__dict__])
    return str(caught.value)
