"""What a plan says beside what is so: counts are exact, memory and operations are those of the
model that runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import veneer
from memory import saved_tensors, storages
from veneer.cli import run as command_line
from veneer.errors import ConfigError
from veneer.kernels.device import count_on_meta
from veneer.models.meta import countable_model
from veneer.train.config import make_config
from veneer.train.plan import count, memory
from veneer.train.plan.hardware import (
    DEVICES,
    LAUNCH_SECONDS,
    LINK_SHARE,
    PEAK_SHARE,
    RESERVED_BYTES,
    find_hardware,
)
from veneer.train.plan.serving import Load, plan_service
from veneer.train.plan.training_plan import Planner, Run, plan_all, recommend

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA = {"model_type": "llama", **SMALL, **HEADS}
MIXED = {
    "model_type": "qwen3_moe", **SMALL, **HEADS, "moe_intermediate_size": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "mlp_only_layers": [0],
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
DEEPSEEK = {
    "model_type": "deepseek_v3", **SMALL, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", **SMALL, **HEADS, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
BASES = {"llama": LLAMA, "qwen3_moe": MIXED, "gpt2": GPT2, "deepseek_v3": DEEPSEEK, "gemma3": GEMMA}
TINY_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SETTINGS = make_config({"base": "", "data": "", "output": "", "batch_size": 2}, "a test")
CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"rank": 4},
    "top": {"rank": 3, "layers": [-1]},
    "dora": {"rank": 2, "variant": "dora", "dropout": 0.1},
    "wide": {"rank": 2, "train_also": ["re:.*(norm|ln_)[^.]*"]},
}


def countable(base: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    model = countable_model(base, dtype)
    veneer.attach(model, veneer.LoraConfig(**{"rank": 4, **config}))
    return model


def real(base: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    own = AutoConfig.for_model(
        base["model_type"], **{k: v for k, v in base.items() if k != "model_type"}
    )
    model = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation="sdpa").train()
    veneer.attach(model, veneer.LoraConfig(**{"rank": 4, **config}))
    return model


# ---- counts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_numbers_that_train_are_those_of_a_real_attach(base, config):
    made = real(base, **config)
    planner = Planner(countable(base, **config))
    assert planner.trainable == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert planner.total == sum(p.numel() for p in made.parameters() if not p.requires_grad)
    planned = memory.memory_breakdown(planner.model, "adamw", None)
    assert planned["base"] == memory.weight_bytes(made)[0]
    assert planned["adapter"] == sum(p.nbytes for p in made.parameters() if p.requires_grad)


def test_the_operations_are_those_of_the_products():
    """Forward and backward without gradients of the base; of attention the half that is not
    masked."""
    batch, length, rank = 2, 32, 2
    step = count.count_step(countable(LLAMA, rank=rank), batch, length)
    tokens, width, inner, kv = batch * length, 64, 160, 32
    shapes = [
        (width, width),
        (width, kv),
        (width, kv),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    base, thin = sum(a * b for a, b in shapes), sum(rank * (a + b) for a, b in shapes)
    attention = 4 * batch * 4 * length * (length + 1) // 2 * 16
    forward, head = 3 * (2 * tokens * (base + thin) + attention), 2 * tokens * width * 300
    assert operations(step.total.forward_work) == forward + 2 * head
    # no gradient goes below the lowest block; flash attention computes its products again, 5 in
    # place of 2
    below = 2 * tokens * sum(a * b for a, b in shapes[:3])
    backward = 3 * (2 * tokens * (base + 2 * thin) + attention * 5 // 2) - below
    thin_below = 2 * tokens * rank * 3 * width  # of A in the lowest block's three first layers
    assert operations(step.total.backward_work) == backward - thin_below


def operations(work: count.Work) -> int:
    return sum(each * times for (each, _, _), times in work.items())


@pytest.mark.parametrize("base", [LLAMA, MIXED, GEMMA], ids=["llama", "qwen3_moe", "gemma3"])
def test_what_blocks_cost_adds_up(base):
    """The model with all of its blocks is what is said of it by one of each kind."""
    model = countable(base)
    with count_on_meta():
        whole = count._run_step(model, 2, 32, 1.0)
    said = count.count_step(countable(base), 2, 32).total
    assert said.saved_bytes == whole.saved_bytes
    assert said.operations == whole.operations
    assert +said.forward_work == +whole.forward_work
    assert said.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("base", "dtype", "config"),
    [
        (LLAMA, torch.float32, {}),
        (LLAMA, torch.bfloat16, {"targets": "attention"}),
        ({**LLAMA, "model_type": "qwen3"}, torch.bfloat16, {}),
        (MIXED, torch.bfloat16, {"targets": ["re:.*self_attn.*_proj"]}),
    ],
    ids=["llama", "attention", "qwen3", "qwen3_moe"],
)
def test_a_block_saves_what_autograd_keeps(base, dtype, config):
    """Of a block that runs here: large enough for what is kept of an input to matter."""
    base, saved = {**base, "hidden_size": 256, "intermediate_size": 512}, []
    for layers in (2, 3):
        model = real({**base, "num_hidden_layers": layers}, dtype, **config)
        states = model.base_model(input_ids=torch.zeros(4, 128, dtype=torch.long), use_cache=False)[
            0
        ]
        own = set(storages([*model.parameters(), *model.buffers()]))
        saved.append(
            sum(size for place, size in storages(saved_tensors(states)).items() if place not in own)
        )
    step = count.count_step(countable({**base, "num_hidden_layers": 3}, dtype, **config), 4, 128)
    assert step.blocks[-1].cost.saved_bytes == pytest.approx(saved[1] - saved[0], rel=0.03)


def test_blocks_below_the_lowest_adapter_keep_nothing():
    lower, upper = count.count_step(countable(LLAMA, layers=[-1]), 2, 32).blocks
    assert (lower.count, upper.count) == (2, 1)
    assert lower.cost.saved_bytes == lower.cost.backward_work.total() == 0
    assert upper.cost.saved_bytes > 0


@pytest.mark.parametrize("config", [{}, {"layers": [-1]}], ids=["all", "the last"])
def test_few_blocks_cost_what_each_of_many_does(config):
    """transformers runs as many blocks as the config says, also where one stands twice to see what
    it costs."""
    one, two, three, four = (count.count_step(countable({**LLAMA, "num_hidden_layers": n}, **config), 2, 16).total
                             for n in (1, 2, 3, 4))  # fmt: skip
    assert (
        two.forward_work.total() - one.forward_work.total()
        == four.forward_work.total() - three.forward_work.total()
        > 0
    )
    assert three.saved_bytes - two.saved_bytes == four.saved_bytes - three.saved_bytes
    assert (four.saved_bytes > three.saved_bytes) is not bool(config)


def test_checkpointing_trades_activations_for_a_forward_pass():
    step = count.count_step(countable(LLAMA), 4, 64)
    again = step.with_checkpointing
    (block,) = step.blocks
    assert again.operations == step.total.operations + 3 * operations(block.cost.forward_work)
    assert again.saved_bytes == step.total.saved_bytes - 3 * (
        block.cost.saved_bytes - step.hidden_bytes
    )
    assert again.saved_bytes < again.peak_bytes < step.total.peak_bytes


def test_the_loss_is_counted_as_it_is_computed():
    few, all_ = (
        count.count_step(countable(LLAMA), 2, 256, labelled_share=share).total
        for share in (0.25, 1.0)
    )
    assert operations(all_.forward_work) - operations(few.forward_work) == 2 * 2 * 64 * 300 * 384


MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    ("base", "dtype"), [(MIXED, torch.float32), (MPT, torch.bfloat16)], ids=["qwen3_moe", "mpt"]
)
def test_a_model_that_cannot_be_counted_is_refused(base, dtype):
    """Whatever its code raises on tensors that it does not expect: mpt's an AttributeError."""
    with pytest.raises(ConfigError, match="which cannot run without numbers"):
        count.count_step(countable(base, dtype), 1, 16)


