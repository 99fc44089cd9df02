"""Every check of an adapter folder: a report that says all that is wrong, and agrees with what
loading says."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.adapters import CONFIG, RECORD, TENSORS, forge, put, small, small_adapter
from tests.support.hostile import Runs, remove_record
from tests.support.models import IDS, TinyLM
from tests.support.real_models import REAL
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.adapter_files.record import PARAMETERS
from veneer.adapter_files.verify import Finding, Report, verify
from veneer.errors import AdapterError, CheckpointError
from veneer.models.base_weights import open_base_weights
from veneer.models.safetensors_dir import Checkpoint
from veneer.variants import VARIANTS

INDEX = "model.safetensors.index.json"


def language_model(tied=False, seed=7):
    torch.manual_seed(seed)
    return TinyLM(tied)


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a language model, small beside its weights."""
    handle = veneer.attach(language_model(), veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle, 0.02)
    return handle.save(tmp_path / "adapter", base_name="tiny")


def checkpoint(folder, model, drop=(), prefix="", strip="", shards=1):
    """The model as a folder of safetensors, as transformers writes one."""
    folder.mkdir()
    state = {
        f"{prefix}{key.removeprefix(strip)}": value.clone()
        for key, value in model.state_dict().items()
        if key not in drop
    }
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[number::shards])
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def said(report: Report, level: str, check: str) -> str:
    """The messages of one level and check."""
    return "\n".join(f.message for f in report.findings if (f.level, f.check) == (level, check))


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS.names() if VARIANTS[name].peft is not None]
)
def test_a_good_adapter_is_good(tmp_path, variant):
    from tests.support.toys import calibration

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    config = veneer.LoraConfig(rank=2, variant=variant)
    handle = veneer.attach(model, config, **calibration(model, variant, (torch.randn(3, 6),)))
    randomise(handle, 0.05)
    report = verify(handle.save(tmp_path / "adapter"))
    assert report.ok
    assert {finding.level for finding in report.findings} == {"ok"}
    assert [f.check for f in report.findings] == [
        "files",
        "tensors",
        "record",
        "numbers",
        "layers",
        "norms",
    ]
    assert (PARAMETERS in said(report, "ok", "record")) == (
        tmp_path / "adapter" / PARAMETERS
    ).exists()
    assert str(report).endswith("good (0 errors, 0 warnings)")
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_base_it_was_made_for(tmp_path, shards, tied):
    handle = veneer.attach(language_model(tied), veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle, 0.02)
    path = handle.save(tmp_path / "adapter")
    drop = {"lm_head.weight"} if tied else set()
    base = checkpoint(tmp_path / "base", language_model(tied), drop=drop, shards=shards)
    for given in (base, str(base), language_model(tied)):
        report = verify(path, given)
        assert report.ok, str(report)
        assert (
            said(report, "ok", "base")
            == f"{13 + (not tied)} weights have the fingerprints of the record"
        )


@pytest.mark.parametrize(
    ("prefix", "strip"), [("", "model."), ("base_model.", ""), ("transformer.", "model.")]
)
def test_names_may_differ_by_a_prefix(tmp_path, prefix, strip):
    handle = veneer.attach(language_model(), veneer.LoraConfig(rank=2))
    path = handle.save(tmp_path / "adapter")
    base = checkpoint(tmp_path / "base", language_model(), prefix=prefix, strip=strip)
    if prefix == "transformer.":  # both: this is a name of another kind, and is not guessed
        assert "lacks" in said(verify(path, base), "error", "base")
    else:
        assert verify(path, base).ok


def test_the_other_name_of_a_tie(tmp_path):
    """A head that is adapted by its name, in a checkpoint that holds the embedding alone; and the
    other way round."""
    for number, (target, drop) in enumerate(
        (("lm_head", "lm_head.weight"), ("embed_tokens", "model.embed_tokens.weight"))
    ):
        handle = veneer.attach(language_model(True), veneer.LoraConfig(rank=2, targets=[target]))
        path = handle.save(tmp_path / f"adapter{number}")
        base = checkpoint(tmp_path / f"base{number}", language_model(True), drop={drop})
        assert verify(path, base).ok, str(verify(path, base))


def test_another_base_is_an_error(tmp_path, adapter):
    for number, base in enumerate((language_model(seed=8), language_model(seed=9))):
        folder = checkpoint(tmp_path / f"base{number}", base)
        for given in (folder, base):
            report = verify(adapter, given)
            assert not report.ok
            assert "other numbers in 14 of 14 weights (model.embed_tokens.weight" in said(
                report, "error", "base"
            )
            assert "Do: take the base that it was trained on, tiny" in said(report, "error", "base")
            assert "tensors that it computes with and does not change (" in said(
                report, "error", "base"
            )
            assert len(report.errors) == 2


