"""The artefact: what is saved loads to the same outputs, and what was damaged, altered or made for
another base does not load."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import struct
import textwrap
import time
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.adapters import (
    CONFIG,
    FUSED,
    FUSED_IDS,
    RECORD,
    TENSORS,
    Small,
    forge,
    fused,
    numbers,
    put,
    refused,
    same,
    small,
    small_adapter,
)
from tests.support.forked import Program
from tests.support.models import IDS, ConvNet, TinyLM
from tests.support.packed import LIBRARIES, x_dtype
from tests.support.toys import bits, calibration, error, flat, randomise
from torch import nn

import veneer
from veneer.adapter_files.record import PARAMETERS, hash_record
from veneer.bases import BASES, weight_of
from veneer.errors import AdapterError, BaseMismatchError, OutputExistsError, TargetError
from veneer.layers import LAYERS
from veneer.variants import VARIANTS

#: the variants of which PEFT's file holds all numbers
PLAIN = {"lora", "rslora", "dora", "dora_rslora", "orthogonal", "eva", "mica"}


def fresh(tied=False, dtype=torch.float32, seed=7):
    torch.manual_seed(seed)
    return TinyLM(tied).to(dtype)


@pytest.fixture
def saved(tmp_path):
    model = fresh()
    handle = veneer.attach(
        model,
        veneer.LoraConfig(
            rank=2, alpha=3, ranks={"q_proj": 3}, train_also=["lm_head"], bias="targets"
        ),
    )
    randomise(handle)
    path = handle.save(tmp_path / "adapter", base_name="tiny", provenance={"steps": 3})
    with torch.no_grad():
        return path, model(IDS)


def comes_back(handle, folder, args) -> None:
    """Assert that what is saved loads on the same base to the same numbers and outputs, and saves
    to the same bytes."""
    model = handle.model.eval()
    with torch.no_grad():
        expected, kept, base = flat(model(*args)), numbers(handle), bits(model)
        path = handle.save(folder / "adapter")
        changes = {at: (c.rank, c.alpha, c.dropout, c.rows) for at, c in handle.changes.items()}
        config = handle.config
        handle.detach()
        assert (
            error(flat(copy.deepcopy(model)(*args)), expected) > 1e-3
        )  # a forward may change weights (max_norm)
        loaded = veneer.load(model, path, name="again")
        same(numbers(loaded), kept)
        assert torch.equal(flat(model(*args)), expected)
    assert str(
        {at: (c.rank, c.alpha, c.dropout, c.rows) for at, c in loaded.changes.items()}
    ) == str(changes)
    assert loaded.config == config
    again = loaded.save(folder / "again")
    for file in (
        CONFIG,
        RECORD,
    ):  # the header of the tensors holds the same record; the order of its entries varies
        assert (again / file).read_bytes() == (path / file).read_bytes()
    loaded.detach()
    same(bits(model), base)


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_of_a_language_model(tmp_path, variant, tied, dtype):
    config = veneer.LoraConfig(
        rank=2,
        alpha=3,
        targets="all",
        variant=variant,
        dropout=0.1,
        ranks={"mlp.up": 4},
        alphas={"k_proj": 9},
    )
    handle = veneer.attach(fresh(tied, dtype).eval(), config)
    randomise(handle)
    assert len(handle.changes) == 13 + (not tied)
    comes_back(handle, tmp_path, [IDS])


def test_a_loaded_adapter_trains_only_on_request(saved):
    path, _ = saved
    model = fresh()
    handle = veneer.load(model, path)
    assert handle.parameters()
    assert not any(p.requires_grad for p in model.parameters())
    model = fresh()
    handle = veneer.load(model, path, trainable=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in handle.parameters()
    }


def kinds():
    import transformers.pytorch_utils  # noqa: F401

    for kind in LAYERS:
        for number, (module, args) in enumerate(kind.examples()):
            yield pytest.param(module, args, id=f"{kind.name}-{number}")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("module", "args"), list(kinds()))
def test_round_trip_of_every_layer_kind(tmp_path, module, args):
    torch.manual_seed(2)
    args = args if isinstance(args, tuple) else (args,)
    model = (
        nn.Sequential(module) if len(args) == 1 else module
    )  # as a child, or as the model itself
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    comes_back(handle, tmp_path, args)
    layers, below = (
        veneer.adapter_files.read(tmp_path / "adapter").layers,
        "0." if len(args) == 1 else "",
    )
    handle = veneer.load(model, tmp_path / "adapter")
    assert {at.removeprefix(below) for at in layers} <= {
        "",
        "0",
        "out_proj",
        *dict(module.named_parameters()),
    }
    assert sorted(low.norm() for low in layers.values()) == pytest.approx(
        sorted(
            change.resolve(
                weight_of(model.get_submodule(at.rpartition(".")[0]), at.rpartition(".")[2])
            )[0].norm()
            for at, change in handle.changes.items()
        ),
        rel=1e-5,
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS.names())
def test_round_trip_of_every_variant(tmp_path, variant, dtype):
    torch.manual_seed(3)
    model, x = Small(), torch.randn(5, 2, 4, 4)
    config = veneer.LoraConfig(
        rank=2, alpha=3, targets="all", variant=variant, ranks={"linear": 4}, dtype=dtype
    )
    handle = veneer.attach(model, config, **calibration(model, variant, (x,)))
    randomise(handle)
    if VARIANTS[variant].peft is None:
        with pytest.raises(AdapterError, match=f"variant '{variant}'"):
            handle.save(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    if variant == "adalora":
        handle.changes["linear.weight"].mask[0, 1] = 0
    # an optimiser's state names the parameters by their order
    names = [name for name, _ in handle.named_parameters()]
    comes_back(handle, tmp_path, [x])
    assert (tmp_path / "adapter" / PARAMETERS).exists() == (variant not in PLAIN)
    loaded = veneer.load(model, tmp_path / "adapter", name="third", trainable=True)
    assert [name for name, _ in loaded.named_parameters()] == names


@pytest.mark.parametrize("fields", list(FUSED.values()), ids=list(FUSED))
def test_round_trip_of_what_is_special(tmp_path, fields):
    handle = veneer.attach(fused(), veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    comes_back(handle, tmp_path, [FUSED_IDS])


def packed():
    for storage in BASES:
        for number in range(
            len(list(storage.examples()))
            if all(map(find_spec, LIBRARIES.get(storage.name, ())))
            else 0
        ):
            yield pytest.param(storage.name, number, id=f"{storage.name}-{number}")


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(("storage", "number"), list(packed()))
def test_round_trip_on_every_storage(tmp_path, storage, number, variant):
    """The fingerprint is that of the decoded weight: a copy is the same base, another weight is
    not."""

    def base(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(list(BASES[storage].examples())[number]).eval()

    model = base()
    x = torch.randn(3, model[0].in_features, dtype=x_dtype(model[0]))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", variant=variant))
    randomise(handle)
    expected, kept = model(x), numbers(handle)
    path = handle.save(tmp_path / "adapter")
    other = base()
    loaded = veneer.load(other, path)
    same(numbers(loaded), kept)
    assert torch.equal(other(x), expected)
    with pytest.raises(BaseMismatchError, match="1 of 1 adapted"):
        veneer.load(base(seed=1), path)


def test_modules_with_statistics_come_back(tmp_path):
    torch.manual_seed(1)
    model, x = ConvNet(), torch.randn(4, 3, 8, 8)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets=["pointwise"], train_also=["norm", "score"])
    )
    for _ in range(3):
        model(x + 1)
    assert torch.equal(model.norm.running_mean, base["norm.running_mean"])
    path = handle.save(tmp_path / "adapter")
    other = ConvNet()
    other.load_state_dict(base)
    veneer.load(other.eval(), path)
    assert torch.equal(other(x), model.eval()(x))
    assert not torch.equal(
        load_file(path / TENSORS)["base_model.model.norm.running_mean"], base["norm.running_mean"]
    )


def test_the_record_says_what_the_adapter_is(saved):
    path, _ = saved
    record = json.loads((path / RECORD).read_text())
    assert record["base"]["name"] == "tiny"
    assert record["base"]["architecture"] == "TinyLM"
    assert record["provenance"] == {"steps": 3}
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["base"]["weights"]) == 12
    files = veneer.adapter_files.read(path)
    assert files.config.ranks == {"q_proj": 3}
    assert files.parameters == sum(tensor.numel() for tensor in load_file(path / TENSORS).values())
    assert sorted(file.name for file in path.parent.iterdir()) == ["adapter"], (
        "no temporary folder is left"
    )


def test_the_base_may_be_in_float32_or_bfloat16_but_not_another(tmp_path):
    handle = veneer.attach(fresh(dtype=torch.bfloat16), veneer.LoraConfig(rank=2))
    path = handle.save(tmp_path / "adapter")
    veneer.load(fresh(dtype=torch.bfloat16).float(), path)
    with pytest.raises(
        BaseMismatchError,
        match=r"other weights in 12 of 12 adapted layers .* and 12 of 18 other tensors",
    ):
        veneer.load(fresh(seed=8), path)
    other = fresh(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp["up"].weight.view(torch.int16)[3, 3] ^= 1  # one bit
    with pytest.raises(
        BaseMismatchError, match=r"1 of 12 adapted layers \(model\.layers\.1\.mlp\.up\.weight\)"
    ):
        veneer.load(other, path)
    assert "veneer" not in str(list(other.state_dict()))
    veneer.load(other, path, verify_base=False)


def test_saving_while_merged_records_the_unmerged_base(tmp_path):
    model = fresh()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    expected = model(IDS)
    second = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"), "second")
    handle.merge()
    path = handle.save(tmp_path / "adapter")
    other = fresh()
    veneer.load(other, path)
    assert torch.equal(other(IDS), expected)
    veneer.load(
        fresh(), second.save(tmp_path / "second")
    )  # which changes weights that hold the first now


def damage_truncate(path):
    data = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(data[: len(data) // 2])


def damage_last_byte(path):
    data = bytearray((path / TENSORS).read_bytes())
    data[-1] ^= 1
    (path / TENSORS).write_bytes(data)


def damage_header(path):
    data = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(data.replace(b"TinyLM", b"TinyLN"))


def damage_size(path):
    data = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def damage_empty(path):
    (path / TENSORS).write_bytes(b"")


def damage_alpha(path):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 4}))


def damage_json(path):
    (path / CONFIG).write_text("{")


def damage_record(path):
    record = json.loads((path / RECORD).read_text())
    (path / RECORD).write_text(json.dumps({**record, "provenance": {"steps": 4}}))


def damage_strip(path):
    save_file(load_file(path / TENSORS), path / TENSORS)


def damage_missing(path):
    (path / CONFIG).unlink()


def damage_format(path):
    tensors = load_file(path / TENSORS)
    record = json.loads((path / RECORD).read_text())
    record["format"] = 99
    record["hashes"]["record"] = hash_record(record)
    (path / RECORD).write_text(json.dumps(record))
    save_file(tensors, path / TENSORS, metadata={"veneer": json.dumps(record)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "cannot be read"),
        (damage_last_byte, "its tensors changed after it was written"),
        (damage_header, "the record in its header"),
        (damage_size, "cannot be read"),
        (damage_empty, "cannot be read"),
        (damage_alpha, "adapter_config.json changed"),
        (damage_json, "not JSON"),
        (damage_record, "veneer.json changed"),
        (damage_strip, "without Veneer's record"),
        (damage_missing, "no adapter_config.json"),
        (damage_format, "format 99"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_a_damaged_adapter_does_not_load(saved, damage, words):
    path, _ = saved
    damage(path)
    model = fresh()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(AdapterError, match=words):
        veneer.load(model, path)
    assert [id(p) for p in model.parameters()] == before
    assert type(model.model.layers[0].mlp["up"]) is nn.Linear


def both(*changes):
    return lambda value: [change(value) for change in changes]


LINEAR, MAIN = "linear.weight", "base_model.model.linear.lora_A.weight"
FORGERIES = [
    # (variant, what is forged, words of the error)
    ("lora", {"tensors": put([MAIN])}, "half a pair at 'linear'"),
    ("lora", {"tensors": both(put([MAIN]), put([MAIN.replace("A", "B")]))}, "no change of 'linear.weight'"),
    ("lora", {"tensors": put([MAIN], torch.zeros(2, 7))}, r"A \(2, 7\) and B \(9, 2\) at 'linear'"),
    ("lora", {"tensors": put([MAIN], torch.zeros(4))}, r"A \(4,\)"),
    ("lora", {"tensors": put([MAIN], torch.zeros(1, 6))}, r"A \(1, 6\) and B \(9, 2\)"),
    ("lora", {"tensors": put(["base_model.model.linear.extra"], torch.zeros(2))}, "a tensor for linear.extra"),
    ("lora", {"tensors": put(["extra"], torch.zeros(2))}, "tensor 'extra'"),
    ("lora", {"tensors": put(["base_model.model.other.lora_A.weight"], torch.zeros(2, 6))}, "half a pair at 'other'"),
    ("lora", {"tensors": put(["base_model.model.linear.lora_magnitude_vector"], torch.ones(9))}, "lora_magnitude"),
    ("lora", {"record": put(["changes", LINEAR, "rank"], 0)}, "rank 0 and alpha 3 for 'linear.weight'"),
    ("lora", {"record": put(["changes", LINEAR, "rank"], 7)}, "rank 7 for 'linear.weight'.*at most 6"),
    ("lora", {"record": put(["changes", LINEAR, "rank"], 3)}, "rank 3, alpha 3 and scale 1 of 'linear.weight'"),
    ("lora", {"record": put(["changes", LINEAR, "alpha"], 4)}, "rank 2, alpha 4 and scale 2 of 'linear.weight'"),
    ("lora", {"record": put(["changes", LINEAR, "alpha"], "3")}, "alpha '3'"),
    ("lora", {"record": put(["changes", LINEAR, "alpha"])}, "alpha None"),
    ("lora", {"record": put(["changes", LINEAR], None)}, "rank None"),
    ("lora", {"record": put(["changes", LINEAR, "rows"], [[0, 99]])}, r"slices \[\[0, 99\]\].*9 outputs"),
    ("lora", {"record": put(["changes", LINEAR, "rows"], [[0, 4], [3, 5]])}, r"slices \[\[0, 4\], \[3, 5\]\]"),
    ("lora", {"record": put(["changes", LINEAR, "rows"], [0, 4])}, r"rows \[0, 4\].*pairs"),
    ("lora", {"record": put(["changes", LINEAR, "rows"], [])}, r"rows \[\].*pairs"),
    ("lora", {"record": put(["changes", LINEAR, "rows"], [[0, 4]])}, "a change outside the rows"),
    ("lora", {"record": put(["changes", LINEAR])}, r"fingerprints of other weights \(linear.weight\)"),
    ("lora", {"record": put(["base", "weights", LINEAR])}, r"fingerprints of other weights \(linear.weight\)"),
    ("lora", {"record": both(put(["changes", LINEAR]), put(["base", "weights", LINEAR]))}, "record does not know: lin"),
    ("lora", {"record": put(["changes"])}, "no base, changes or config"),
    ("lora", {"record": put(["config", "variant"], "loora")}, r"variant='loora' \(nearest"),
    ("lora", {"record": put(["config", "variant"], "vera")}, "no b, d of 'linear.weight' in veneer.safetensors"),
    ("lora", {"record": put(["config", "variant"], "dora")}, "lora_magnitude_vector, as variant 'dora' has"),
    ("lora", {"record": put(["config", "rank"], "x")}, "rank='x'"),
    ("lora", {"record": put(["config", "ranky"], 2)}, "field 'ranky'"),
    ("lora", {"record": put(["config"], [])}, "no base, changes or config"),
    (
        "lora",
        {"record": both(*(put([part, "other.weight"], {"rank": 1, "alpha": 1}) for part in ("changes",)),
                        put(["base", "weights", "other.weight"], ""))},
        "a change of 'other.weight', which this model lacks",
    ),
    ("lora", {"config": put(["r"], 3)}, "rank 2"),
    ("lora", {"config": put(["lora_alpha"], 5)}, "Expected: 2, 5 and 2.5, as in adapter_config"),
    ("lora", {"config": put(["use_rslora"], True)}, "alpha 3 and scale 1.5 of 'conv.weight'"),
    ("dora", {"tensors": put(["base_model.model.linear.lora_magnitude_vector"])}, "none at 'linear'"),
    ("dora", {"tensors": put(["base_model.model.linear.lora_magnitude_vector"], torch.ones(8))}, "magnitude_vector"),
    ("vera", {"own": put(["linear.weight.d"])}, "numbers b in veneer.safetensors for 'linear.weight'"),
    ("vera", {"own": put(["linear.weight.e"], torch.ones(2))}, "numbers b, d, e in veneer.safetensors"),
    ("vera", {"own": put(["other.weight.d"], torch.ones(2))}, "does not know: other.weight"),
    ("vera", {"own": put(["linear.weight.d"], torch.ones(1, 5))}, "shapes that do not fit"),
    ("vera", {"own": put(["linear.weight.d"], torch.ones(1, 2))}, r"another change \(off by"),
    ("vera", {"own": put(["linear.weight.d"], torch.full((1, 2), torch.nan))}, "not finite"),
    ("vera", {"record": put(["changes", LINEAR, "alpha"], 4)}, r"another change \(off by"),
    ("vera", {"record": put(["config", "variant"], "loha")}, "numbers b, d in veneer.safetensors"),
    ("pissa", {"own": put(["linear.weight.A"], torch.ones(1, 3, 6))}, "shapes that do not fit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "forged", "words"), FORGERIES, ids=[words for *_, words in FORGERIES]
)
def test_a_folder_that_is_wrong_in_itself_does_not_load(tmp_path, variant, forged, words):
    """Hashes tell what was altered; this is what they cannot tell."""
    path = small_adapter(tmp_path / "adapter", variant)
    forge(path)
    veneer.load(small(), path)  # forging by itself is no harm
    forge(path, **forged)
    refused(small(), path, words)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    forge(
        path,
        tensors=put([MAIN], torch.zeros(2, 7)),
        record=put(["changes", "conv.weight", "rank"], 99),
    )
    text = refused(small(), path, "2 problems")
    assert "rank 99 for 'conv.weight'" in text
    assert "A (2, 7)" in text


def test_the_file_of_a_variant_is_there_and_is_its_own(tmp_path):
    path = small_adapter(tmp_path / "adapter", "vera")
    other = small_adapter(tmp_path / "other", "vera", rank=1)
    shutil.copy(other / PARAMETERS, path / PARAMETERS)
    refused(small(), path, "veneer.safetensors, which changed after it was written")
    (path / PARAMETERS).write_bytes(b"")
    refused(small(), path, "veneer.safetensors cannot be read")
    (path / PARAMETERS).unlink()
    refused(small(), path, "no veneer.safetensors in .*, which holds the numbers of variant 'vera'")
    plain = small_adapter(tmp_path / "plain")
    shutil.copy(other / PARAMETERS, plain / PARAMETERS)
    refused(small(), plain, "veneer.safetensors, of which the record says nothing")


def test_another_base_is_refused_without_a_trace(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    refused(small(seed=6), path, "2 of 2 adapted layers", BaseMismatchError)


def test_the_record_stripped_off_a_variant_leaves_the_plain_change(tmp_path):
    """As the error about a missing veneer.safetensors advises."""
    model = nn.Sequential(nn.Linear(6, 9))
    state, x = bits(model), torch.randn(4, 6)
    path = small_adapter(tmp_path / "adapter", "vera", model)
    expected = model(x)
    for file in (RECORD, PARAMETERS):
        (path / file).unlink()
    save_file(load_file(path / TENSORS), path / TENSORS)
    other = nn.Sequential(nn.Linear(6, 9))
    other.load_state_dict(state)
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(other, path)
    assert error(other(x), expected) < 1e-6


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS.names() if VARIANTS[name].peft is not None]
)
def test_changes_as_values(tmp_path, variant):
    """What analyses of adapters read: plain paths, and a refusal of what is no product alone."""
    model = fused()
    targets = ["qkv", "attention", "embed"]
    targets += (
        []
        if "inputs" in VARIANTS[variant].needs
        else ["experts", "tables.0", "tables.1", "position"]
    )  # which tell no inputs
    config = veneer.LoraConfig(rank=2, targets=targets, variant=variant)
    loss = lambda model, batch: model(*batch).square().mean()  # noqa: E731
    handle = veneer.attach(model, config, **calibration(model, variant, (FUSED_IDS,), loss))
    randomise(handle)
    files = veneer.adapter_files.read(handle.save(tmp_path / "adapter"))
    names = {*targets, "attention.out_proj", "head"}
    names = {at.replace("experts", "experts.proj") for at in names}
    assert files.products.keys() == names
    if variant.startswith("dora"):
        with pytest.raises(
            AdapterError, match=f"variant '{variant}', whose change is no low-rank product alone"
        ):
            files.layers  # noqa: B018
        return
    assert files.layers.keys() == names
    for at, change in handle.changes.items():
        low = files.layers[at.removesuffix(".weight").removesuffix(".in_proj_weight")]
        owner, _, weight = at.rpartition(".")
        expected, _ = change.resolve(weight_of(model.get_submodule(owner), weight))
        assert low.norm() == pytest.approx(expected.norm(), rel=1e-5)
    held = sum(
        v.numel()
        for c in handle.changes.values()
        for n, v in c.adapter_parameters.items()
        if n not in c.variant.derived
    )
    tied = files.layers["head"].A.numel() + files.layers["head"].B.numel()
    assert files.parameters == held + tied


def test_every_flipped_byte_of_a_small_adapter_is_noticed(tmp_path):
    """Each byte of all three files, one at a time: an AdapterError, or outputs that are the
    same."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3))
    state = {k: v.clone() for k, v in base.state_dict().items()}
    handle = veneer.attach(base, veneer.LoraConfig(rank=1))
    randomise(handle)
    path, x = handle.save(tmp_path / "adapter"), torch.randn(2, 4)
    expected = base(x)
    refused = accepted = 0
    for file in (CONFIG, RECORD, TENSORS):
        data = (path / file).read_bytes()
        for position in range(0, len(data), 3):
            changed = bytearray(data)
            changed[position] ^= 1 << (position % 8)
            (path / file).write_bytes(changed)
            model = nn.Sequential(nn.Linear(4, 3))
            model.load_state_dict(state)
            try:
                veneer.load(model, path)
            except AdapterError:
                refused += 1
            else:
                accepted += 1  # white space between JSON values, padding of the header
                assert torch.equal(model(x), expected), (file, position)
        (path / file).write_bytes(data)
    assert refused > 10 * accepted