@pytest.mark.parametrize(
    ("base", "why"),
    [(MPT, "cannot run without numbers"), ({"model_type": "vit", **TINY_VIT}, "reads no tokens")],
)
def test_a_run_is_told_why_its_activations_are_not_counted(base, why):
    model = AutoModel.from_config(AutoConfig.for_model(**base))
    veneer.attach(model, veneer.LoraConfig(rank=2))
    text = memory.estimate(model, SETTINGS, 64, 32)
    assert text.startswith("at least ")
    assert "activations are not counted: " in text
    assert why in text


def test_counting_a_step_draws_nothing():
    """A run that prints what it takes has the losses of one that does not."""
    model = real(LLAMA, dropout=0.1)
    before = torch.get_rng_state()
    text = memory.estimate(model, SETTINGS, 64, 32)
    assert "activations" in text
    assert " 0 B" not in text  # gradients come where activations go: there is nothing to tell of
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_by_fsdp_is_told_what_one_process_holds(monkeypatch):
    model, settings = real(LLAMA), SETTINGS.model_copy(update={"parallel": "fsdp"})
    alone, _ = memory.predict(model, settings, 64, 32)
    monkeypatch.setattr(memory.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(memory.dist, "get_world_size", lambda: 4)
    each, _ = memory.predict(model, settings, 64, 32)
    blocks = memory.weight_bytes(model.model.layers)[0]
    assert each["base"] == -(-alone["base"] // 4)
    assert each["gathered"] in (alone["base"] - blocks, alone["base"] - blocks // 3)
    assert memory.predict(model, SETTINGS, 64, 32)[0] == alone


def test_runs_at_once_hold_the_rows_of_all_that_share_a_forward():
    model = real(LLAMA, rank=2)
    alone, _ = memory.predict(model, SETTINGS.model_copy(update={"batch_size": 6}), 192, 96)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model = real(LLAMA, rank=2)
    parameters = {
        "default": [parameter for parameter in model.parameters() if parameter.requires_grad]
    }
    for name in "bc":
        parameters[name] = veneer.attach(model, veneer.LoraConfig(rank=2), name).parameters()
    numbers = sum(parameter.numel() for parameter in own)
    runs = {
        name: memory.ConcurrentRun(SETTINGS, each, rows_key=0) for name, each in parameters.items()
    }
    found = memory.predict_at_once(model, runs, 64, 32)
    assert found["base"] == alone["base"]
    assert found["adapter"] == 3 * alone["adapter"]
    assert found["optimiser"] == 3 * alone["optimiser"]
    # rows of three as of one with all of them, and the factors that are joined
    assert found["activations"] == alone["activations"] + 3 * numbers * model.dtype.itemsize
    apart = {name: run._replace(rows_key=name) for name, run in runs.items()}
    each = memory.predict_at_once(model, apart, 64, 32)
    assert each["activations"] < found["activations"] / 2
    assert each["gradients"] == each["adapter"], "those of runs that are through wait"


def test_the_blocks_are_those_of_the_text():
    """A model that also sees has two stacks of blocks."""
    fields = {**SMALL, **HEADS, "sliding_window": 8}
    seeing = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            "gemma3", text_config=fields, vision_config=seeing, mm_tokens_per_image=4
        )
    )
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["re:.*language_model.*q_proj"]))
    step = memory.count_model_step(model, 2, 16, 1.0)
    assert sum(blocks.count for blocks in step.blocks) == 3
    assert step.with_checkpointing.saved_bytes < step.total.saved_bytes


