"""Conversions change nothing: what comes back are the same bits, or the same product where a format has another rule,
and libraries of the other side compute the same outputs. What a format cannot hold, it says."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from models import IDS, Stack, TinyLM
from toys import error, example, flat, randomise
from veneer.artefact import read
from veneer.convert import FORMATS, conversion, convert, detect
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.layers import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
#: what kohya's and diffusers' formats hold: layers by their weight, with one group
PLAIN = ("linear", "conv1d", "conv2d", "conv3d")


def trained(model, path, dtype=None, **config):
    """A saved adapter with changes that are not zero."""
    handle = veneer.attach(
        model, veneer.LoraConfig(**{"rank": 2, "targets": "all", "alpha": 3, "dtype": dtype, **config})
    )
    randomise(handle)
    handle.save(path)
    handle.detach()
    return read(path)


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


def same(one, other):
    """The same tensors, bit by bit, and the same rank, alpha and scale."""
    first, second = tensors(one.path), tensors(other.path)
    assert first.keys() == second.keys()
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
    for at, layer in one.low.items():
        found = other.low[at]
        assert (layer.rank, layer.scale) == (found.rank, pytest.approx(found.scale, rel=1e-12))


def there_and_back(first, model, tmp_path, to, **options):
    """The adapter after it was written in another format and read again, on the same base."""
    between = tmp_path / f"between-{to}"
    convert(first.path, between, to=to, base=model, **options)
    assert detect(between) == to
    return read(convert(between, tmp_path / f"back-{to}", to="veneer", base=model))


def outputs(model, path, *args):
    handle = veneer.load(model, path)
    with torch.no_grad():
        found = flat(model(*args))
    handle.detach()
    return found


#: every layer in every format; what the image formats refuse whatever the variant, once
CASES = [
    (kind, number, to, variant)
    for kind, number in EXAMPLES
    for to in ("kohya", "diffusers", "peft")
    for variant in ("lora", "dora")
    if kind in PLAIN or (variant == "lora" and (to == "peft" or number == 0))
]


@pytest.mark.parametrize(("kind", "number", "to", "variant"), CASES)
def test_every_layer_comes_back_bit_by_bit(kind, number, to, variant, tmp_path):
    module, _ = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    first = trained(model, tmp_path / "a", variant=variant, rank=1)
    options = {} if to == "peft" else {"part": "model"}
    grouped = getattr(module, "groups", 1) > 1
    holds = to == "peft" or (kind in PLAIN and not grouped and not first.full)
    if to != "kohya":
        holds &= not str(first.peft_config["peft_type"]).startswith("not for PEFT")
    if not holds:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(AdapterError, match="in another way|cannot hold"):
            convert(first.path, tmp_path / "b", to=to, base=model, **options)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return
    same(first, there_and_back(first, model, tmp_path, to, **options))


@pytest.mark.parametrize(
    ("kind", "number", "variant"),
    [(kind, number, variant) for kind, number in EXAMPLES for variant in ("lora", "dora")]
    + [("conv2d", 0, variant) for variant in ("rslora", "loha", "lokr", "pissa", "vera")],
)
def test_every_layer_and_variant_has_a_dense_change(kind, number, variant, tmp_path):
    module, args = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    first = trained(model, tmp_path / "a", variant=variant, rank=1)
    second = there_and_back(first, model, tmp_path, "dense")
    expected = outputs_of(model, module, first.path, args)
    assert error(outputs_of(model, module, second.path, args), expected) < 1e-5
    plain = copy.deepcopy(module)  # and the file is what it says: base + ΔW
    for name, delta in load_file(tmp_path / "between-dense").items():
        path = name.removeprefix("layer.")
        held = plain.get_submodule(path.rpartition(".")[0])
        with torch.no_grad():
            {**held._parameters, **held._buffers}[path.rpartition(".")[2]].add_(delta)
    if kind not in ("embedding", "embedding_bag"):  # max_norm rewrites the rows of a plain one as it reads them
        assert error(flat(plain(*args)), expected) < 1e-5


def outputs_of(model, module, path, args):
    handle = veneer.load(model, path)
    with torch.no_grad():
        found = flat(module(*args))
    handle.detach()
    return found
