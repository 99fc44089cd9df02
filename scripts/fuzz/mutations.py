"""The mutations of an adapter folder. A mutation makes its random choices with the generator of the
mutant, so that the same seed makes the same mutant."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from veneer.adapter_files.file_names import CORE_FILES
from veneer.adapter_files.record import PARAMETERS, RECORD, hash_record, hash_tensors
from veneer.fileio.hashing import hash_json
from veneer.formats import peft

CONFIG, TENSORS = peft.CONFIG, peft.TENSORS


@dataclass
class Mutant:
    """A copy of an adapter folder that a mutation may change.

    Fields:
        folder: the copy.
        twin: the folder of another adapter of the same kind.
        ours: whether Veneer wrote the adapter.
        forged: whether the hashes were corrected after the change, so that they cannot tell.
        other_base: whether to load the folder onto another model with the same shapes.
        notes: what was changed.
    """

    folder: Path
    twin: Path
    random: random.Random
    ours: bool
    forged: bool = False
    other_base: bool = False
    notes: list[str] = field(default_factory=list)

    def file(self, *names: str) -> Path:
        """A random one of the existing files; ``names``: the candidates."""
        files = [self.folder / name for name in names or CORE_FILES]
        files = [file for file in files if file.is_file()]
        return self.random.choice(files)

    def maybe_forge(self) -> None:
        if self.ours and self.random.random() < 0.7:
            self.forged = forge(self.folder)

    def note(self, *words: object) -> None:
        self.notes.append(" ".join(map(str, words))[:200])


Mutate = Callable[[Mutant], None]
MUTATIONS: dict[str, Mutate] = {}


def mutation(function: Mutate) -> Mutate:
    MUTATIONS[function.__name__] = function
    return function


# ----------------------------------------------------------------------------------------------
# helpers


class Raw(str):
    """Text to insert into a JSON file unchanged, if no Python value gives this text."""


DEEP = Raw("[" * 3000 + "]" * 3000)
#: regular expressions that are slow or invalid
EVIL = [
    r"(a|a)*b", r"(.*)*x", r"((a+)+)+$", r"(.*.*.*.*.*.*.*)y", r"(\w+\.?)+!", r"(?=.*a)+.*",
    r"(x+x+)+y", r"(q", r"\1", r"(?P<a>q)(?P=a)", "((((" * 300 + "q" + "))))" * 300,
    "q{1000}{1000}{1000}", "(?i)Q", "q" * 100_000, r"[[a]", "*", "((((){999}){999}){999}){999}",
    ".*" * 2000, r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*\.)*(q|up)", "(" * 50 + ".*" + ")*" * 50,
]  # fmt: skip
#: unusual values for JSON files
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 1e-300, 1e30, 1e308, 2**31, 2**63, 2**64, "",
    "x", "q", "0", "../x", "a" * 5000, "\x00", "\u202e", "é", [], [0], ["q"], ["q", "up"], [None],
    [[0, 99]], [[0, 1]], [[]], ["q", 3], {}, {"a": 1}, {"q": 2}, {"q": "2"}, {"": 0},
    {"a": {"b": []}}, {"q": 1e300}, {"q": 0}, {".*": 2}, {"q": True}, "LORA", "all-linear",
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("1" * 5000), Raw('"\\ud800"'),
    Raw('{"a": 1, "a": 2}'), DEEP, Raw("01"), Raw("1E400"), Raw("-0"), Raw("2.0"),
    *({pattern: 2} for pattern in EVIL), *EVIL,
]  # fmt: skip


def dumps(value: Any) -> str:
    """``value`` as JSON, with ``Raw`` texts unchanged."""
    raws: list[Raw] = []

    def replace_raw(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: replace_raw(child) for key, child in value.items()}
        return [replace_raw(child) for child in value] if isinstance(value, list) else value

    text = json.dumps(replace_raw(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write(file: Path, header: Any, data: bytes) -> None:
    text = (header if isinstance(header, str) else dumps(header)).encode(errors="surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_in(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as tensor_file:
        names = tensor_file.keys()
        tensors = {name: tensor_file.get_tensor(name) for name in names}
        return tensors, dict(tensor_file.metadata() or {})


def forge(folder: Path) -> bool:
    """Correct every hash in a folder, as only a program can. Returns whether this was possible."""
    try:
        tensors, metadata = tensors_in(folder / TENSORS)
        record = json.loads(metadata["veneer"])
        config = json.loads((folder / CONFIG).read_text())
        record["hashes"] |= {"tensors": hash_tensors(tensors), CONFIG: hash_json(config)}
        if (folder / PARAMETERS).exists():
            record["hashes"][PARAMETERS] = hash_tensors(tensors_in(folder / PARAMETERS)[0])
        return put_record(folder, record)
    except Exception:
        return False  # the folder is too damaged, which the reader will notice too


def put_record(folder: Path, record: Any, hashed: bool = True) -> bool:
    """Write a record to both files that hold it; ``hashed``: correct the hash of the record."""
    if hashed:
        record["hashes"]["record"] = hash_record(record)
    text = dumps(record)
    (folder / RECORD).write_text(text)
    header, data = read(folder / TENSORS)
    header["__metadata__"]["veneer"] = text
    write(folder / TENSORS, header, data)
    return hashed


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value, to a depth of 100. (An earlier mutation may have
    nested thousands of lists.)"""
    if len(path) > 100:
        return []
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    paths = []
    for key, child in entries:
        paths += [(*path, key), *json_paths(child, (*path, key))]
    return paths