# ---- memory
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_of_a_run_are_what_holds_them(batch):
    model = countable(LLAMA)
    planner, run = Planner(model), Run(batch, 64, accumulate=2)
    planned = planner.plan(run, hardware=find_hardware("h100"))
    own = 4 * planner.trainable  # float32 on a 16-bit base
    assert planned.memory["adapter"] == planned.memory["gradients"] == own
    assert planned.memory["optimiser"] == 2 * own
    assert planned.memory["base"] == 2 * planner.total
    assert planned.fits
    assert planned.total <= DEVICES["h100"].memory - RESERVED_BYTES
    assert planned.tokens == 2 * 64 * batch
    nf4 = planner.plan(Run(batch, 64, quantize="nf4"))
    assert nf4.memory["base"] < planned.memory["base"]
    assert nf4.memory["one weight unpacked"] == 2 * 64 * 160
    assert nf4.seconds is nf4.fits is None


def test_gradients_of_one_pass_come_as_its_activations_go():
    planner = Planner(countable(LLAMA, train_also=["model.embed_tokens"]))
    own = sum(p.nbytes for p in planner.trained)
    for length in (2, 256):
        once, twice = (planner.plan(Run(1, length, accumulate=n)).memory for n in (1, 2))
        held = once["activations"] + once["workspace"]
        assert (held > own) is (length == 256)
        assert once["gradients"] == max(0, own - held)
        assert twice["gradients"] == own
    sent = planner.plan(Run(2, 2), "ddp", 2).memory  # beside them, in float32
    assert (
        sent["gradients"] == own + 4 * planner.trainable - sent["activations"] - sent["workspace"]
    )


