"""A checkpoint is merged tensor by tensor: the bits of a merge in memory, in bounded memory, the
whole result or nothing after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import equal, in_memory, save_model, tensors, tiny, trained
from tests.support.forked import LARGE, Program, printed
from tests.support.real_models import REAL, transformers_models
from tests.support.tiny import write_tiny
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.errors import (
    AdapterError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    MergeError,
    OutputExistsError,
    TargetError,
)
from veneer.fileio.locks import hold_lock
from veneer.kernels.switch import is_on
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.merge_checkpoint import merge_checkpoint, prove
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:.*was written by another library")


@pytest.mark.parametrize(
    "variant", [variant.name for variant in VARIANTS if variant.peft is not None]
)
def test_the_bits_are_those_of_a_merge_in_memory(variant, tmp_path):
    from tests.support.toys import calibration

    model, base = tiny(tmp_path / "base")
    config = veneer.LoraConfig(rank=2, targets="all-linear", variant=variant)
    ids = torch.arange(5)[None]
    handle = veneer.attach(
        model,
        config,
        **calibration(model, variant, (ids,), lambda m, b: m(*b).logits.float().sum()),
    )
    randomise(handle, 0.05)
    handle.save(tmp_path / "adapter")
    handle.detach()
    done = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out", model=model)
    equal(tensors(tmp_path / "out"), in_memory(model, tmp_path / "adapter", tmp_path / "memory"))
    assert len(done.report.layers) == 14
    proven = prove(base, [tmp_path / "adapter"], tmp_path / "out", model=model)
    assert proven == len(open_checkpoint(base).file_of)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", transformers_models())
def test_every_architecture(name, variant, tmp_path):
    """Ties, fused weights, stacks that the files hold expert by expert, convolutions, norms,
    running statistics."""
    model = REAL[name].build()[0].to(torch.bfloat16)
    base = save_model(model, tmp_path / "base", max_shard_size="40KB")
    # a weight that is computed from others in the files
    computed = {"wav2vec2": "pos_conv_embed.conv"}.get(name, ())
    adapter = trained(model, tmp_path / "adapter", variant=variant, exclude=computed)
    merge_checkpoint(base, [adapter], tmp_path / "out", model=model)
    equal(tensors(tmp_path / "out"), in_memory(model, adapter, tmp_path / "memory"))


def test_the_result_is_a_model_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "pytorch_model.bin").write_bytes(b"old")
    done = merge_checkpoint(base, [adapter], tmp_path / "out")
    assert done.left_out == ("pytorch_model.bin",)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    handle = veneer.load(model, adapter)
    handle.merge()
    ids = torch.arange(7)[None]
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged(ids).logits, model(ids).logits)
    names = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"veneer_merge.json"}
    for name in names:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    record = json.loads((tmp_path / "out" / "veneer_merge.json").read_text())
    assert record["adapters"][0]["name"] == "adapter"
    assert str(tmp_path) not in json.dumps(record)


def test_several_adapters_with_weights(tmp_path):
    model, base = tiny(tmp_path / "base", torch.float32)
    one = trained(model, tmp_path / "a", targets=["q_proj", "up_proj"])
    two = trained(model, tmp_path / "b", targets=["q_proj", "norm"], rank=3, variant="dora")
    expected = {name: value.double() for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in expected.items()}
    for path, weight in ((one, 0.5), (two, -0.25)):
        handle = veneer.load(model.double(), path)
        handle.merge()
        for name, value in model.named_parameters():
            if name in expected:
                expected[name] = expected[name] + weight * (value.detach() - before[name])
        handle.unmerge()
        handle.detach()
    merge_checkpoint(base, [(one, 0.5), (two, -0.25)], tmp_path / "out")
    for name, value in tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_on_the_way(stored, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    from veneer.kernels.reference import round_once

    model, base = tiny(tmp_path / "base", stored)
    adapter = trained(model, tmp_path / "adapter")
    merge_checkpoint(base, [adapter], tmp_path / "out", dtype=dtype, rounding="nearest")
    handle = veneer.load(model, adapter)
    exact = {
        name: value.detach().double()
        for name, value in model.named_parameters()
        if "veneer" not in name
    }
    for path, change in handle.changes.items():
        low, _ = change.resolve(model.get_parameter(path))
        exact[path] = (
            exact[path] + change.layer.fold(low.delta(torch.float64), exact[path].shape).detach()
        )
    for path, part in handle.layers.items():
        exact |= {
            f"{path}.{name}": value.detach().double()
            for name, value in part.full.named_parameters()
        }
    found = tensors(tmp_path / "out")
    for name, value in found.items():
        assert torch.equal(value, round_once(exact[name], dtype)), name
    size = sum(value.numel() * value.element_size() for value in found.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype


def test_a_model_that_transformers_does_not_know(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 2), nn.Flatten()
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    adapter = trained(model, tmp_path / "adapter")
    with torch.device("meta"):
        bare = nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2),
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 4, 2),
            nn.Flatten(),
        )
    for given in (model, bare):
        merge_checkpoint(tmp_path, [adapter], tmp_path / "out", model=given, overwrite=True)
        handle = veneer.load(model, adapter)
        handle.merge()
        equal(
            tensors(tmp_path / "out"),
            {k: v for k, v in model.state_dict().items() if "veneer" not in k.split(".")},
        )
        handle.unmerge()
        handle.detach()
    assert all(value.is_meta for value in bare.state_dict().values())


# ------------------------------------------------------------------------------------------------
# bad input


def nothing_left(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_another_base_is_refused_and_nothing_is_left(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    file = sorted(base.glob("*.safetensors"))[-1]
    held = load_file(file)
    name = next(name for name in held if name.endswith("proj.weight"))
    held[name][0, 0] += 1
    save_file(held, file)
    with pytest.raises(BaseMismatchError, match=name):
        merge_checkpoint(base, [adapter], tmp_path / "out")
    nothing_left(tmp_path, "base", "adapter")
    merge_checkpoint(base, [adapter], tmp_path / "out", verify_base=False)


def test_numbers_that_the_dtype_does_not_hold_are_refused(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", size=300, targets=["q_proj"])
    with pytest.raises(MergeError, match=r"q_proj.weight: W \+ ΔW is not finite in torch.float16"):
        merge_checkpoint(base, [adapter], tmp_path / "out", dtype=torch.float16)
    nothing_left(tmp_path, "base", "adapter")


def test_what_does_not_fit_is_one_error(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    with pytest.raises(MergeError, match="no adapter"):
        merge_checkpoint(base, [], tmp_path / "out")
    with pytest.raises(ConfigError, match="rounding='up'"):
        merge_checkpoint(base, [adapter], tmp_path / "out", rounding="up")
    with pytest.raises(MergeError, match="int8"):
        merge_checkpoint(base, [adapter], tmp_path / "out", dtype=torch.int8)
    with pytest.raises(AdapterError):
        merge_checkpoint(base, [base], tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder"):
        merge_checkpoint(tmp_path / "nowhere", [adapter], tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merge_checkpoint(base, [adapter], base)
    with pytest.raises(MergeError, match="holds the base"):
        merge_checkpoint(base, [adapter], base, overwrite=True)
    other = tmp_path / "other"
    write_tiny(other, hidden_size=16)
    with pytest.raises((AdapterError, TargetError), match="q_proj"):
        merge_checkpoint(other, [adapter], tmp_path / "out")
    nothing_left(tmp_path, "base", "adapter", "other")


def test_a_weight_that_the_files_hold_as_others_is_refused(tmp_path):
    model = REAL["wav2vec2"].build()[0]
    base, adapter = save_model(model, tmp_path / "base"), trained(model, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"pos_conv_embed.conv.weight.*computed"):
        merge_checkpoint(base, [adapter], tmp_path / "out", model=model)


def test_a_checkpoint_without_a_weight_is_refused(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    file = base / index["weight_map"].pop(name)
    held = load_file(file)
    del held[name]
    save_file(held, file) if held else file.unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"no tensor that is '{name}'"):
        merge_checkpoint(base, [adapter], tmp_path / "out")


def test_proving_finds_one_flipped_bit_and_a_changed_file(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    merge_checkpoint(base, [adapter], tmp_path / "out", model=model)
    assert prove(base, [adapter], tmp_path / "out", model=model) == len(
        open_checkpoint(base).file_of
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        path, start = tmp_path / "out" / checkpoint.file_of[name], checkpoint.start(name)
        whole = path.read_bytes()
        path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        with pytest.raises(MergeError, match=name):
            prove(base, [adapter], tmp_path / "out", model=model)
        path.write_bytes(whole)
    for name in ("tokenizer.json", "config.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_text("{}")
        with pytest.raises(MergeError, match=name):
            prove(base, [adapter], tmp_path / "out", model=model)
        (tmp_path / "out" / name).unlink()
        with pytest.raises(MergeError, match=f"{name} is not there"):
            prove(base, [adapter], tmp_path / "out", model=model)
        (tmp_path / "out" / name).write_bytes(whole)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_folders_beside_the_weights_are_copied_too(dtype, tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    copied = ("templates/tool.jinja", "templates/deep/x.txt")
    for name in (*copied, ".cache/x.txt", "onnx/model.onnx", "o/t.bin"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    done = merge_checkpoint(base, [adapter], tmp_path / "out", dtype=dtype, model=model)
    assert done.left_out == (".cache", "o", "onnx")
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == name
    assert not {".cache", "o", "onnx"} & {path.name for path in (tmp_path / "out").iterdir()}
    prove(base, [adapter], tmp_path / "out", dtype=dtype, model=model)
    (tmp_path / "out" / "templates" / "deep" / "x.txt").unlink()
    with pytest.raises(MergeError, match=r"x\.txt is not there"):
        prove(base, [adapter], tmp_path / "out", dtype=dtype, model=model)


# ------------------------------------------------------------------------------------------------
# kills

CHILD = """
import time
import veneer.tools.merge_checkpoint as merging
from veneer.tools.merge_checkpoint import merged_files
write = merged_files.CheckpointWriter._write_tensor
def write_slowly(self, name):
    time.sleep(0.03)
    return write(self, name)