def test_one_bit_of_the_base(tmp_path, adapter):
    model = language_model().bfloat16()
    base = checkpoint(tmp_path / "rounded", model)
    assert verify(adapter, base).ok  # a fingerprint is of a rounding to bfloat16
    with torch.no_grad():
        model.model.layers[1].mlp["up"].weight.view(torch.int16)[3, 3] ^= 1
    report = verify(adapter, checkpoint(tmp_path / "base", model))
    assert "in 1 of 14 weights (model.layers.1.mlp.up.weight)" in said(report, "error", "base")


def test_a_base_of_other_names_and_shapes(tmp_path, adapter):
    report = verify(adapter, TinyLM(width=12, blocks=1))
    found = said(report, "error", "base")
    assert "weights that the base lacks (model.layers.1.self_attn.q_proj.weight" in found
    assert "other shapes (model.embed_tokens.weight is (17, 12), and B A there 8 × 17" in found
    assert (
        "trained in full with another shape: model.layers.0.norm.weight (8,), in the base (12,)"
        in found
    )
    assert "tensors that it computes with and does not change (" in found
    assert len(report.errors) == 4
    assert said(report, "ok", "proof") == "0 of 27 tensors proven"


def test_one_weight_is_in_memory_at_a_time(tmp_path, adapter, monkeypatch):
    """The base is read by name, each tensor once."""
    read = []

    whole = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, name, rows=None: (read.append(name), whole(self, name, rows))[1],
    )
    base = checkpoint(tmp_path / "base", language_model())
    assert verify(adapter, base).ok
    assert sorted(read) == sorted(language_model().state_dict())


def test_what_is_no_base(tmp_path, adapter):
    with pytest.raises(CheckpointError, match=r"no folder .*nothing"):
        verify(adapter, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file in"):
        verify(adapter, tmp_path / "empty")
    folder = checkpoint(tmp_path / "base", language_model(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    for file in ("../adapter/adapter_model.safetensors", "nothing.safetensors", 3):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "x": file}}))
        with pytest.raises(
            CheckpointError,
            match=r"names of \.safetensors files beside it|no nothing|no weight_map",
        ):
            verify(adapter, folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        verify(adapter, folder)


@pytest.mark.parametrize("name", ["mixtral", "llama-tied-biased", "swin"])
def test_weights_are_found_as_transformers_loads_them(tmp_path, name):
    """A stack of experts that the files hold one by one, a head that is the embedding: as a live
    model has them."""
    model = REAL[name].build()[0]
    model.save_pretrained(tmp_path / "base")
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle, 0.02)
    path, count = handle.save(tmp_path / "adapter"), len(handle.changes)
    changed = (
        "model.embed_tokens.weight"
        if name == "llama-tied-biased"
        else next(reversed(handle.changes))
    )
    report = verify(path, tmp_path / "base")
    assert not said(report, "error", "base") + said(report, "warning", "base")
    assert said(report, "ok", "base") == f"{count} weights have the fingerprints of the record"
    handle.detach()
    with torch.no_grad():
        model.get_parameter(changed).view(-1)[-1] += 1
    model.save_pretrained(tmp_path / "other")
    assert f"other numbers in 1 of {count} weights" in said(
        verify(path, tmp_path / "other"), "error", "base"
    )


def test_a_config_that_nobody_knows_leaves_the_names(tmp_path, adapter):
    base = checkpoint(tmp_path / "base", language_model())
    (base / "config.json").write_text('{"model_type": "of my own", "architectures": ["Mine"]}')
    assert verify(adapter, base).ok
    assert not verify(adapter, checkpoint(tmp_path / "other", language_model(seed=9))).ok


# ----------------------------------------------------------------------------------------------
# what is wrong


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    path = small_adapter(tmp_path / "adapter", "vera")
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 4}))
    for file in (TENSORS, PARAMETERS):
        data = bytearray((path / file).read_bytes())
        data[-3:] = b"\x7f\xff\x7f"
        (path / file).write_bytes(data)
    (path / "setup.py").write_text("import os")
    report = verify(path)
    assert "a pickle, which runs whatever code" in said(report, "error", "files")
    changed = said(report, "error", "record")
    for what in ("its tensors", CONFIG, PARAMETERS):
        assert f"{what} changed after it was written" in changed
    assert "setup.py is a program" in said(report, "warning", "files")
    assert len(report.errors) == 5
    assert [f.check for f in report.errors] == ["files", "record", "record", "record", "numbers"]
    with pytest.raises(AdapterError):
        veneer.adapter_files.read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("optimizer.pt", pickle.dumps(Runs()), "optimizer.pt is a pickle"),
        (
            "training_args.bin",
            b"PK\x03\x04" + bytes(20),
            "training_args.bin is a zip archive, as torch.save",
        ),
        ("modeling.py", b"import os", "modeling.py is a program"),
        ("run", b"#!/bin/sh\n", "run is a program"),
        ("tool", b"\x7fELF" + bytes(20), "tool is a program"),
        ("README.md", b"# mine", ""),
        ("tokenizer.json", b"{}", ""),
    ],
)
def test_files_that_have_no_business_there(tmp_path, name, content, words):
    path = small_adapter(tmp_path / "adapter")
    (path / name).write_bytes(content)
    report = verify(path)
    assert report.ok  # Veneer opens none of them
    assert words in said(report, "warning", "files")
    assert bool(report.warnings) == bool(words)


