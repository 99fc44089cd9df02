"""A base that is quantised as it is loaded: what it computes with, what it proves, a run on it,
what that takes."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import write_tiny
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import veneer
from veneer import models
from veneer.adapter_files.record import record_problems
from veneer.adapter_files.verify import verify
from veneer.bases import storage_of
from veneer.errors import BaseMismatchError, ConfigError, MergeError
from veneer.fileio.hashing import fingerprint
from veneer.models import quantize
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.train.config import make_config
from veneer.train.plan import memory
from veneer.train.run import fit

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
KINDS = ("nf4", "fp4", "int8")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows are whole blocks of 4-bit numbers."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return write_tiny(folder, hidden_size=64, intermediate_size=128)


def load(base: Path, kind: str | None = "nf4", precision: Any = "fp32", **more: Any) -> Any:
    return models.load_base(base, precision=precision, device="cpu", quantize=kind, **more).model  # type: ignore[arg-type]


def packed(model: Any) -> dict[str, torch.Tensor]:
    """The dense values of each packed weight."""
    found = {}
    for path, module in model.named_modules():
        storage: Any = storage_of(module._parameters.get("weight"))
        if storage is not None and storage.name.startswith("bitsandbytes"):
            storage.prepare(module)
            found[f"{path}.weight"] = storage.dense(module.weight).double()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_packed_the_head_is_not_and_each_weight_knows_its_file(
    wide: Path, kind: str
) -> None:
    model, plain = load(wide, kind), load(wide, None)
    dense, sources = packed(model), quantize.sources_of(model)
    linear = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if type(module) is torch.nn.Linear
    }
    assert dense.keys() == linear - {"lm_head.weight"}
    assert type(model.lm_head) is torch.nn.Linear
    assert not model.training
    prints = dict(zip(dense, sources.values(), strict=True))
    for name, values in dense.items():
        weight = plain.get_parameter(name).double()
        half_a_gap = {"int8": 0.0045, "nf4": 0.16, "fp4": 0.18}[kind] * weight.abs().amax()
        assert (values - weight).abs().max() <= half_a_gap
        assert prints[name] == fingerprint(plain.get_parameter(name))


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="Linux says what a process has mapped"
)
def test_no_weight_lies_in_the_files_that_were_packed(wide: Path) -> None:
    model = load(wide)
    assert str(wide) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_products_are_in_the_precision_and_scales_are_quantised_too(wide: Path) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = load(wide, "nf4", precision).model.layers[0].mlp.up_proj
        assert layer.compute_dtype == dtype
        assert layer.weight.quant_state.nested
        assert layer.weight.quant_state.quant_type == "nf4"


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_leaves_the_base_as_it_was(wide: Path, kind: str) -> None:
    """bitsandbytes repacks 4-bit weights in the first call on some processors, and rounds their
    scales for good."""
    model = load(wide, kind, "bf16")
    before = packed(load(wide, kind, "bf16"))
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert all(torch.equal(value, before[name]) for name, value in packed(model).items())


@pytest.mark.parametrize(("kind", "within"), [("nf4", 1e-4), ("fp4", 1e-4), ("int8", 0.03)])
def test_gradients_are_those_of_the_dense_weights(wide: Path, kind: str, within: float) -> None:
    """In float64, on the values that the packed weights mean; int8 rounds x to 8 bits too."""
    torch.manual_seed(1)
    ids = torch.randint(3, 250, (2, 24))
    model, reference = load(wide, kind), load(wide, None).double()
    for name, values in packed(model).items():
        reference.get_parameter(name).data = values
    grads = []
    for each in (model, reference):
        torch.manual_seed(2)
        veneer.attach(each, veneer.LoraConfig(rank=4))
        each.train()
        trained = {name: p for name, p in each.named_parameters() if p.requires_grad}
        for p in trained.values():
            generator = torch.Generator().manual_seed(p.numel())
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        each(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.double() for name, p in trained.items()})  # type: ignore[union-attr]
    mine, wanted = grads
    assert mine.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (mine[name] - grad).norm() <= within * grad.norm(), name


@pytest.fixture(scope="module")
def run(wide: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short run on nf4, as the command makes it."""
    from tests.train.conftest import config_of

    output = tmp_path_factory.mktemp("nf4") / "run"
    return fit(config_of(wide, rows, output, quantize="nf4", epochs=2), quiet=True)