merged_files.CheckpointWriter._write_tensor = write_slowly
print("begun", flush=True)
merging.merge_checkpoint({base!r}, [{adapter!r}], {out!r})
"""


def kill_merge(base, adapter, out, delay):
    """Kill a merge ``delay`` seconds after its first file is there. Whether it was killed before
    its result had its name."""
    child = Program(CHILD.format(base=str(base), adapter=str(adapter), out=str(out)), *LARGE)
    child.until(lambda: child.said.startswith("begun\n"))
    while child.alive and not list(out.parent.glob(f".{out.name}.*.tmp/new/*.safetensors")):
        time.sleep(0.005)
    time.sleep(delay)
    child.kill()
    return child.wait() == -signal.SIGKILL and not out.exists()


def _kills(tmp_path, kills, seed, targets="all"):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=targets)
    merge_checkpoint(base, [adapter], tmp_path / "expected")
    draws, out = random.Random(seed), tmp_path / "out"
    killed = [kill_merge(base, adapter, out, draws.uniform(0, 0.1)) for _ in range(kills)]
    assert any(killed)
    if not out.exists():
        assert len(list(tmp_path.glob(".out.*.tmp"))) == 1, "each merge removes what it finds"
        merge_checkpoint(base, [adapter], out)
    for path in (tmp_path / "expected").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    nothing_left(tmp_path, "base", "adapter", "expected", "out")


def test_a_merge_after_a_kill_starts_anew_and_removes_what_was_left(tmp_path):
    _kills(tmp_path, 2, 0, targets="all-linear")  # for which no other process is asked


@pytest.mark.slow
def test_ten_kills(tmp_path):
    seed = int(time.time())
    print(f"seed {seed}")
    _kills(tmp_path, 10, seed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("last", [True, False])
def test_after_an_interrupt_or_a_full_disk_nothing_is_left(error, last, tmp_path, monkeypatch):
    import veneer.tools.merge_checkpoint as merging

    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if last:
            patch.setattr(merging, "_write_aux_files", fail)
        else:
            patch.setattr(merging.CheckpointWriter, "_write_tensor", fail)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            merge_checkpoint(base, [adapter], tmp_path / "out")
    nothing_left(tmp_path, "base", "adapter")
    merge_checkpoint(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("fcntl", [True, False])
def test_two_processes_do_not_write_one_result(fcntl, tmp_path):
    """Also on a system without fcntl."""
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    without = "import sys, time; assert 'filelock' not in sys.modules"
    without += "" if fcntl else "; sys.modules['fcntl'] = None"
    holder = f"""
        {without}
        from pathlib import Path
        from veneer.fileio.locks import hold_lock
        with hold_lock(Path({str(tmp_path / ".out.merging.lock")!r}), AssertionError):
            print("held", flush=True)
            while not Path({str(tmp_path / "go")!r}).exists():
                time.sleep(0.01)
    """
    merges = f"""
        {without}
        from veneer.errors import MergeError
        from veneer.tools.merge_checkpoint import merge_checkpoint
        try:
            merge_checkpoint({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / "out")!r})
        except MergeError as error:
            print(error)
    """
    held = Program(textwrap.dedent(holder), "torch")
    held.until(lambda: held.said == "held\n" or not held.alive)
    assert held.alive, held.said
    assert "another process" in printed(textwrap.dedent(merges))
    (tmp_path / "go").touch()
    assert held.wait() == 0
    assert printed(textwrap.dedent(merges)) == ""
    (tmp_path / "go").unlink()
    equal(tensors(tmp_path / "out"), in_memory(model, adapter, tmp_path / "memory"))
    nothing_left(tmp_path, "base", "adapter", "out", "memory")


# ------------------------------------------------------------------------------------------------
# memory


def large(**shape):
    """A Llama in bfloat16 that costs no drawing of its numbers: what matters is how many are in
    memory, not which."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, **shape)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    block = (torch.randn(1 << 20) * 0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)])
    return model