def test_stacks_of_experts_are_not_packed():
    model = countable(MIXED)
    experts = sum(p.nbytes for p in model.parameters() if p.dim() == 3 and not p.requires_grad)
    assert memory.packed_weight_bytes(model, "nf4")[0] > experts > 0


# ---- several devices
# ------------------------------------------------------------------------------------------------


def test_several_devices_share_the_rows_of_a_step():
    """As `veneer train` does under torchrun (`processes.share_config`)."""
    planner = Planner(countable(LLAMA))
    run = Run(4, 32, accumulate=3)
    for strategy, shares in {"ddp": (4, 3, 2), "fsdp": (4, 3, 2), "tp": (12, 12)}.items():
        for devices, rows in zip((1, 2, 3), shares, strict=False):
            planned = planner.plan(run, strategy, devices)
            assert planned.tokens == 12 * 32
            assert planned.run.batch * planned.run.accumulate == (
                12 if strategy == "tp" else 12 // devices
            )
            assert planned.run.batch == (
                min(rows, 4) if strategy == "tp" else {1: 4, 2: 3, 3: 4}[devices]
            )
    with pytest.raises(ConfigError, match="= 12 examples a step, over 5 processes"):
        planner.plan(run, "ddp", 5)


def test_ddp_sends_the_gradients_of_the_adapter_alone():
    model = countable_model(LLAMA, torch.bfloat16)
    veneer.attach(model, veneer.LoraConfig(rank=4, dtype="bfloat16"))
    planner = Planner(model)
    one, four = (planner.plan(Run(4, 32, accumulate=2), "ddp", n) for n in (1, 4))
    assert one.sent == 0
    assert four.sent == 2 * 3 * 4 * planner.trainable // 4  # in float32
    assert four.memory["base"] == one.memory["base"]


def test_fsdp_spreads_the_base_and_gathers_it_twice_a_pass():
    model = countable(LLAMA)
    planner = Planner(model)
    planned = planner.plan(Run(2, 32, accumulate=6), "fsdp", 4)
    block = sum(p.nbytes for p in model.model.layers[0].parameters() if not p.requires_grad)
    root = 2 * planner.total - 3 * block
    assert planned.memory["base"] == 2 * planner.total // 4
    assert planned.memory["gathered"] in (
        root,
        root + 2 * block,
    )  # at the loss, or while blocks run
    held = [planned.memory[name] for name in ("gathered", "activations", "workspace")]
    cost = planner.step(planned.run, chunked_loss=False).total
    assert sum(held) == root + max(cost.loss_peak_bytes, cost.backward_peak_bytes + 2 * block)
    assert planned.run.accumulate == 3  # of one row
    assert planned.sent == round(
        3 / 4 * (planned.run.accumulate * (2 * 3 * block + root) + 2 * 4 * planner.trainable)
    )