def test_a_file_that_is_a_link_elsewhere_is_told(tmp_path):
    path = small_adapter(tmp_path / "adapter")
    (path / "notes.txt").symlink_to("adapter_config.json")
    assert not verify(path).warnings
    (path / "setup.py").symlink_to(tmp_path / "x.py")
    (path / "more").symlink_to("/")
    os.mkfifo(path / "pipe")
    found = said(verify(path), "warning", "files")
    for name in ("setup.py", "more", "pipe"):
        assert f"{name} is a link that leads elsewhere, or no regular file" in found


def test_what_is_printed_cannot_look_like_another_finding(tmp_path):
    """Names come from the folder: no colours, nothing that moves the cursor, and no line of its
    own."""
    path = small_adapter(tmp_path / "adapter")
    (path / "a\nok       files    all is well\x1b[32m.py").write_text("")
    (path / os.fsdecode(b"\xff.py")).write_text("")
    text = str(verify(path))
    assert text.encode()
    assert r"\x1b[32m.py is a program" in text
    assert r"\udcff.py is a program" in text
    assert "\x1b" not in text
    assert not any(line.startswith("ok       files    all") for line in text.splitlines())
    assert sum(line.startswith("warning  files") for line in text.splitlines()) == 2


def test_what_is_not_there():
    assert "no folder" in said(verify("/nothing"), "error", "files")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    path = small_adapter(tmp_path / "adapter", "vera")
    for name in (CONFIG, TENSORS, RECORD, PARAMETERS):
        shutil.move(path / name, tmp_path / name)
        (path / name).symlink_to("/dev/zero")
        report = verify(path)
        assert f"{name}, a link to /dev/zero" in said(report, "error", "files")
        (path / name).unlink()
        shutil.move(tmp_path / name, path / name)
    assert verify(path).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_numbers_are_looked_at_though_every_hash_is_right(tmp_path, value):
    path = small_adapter(tmp_path / "adapter")
    forge(
        path, tensors=lambda tensors: tensors["base_model.model.linear.lora_A.weight"].fill_(value)
    )
    report = verify(path)
    assert "linear.lora_A.weight" in said(report, "error", "numbers")
    assert said(report, "ok", "record")
    assert {finding.check for finding in report.errors} <= {"numbers", "layers"}


def test_types_of_numbers(tmp_path):
    half = small_adapter(tmp_path / "half")
    forge(half, tensors=lambda t: t.update({key: t[key].half() for key in list(t)[:1]}))
    assert "several types: float16, float32" in said(verify(half), "warning", "numbers")
    double = small_adapter(tmp_path / "double", dtype="float64")
    assert "float64" in said(verify(double), "warning", "numbers")


def test_an_adapter_that_changes_nothing(tmp_path):
    handle = veneer.attach(small(), veneer.LoraConfig(rank=2, targets="all"))
    assert "changes nothing" in said(
        verify(handle.save(tmp_path / "untrained")), "warning", "norms"
    )
    randomise(handle)
    handle.changes["conv.weight"].adapter_parameters["B"].data.zero_()
    assert "changes of zero, as before training, at conv" in said(
        verify(handle.save(tmp_path / "one")), "warning", "norms"
    )


class Layers(nn.Module):
    """Many layers of one shape."""

    def __init__(self, count=12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(("factor", "odd"), [(1, False), (4, False), (100, True), (1e-3, True)])
def test_a_layer_far_from_its_like(tmp_path, factor, odd):
    handle = veneer.attach(Layers(), veneer.LoraConfig(rank=2))
    randomise(handle, 0.05)
    handle.changes["layers.5.weight"].adapter_parameters["B"].data.mul_(factor)
    report = verify(handle.save(tmp_path / "adapter"))
    found = said(report, "warning", "norms")
    assert report.ok
    assert ("at 'layers.5'" in found) == odd
    assert found.count("‖ΔW‖") == odd


def test_changes_larger_than_the_weight(tmp_path):
    model = language_model()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["q_proj", "v_proj"]))
    randomise(handle, 0.02)
    handle.changes["model.layers.0.self_attn.q_proj.weight"].adapter_parameters["B"].data.mul_(1000)
    path = handle.save(tmp_path / "adapter")
    report = verify(path, checkpoint(tmp_path / "base", language_model()))
    assert report.ok
    found = said(report, "warning", "norms")
    assert (
        "larger than the weight itself, ‖ΔW‖ / ‖W‖: model.layers.0.self_attn.q_proj.weight" in found
    )
    assert "v_proj" not in found