def change_somewhere(value: Any, rng: random.Random, m: Mutant) -> None:
    """Replace, remove or add a random entry in a JSON value."""
    path = rng.choice(json_paths(value))
    container = value
    for key in path[:-1]:
        container = container[key]
    choice = rng.random()
    if choice < 0.7:
        container[path[-1]] = rng.choice(ODD)
        m.note("put", repr(container[path[-1]])[:60], "at", path)
    elif choice < 0.85:
        del container[path[-1]]
        m.note("removed", path)
    elif isinstance(container, dict):
        container[rng.choice(["x", "", "../x", "q", "é", "\x00", "linear.weight"])] = rng.choice(
            ODD
        )
        m.note("added at", path[:-1])
    else:
        container.append(rng.choice(ODD))
        m.note("appended at", path[:-1])


# ----------------------------------------------------------------------------------------------
# bytes


@mutation
def flip_bits(m: Mutant) -> None:
    file = m.file()
    data = bytearray(file.read_bytes())
    for _ in range(m.random.choice([1, 1, 1, 2, 8])):
        position = m.random.randrange(len(data))
        data[position] ^= 1 << m.random.randrange(8)
        m.note(file.name, position)
    file.write_bytes(data)


@mutation
def flip_header(m: Mutant) -> None:
    file = m.file(TENSORS, PARAMETERS)
    data = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    position = m.random.randrange(end)
    data[position] ^= 1 << m.random.randrange(8)
    file.write_bytes(data)
    m.note(file.name, position)


@mutation
def flip_data(m: Mutant) -> None:
    file = m.file(TENSORS, PARAMETERS)
    data = bytearray(file.read_bytes())
    position = m.random.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))
    data[position] ^= 1 << m.random.randrange(8)
    file.write_bytes(data)
    m.note(file.name, position)
    m.maybe_forge()


@mutation
def truncate(m: Mutant) -> None:
    file = m.file()
    size = m.random.choice([0, 1, 7, 8, 9, m.random.randrange(file.stat().st_size)])
    os.truncate(file, size)
    m.note(file.name, size)


@mutation
def shuffle_bytes(m: Mutant) -> None:
    """Remove, double, zero or randomise a range of bytes."""
    file = m.file()
    data = file.read_bytes()
    start = m.random.randrange(len(data))
    stop = min(len(data), start + m.random.choice([1, 4, 8, 64, 512]))
    replacement = m.random.choice(
        [b"", data[start:stop] * 2, bytes(stop - start), m.random.randbytes(stop - start)]
    )
    file.write_bytes(data[:start] + replacement + data[stop:])
    m.note(file.name, start, stop, len(replacement))