def test_fsdp_has_the_logits_of_all_rows():
    """Its head cannot be called for some rows alone (`head_split.find_body`)."""
    planner = Planner(countable({**LLAMA, "vocab_size": 3000}))
    ddp, fsdp = (
        planner.plan(Run(2, 512), strategy, 2).memory["workspace"] for strategy in ("ddp", "fsdp")
    )
    assert fsdp - ddp >= (512 - count.MAX_LOGIT_ROWS) * 3000 * (2 + 4)


def test_tp_cuts_what_transformers_cuts():
    model = countable(LLAMA)
    planner = Planner(model)
    one, two = (planner.plan(Run(2, 32), "tp", n) for n in (1, 2))
    cut = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert two.memory["base"] == one.memory["base"] - cut // 2
    assert two.memory["adapter"] == one.memory["adapter"]  # whole on each
    assert two.tokens == one.tokens
    blocks = 3 * planner.step(Run(2, 32)).blocks[0].cost.operations
    assert two.operations == pytest.approx(one.operations - blocks / 2)  # the head is whole on each
    sums = 3 * 4 * (2 * 32 * 64 * 2)  # blocks · sums · bytes of a hidden state, of a ring of two
    assert two.sent == sums + 4 * planner.trainable
    wide = sum(3 * blocks.cost.replicated_bytes for blocks in planner.step(Run(2, 32)).blocks)
    assert one.memory["activations"] > two.memory["activations"] > wide


def test_tp_cuts_experts_too():
    model = countable(MIXED)
    one, two = (Planner(model).plan(Run(2, 32), "tp", n).memory["base"] for n in (1, 2))
    experts = sum(p.nbytes for p in model.parameters() if p.dim() == 3 and not p.requires_grad)
    linear = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert one - two == (experts + linear) // 2


@pytest.mark.parametrize(
    ("base", "strategy", "devices", "found"),
    [
        (GPT2, "tp", 2, "for which transformers has no plan"),
        (LLAMA, "tp", 8, "8 devices, and 2 heads"),
        (LLAMA, "ddp", 3, "8 examples a step, over 3 processes"),
        ({**LLAMA, "quantize": "nf4"}, "fsdp", 2, "packed weights are not spread"),
    ],
)
def test_what_cannot_be_planned_is_said(base, strategy, devices, found):
    run = Run(8, 16, quantize=base.get("quantize"))
    with pytest.raises(ConfigError, match=found):
        Planner(countable({name: base[name] for name in base if name != "quantize"})).plan(
            run, strategy, devices
        )


def test_a_plan_leaves_out_what_cannot_be():
    plans, left_out = plan_all(
        Planner(countable(LLAMA)), Run(2, 16), (1, 2, 4), ("ddp", "tp"), None
    )
    assert [(one.devices, one.strategy) for one in plans] == [(1, "ddp"), (2, "ddp"), (2, "tp")]
    assert len(left_out) == 2
    assert "2 examples a step, over 4 processes" in left_out[0]
    assert "4 devices, and 2 heads" in left_out[1]


# ---- time
# -----------------------------------------------------------------------------------------------------------


