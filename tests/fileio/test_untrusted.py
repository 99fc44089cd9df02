"""Files that nobody vouches for: headers that lie, JSON with traps, links that lead elsewhere,
pickles."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.adapters import (
    CONFIG,
    RECORD,
    TENSORS,
    forge,
    put,
    refused,
    small,
    small_adapter,
)
from tests.support.hostile import Runs, remove_record

import veneer
from veneer.adapter_files.record import PARAMETERS
from veneer.errors import AdapterError
from veneer.fileio.untrusted import (
    BITS_PER_VALUE,
    MAX_DEPTH,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_METADATA_CHARACTERS,
    parse,
    read_header,
    read_json,
)


def write(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@given(
    shapes=st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=5,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_what_the_library_writes_is_read(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {
        name: torch.ones(shape).to(dtype)
        for name, shape in shapes.items()
        if name != "__metadata__"
    }
    save_file(tensors, path, metadata={"format": "pt", "é": "ü"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "é": "ü"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    data = path.read_bytes()[header.data_start :]
    for name, found in header.tensors.items():
        count = math.prod(found.shape)
        assert count == tensors[name].numel()
        assert (
            found.stop - found.start
            == count * tensors[name].element_size()
            == count * BITS_PER_VALUE[found.dtype] / 8
        )
        assert data[found.start : found.stop] == bytes(
            tensors[name].reshape(-1).view(torch.uint8).tolist()
        )


DEEP = b"[" * 100_000 + b"]" * 100_000
A_TENSOR = entry()
#: (header, bytes of data, words of the error)
LIES = [
    ({"x": entry()}, 23, "tensor 'x' claims the bytes 0 to 24 of 23"),
    ({"x": entry()}, 25, "1 bytes behind tensor 'x' belong to none"),
    ({"x": entry(offsets=(4, 28))}, 28, "4 bytes before tensor 'x' belong to none"),
    ({"x": entry(), "y": entry(offsets=(20, 44))}, 44, "tensor 'y' overlaps tensor 'x'"),
    ({"x": entry(), "y": entry()}, 24, "overlaps"),
    ({"x": entry(), "y": entry(offsets=(28, 52))}, 52, "4 bytes before tensor 'y'"),
    ({"x": entry(offsets=(24, 0))}, 24, "claims the bytes 24 to 0"),
    ({"x": entry(offsets=(0, 2**63))}, 24, "claims the bytes"),
    ({"x": entry(offsets=(-1, 23))}, 24, "data_offsets that are no two whole numbers"),
    ({"x": entry(offsets=(0, 24.0))}, 24, "data_offsets that are no two whole numbers"),
    ({"x": entry(offsets=(False, 24))}, 24, "data_offsets that are no two whole numbers"),
    ({"x": entry(offsets=(0, 24, 24))}, 24, "data_offsets that are no two whole numbers"),
    ({"x": entry(shape=(2, 4))}, 24, r"claims 24 bytes, and 32 by its shape \[2, 4\] of F32"),
    ({"x": entry(dtype="F16")}, 24, "claims 24 bytes, and 12"),
    ({"x": entry(dtype="F128")}, 24, "unknown dtype 'F128'"),
    ({"x": entry(dtype=["F32"])}, 24, "unknown dtype"),
    ({"x": entry(shape=(-2, -3))}, 24, "shape that is no list"),
    ({"x": entry(shape=(2.0, 3))}, 24, "shape that is no list"),
    ({"x": entry(shape=(True, 6))}, 24, "shape that is no list"),
    ({"x": entry(shape=[1] * 65)}, 24, "shape that is no list of at most 64"),
    ({"x": entry(shape=(2**62, 2**62, 2**62))}, 24, "that no memory can hold"),
    ({"x": entry(shape=(2**62, 4, 0), offsets=(0, 0))}, 0, "that no memory can hold"),
    (
        {"x": entry(shape=(2**32, 2**32, 6))},
        24,
        "that no memory can hold",
    ),  # 0 where it wraps around
    ({"x": {**A_TENSOR, "more": 1}}, 24, "dtype, shape and data_offsets alone"),
    ({"x": {"dtype": "F32"}}, 24, "dtype, shape and data_offsets alone"),
    ({"x": None}, 24, "dtype, shape and data_offsets alone"),
    ({"": entry()}, 24, "has a name that is empty"),
    ({"x\x1b[31m": entry()}, 24, "not printable"),
    ({"x" * 513: entry()}, 24, "longer than 512 characters"),
    ({"__metadata__": {"x": 1}, "x": entry()}, 24, "__metadata__ is no mapping of text to text"),
    ({"__metadata__": None, "x": entry()}, 24, "__metadata__ is no mapping"),
    (
        {"__metadata__": {"x": "y" * (MAX_METADATA_CHARACTERS + 1)}, "x": entry()},
        24,
        "__metadata__ has .* characters",
    ),
    (b'{"x": {}, "x": {}}', 0, "the key 'x' is there twice"),
    (b'{"x": NaN}', 0, "NaN, which is no JSON"),
    (b'{"x": ' + DEEP + b"}", 0, "nested deeper than 64"),
    (b'{"x": [' + b"[]," * 1_000_000 + b"[]]}", 0, "more than 1,000,000 values"),
    (b'{"x": ' + b"1" * 5000 + b"}", 0, "a whole number of 5000 digits"),
    (b'{"x": "\\ud800"}', 0, "surrogates"),
    (b'{"x": "\xff"}', 0, "invalid start byte"),
    (b"{", 0, "header is not JSON"),
    (b"[]", 0, "does not begin with {"),
    (b" {}", 0, "does not begin with {"),
    (b"", 0, "does not begin with {"),
]


@pytest.mark.parametrize(("header", "size", "words"), LIES, ids=[words for *_, words in LIES])
def test_a_header_that_lies_is_refused(tmp_path, header, size, words):
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(AdapterError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2500


def test_several_tensors_are_named_at_once(tmp_path):
    path = write(tmp_path / "x", {name: entry(dtype="F9") for name in "abcde"}, bytes(24))
    with pytest.raises(AdapterError, match=r"tensor 'a'.*tensor 'b'.*tensor 'c'.*5 in all"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, 2**20, MAX_HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1])
def test_a_length_is_a_claim_too(tmp_path, length):
    path = write(tmp_path / "x", {"x": entry()}, bytes(24), length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match="cannot be read"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


@pytest.mark.parametrize("size", range(17))
def test_a_file_that_is_cut_short(tmp_path, size):
    path = write(tmp_path / "x", {"x": entry()}, bytes(24))
    os.truncate(path, size)
    with pytest.raises(AdapterError, match=r"cut short|does not begin"):
        read_header(path)


def test_the_header_of_a_large_file_is_all_that_is_read(tmp_path):
    """A sparse file of 64 GiB: the header is checked against its size, and nothing else is
    touched."""
    path = write(tmp_path / "x", {"x": entry("BF16", (2**19, 2**16), (0, 2**36))})
    os.truncate(path, path.stat().st_size + 2**36)
    assert read_header(path).tensors["x"].shape == (2**19, 2**16)


def test_narrow_types_fill_whole_bytes(tmp_path):
    assert read_header(write(tmp_path / "x", {"x": entry("F4", (3, 2), (0, 3))}, bytes(3))).tensors[
        "x"
    ].shape == (3, 2)
    with pytest.raises(AdapterError, match="claims 1 bytes, and 2"):
        read_header(write(tmp_path / "x", {"x": entry("F4", (3,), (0, 1))}, bytes(1)))


def test_the_header_is_at_least_as_strict_as_the_library(tmp_path):
    for header, size, words in LIES:
        path = write(tmp_path / "x", header, bytes(size))
        try:
            with safe_open(path, framework="pt") as opened:
                list(opened.keys())
        except Exception:  # whatever it says
            with pytest.raises(AdapterError, match=words):
                read_header(path)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=6))
def test_a_shape_without_numbers_is_read_or_too_large(tmp_path_factory, shape):
    path = write(tmp_path_factory.mktemp("file") / "x", {"x": entry("U8", shape, (0, 0))})
    if math.prod(shape) == 0 and math.prod(axis or 1 for axis in shape) <= 2**63 - 1:
        assert read_header(path).tensors["x"].shape == tuple(shape)
    else:
        with pytest.raises(AdapterError, match=r"no memory can hold|claims 0 bytes"):
            read_header(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(AdapterError, match="no regular file"):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(30), "a zip archive.*runs code"),
        (pickle.dumps({"x": 1}), "a pickle, which runs code"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(30), "a GGUF file"),
    ],
)
def test_what_is_taken_for_tensors_is_told_by_its_name(tmp_path, content, words):
    path = small_adapter(tmp_path / "adapter")
    (path / TENSORS).write_bytes(content)
    refused(small(), path, words)


# ----------------------------------------------------------------------------------------------
# JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda below: st.lists(below, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), below),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_json_is_json(value):
    for text in (
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        json.dumps(value).encode(),
    ):
        assert parse(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "which no float holds"),
        ("1" * 21, "21 digits"),
        (str(2**64), "20 digits"),
        (str(-(2**63) - 1), "20 digits"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ('"\\udc00"', "surrogates"),
        ('"\ud800"', "invalid"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)  # fmt: skip
def test_traps_of_json(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_json_file_is_an_object_of_bounded_size(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{}" + " " * (MAX_JSON_BYTES - 2))
    assert read_json(file) == {}
    file.write_text("{}" + " " * MAX_JSON_BYTES)
    with pytest.raises(AdapterError, match="more than 16,777,216 bytes"):
        read_json(file)
    file.write_text("[]")
    with pytest.raises(AdapterError, match="a JSON list"):
        read_json(file)


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    handle = veneer.attach(small(), veneer.LoraConfig(rank=2, targets="all"))
    deep: list = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    for provenance in ({"x": deep}, {"x": 2**64}, {"x": "y" * MAX_JSON_BYTES}):
        with pytest.raises(AdapterError, match=r"could not be read again|bytes"):
            handle.save(tmp_path / "adapter", provenance=provenance)
        assert not (tmp_path / "adapter").exists()
    path = handle.save(
        tmp_path / "adapter", provenance={"loss": float("inf"), "last": [1.5, (float("nan"),)]}
    )
    assert veneer.adapter_files.read(path).metadata["provenance"] == {
        "loss": "inf",
        "last": [1.5, ["nan"]],
    }


# ----------------------------------------------------------------------------------------------
# folders


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    for name in (CONFIG, TENSORS, RECORD):
        outside = tmp_path / name
        shutil.move(path / name, outside)
        for target in (outside, Path("..") / name):
            (path / name).symlink_to(target)
            refused(small(), path, f"{name}, a link to .*, which lies outside the folder")
            (path / name).unlink()
        shutil.move(outside, path / name)
    veneer.load(small(), path)
    (path / PARAMETERS).symlink_to("/dev/zero")
    refused(small(), path, "a link to /dev/zero")


def test_a_link_inside_the_folder_and_to_the_folder(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    shutil.move(path / TENSORS, path / "data")
    (path / TENSORS).symlink_to("data")
    (tmp_path / "link").symlink_to(path)
    veneer.load(small(), tmp_path / "link")


def test_a_plan_in_a_folder_without_a_config_reaches_no_other_file(tmp_path):
    """Such a folder is read as if a killed writer had left it."""
    path, other = small_adapter(tmp_path / "adapter"), tmp_path / "notes.txt"
    container = path / ".veneer-abc12345.tmp"
    (container / "new").mkdir(parents=True)
    shutil.move(path / CONFIG, container / "new" / CONFIG)
    other.write_text("mine")
    for removes in ([str(other)], ["../notes.txt"], None):
        plan = {"entry": CONFIG, "writes": [CONFIG], "removes": removes}
        (container / "plan.json").write_text(json.dumps(plan))
        refused(small(), path, f"no {CONFIG} in")
    assert other.read_text() == "mine"
    (container / "plan.json").write_text(json.dumps({**plan, "removes": []}))
    veneer.load(small(), path)


@pytest.mark.parametrize("inside", ["", "sub"])
def test_the_cache_of_the_hub(tmp_path, inside):
    """models--owner--name/snapshots/<revision>/<file> -> ../../blobs/<hash>, as huggingface_hub
    lays it out."""
    made = small_adapter(tmp_path / "adapter")
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123abc" / inside, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, TENSORS, RECORD):
        shutil.copy(made / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"hash-{name}", snapshot))
    veneer.load(small(), snapshot)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(made / CONFIG)
    refused(small(), snapshot, "outside the folder")
    other = tmp_path / "models--other" / "blobs"  # of another repository
    other.mkdir(parents=True)
    shutil.copy(made / CONFIG, other / "x")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(other / "x")
    refused(small(), snapshot, "outside the folder")


def test_what_is_no_file_of_a_folder(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    for name, words in (
        ("a folder", "a folder"),
        ("pipe", "no regular file"),
        ("loop", "a link"),
        ("nothing", "a link"),
    ):
        (path / RECORD).unlink()
        if name == "a folder":
            (path / RECORD).mkdir()
        elif name == "pipe":
            os.mkfifo(path / RECORD)
        else:
            (path / RECORD).symlink_to(RECORD if name == "loop" else "nothing")
        refused(small(), path, words)
        (path / RECORD).rmdir() if name == "a folder" else (path / RECORD).unlink()
        (path / RECORD).touch()


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt"])
def test_a_pickle_of_an_adapter_is_refused_and_never_read(tmp_path, ending):
    path = small_adapter(tmp_path / "adapter")
    pickled = path / f"adapter_model.{ending}"
    pickled.write_bytes(pickle.dumps(Runs()))
    text = refused(small(), path, f"adapter_model.{ending} in .*a pickle, which runs whatever code")
    assert "Expected: tensors as adapter_model.safetensors alone" in text
    (path / TENSORS).unlink()
    refused(small(), path, "save_pretrained")
    shutil.move(pickled, path / TENSORS)
    refused(small(), path, "a pickle")


def test_pickles_of_a_training_run_are_none_of_the_adapters(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    (path / "optimizer.pt").write_bytes(pickle.dumps(Runs()))
    veneer.load(small(), path)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", "2"), ("r", 2.0), ("r", True), ("r", 2**40), ("lora_alpha", "3"), ("lora_alpha", [3]),
        ("rank_pattern", {"q": 0}), ("rank_pattern", {"q": "8"}), ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": None}), ("target_modules", 3), ("target_modules", {"q": 1}), ("target_modules", [3]),
        ("target_parameters", "linear.weight"), ("exclude_modules", 7), ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]), ("layers_pattern", 3), ("modules_to_save", "head"), ("use_dora", "no"),
        ("use_rslora", 1), ("bias", "some"), ("bias", ["all"]), ("lora_dropout", "0"), ("lora_dropout", -1),
        ("lora_dropout", 1.5), ("init_lora_weights", 3), ("peft_version", 0.19), ("fan_in_fan_out", "x"),
        ("inference_mode", 0), ("peft_type", ["LORA"]), ("base_model_name_or_path", {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_type_is_refused(tmp_path, field, value, foreign):
    path = small_adapter(tmp_path / "adapter")
    forge(path, config=put([field], value))
    path = remove_record(path) if foreign else path
    refused(small(), path, rf"{field}[ =].*")


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (["hashes"], [], "holds no hashes"),
        (["base", "name"], 3, "fields of other types"),
        (["base", "weights", "linear.weight"], None, "fields of other types"),
        (["versions"], [], "fields of other types"),
        (["provenance"], "x", "fields of other types"),
        (["changes", "linear.weight", "rank"], 2**40, "rank 1099511627776"),
        (["changes", "linear.weight", "rows"], None, "rows None"),
        (["config", "alpha"], "x", "alpha='x'"),
        (["config", "ranks"], {"q": "x" * 10_000}, "ranks"),
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused(tmp_path, at, value, words):
    from veneer.adapter_files.record import hash_record

    path = small_adapter(tmp_path / "adapter")
    record = json.loads((path / RECORD).read_text())
    put(at, value)(record)
    if isinstance(record["hashes"], dict):
        record["hashes"]["record"] = hash_record(record)
    (path / RECORD).write_text(json.dumps(record))
    with safe_open(path / TENSORS, framework="pt") as opened:
        names = opened.keys()
        tensors = {name: opened.get_tensor(name) for name in names}
    save_file(tensors, path / TENSORS, metadata={"veneer": json.dumps(record)})
    assert len(refused(small(), path, words)) < 3000


A, B = "base_model.model.linear.lora_A.weight", "base_model.model.linear.lora_B.weight"


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (put([A], torch.full((2, 6), 1e10)), "numbers beyond 1e\\+09"),
        (put([A], torch.full((2, 6), -3e38)), "numbers beyond 1e\\+09"),
        (
            lambda t: t.update({A: torch.full((2, 6), 1e6), B: torch.full((9, 2), 1e6)}),
            "a change of norm up to",
        ),
        (put([A], torch.ones(2, 6).int()), "A stored as torch.int32"),
        (put([A], torch.ones(2, 6).bool()), "A stored as torch.bool"),
        (put([A], torch.ones(2, 6) + 0j), "numbers stored as torch.complex64"),
        (put([A], torch.ones(2, 6).to(torch.float8_e4m3fn)), "numbers stored as torch.float8"),
        (put([A], torch.tensor(1.0)), r"A \(\) and B \(9, 2\) at 'linear'"),
        (put([A], torch.zeros(2, 0)), r"A \(2, 0\)"),
        (put([A], torch.zeros(0, 6)), r"A \(0, 6\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_no_adapter_has(tmp_path, tensors, words, foreign):
    path = small_adapter(tmp_path / "adapter", model=small(), targets=["linear"])
    forge(path, tensors=tensors)
    refused(small(), remove_record(path) if foreign else path, words)


def test_a_change_too_large_by_its_alpha(tmp_path):
    path = remove_record(small_adapter(tmp_path / "adapter", targets=["linear"]))
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 1e300}))
    refused(small(), path, "a change of norm up to .* at 'linear'")


@pytest.mark.parametrize("foreign", [False, True])
def test_a_variance_below_zero(tmp_path, foreign):
    from tests.support.models import ConvNet

    handle = veneer.attach(
        ConvNet().eval(), veneer.LoraConfig(rank=2, targets=["pointwise"], train_also=["norm"])
    )
    path = handle.save(tmp_path / "adapter")
    forge(path, tensors=put(["base_model.model.norm.running_var"], -torch.ones(6)))
    path = remove_record(path) if foreign else path
    with pytest.raises(AdapterError, match=r"a variance below zero in norm\.running_var"):
        veneer.load(ConvNet(), path)


def test_a_message_is_never_longer_than_one_reads(tmp_path):
    path = remove_record(small_adapter(tmp_path / "adapter", targets=["linear"]))
    with safe_open(path / TENSORS, framework="pt") as opened:
        names = opened.keys()
        tensors = {name: opened.get_tensor(name) for name in names}
    save_file(
        {**tensors, **{f"x{number}": torch.zeros(1) for number in range(3000)}}, path / TENSORS
    )
    text = refused(small(), path, "3000 problems")
    assert len(text) < 12_000
    assert text.endswith("… and 2950 more")


# ----------------------------------------------------------------------------------------------
# regular expressions


@pytest.mark.parametrize(
    "pattern",
    [r"(a|a)*b", r"(\w+\.?)+!", r"((.*)*)*x", "(" * 30 + ".*" + ")*" * 30, ".*" * 500 + "!"],
)
@pytest.mark.parametrize(
    "field",
    ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"],
)
def test_an_expression_that_never_ends_ends(tmp_path, monkeypatch, field, pattern):
    """Each takes Python's ``re`` years on this model's paths."""
    monkeypatch.setattr("veneer.formats.patterns.MAX_SECONDS", 0.05)
    path = remove_record(small_adapter(tmp_path / "adapter", model=long(), targets=["linear"]))
    config = json.loads((path / CONFIG).read_text())
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    (path / CONFIG).write_text(
        json.dumps(
            {**config, field: value, "layers_to_transform": [0] if "layers" in field else None}
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.UnverifiedAdapter)
        try:
            veneer.load(long(), path)
        except AdapterError as error:
            said = (
                "no tensors for",
                "longer than any that people use",
                "of 4,096 at most",
                "no tensor of 2 for what",
            )
            assert any(words in str(error) for words in said) or field == "target_modules"  # noqa: PT017


def long():
    """A model with a path of many letters."""
    model = small()
    model.add_module("a" * 200, torch.nn.Linear(2, 2))
    return model


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(q", "no regular expression"),
        ("(q{1000}){1000}", "repeats too often"),
        ("(" * 2000 + ")" * 2000, "no regular expression|not supported"),
        ("(q|w)" * 1000, "of 4,096 at most"),
        ("((((){999}){999}){999}){999}", "repeats too often"),
        ("(){60000}", "repeats too often"),
        ("q{e}", "a brace that is not escaped"),
    ],
)
def test_an_expression_that_cannot_be_used_is_refused(tmp_path, pattern, words):
    path = remove_record(small_adapter(tmp_path / "adapter", targets=["linear"]))
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "rank_pattern": {pattern: 2}}))
    refused(small(), path, words)
    (path / CONFIG).write_text(json.dumps({**config, "target_modules": pattern}))
    if "no regular expression" in words:
        refused(small(), path, words)
    else:  # the tensors tell what it means
        with pytest.warns(veneer.UnverifiedAdapter):
            assert [*veneer.load(small(), path).changes] == ["linear.weight"]
