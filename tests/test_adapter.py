"""The artefact: what is saved loads to the same outputs, and what was damaged, altered or made for another base does
not load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from models import IDS, ConvNet, TinyLM
from toys import error, randomise
from veneer.artefact import _hash_record
from veneer.errors import AdapterError, BaseMismatchError, OutputExistsError, TargetError
from veneer.layers import LAYERS
from veneer.variants import VARIANTS

TENSORS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "veneer.json"


def fresh(tied=False, dtype=torch.float32, seed=7):
    torch.manual_seed(seed)
    return TinyLM(tied).to(dtype)


@pytest.fixture
def saved(tmp_path):
    model = fresh()
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, alpha=3, ranks={"q_proj": 3}, train_also=["lm_head"], bias="targets")
    )
    randomise(handle)
    path = handle.save(tmp_path / "adapter", base_name="tiny", provenance={"steps": 3})
    with torch.no_grad():
        return path, model(IDS)


@pytest.mark.parametrize("variant", [name for name in VARIANTS.names() if VARIANTS[name].peft is not None])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_of_a_language_model(tmp_path, variant, tied, dtype):
    model = fresh(tied, dtype)
    config = veneer.LoraConfig(
        rank=2, alpha=3, targets="all", variant=variant, dropout=0.1, ranks={"mlp.up": 4}, alphas={"k_proj": 9}
    )
    handle = veneer.attach(model.eval(), config)
    randomise(handle)
    path = handle.save(tmp_path / "adapter")
    other = fresh(tied, dtype).eval()
    loaded = veneer.load(other, path, name="other")
    assert torch.equal(other(IDS), model(IDS))
    assert loaded.config == handle.config
    assert [p.requires_grad for p in loaded.parameters()] == [False] * len(loaded.parameters())
    assert not any(p.requires_grad for p in other.parameters())
    assert {k: (v.rank, v.alpha, v.dropout) for k, v in loaded.layers.items()} == {
        k: (v.rank, v.alpha, v.dropout) for k, v in handle.layers.items()
    }
    again = loaded.save(tmp_path / "again")
    for file in (CONFIG, RECORD):  # the header of the tensors holds the same record; the order of its entries varies
        assert (again / file).read_bytes() == (path / file).read_bytes()
    assert veneer.load(fresh(tied, dtype), path, trainable=True).parameters()[0].requires_grad


@pytest.mark.parametrize("kind", LAYERS.names())
def test_round_trip_of_every_layer_kind(tmp_path, kind):
    import transformers.pytorch_utils  # noqa: F401

    for number, (module, x) in enumerate(LAYERS[kind].examples()):
        model = nn.Sequential(module)
        rank = min(2, LAYERS[kind].dims(module).max_rank)
        bare = {name: value.clone() for name, value in model.state_dict().items()}
        handle = veneer.attach(model, veneer.LoraConfig(rank=rank, targets="all"))
        randomise(handle)
        expected = model(x)
        path = handle.save(tmp_path / f"{number}")
        norms = {name: low.norm() for name, low in veneer.adapter.read(path).layers.items()}
        (part,) = handle.layers.values()
        weight = module._parameters[LAYERS[kind].weight]
        assert norms == {"0": pytest.approx(part.resolve(weight)[0].norm(), rel=1e-5)}
        handle.detach()
        model.load_state_dict(bare)
        veneer.load(model, path)
        assert torch.equal(model(x), expected)


def test_modules_with_statistics_come_back(tmp_path):
    torch.manual_seed(1)
    model, x = ConvNet(), torch.randn(4, 3, 8, 8)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["pointwise"], train_also=["norm", "score"]))
    for _ in range(3):
        model(x + 1)
    assert torch.equal(model.norm.running_mean, base["norm.running_mean"])
    path = handle.save(tmp_path / "adapter")
    other = ConvNet()
    other.load_state_dict(base)
    veneer.load(other.eval(), path)
    assert torch.equal(other(x), model.eval()(x))
    assert not torch.equal(load_file(path / TENSORS)["base_model.model.norm.running_mean"], base["norm.running_mean"])


def test_the_record_says_what_the_adapter_is(saved):
    path, _ = saved
    record = json.loads((path / RECORD).read_text())
    assert record["base"]["name"] == "tiny"
    assert record["base"]["architecture"] == "TinyLM"
    assert record["provenance"] == {"steps": 3}
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["base"]["weights"]) == 12
    artefact = veneer.adapter.read(path)
    assert artefact.config.ranks == {"q_proj": 3}
    assert artefact.parameters == sum(tensor.numel() for tensor in load_file(path / TENSORS).values())
    assert sorted(file.name for file in path.parent.iterdir()) == ["adapter"], "no temporary folder is left"


def test_the_base_may_be_in_float32_or_bfloat16_but_not_another(tmp_path):
    handle = veneer.attach(fresh(dtype=torch.bfloat16), veneer.LoraConfig(rank=2))
    path = handle.save(tmp_path / "adapter")
    veneer.load(fresh(dtype=torch.bfloat16).float(), path)
    with pytest.raises(BaseMismatchError, match="other weights in 12 of 12 adapted layers"):
        veneer.load(fresh(seed=8), path)
    other = fresh(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp["up"].weight.view(torch.int16)[3, 3] ^= 1  # one bit
    with pytest.raises(BaseMismatchError, match=r"1 of 12 adapted layers \(model\.layers\.1\.mlp\.up\)"):
        veneer.load(other, path)
    assert "veneer" not in str(list(other.state_dict()))
    veneer.load(other, path, verify_base=False)


def test_saving_while_merged_records_the_unmerged_base(tmp_path):
    model = fresh()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    expected = model(IDS)
    handle.merge()
    path = handle.save(tmp_path / "adapter")
    other = fresh()
    veneer.load(other, path)
    assert torch.equal(other(IDS), expected)


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
    record["hashes"]["record"] = _hash_record(record)
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


def test_every_flipped_byte_of_a_small_adapter_is_noticed(tmp_path):
    """Each byte of all three files, one at a time: an AdapterError, or outputs that are the same."""
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
    with pytest.raises(AdapterError, match=r"a change of 'model.layers.0.self_attn.q_proj', which this model lacks"):
        veneer.load(ConvNet(), path)
    with pytest.raises(AdapterError, match=r"A \(3, 8\) and B \(8, 3\) at 'model.layers.0.self_attn.q_proj'"):
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
    model = nn.Linear(4, 4)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    handle.parameters()[0].data[0, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        handle.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    tensors = load_file(path / TENSORS)
    tensors["base_model.model.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, path / TENSORS)
    (path / RECORD).unlink()
    with pytest.raises(AdapterError, match="not finite"):
        veneer.load(nn.Linear(4, 4), path)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    model = nn.Linear(4, 4)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    (path / "note.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        handle.save(path)
    assert (path / "note.txt").exists()
    handle.save(path, overwrite=True)
    assert not (path / "note.txt").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_while_saving_leaves_the_old_folder(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter")
    before = (path / TENSORS).read_bytes()
    handle.parameters()[0].data.add_(1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("veneer.artefact.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        handle.save(path, overwrite=True)
    assert (path / TENSORS).read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_killed_process_leaves_an_adapter_that_loads(tmp_path):
    """kill -9 at random moments of a loop that saves over the same folder: the folder always holds one whole
    adapter."""
    script = textwrap.dedent(
        """
        import sys, torch, veneer
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        handle = veneer.attach(model, veneer.LoraConfig(rank=8))
        while True:
            handle.parameters()[0].data.add_(1)
            handle.save(sys.argv[1], overwrite=True)
            print("saved", flush=True)
        """
    )
    path = tmp_path / "adapter"
    for moment in range(4):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(5 + 3 * moment):
            assert process.stdout.readline() == b"saved\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        torch.manual_seed(0)
        veneer.load(nn.Linear(64, 64), path)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="no folder"):
        veneer.adapter.read(tmp_path / "file")


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


def test_a_provenance_with_numbers_for_keys_can_be_read_again(tmp_path):
    handle = veneer.attach(nn.Linear(4, 4), veneer.LoraConfig(rank=1))
    path = handle.save(tmp_path / "adapter", provenance={"loss": {1: 3.0, 2: 2.0, 10: 1.0}})
    assert veneer.adapter.read(path).metadata["provenance"]["loss"]["10"] == 1.0
    with pytest.raises(AdapterError, match="a provenance that is not JSON"):
        handle.save(tmp_path / "other", provenance={"x": object()})
    assert not (tmp_path / "other").exists()


def test_overwriting_a_file_or_a_link_leaves_no_litter(tmp_path):
    handle = veneer.attach(nn.Linear(4, 4), veneer.LoraConfig(rank=1))
    (tmp_path / "file").write_text("x")
    handle.save(tmp_path / "file", overwrite=True)
    real = handle.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    handle.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert veneer.adapter.read(tmp_path / "link").parameters == veneer.adapter.read(tmp_path / "file").parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real"]


def test_the_shape_of_a_convolution_is_checked_not_its_size(tmp_path):
    path = veneer.attach(nn.Sequential(nn.Conv2d(4, 6, (3, 1))), veneer.LoraConfig(rank=2, targets="all")).save(
        tmp_path / "adapter"
    )
    with pytest.raises(AdapterError, match=r"A \(2, 4, 3, 1\)"):
        veneer.load(nn.Sequential(nn.Conv2d(4, 6, (1, 3))), path, verify_base=False)