def test_time_is_that_of_each_call_at_its_limit():
    on = DEVICES["h100"]
    large, tiny = (10**12, 10**6, False), (10, 10, True)
    assert on.seconds(count.Work({large: 2})) == pytest.approx(2 * 10**12 / (PEAK_SHARE * 989e12))
    assert on.seconds(count.Work({tiny: 5})) == pytest.approx(5 * LAUNCH_SECONDS)
    assert on.seconds(count.Work({large: 1}), itemsize=4) == pytest.approx(
        10**12 / (PEAK_SHARE * 67e12)
    )
    assert on.transfer_seconds(10**9, 8) == pytest.approx(10**9 / (LINK_SHARE * 450e9))
    assert on.transfer_seconds(10**9, 16) == pytest.approx(
        10**9 / (LINK_SHARE * 400e9)
    )  # eight adapters, of 50 GB/s each


@pytest.mark.parametrize("one", DEVICES.values(), ids=DEVICES)
def test_each_device_has_a_source(one):
    assert urlsplit(one.source).hostname.endswith((".nvidia.com", "nvdam.widen.net", "www.amd.com"))
    maker = (".nvidia.com", "rocm.docs.amd.com")
    assert one.network.source is None or urlsplit(one.network.source).hostname.endswith(maker)
    assert (one.network.source is None) == (one.network.bandwidth == 12.5e9)
    assert (
        one.peak16
        >= one.peak32
        > one.memory_bandwidth
        > one.link_bandwidth
        >= one.host_bandwidth
        > 0
    )


def test_the_help_names_all_devices():
    assert f"Device: {', '.join(DEVICES)}." in " ".join(said("--help").replace("│", " ").split())


def test_unknown_hardware_is_refused():
    with pytest.raises(ConfigError, match="h100"):
        find_hardware("h10")


def test_what_is_recommended_fits():
    planner, on = Planner(countable(LLAMA)), find_hardware("h100")
    assert recommend(planner, Run(1, 32), (1, 2), ("ddp",), on).startswith("one h100: ")
    most, less = (planner.plan(Run(8, 128, checkpointing=how)).total for how in (False, True))
    small, none = (
        replace(on, name="small", memory=RESERVED_BYTES + size) for size in ((most + less) / 2, 1e4)
    )
    assert "with activation checkpointing: " in recommend(
        planner, Run(8, 128), (1,), ("ddp",), small
    )
    assert "nothing fits" in recommend(planner, Run(8, 128), (1, 2), ("ddp", "fsdp"), none)


# ---- serving
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [LLAMA, DEEPSEEK, GEMMA], ids=["llama", "deepseek_v3", "gemma3"])
def test_keys_and_values_are_those_of_the_model(base):
    ids = torch.zeros(1, 24, dtype=torch.long)
    with torch.no_grad():
        cache = real(base).eval()(input_ids=ids, use_cache=True)["past_key_values"]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan_service(countable(base), Load(prompt=16, answer=8), DEVICES["l4"]).row == held


def test_a_service_fits_and_answers_its_load():
    model, on = countable(LLAMA), DEVICES["l4"]
    planned = plan_service(model, Load(requests=1000, adapters=500, rows=32), on)
    assert planned.rows == 32
    assert planned.in_memory == 500
    assert planned.hits == 1.0
    assert planned.replicas * planned.answered >= 1000
    assert (planned.replicas - 1) * planned.answered < 1000 / 0.7
    more = plan_service(model, Load(requests=2000, adapters=500, rows=32), on)
    assert more.replicas >= 2 * planned.replicas - 1


def test_a_base_that_does_not_fit_a_replica_is_said():
    model = countable({**LLAMA, "vocab_size": 200_000_000})
    planned = plan_service(model, Load(), DEVICES["l4"])
    assert (planned.rows, planned.replicas, planned.answered) == (0, 0, 0.0)


def test_a_load_is_checked():
    with pytest.raises(ConfigError, match=r"requests=0.*more than 0"):
        Load(requests=0)