def test_an_adapter_of_another_model_names_what_differs(saved, tmp_path):
    path, _ = saved
    with pytest.raises(
        AdapterError, match=r"a change of 'model.layers.0.self_attn.q_proj', which this model lacks"
    ):
        veneer.load(ConvNet(), path)
    with pytest.raises(
        AdapterError, match=r"A \(3, 8\) and B \(8, 3\) at 'model.layers.0.self_attn.q_proj'"
    ):
        veneer.load(TinyLM(width=12), path)
    with pytest.raises(AdapterError, match=r"layers.1"):
        veneer.load(TinyLM(blocks=1), path)
    with pytest.raises(AdapterError, match="'default', which is taken"):
        model = fresh()
        veneer.load(model, path)
        veneer.load(model, path)
    with pytest.raises(TargetError):
        veneer.attach(model, veneer.LoraConfig(rank=2))


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    handle.parameters()[0].data[0, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        handle.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    tensors = load_file(path / TENSORS)
    tensors["base_model.model.0.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, path / TENSORS)
    (path / RECORD).unlink()
    with pytest.raises(AdapterError, match="not finite"):
        veneer.load(nn.Sequential(nn.Linear(4, 4)), path)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    model = nn.Linear(4, 4)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    (path / "note.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        handle.save(path)
    assert (path / "note.txt").exists()
    handle.save(path, overwrite=True)
    assert (path / "note.txt").read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_while_saving_leaves_the_old_folder(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    before = (path / TENSORS).read_bytes()
    handle.parameters()[0].data.add_(1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("veneer.adapter_files.folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        handle.save(path, overwrite=True)
    assert (path / TENSORS).read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_killed_process_leaves_an_adapter_that_loads(tmp_path):
    """kill -9 at random moments of a loop that saves over the same folder: the folder always holds
    one whole adapter."""
    path = tmp_path / "adapter"
    script = textwrap.dedent(
        f"""
        import torch, veneer
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        handle = veneer.attach(model, veneer.LoraConfig(rank=8))
        while True:
            handle.parameters()[0].data.add_(1)
            handle.save({str(path)!r}, overwrite=True)
            print("saved", flush=True)
        """
    )
    for moment in range(4):
        process = Program(script, "torch")
        while process.said.count("saved") < 5 + 3 * moment:
            assert process.alive, process.said
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        torch.manual_seed(0)
        veneer.load(nn.Linear(64, 64), path)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="no folder"):
        veneer.adapter_files.read(tmp_path / "file")


def test_several_adapters_of_one_model_are_saved_one_by_one(tmp_path):
    model = fresh()
    outputs = {}
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2), name))
        veneer.save(model, tmp_path / name, name=name)
        with veneer.use(model, name):
            outputs[name] = model(IDS)
    other = fresh()
    for name in ("b", "a"):
        veneer.load(other, tmp_path / name, name=name)
    for name in ("a", "b"):
        with veneer.use(other, name):
            assert error(other(IDS), outputs[name]) == 0


@pytest.mark.parametrize(
    ("module", "value", "words"),
    [
        ("a\u200b", 1.0, "not printable"),
        ("a\n", 1.0, "not printable"),
        ("a" * 600, 1.0, "longer than 512 characters"),
        ("a", 1e5, r"a change of norm up to .* at 'a'"),
    ],
    ids=["a blank of no width", "a new line", "a long name", "a change that is too large"],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, module, value, words):
    """An adapter that saves and does not load is a training that is lost, and the old one with
    it."""
    model = nn.ModuleDict({module: nn.Linear(4, 4)})
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    before = small_adapter(tmp_path / "adapter")
    kept = {file.name: file.read_bytes() for file in before.iterdir()}
    for parameter in handle.parameters():
        parameter.data.fill_(value)
    for path, overwrite in ((before, True), (tmp_path / "new", False)):
        with pytest.raises(
            AdapterError, match=f"was not written, as it could not be read again.*{words}"
        ):
            handle.save(path, overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in before.iterdir()} == kept
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_saving_when_nobody_knows_the_base_any_more(tmp_path):
    """Merged weights would be taken for the base, and the adapter would load on no base at all."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["1"]), "other")
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
    randomise(handle)
    handle.merge(keep=False)
    with pytest.raises(
        AdapterError, match=r"0\.weight, merged with keep=False.*save it before that merge"
    ):
        handle.save(tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
    other.save(tmp_path / "other")  # changes weights that nobody merged


def test_a_provenance_with_numbers_for_keys_can_be_read_again(tmp_path):
    handle = veneer.attach(nn.Linear(4, 4), veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter", provenance={"loss": {1: 3.0, 2: 2.0, 10: 1.0}})
    assert veneer.adapter_files.read(path).metadata["provenance"]["loss"]["10"] == 1.0
    with pytest.raises(AdapterError, match="a provenance that is not JSON"):
        handle.save(tmp_path / "other", provenance={"x": object()})
    assert not (tmp_path / "other").exists()


def test_overwriting_a_link_leaves_no_litter(tmp_path):
    handle = veneer.attach(nn.Linear(4, 4), veneer.LoraConfig(rank=1))
    file = handle.save(tmp_path / "file")
    real = handle.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    handle.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (
        veneer.adapter_files.read(tmp_path / "link").parameters
        == veneer.adapter_files.read(file).parameters
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real"]


def test_the_shape_of_a_convolution_is_checked_not_its_size(tmp_path):
    path = veneer.attach(
        nn.Sequential(nn.Conv2d(4, 6, (3, 1))), veneer.LoraConfig(rank=2, targets="all")
    ).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"A \(2, 4, 3, 1\)"):
        veneer.load(nn.Sequential(nn.Conv2d(4, 6, (1, 3))), path, verify_base=False)


def test_what_is_loaded_has_its_parameters_in_the_order_of_what_was_saved(tmp_path):
    """An optimiser's state goes by that order: weight and bias of a norm have one shape, and would
    change places."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    config = veneer.LoraConfig(rank=2, targets=["0"], train_also=["1", "2"])
    handle = veneer.attach(copy.deepcopy(plain), config)
    handle.save(tmp_path / "adapter")
    loaded = veneer.load(plain, tmp_path / "adapter", trainable=True)
    names = [name for name, parameter in handle.model.named_parameters() if parameter.requires_grad]
    assert [
        name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad
    ] == names
    assert [name for name, _ in loaded.named_parameters()] == [
        name for name, _ in handle.named_parameters()
    ]