# ---------------------------------------------------------------------------------------------- of
# other libraries


def test_an_adapter_without_a_record(tmp_path, adapter):
    path = remove_record(adapter)
    base = checkpoint(tmp_path / "base", language_model())
    for report in (verify(path), verify(path, base), verify(path, language_model(seed=9))):
        assert report.ok
        assert "written by another library" in said(report, "warning", "record")
    assert "14 weights by name and shape alone" in said(verify(path, base), "ok", "base")
    report = verify(path, TinyLM(width=12, blocks=1))
    assert "weights that the base lacks" in said(report, "error", "base")
    assert "other shapes" in said(report, "error", "base")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(
        json.dumps({**config, "target_modules": [*config["target_modules"], "gate"]})
    )
    assert "targets without a tensor: gate" in said(verify(path), "warning", "config")
    (path / CONFIG).write_text(json.dumps({**config, "r": 3}))
    assert "rank 2 at" in said(verify(path), "error", "layers")
    (path / CONFIG).write_text(json.dumps({**config, "x_lora": True}))
    assert "x_lora=True" in said(verify(path), "error", "config")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft(tmp_path):
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    theirs = peft.get_peft_model(language_model(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.02)
    theirs.save_pretrained(tmp_path / "adapter")
    report = verify(tmp_path / "adapter", checkpoint(tmp_path / "base", language_model()))
    assert report.ok, str(report)
    assert "3 changes" in said(report, "ok", "layers")


def test_a_new_head_and_one_of_another_shape(tmp_path):
    handle = veneer.attach(
        language_model(), veneer.LoraConfig(rank=2, targets=["q_proj"], train_also=["lm_head"])
    )
    path = handle.save(tmp_path / "adapter")
    base = checkpoint(tmp_path / "base", language_model(), drop={"lm_head.weight"})
    state = load_file(base / "model.safetensors")
    report = verify(path, base)  # the embedding stands in for the head, as if tied
    assert report.ok
    save_file({k: v for k, v in state.items() if "embed" not in k}, base / "model.safetensors")
    assert "not in the base: lm_head.weight (a new head?)" in said(
        verify(path, base), "warning", "base"
    )
    save_file({**state, "lm_head.weight": torch.zeros(9, 8)}, base / "model.safetensors")
    assert "lm_head.weight (17, 8), in the base (9, 8)" in said(verify(path, base), "error", "base")


def test_the_weights_of_a_packed_model_are_read_as_loading_reads_them(tmp_path):
    from torch.nn.utils import parametrizations

    def model():
        torch.manual_seed(1)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)))

    handle = veneer.attach(model(), veneer.LoraConfig(rank=2))
    randomise(handle, 0.02)
    path = handle.save(tmp_path / "adapter")
    veneer.load(model(), path)
    assert verify(path, model()).ok
    assert open_base_weights(model()).get("0.nothing") is None
    assert open_base_weights(model()).get("nothing.weight") is None


def test_a_report_is_a_value(adapter):
    report = verify(adapter)
    assert report == verify(adapter)
    assert Report(adapter, (Finding("warning", "x", "y"),)).ok
    assert not Report(adapter, (Finding("error", "x", "y"),)).ok
    model = language_model()
    veneer.load(model, adapter)
    assert model(IDS).isfinite().all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / TENSORS).write_bytes(b""),
        lambda path: (path / RECORD).write_text("[]"),
        lambda path: (path / CONFIG).write_text("{"),
        lambda path: (path / CONFIG).unlink(),
        lambda path: (path / TENSORS).unlink(),
        lambda path: save_file(load_file(path / TENSORS), path / TENSORS),
        lambda path: forge(path, record=put(["config", "variant"], "loora")),
        lambda path: forge(path, record=put(["format"], 2)),
        lambda path: forge(path, tensors=put(["base_model.model.linear.lora_A.weight"])),
    ],
)
def test_what_read_refuses_is_an_error(tmp_path, damage):
    path = small_adapter(tmp_path / "adapter")
    damage(path)
    with pytest.raises(AdapterError):
        veneer.adapter_files.read(path)
    assert not verify(path).ok