@mutation
def append(m: Mutant) -> None:
    file = m.file()
    suffix = m.random.choice([b"\0", b" ", b"\n", b"{}", m.random.randbytes(64), bytes(10_000)])
    file.write_bytes(file.read_bytes() + suffix)
    m.note(file.name, len(suffix))


@mutation
def remove(m: Mutant) -> None:
    file = m.file()
    file.unlink()
    m.note(file.name)


# ----------------------------------------------------------------------------------------------
# headers


@mutation
def lie_about_length(m: Mutant) -> None:
    file = m.file(TENSORS, PARAMETERS)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    false_length = m.random.choice(
        [
            0,
            1,
            length - 1,
            length + 1,
            length + 8,
            len(data),
            len(data) - 8,
            2**31,
            2**63,
            2**64 - 1,
        ]
    )
    file.write_bytes(struct.pack("<Q", false_length) + data[8:])
    m.note(file.name, false_length)


def edit_header(m: Mutant, edit: Callable[[dict[str, Any], str], Any]) -> None:
    file = m.file(TENSORS, PARAMETERS)
    header, data = read(file)
    name = m.random.choice([key for key in header if key != "__metadata__"])
    m.note(file.name, name, edit(header, name))
    write(file, header, data)
    m.maybe_forge()


@mutation
def lie_about_shape(m: Mutant) -> None:
    def edit(header: dict[str, Any], name: str) -> Any:
        shape = list(header[name]["shape"])
        false_values = [
            shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], [2**31, 2**31], [2**63], [2**64, 0],
            [-n for n in shape], [float(n) for n in shape], [str(n) for n in shape],
            [True] * len(shape), None, "2", {}, [n + 1 for n in shape], [10**9, *shape],
            [1] * 1000 + shape, [2**62, 2**62, 2**62], [shape], [n * 2 for n in shape], [],
            [2**62, 0],
        ]  # fmt: skip
        header[name]["shape"] = m.random.choice(false_values)
        return str(header[name]["shape"])[:60]

    edit_header(m, edit)


@mutation
def lie_about_dtype(m: Mutant) -> None:
    def edit(header: dict[str, Any], name: str) -> Any:
        types = [
            "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U8", "BOOL", "U32", "U16", "C64",
            "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F8_E8M0", "f32", "", None, 3, [], "F128", "O",
            "float32",
        ]  # fmt: skip
        header[name]["dtype"] = m.random.choice(types)
        return header[name]["dtype"]

    edit_header(m, edit)


