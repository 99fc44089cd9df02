"""Files of other formats that say something odd: each is refused by one error of Veneer's, in
bounded time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.adapter_files.folder import read
from veneer.errors import VeneerError
from veneer.tools.convert import conversion, convert


class Picture(nn.Module):
    """A linear layer and a convolution."""

    def __init__(self):
        super().__init__()
        self.to_q, self.conv = nn.Linear(8, 8), nn.Conv2d(4, 8, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the model, an adapter of it as a file of each format)."""
    folder, model = tmp_path_factory.mktemp("formats"), Picture()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    handle.save(folder / "adapter")
    handle.detach()
    for to in ("kohya", "diffusers"):
        convert(folder / "adapter", folder / to, to=to, part="unet", base=model)
    convert(folder / "adapter", folder / "dense", to="dense", base=model)
    return model, folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def refused(files, tmp_path, name, tensors, said):
    """Assert that a file with these tensors and this header is refused, and that nothing is
    written."""
    model, folder = files
    held = {
        key: value
        for key, value in {**load_file(folder / name), **tensors}.items()
        if value is not None
    }
    save_file(held, tmp_path / "odd", metadata={**header(folder / name), **said})
    with pytest.raises(VeneerError):
        conversion(tmp_path / "odd", tmp_path / "out", to="veneer", base=model, part=None)
    assert not (tmp_path / "out").exists()