@pytest.mark.parametrize(
    ("vocabulary", "blocks", "compiled"), [(12288, 9, False), (65536, 3, True)]
)
def test_memory_is_bounded_by_the_largest_tensor(vocabulary, blocks, compiled, tmp_path):
    """Checkpoints whose largest tensor has 24 or 128 MiB, with every linear weight changed. The
    second has room for numba's own code."""
    model = large(num_hidden_layers=blocks, vocab_size=vocabulary)
    base = save_model(model, tmp_path / "base", max_shard_size="150MB")
    adapter = trained(model, tmp_path / "adapter", targets="all-linear", rank=4)
    del model
    code = f"""
        from veneer.tools.merge_checkpoint import merge_checkpoint
        done = merge_checkpoint({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / "out")!r})
        import sys
        print("numba" in sys.modules)
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    checkpoint = open_checkpoint(base)
    largest = max(map(checkpoint.bytes, checkpoint.file_of))
    used, peak = done.stdout.split()
    assert compiled or sum(map(checkpoint.bytes, checkpoint.file_of)) > 12 * largest
    assert int(peak) * 1024 < 2 * largest + 300 * 2**20
    assert used == str(compiled and is_on("round_nearest"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert Path(tmp_path / "out" / "config.json").is_file()


def test_the_other_process_that_merges_is_named(tmp_path):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj"])
    with (
        hold_lock(tmp_path / ".out.merging.lock", AssertionError),
        pytest.raises(
            MergeError, match=rf"another process \({os.getpid()} on .*\), which merges into .*out"
        ),
    ):
        merge_checkpoint(base, [adapter], tmp_path / "out")
    assert merge_checkpoint(base, [adapter], tmp_path / "out")
    nothing_left(tmp_path, "base", "adapter", "out")