@mutation
def lie_about_type_and_shape(m: Mutant) -> None:
    """Give a tensor another dtype, with a shape that fits the bytes."""

    def edit(header: dict[str, Any], name: str) -> Any:
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        types = [
            ("F64", 8), ("F16", 2), ("BF16", 2), ("I64", 8), ("I32", 4), ("U8", 1), ("BOOL", 1),
            ("C64", 8), ("F8_E4M3", 1), ("I8", 1), ("U32", 4),
        ]  # fmt: skip
        entry["dtype"], width = m.random.choice(types)
        shape = entry["shape"]
        fits = size % (width * max(1, shape[-1] if shape else 1)) == 0 and shape
        entry["shape"] = (
            [size // width // max(1, shape[-1]), shape[-1]] if fits else [size // width]
        )
        return entry["dtype"], entry["shape"]

    edit_header(m, edit)


@mutation
def lie_about_offsets(m: Mutant) -> None:
    def edit(header: dict[str, Any], name: str) -> Any:
        start, stop = header[name]["data_offsets"]
        another_name = m.random.choice([key for key in header if key != "__metadata__"])
        false_values = [
            [stop, start], [start + 4, stop + 4], [start - 4, stop - 4], [0, stop - start],
            [start, stop * 1000], [start], [start, 2**63], [2**63, 2**64 - 1], [-4, stop],
            [start, stop, stop], None, "0", [float(start), stop], [start, None],
            [start + 1, stop + 1], list(header[another_name]["data_offsets"]),
            [10**18, 10**18 + stop - start], [True, stop],
        ]  # fmt: skip
        header[name]["data_offsets"] = m.random.choice(false_values)
        return header[name]["data_offsets"]

    edit_header(m, edit)


@mutation
def swap_offsets(m: Mutant) -> None:
    """Swap two tensors of the same shape: a valid file with other values."""

    def edit(header: dict[str, Any], name: str) -> Any:
        same_shape = [
            key
            for key, entry in header.items()
            if key != "__metadata__" and entry["shape"] == header[name]["shape"]
        ]
        twin = m.random.choice(same_shape)
        header[name], header[twin] = header[twin], header[name]
        return twin

    edit_header(m, edit)


@mutation
def reorder(m: Mutant) -> None:
    """Reorder the entries of a header, or also the data. Both files are valid, with the same
    tensors."""
    file = m.file(TENSORS, PARAMETERS)
    header, data = read(file)
    names = list(header)
    m.random.shuffle(names)
    reordered, offset, chunks = {}, 0, []
    for name in names:
        reordered[name] = header[name]
        if name != "__metadata__" and len(names) % 2:
            start, stop = header[name]["data_offsets"]
            reordered[name] = {**header[name], "data_offsets": [offset, offset + stop - start]}
            offset += stop - start
            chunks.append(data[start:stop])
    write(file, reordered, b"".join(chunks) or data)


@mutation
def rename(m: Mutant) -> None:
    def edit(header: dict[str, Any], name: str) -> Any:
        prefix, _, last = name.rpartition(".")
        odd_names = [
            "", ".", "..", f"../{name}", f"{prefix}..{last}", f".{name}", f"{name}.", name.upper(),
            f"{name}\x00", f"{name}\n", name.replace("lora_A", "lora_B"),
            name.replace("lora_A", "lora_a"), name.replace("base_model.model.", ""),
            name.replace("0", "1"), name.replace("0", "9" * 30), name.replace("q", "up"),
            name.replace("weight", "bias"), "é", f"base_model.model.{name}",
            name.replace(".lora_", ".base_layer.lora_"), "a" * 100_000, f"{name}.\u202e\ufeff",
            name.replace(".weight", ".default.weight"), "base_model.model..lora_A.weight",
            "__class__", "base_model.model.a.b", "base_model.model.norm.running_var",
            name.replace("lora_A", "lora_embedding_A"), "x.original_module.y",
            f"{prefix}.modules_to_save.default.{last}", "base_model.model.head.weight", "\ud800",
            "__metadata__2",
        ]  # fmt: skip
        new_name = m.random.choice(odd_names)
        entries = {new_name if key == name else key: entry for key, entry in header.items()}
        header.clear()
        header.update(entries)
        return repr(new_name[:80])

    edit_header(m, edit)


@mutation
def odd_header(m: Mutant) -> None:
    """Write an unusual header: with duplicate keys, padding, nesting or metadata of other types."""
    file = m.file(TENSORS, PARAMETERS)
    header, data = read(file)
    text = json.dumps(header)
    first = next(key for key in header if key != "__metadata__")
    entry = json.dumps(header[first])
    meta = header.get("__metadata__", {})
    odd_headers = {
        "twice": f'{{"{first}": {entry}, {text[1:]}',
        "metadata twice": '{"__metadata__": {}, ' + text[1:],
        "padding": text + " " * m.random.choice([1, 8, 5_000_000]),
        "leading": " " + text,
        "deep": text[:-1] + ', "x": ' + DEEP + "}",
        "list": "[" + text + "]",
        "metadata of numbers": {**header, "__metadata__": {**meta, "x": 1}},
        "metadata list": {**header, "__metadata__": [1]},
        "metadata null": {**header, "__metadata__": None},
        "metadata large": {**header, "__metadata__": {**meta, "x": "y" * 3_000_000}},
        "metadata more": {**header, "__metadata__": {**meta, "format": "tf", "veneer2": "{}"}},
        "no metadata": {key: value for key, value in header.items() if key != "__metadata__"},
        "many": {**header, **{f"x{number}": header[first] for number in range(3000)}},
        "many empty": {
            **header,
            **{
                f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(2000)
            },
        },
        "brackets": text[:-1] + ', "x": [' + "[]," * 300_000 + "[]]}",
        "entry more": {**header, first: {**header[first], "x": 1}},
        "entry less": {**header, first: {}},
        "entry list": {**header, first: [1]},
        "entry null": {**header, first: None},
        "NaN": text[:-1] + ', "x": NaN}',
        "digits": text.replace("[0,", "[" + "0" * 5000 + ","),
        "utf-16": text.encode("utf-16").decode("latin-1"),
        "record deep": {**header, "__metadata__": {**meta, "veneer": str(DEEP)}},
        "record null": {**header, "__metadata__": {**meta, "veneer": "null"}},
        "record empty": {**header, "__metadata__": {**meta, "veneer": ""}},
        "record object": {**header, "__metadata__": {**meta, "veneer": '{"hashes": []}'}},
    }
    choice = m.random.choice(list(odd_headers))
    write(file, odd_headers[choice], data)
    m.note(file.name, choice)


# ----------------------------------------------------------------------------------------------
# tensors


def edit_tensors(m: Mutant, edit: Callable[[dict[str, torch.Tensor], str], Any]) -> None:
    file = m.file(TENSORS, PARAMETERS)
    tensors, metadata = tensors_in(file)
    name = m.random.choice(sorted(tensors))
    m.note(file.name, name, edit(tensors, name))
    save_file(
        {key: value.clone().contiguous() for key, value in tensors.items()}, file, metadata=metadata
    )
    m.maybe_forge()


@mutation
def put_number(m: Mutant) -> None:
    def edit(tensors: dict[str, torch.Tensor], name: str) -> Any:
        floats = [key for key, value in tensors.items() if value.is_floating_point()]
        name = m.random.choice(sorted(floats))
        values = [
            float("nan"),
            float("inf"),
            -float("inf"),
            3e38,
            -1e30,
            1e12,
            1e8,
            -1e4,
            -1.0,
            0.0,
            1e-40,
        ]
        value = m.random.choice(values)
        flat = tensors[name].view(-1)
        flat[m.random.randrange(flat.numel()) if m.random.random() < 0.7 else slice(None)] = value
        return name, value

    edit_tensors(m, edit)


@mutation
def change_tensor(m: Mutant) -> None:
    """Give a tensor another dtype or shape, or remove it."""

    def edit(tensors: dict[str, torch.Tensor], name: str) -> Any:
        value = tensors[name]
        small = value.float().clamp(-100, 100)
        edits: dict[str, Any] = {
            "removed": None, "half": small.half(), "double": value.double(),
            "bf16": value.bfloat16(), "int": small.int(), "long": small.long(), "bool": small > 0,
            "byte": small.abs().byte(), "complex": small + 0j,
            "empty": value[..., :0] if value.dim() else value, "scalar": value.sum(),
            "flat": value.reshape(-1), "turned": value.T if value.dim() == 2 else value[None],
            "twice": torch.cat([value, value]) if value.dim() else value, "more": value[None],
            "wide": torch.cat([value, value], -1) if value.dim() else value,
            "less": value[:1] if value.dim() else value, "float8": small.to(torch.float8_e4m3fn),
            "zero": value * 0,
        }  # fmt: skip
        choice = m.random.choice(list(edits))
        del tensors[name]
        if edits[choice] is not None:
            tensors[name] = edits[choice]
        return choice

    edit_tensors(m, edit)


@mutation
def add_tensor(m: Mutant) -> None:
    def edit(tensors: dict[str, torch.Tensor], name: str) -> Any:
        module_path, _, last = name.rpartition(".")
        names = [
            "base_model.model.head.weight", "base_model.model.head.bias",
            "base_model.model.head.lora_A.weight", "x", name + ".x",
            "base_model.model.norm.running_mean", "base_model.model.layers.0.q.weight",
            "base_model.model.layers.0.q.bias", "",
            "base_model.model.layers.0.q.lora_magnitude_vector",
            "base_model.model.layers.0.lora_A.weight", f"{module_path}.x.{last}",
            "base_model.model.embed.lora_embedding_A", "base_model.model.norm.num_batches_tracked",
            "base_model.model.", "base_model.model.layers.0.q.base_layer.lora_A.weight",
            "base_model.model.norm.weight", "layers.0.q.weight.A",
            "base_model.model.a.token_adapter.trainable_tokens_delta",
            "base_model.model.layers.0.q.lora_B.bias", "a.b",
        ]  # fmt: skip
        shapes = [
            (6, 6),
            (5, 6),
            (2, 6),
            (6, 2),
            (6,),
            (5,),
            (),
            (0,),
            (1,),
            (4,),
            tuple(tensors[name].shape),
        ]
        new_name = m.random.choice(names)
        tensors[new_name] = torch.rand(
            m.random.choice(shapes), generator=torch.Generator().manual_seed(0)
        )
        return new_name, tuple(tensors[new_name].shape)

    edit_tensors(m, edit)


# ----------------------------------------------------------------------------------------------
# JSON


@mutation
def config_field(m: Mutant) -> None:
    """Give a field of adapter_config.json an invalid value, or one with another meaning."""
    file = m.folder / CONFIG
    config = json.loads(file.read_text())
    names = [
        *config, "rank_pattern", "alpha_pattern", "target_parameters", "exclude_modules",
        "layers_pattern", "lora_bias", "layers_to_transform", "use_qalora", "x",
        "trainable_token_indices", "peft_version", "init_lora_weights",
    ]  # fmt: skip
    name = m.random.choice(names)
    if m.random.random() < 0.1:
        config.pop(name, None)
        m.note("removed", name)
    else:
        config[name] = m.random.choice(ODD)
        m.note(name, repr(config[name])[:80])
    file.write_text(dumps(config))
    m.maybe_forge()


@mutation
def config_somewhere(m: Mutant) -> None:
    file = m.folder / CONFIG
    config = json.loads(file.read_text())
    for _ in range(m.random.choice([1, 1, 3])):
        change_somewhere(config, m.random, m)
    file.write_text(dumps(config))
    m.maybe_forge()


@mutation
def evil_regex(m: Mutant) -> None:
    file = m.folder / CONFIG
    config = json.loads(file.read_text())
    name = m.random.choice(
        ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"]
    )
    pattern = m.random.choice(EVIL)
    if name.endswith("_pattern") and name != "layers_pattern":
        config[name] = {pattern: config["r"], **(config.get(name) or {})}
    else:
        config[name] = [pattern] if m.random.random() < 0.3 else pattern
        config["layers_to_transform"] = m.random.choice([None, 0, [0, 1]])
    file.write_text(dumps(config))
    m.note(name, pattern[:80])
    m.maybe_forge()


@mutation
def record_somewhere(m: Mutant) -> None:
    """Change the record of a Veneer adapter, and correct the record's hash or not."""
    if not m.ours:
        return config_somewhere(m)
    record = json.loads((m.folder / RECORD).read_text())
    for _ in range(m.random.choice([1, 1, 2])):
        change_somewhere(record, m.random, m)
    with contextlib.suppress(Exception):  # the change may have hit the hashes
        m.forged = put_record(m.folder, record, hashed=m.random.random() < 0.8)
    return None


@mutation
def odd_json(m: Mutant) -> None:
    file = m.file(CONFIG, RECORD)
    text = file.read_text()
    content = text.rstrip()
    first = content[1:].split(":", 1)[0].strip()
    odd_texts: dict[str, str | bytes] = {
        "deep": DEEP,
        "deep inside": content[:-1] + ', "x": ' + DEEP + "}",
        "less deep": content[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}",
        "twice": "{" + first + ": 7, " + content[1:],
        "twice behind": content[:-1] + ", " + first + ": 7}",
        "list": "[" + content + "]",
        "text": '"x"',
        "null": "null",
        "empty": "",
        "spaces": text + " \n\t ",
        "comma": content[:-1] + ",}",
        "NaN": content[:-1] + ', "x": NaN}',
        "digits": content[:-1] + ', "x": ' + "9" * 6000 + "}",
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "utf-16": text.encode("utf-16"),
        "latin-1": (text + "é").encode("latin-1"),
        "large": content[:-1] + ', "x": "' + "y" * 3_000_000 + '"}',
        "too large": content + " " * 17 * 2**20,
        "brackets": content[:-1] + ', "x": [' + "[]," * 700_000 + "[]]}",
        "surrogate": content[:-1] + ', "x": "\\udc00"}',
        "escape": content[:-1] + ', "\\u001b[31mx": "\\u001b]0;x"}',
        "null byte": content[:-1] + ', "x\\u0000": "\\u0000"}',
        "comment": content + "// x",
        "again": content * 2,
        "nested objects": '{"a":' * 2000 + "1" + "}" * 2000,
    }
    choice = m.random.choice(list(odd_texts))
    file_content = odd_texts[choice]
    file.write_bytes(file_content if isinstance(file_content, bytes) else file_content.encode())
    m.note(file.name, choice)
    m.maybe_forge()


# ----------------------------------------------------------------------------------------------
# folders


@mutation
def swap_files(m: Mutant) -> None:
    """Replace files by those of another adapter with the same shapes."""
    for name in m.random.sample(CORE_FILES, m.random.choice([1, 1, 2])):
        if (m.twin / name).exists() and (m.folder / name).exists():
            shutil.copy(m.twin / name, m.folder / name)
            m.note(name)
    # if all files are the twin's now, they are another complete adapter
    m.forged = all(
        (m.folder / name).read_bytes() == (m.twin / name).read_bytes()
        for name in CORE_FILES
        if (m.folder / name).exists()
    )


@mutation
def other_base(m: Mutant) -> None:
    """Keep the folder, and load it onto a model with the same shapes and other values."""
    m.other_base = True


@mutation
def links(m: Mutant) -> None:
    file = m.file()
    outside = m.folder.parent / f"outside-{file.name}"
    link_kind = m.random.choice(
        ["outside", "inside", "loop", "nothing", "folder", "pipe", "device", "passwd", "up"]
    )
    if link_kind == "outside":
        shutil.move(file, outside)
        file.symlink_to(outside)
    elif link_kind == "up":
        shutil.move(file, outside)
        file.symlink_to(Path("..") / outside.name)
    elif link_kind == "inside":
        shutil.move(file, m.folder / "data")
        file.symlink_to("data")
    else:
        file.unlink()
        if link_kind == "folder":
            file.mkdir()
        elif link_kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(
                {"loop": file.name, "device": "/dev/zero", "passwd": "/etc/passwd"}.get(
                    link_kind, "nothing"
                )
            )
    m.note(file.name, link_kind)


class Runs:
    """An object whose pickle ends the process that loads it."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


@mutation
def pickles(m: Mutant) -> None:
    names = [
        "adapter_model.bin",
        "adapter_model.pt",
        "adapter_model.ckpt",
        "adapter_model.pth",
        "optimizer.pt",
    ]
    name = m.random.choice([TENSORS, PARAMETERS, CONFIG, RECORD, *names])
    if m.random.random() < 0.5 and name != TENSORS:
        (m.folder / TENSORS).unlink()
    if m.random.random() < 0.5:
        (m.folder / name).write_bytes(pickle.dumps(Runs(), protocol=m.random.choice([0, 2, 4, 5])))
    else:
        torch.save({"x": torch.zeros(2)}, m.folder / name)
    m.note(name)


@mutation
def more_files(m: Mutant) -> None:
    """Add a file that people keep with an adapter; it must be harmless."""
    name = m.random.choice(
        ["README.md", "setup.py", "optimizer.pt", "tokenizer.json", "x.safetensors", ".hidden", "é"]
    )
    (m.folder / name).write_bytes(m.random.randbytes(50))
    m.note(name)