def test_a_run_learns_and_its_record_says_on_what(run: Any) -> None:
    assert run.losses[-1] < run.losses[0] - 0.1
    record = veneer.adapter_files.read(run.adapter).metadata["base"]
    assert record["quantized"] == {"by": "bitsandbytes", "as": "nf4", "original": True}


class StopAt7(TrainerCallback):
    """Ctrl-C in step 7, after the checkpoint of step 5."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_ends_at_the_same_losses(
    run: Any, wide: Path, make: Callable[..., Any]
) -> None:
    stopped = fit(make(base=str(wide), quantize="nf4", epochs=2), callbacks=[StopAt7()], quiet=True)
    assert stopped.interrupted
    assert fit(make(base=str(wide), quantize="nf4", epochs=2), quiet=True).losses == run.losses


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_an_adapter_trained_on_nf4_proves_its_base_in_every_precision(
    run: Any, wide: Path, kind: str | None
) -> None:
    veneer.load(load(wide, kind), run.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_dense_base_proves_a_quantised_one(
    wide: Path, tmp_path: Path, kind: str
) -> None:
    veneer.attach(load(wide, None), veneer.LoraConfig(rank=2, exclude=["mlp"])).save(tmp_path / "a")
    veneer.load(load(wide, kind), tmp_path / "a")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_another_base_is_refused(run: Any, tmp_path: Path, kind: str | None) -> None:
    other = write_tiny(tmp_path / "other", seed=5, hidden_size=64, intermediate_size=128)
    with pytest.raises(BaseMismatchError, match="other weights in 14 of 14 adapted layers"):
        veneer.load(load(other, kind), run.adapter)


def test_a_weight_that_changed_since_it_was_loaded_is_not_the_files(run: Any, wide: Path) -> None:
    model = load(wide)
    model.model.layers[0].mlp.up_proj.weight.data.view(-1)[0] ^= 0x70
    with pytest.raises(BaseMismatchError, match="other weights in 1 of 14 adapted layers"):
        veneer.load(model, run.adapter)


def test_what_was_merged_and_unmerged_is_the_base_again(
    run: Any, wide: Path, tmp_path: Path
) -> None:
    model = load(wide)
    handle = veneer.load(model, run.adapter)
    handle.merge()
    handle.save(tmp_path / "while-merged")
    handle.unmerge()
    handle.save(tmp_path / "after")
    said = [
        veneer.adapter_files.read(path).metadata["base"]["weights"] for path in tmp_path.iterdir()
    ]
    assert said == [veneer.adapter_files.read(run.adapter).metadata["base"]["weights"]] * 2


def test_it_merges_into_the_16_bit_files(run: Any, wide: Path, tmp_path: Path) -> None:
    done = merge_checkpoint(wide, [run.adapter], tmp_path / "merged")
    assert any("trained on its base in nf4" in note for note in done.notes)
    plain = load(wide, None)
    changes = dict(veneer.adapter_files.read(run.adapter).layers)
    merged = load(tmp_path / "merged", None)
    for path, change in changes.items():
        weight = plain.get_submodule(path).weight.double()
        wanted = weight + change.scale * change.B[0].double() @ change.A[0].double()
        assert torch.equal(merged.get_submodule(path).weight, wanted.float())


def test_a_model_that_its_owner_quantised_proves_what_it_computes_with(
    wide: Path, tmp_path: Path
) -> None:
    config = quantize.quantizer("nf4", torch.float32)
    with models.quiet():
        own = AutoModelForCausalLM.from_pretrained(
            wide, dtype=torch.float32, quantization_config=config
        )
    veneer.attach(own, veneer.LoraConfig(rank=2)).save(tmp_path / "a")
    assert veneer.adapter_files.read(tmp_path / "a").metadata["base"]["quantized"] == {
        "by": "bitsandbytes", "as": "nf4",
    }  # fmt: skip
    veneer.load(load(wide), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match=r"quantised by bitsandbytes \(nf4\)"):
        veneer.load(load(wide, None), tmp_path / "a")


# ---- what cannot be
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "one of them"),
        ({"device_map": "autos"}, "auto, balanced"),
        ({"device": "cuda:7"}, "a device of this machine"),
        ({"attention": "sdpaa"}, "nearest: 'sdpa'"),
        ({"attention": "flash_attention_2"}, "FlashAttention2"),
        ({"quantize": "nf3"}, "nf4, fp4 or int8"),
    ],
)
def test_what_cannot_be_loaded_so_is_one_clear_error(
    wide: Path, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        models.load_base(wide, **options)


def test_an_encoder_is_not_put_on_a_device_that_is_not_here(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=9, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a device of this machine \(cpu\)"):
        models.load_encoder(tmp_path, device="cuda:7")


def test_files_that_name_no_class_tell_their_weights(wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert quantize.sources_of(load(tmp_path / "base")) == quantize.sources_of(load(wide)) != {}


def test_a_map_that_is_the_processor_is_no_gpu(monkeypatch: pytest.MonkeyPatch, wide: Path) -> None:
    from veneer.train import arguments

    monkeypatch.setattr(arguments, "best_device", lambda: "cuda")
    fields = {"base": str(wide), "data": "x", "output": "out"}
    config = make_config({**fields, "device_map": "cpu", "offload_activations": True})
    with pytest.raises(ConfigError, match="a run on the processor"):
        arguments.arguments_of(config, Path("out"), None)  # type: ignore[arg-type]


def test_without_bitsandbytes_it_says_what_to_install(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        load(wide)


def test_rows_that_are_no_whole_blocks_are_refused_on_the_processor(base: Path) -> None:
    """bitsandbytes 0.50 unpacks them with the scales of other blocks there, without a word."""
    with pytest.raises(ConfigError, match=r"model.layers.0.self_attn.q_proj \(32\)"):
        load(base)
    load(base, "int8")


def test_a_base_that_is_quantised_already_is_refused(wide: Path, tmp_path: Path) -> None:
    load(wide).save_pretrained(tmp_path / "packed")
    models.load_tokenizer(wide).save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="quantised already"):
        load(tmp_path / "packed")


def test_activations_of_the_processor_are_not_offloaded(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="in main memory already"):
        fit(make(offload_activations=True, device="cpu"), quiet=True)


def test_a_device_map_of_one_device_trains_to_the_same_losses(make: Callable[..., Any]) -> None:
    losses = [
        fit(make(f"run-{where}", max_steps=3, device_map=where), quiet=True).losses
        for where in (None, "auto")
    ]
    assert losses[0] == losses[1]


# ---- what it takes
# --------------------------------------------------------------------------------------------------


def test_the_memory_of_packed_weights_is_what_they_take(wide: Path) -> None:
    numbers = {name: p.numel() for name, p in load(wide, None).named_parameters()}
    linear = {name: count for name, count in numbers.items() if "_proj" in name}
    other = 2 * (sum(numbers.values()) - sum(linear.values()))
    rows = {
        name: module.out_features
        for name, module in load(wide, None).named_modules()
        if "_proj" in name
    }
    int8 = sum(linear.values()) + 4 * sum(rows.values()) + other
    # half a byte a number, a byte for 64 of them, a float32 for 256 of these, a table and an offset
    # each
    nf4 = other + sum(
        n / 2 + n / 64 + 4 * math.ceil(n / 64 / 256) + 4 * 257 for n in linear.values()
    )
    for kind, wanted in (("int8", int8), ("nf4", nf4)):
        model = load(wide, kind, "bf16").requires_grad_(False)
        assert memory.weight_bytes(model) == (wanted, 2 * max(linear.values()))
        model(torch.arange(8)[None])  # which moves the scales of 8 bits elsewhere
        assert memory.weight_bytes(model) == (wanted, 2 * max(linear.values()))
    plain = load(wide, None, "bf16").requires_grad_(False)
    assert memory.weight_bytes(plain) == (2 * sum(numbers.values()), 0)
    for kind, wanted in (("int8", int8), ("nf4", nf4)):  # as it is planned without packing anything
        assert memory.packed_weight_bytes(plain, kind) == (wanted, 2 * max(linear.values()))


def test_what_a_step_on_packed_weights_holds_is_counted(
    wide: Path, make: Callable[..., Any]
) -> None:
    models = [load(wide, kind, "bf16") for kind in (None, "nf4")]
    for model in models:
        veneer.attach(model, veneer.LoraConfig(rank=4))
    plain, packed = (memory.predict(model, make(), 64, 8)[0] for model in models)
    assert packed["base"] < plain["base"]
    assert packed["adapter"] == plain["adapter"]
    assert packed["activations"] >= plain["activations"] > 0


@pytest.mark.parametrize(
    "name",
    ["adamw", "adamw_torch", "sgd", "adagrad", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit",
     "ademamix_8bit", "rmsprop_bnb_8bit"],
)  # fmt: skip
def test_the_memory_of_an_optimiser_is_what_it_keeps(make: Callable[..., Any], name: str) -> None:
    """The bytes of its states after a step, scales and all."""
    config = make(optimiser=name)
    trained = [torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 320), (1024, 16), (40, 8))]
    options = TrainingArguments(optim=config.optimiser, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(options)
    optimiser = kind(trained, **settings)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    # not the count of steps, nor bitsandbytes' tables of levels, of which all parameters share one
    found = sum(
        value.nbytes
        for state in optimiser.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1 and not key.startswith("qmap")
    )
    assert sum(memory.state_bytes(p, config.optimiser) for p in trained) == pytest.approx(
        found, rel=0.001
    )


def test_the_memory_of_offloaded_activations_is_counted_elsewhere(
    wide: Path, make: Callable[..., Any]
) -> None:
    model = load(wide, None)
    veneer.attach(model, veneer.LoraConfig(rank=4))
    parts, elsewhere = memory.predict(model, make(), 64, 8)
    away, there = memory.predict(model, make(offload_activations=True), 64, 8)
    layers = 2  # of the tiny Llama
    assert elsewhere == 0 < there
    assert away["activations"] == parts["activations"] - there
    assert away["workspace"] == parts["workspace"] + there // layers
    text = memory.estimate(model, make(offload_activations=True), 64, 8)
    assert text.endswith("in main memory")
    assert "main memory" not in memory.estimate(model, make(), 64, 8)


def test_a_record_whose_word_on_quantisation_is_no_table_is_refused(run: Any) -> None:
    saved = veneer.adapter_files.read(run.adapter)
    base = {**saved.metadata["base"], "quantized": "nf4"}
    (problem,) = record_problems({**saved.metadata, "base": base}, saved.path)
    assert "quantized by name" in problem
    assert list(record_problems(saved.metadata, saved.path)) == []


def test_a_loftq_adapter_is_of_the_quantised_base_alone(wide: Path, tmp_path: Path) -> None:
    """It begins with what the quantisation has lost, which the weights of 16 bits still have."""
    model, plain = load(wide), load(wide, None)
    config = veneer.LoraConfig(rank=8, variant="loftq")
    handle = veneer.attach(model, config, original=plain)
    handle.save(tmp_path / "adapter")
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        expected = model(ids).logits
        again = load(wide)
        veneer.load(again, tmp_path / "adapter")
        assert torch.allclose(again(ids).logits, expected, atol=1e-5)
    with pytest.raises(BaseMismatchError, match="quantised as it was in training"):
        veneer.load(load(wide, None), tmp_path / "adapter")
    assert "not compared" in str(verify(tmp_path / "adapter", wide))
    for verify_base in (True, False):
        with pytest.raises(MergeError, match="what the quantisation of its base lost"):
            merge_checkpoint(
                wide, [tmp_path / "adapter"], tmp_path / "merged", verify_base=verify_base
            )
    assert not (tmp_path / "merged").exists()