# ---- the command
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def said(*arguments: Any) -> Any:
    from veneer.cli.commands import app

    done = CliRunner().invoke(
        app, ["plan", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_command_plans_from_a_config_alone(config: Path, tmp_path: Path):
    found = json.loads(
        said("--base", config, "--rank", 2, "--seq", 64, "--batch", 2, "--devices", 3, "--json")
    )
    assert found["trainable"] == Planner(countable(LLAMA, rank=2)).trainable
    assert [(one["devices"], one["strategy"]) for one in found["plans"]] == [
        (1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "tp"),
    ]  # fmt: skip
    assert "2 examples a step, over 3 processes" in found["left_out"][0]
    assert found["plans"][0]["total"] == sum(found["plans"][0]["memory"].values())
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"base: {config}\nrank: 2\nmax_length: 64\nbatch_size: 2\n")
    shown = said(yaml)
    assert "Take     one h100: " in shown
    assert json.loads(said(yaml, "--json"))["plans"] == found["plans"][:1]
    assert "numbers train" in shown


def test_the_command_plans_a_service(config: Path):
    assert "Take     1 replicas" in said("--base", config, "--serve", "--adapters", 10)
    found = json.loads(said("--base", config, "--serve", "--requests", 5, "--json"))
    assert found["replicas"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no base"),
        (["--base", "CONFIG", "--hardware", "h10"], "hardware 'h10'"),
        (["--base", "missing.json"], "no configuration in missing.json"),
        (["--base", "CONFIG", "--target", "q_prj"], "q_proj"),
        (["--base", "CONFIG", "--rank", "0"], "rank"),
        (["--base", "CONFIG", "--serve", "--requests", "0"], "requests=0"),
        (["--base", "CONFIG", "--requests", "5"], "--requests without --serve"),
        (["--base", "CONFIG", "--rows", "2"], "--rows without --serve"),
        (["--base", "CONFIG", "--serve", "--strategy", "tp"], "--strategy with --serve"),
    ],
)
def test_errors_say_what_to_do(config: Path, arguments: list[str], message: str, capfd: Any):
    assert (
        command_line(["plan", *(str(config) if one == "CONFIG" else one for one in arguments)]) == 2
    )
    assert message in capfd.readouterr().err


def test_another_task_is_refused(config: Path, tmp_path: Path, capfd: Any):
    (tmp_path / "run.yaml").write_text(f"base: {config}\ntask: dpo\n")
    assert command_line(["plan", str(tmp_path / "run.yaml")]) == 2
    assert "task dpo" in capfd.readouterr().err


def test_rows_are_those_of_the_context(tmp_path: Path, capfd: Any):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 96}))
    found = json.loads(said("--base", tmp_path / "config.json", "--json"))
    assert found["plans"][0]["run"]["length"] == 96
    base = str(tmp_path / "config.json")
    assert command_line(["plan", "--base", base, "--seq", "97"]) == 2
    text = " ".join(capfd.readouterr().err.split())
    assert "max_length 97. Expected: at most 96, the context of" in text


@pytest.mark.parametrize("field", ["adapter: a", "add_tokens: [a]", "trainable_tokens: [a]"])
def test_what_a_plan_does_not_count_is_refused(
    field: str, config: Path, tmp_path: Path, capfd: Any
):
    (tmp_path / "run.yaml").write_text(f"base: {config}\n{field}\n")
    assert command_line(["plan", str(tmp_path / "run.yaml")]) == 2
    text = " ".join(capfd.readouterr().err.split())
    assert f"Found: {field.partition(':')[0]}, for which" in text
    assert "veneer train --dry-run" in text


@pytest.mark.parametrize(
    "fields", [{"model_type": "no-such"}, {}, {"model_type": "llama", "num_hidden_layers": "x"}]
)
def test_a_config_of_no_model_is_refused(fields: dict[str, Any], tmp_path: Path):
    (tmp_path / "c.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError):
        countable_model(tmp_path / "c.json")


@pytest.mark.slow
def test_the_page_of_plans_is_fresh():
    from scripts import plan_page

    root = Path(__file__).resolve().parents[2]
    assert (root / "docs" / "plan.md").read_text() == plan_page.page()