Q = "unet.to_q"
DIFFUSERS = {
    "two alphas": {f"{Q}.alpha": torch.ones(2)},
    "a complex alpha": {f"{Q}.alpha": torch.tensor(1j)},
    "a number for A": {f"{Q}.lora_A.weight": torch.tensor(1.0)},
    "no rank": {f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(8, 0)},
    "8 bits": {f"{Q}.lora_A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)},
    "whole numbers": {f"{Q}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)},
}


@pytest.mark.parametrize("what", DIFFUSERS)
def test_tensors_of_diffusers(what, files, tmp_path):
    refused(files, tmp_path, "diffusers", DIFFUSERS[what], {})


CONFIGS = {
    "a rank in words": {"unet.r": "abc"},
    "an alpha in words": {"unet.lora_alpha": "abc"},
    "a list of alphas": {"unet.lora_alpha": [1]},
    "rank 0": {"unet.rank_pattern": {"to_q": 0}},
    "a negative rank": {"unet.rank_pattern": {"to_q": -2}, "unet.use_rslora": True},
    "no expression": {"unet.rank_pattern": {"(": 2}},
    "a list of patterns": {"unet.alpha_pattern": [1]},
    "another method": {"unet.use_qalora": True},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_the_config_of_diffusers(what, files, tmp_path):
    said = json.loads(header(files[1] / "diffusers")["lora_adapter_metadata"])
    refused(
        files,
        tmp_path,
        "diffusers",
        {},
        {"lora_adapter_metadata": json.dumps({**said, **CONFIGS[what]})},
    )


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", ["{", "[1]", NESTED, '{"unet.r": 2, "unet.r": 2}'], ids=["cut", "list", "deep", "twice"]
)
def test_a_config_of_diffusers_that_is_no_object(text, files, tmp_path):
    refused(files, tmp_path, "diffusers", {}, {"lora_adapter_metadata": text})


K = "lora_unet_to_q"
NONE = {f"{K}.lora_down.weight": None, f"{K}.lora_up.weight": None}
KOHYA = {
    "two alphas": {f"{K}.alpha": torch.ones(2)},
    "a complex alpha": {f"{K}.alpha": torch.tensor(1j)},
    "8 bits": {f"{K}.lora_down.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)},
    "no rank": {f"{K}.lora_down.weight": torch.ones(0, 8), f"{K}.lora_up.weight": torch.ones(8, 0)},
    "LoHa of no rank": {
        **NONE,
        **{f"{K}.hada_w{n}_a": torch.ones(8, 0) for n in (1, 2)},
        **{f"{K}.hada_w{n}_b": torch.ones(0, 8) for n in (1, 2)},
    },
    "LoHa of another shape": {
        **NONE,
        **{f"{K}.hada_w{n}_a": torch.ones(3_000_000, 1) for n in (1, 2)},
        **{f"{K}.hada_w{n}_b": torch.ones(1, 3_000_000) for n in (1, 2)},
    },
    "LoHa of two shapes": {
        **NONE,
        f"{K}.hada_w1_a": torch.ones(8, 300),
        f"{K}.hada_w1_b": torch.ones(300, 8),
        f"{K}.hada_w2_a": torch.ones(3000, 300),
        f"{K}.hada_w2_b": torch.ones(300, 3000),
    },
    "LoHa of two ranks": {
        **NONE,
        **{f"{K}.hada_w{n}_a": torch.ones(8, 20_000) for n in (1, 2)},
        **{f"{K}.hada_w{n}_b": torch.ones(1, 8) for n in (1, 2)},
    },
    "LoKr of a third axis": {
        **NONE,
        f"{K}.lokr_w1_a": torch.ones(8, 1),
        f"{K}.lokr_w1_b": torch.ones(1, 1, 1_000_000),
        f"{K}.lokr_w2": torch.ones(1, 8),
    },
    "LoKr of two ranks": {
        **NONE,
        f"{K}.lokr_w1": torch.ones(2, 2),
        f"{K}.lokr_w2_a": torch.ones(4, 1000),
        f"{K}.lokr_w2_b": torch.ones(1, 4),
    },
    "a Tucker core of another rank": {
        f"{K}.lora_mid.weight": torch.ones(100_000, 2, 1, 1),
    },
    "LoKr of another shape": {
        **NONE,
        f"{K}.lokr_w1": torch.ones(1000, 1000),
        f"{K}.lokr_w2": torch.ones(1000, 1000),
    },
    "a Tucker core of another shape": {
        f"{K}.lora_mid.weight": torch.ones(2, 2, 1000, 1000),
        f"{K}.lora_down.weight": torch.ones(2, 1_000_000, 1, 1),
        f"{K}.lora_up.weight": torch.ones(8, 2, 1, 1),
    },
}


@pytest.mark.parametrize("what", KOHYA)
def test_tensors_of_kohya(what, files, tmp_path):
    refused(files, tmp_path, "kohya", KOHYA[what], {})


DENSE = {
    "nested": NESTED,
    "cut": "{",
    "weights in a list": json.dumps({"format": 1, "base": {"weights": [1]}}),
    "a name that is none": json.dumps({"format": 1, "base": {"name": {"a": 1}}}),
    "full, as a word": json.dumps({"format": 1, "full": "conv.weight"}),
    "full, as numbers": json.dumps({"format": 1, "full": [1]}),
    "a format that is none": json.dumps({"format": True}),
}


@pytest.mark.parametrize("what", DENSE)
def test_the_header_of_dense_changes(what, files, tmp_path):
    refused(files, tmp_path, "dense", {}, {"veneer_dense": DENSE[what]})


@pytest.mark.parametrize("options", [{"energy": "x"}, {"rank": True}, {"energy": True}], ids=str)
def test_options_that_are_no_numbers(options, files, tmp_path):
    with pytest.raises(VeneerError):
        convert(files[1] / "dense", tmp_path / "out", to="veneer", base=files[0], **options)


# ----------------------------------------------------------------------------------------------
# GGUF


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(
    path: Path, *, pairs: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0
) -> Path:
    """A GGUF file of version 3 that says it is an adapter."""
    said = pair("general.type", 8, text("adapter")) + pair("adapter.type", 8, text("lora"))
    said += pair("general.architecture", 8, text("llama"))
    body = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, 3 + count) + said + pairs + tensors
    path.write_bytes(body + bytes(-len(body) % 32))
    return path


ARRAY, BYTE = 9, 0
LYING = {
    "an array of 2^60 bytes": {"pairs": pair("a", ARRAY, struct.pack("<IQ", BYTE, 2**60)), "count": 1},
    "an array of 2^60 arrays": {"pairs": pair("a", ARRAY, struct.pack("<IQ", ARRAY, 2**60)), "count": 1},
    "a text of 2^60 letters": {"pairs": text("a") + struct.pack("<IQ", 8, 2**60), "count": 1},
    "2^60 pairs": {"count": 2**60},
    "2^60 tensors": {"tensor_count": 2**60},
    "a type that is none": {"pairs": pair("a", 77, b""), "count": 1},
    "a tensor beyond the end": {
        "tensors": text("blk.0.attn_q.weight.lora_a") + struct.pack("<IQQIQ", 2, 2**40, 2**10, 0, 0), "tensor_count": 1
    },
    "a tensor of 2^32 axes": {"tensors": text("a") + struct.pack("<I", 2**32 - 1), "tensor_count": 1},
}  # fmt: skip


@pytest.mark.parametrize("what", LYING)
def test_a_gguf_file_that_lies_about_sizes(what, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(VeneerError, match="GGUF"):
        conversion(gguf(tmp_path / "odd", **LYING[what]), tmp_path / "out", to="peft")


SHAPES = {
    "b of other rows": {"lora_b": (7, 2)},
    "b of one axis": {"lora_b": (32,)},
    "a of one axis": {"lora_a": (32,)},
    "a of three axes": {"lora_a": (4, 2, 32)},
    "both of three axes": {"lora_a": (4, 2, 32), "lora_b": (4, 32, 2)},
    "no rank": {"lora_a": (1, 32), "lora_b": (32, 3)},
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("tensor", ["blk.0.attn_q.weight", "token_embd.weight"])
def test_shapes_in_a_gguf_file(what, tensor, tmp_path):
    library = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    writer = library.GGUFWriter(tmp_path / "odd", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    for side, shape in {"lora_a": (2, 32), "lora_b": (32, 2), **SHAPES[what]}.items():
        writer.add_tensor(f"{tensor}.{side}", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VeneerError):
        conversion(tmp_path / "odd", tmp_path / "out", to="peft", base=model)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, w2 decomposed"])
def test_factors_of_kohya_of_a_large_rank_take_no_more_memory_than_the_weight(kind, tmp_path):
    """As factors of a LoRA, these would have a rank of 20,000² or 40,000."""
    rank = 20_000
    tensors = {
        "LoHa": {
            **{f"{K}.hada_w{n}_a": torch.rand(8, rank) / 100 for n in (1, 2)},
            **{f"{K}.hada_w{n}_b": torch.rand(rank, 8) / 100 for n in (1, 2)},
        },
        "LoKr": {f"{K}.lokr_w1": torch.rand(2, 8), f"{K}.lokr_w2": torch.rand(4, 1)},
        "LoKr, w2 decomposed": {
            f"{K}.lokr_w1": torch.rand(2, 4),
            f"{K}.lokr_w2_a": torch.rand(4, rank) / 100,
            f"{K}.lokr_w2_b": torch.rand(rank, 2) / 100,
        },
    }[kind]
    save_file(tensors, tmp_path / "file")
    convert(tmp_path / "file", tmp_path / "out", to="veneer", base=Picture(), part="unet")
    t = {name.removeprefix(f"{K}."): value.double() for name, value in tensors.items()}
    expected = {
        "LoHa": lambda: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        "LoKr": lambda: torch.kron(t["lokr_w1"], t["lokr_w2"]),
        "LoKr, w2 decomposed": lambda: torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    }[kind]()
    (change,) = read(tmp_path / "out").layers.values()
    torch.testing.assert_close(change.delta()[0].double(), expected, rtol=1e-5, atol=0)
