"""`veneer plan` beside what runs take here."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

import memory
import runner
import veneer
from candidates import trained_parameters
from runner import Arms, Case
from veneer.models.load import load_head
from veneer.models.meta import countable_model
from veneer.train.loss import token_loss
from veneer.train.plan.hardware import BANDWIDTH_SHARE, PEAK_SHARE, Hardware, Network
from veneer.train.plan.training_plan import Planner, Run

#: the shape of SmolLM2-135M with fewer blocks, and others of about its width
LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
}
GEMMA = {**QWEN, "model_type": "gemma3_text", "num_hidden_layers": 6}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "vocab_size": 32000,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
EXPERTS = {
    **QWEN,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "moe_intermediate_size": 384,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
#: name -> (base, dtype, adapter, run)
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "llama-fp32": (LLAMA, "fp32", {}, {}),
    "llama-bf16": (LLAMA, "bf16", {}, {}),
    "llama-bf16-long": (LLAMA, "bf16", {}, {"batch": 1, "length": 1024}),
    "llama-fp32-attention": (LLAMA, "fp32", {"targets": "attention"}, {}),
    "llama-fp32-top": (LLAMA, "fp32", {"layers": [6, 7]}, {}),
    "llama-fp32-rank-64": (LLAMA, "fp32", {"rank": 64}, {}),
    "llama-fp32-checkpointed": (LLAMA, "fp32", {}, {"checkpointing": True}),
    "llama-bf16-nf4": (LLAMA, "bf16", {}, {"quantize": "nf4"}),
    "qwen3-bf16": (QWEN, "bf16", {}, {}),
    "gemma3-fp32": (GEMMA, "fp32", {}, {}),
    "gpt2-fp32": (GPT2, "fp32", {}, {}),
    "qwen3-moe-bf16": (EXPERTS, "bf16", {}, {}),
    "llama-fp32-ddp": (LLAMA, "fp32", {"rank": 64}, {"strategy": "ddp"}),
    "llama-fp32-fsdp": (LLAMA, "fp32", {}, {"strategy": "fsdp"}),
    "qwen3-bf16-fsdp": (QWEN, "bf16", {}, {"strategy": "fsdp", "length": 128}),
}
PROCESSES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_of(name: str) -> tuple[Run, str | None]:
    """The run of one process, and what spreads it over several."""
    fields = {"batch": 4, "length": 256, **CONFIGURATIONS[name][3]}
    strategy = fields.pop("strategy", None)
    return Run(**fields), strategy


def build(base: dict[str, Any], dtype: str, quantize: str | None) -> Any:
    """The model with random weights, by way of its files if it is packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**base)
    if quantize is None:
        return AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(folder)
        gc.collect()
        return load_head(
            folder,
            "AutoModelForCausalLM",
            precision="bf16",
            device="cpu",
            attention="sdpa",
            quantize=quantize,
        )


def prepare_step(
    base: dict[str, Any], dtype: str, adapter: dict[str, Any], run: Run, strategy: Any
) -> Any:
    """A training step of the configuration, as a call that returns its CPU seconds."""
    from veneer.distributed import average_gradients
    from veneer.train.sharding import shard

    torch.manual_seed(0)
    model = build(base, dtype, run.quantize).train()
    veneer.attach(model, veneer.LoraConfig(**{"rank": 8, **adapter}))
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if strategy == "fsdp":
        shard(model, torch.device("cpu"))
    trained = trained_parameters(model)
    optimiser = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(0, base["vocab_size"], (run.batch, run.length))
    labels = ids.clone()
    labels[:, : round(run.length * (1 - run.labelled))] = -100
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}

    def step() -> float:
        start = time.process_time()
        token_loss(model, inputs).total.backward()
        if strategy is not None:
            average_gradients(trained)
        optimiser.step()
        optimiser.zero_grad()
        return time.process_time() - start

    return step


def measure_speeds(dtype: str) -> dict[str, float]:
    """Operations a second of a large product, and bytes a second of a pass over memory, of the
    processor's time."""
    x, y = torch.randn(1024, 1024, dtype=DTYPES[dtype]), torch.randn(1 << 24)
    out = torch.empty_like(y)

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(16):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return statistics.median(times[1:])

    return {
        "operations": 2 * 1024**3 / seconds(lambda: x @ x),
        "bytes": 3 * y.nbytes / seconds(lambda: torch.add(y, y, out=out)),
    }


def run_alone(name: str, steps: int, changes: Mapping[str, Any]) -> dict[str, float]:
    """Memory and seconds of one configuration; of several processes, each."""
    from veneer.train.processes import join

    base, dtype, adapter, _ = CONFIGURATIONS[name]
    base, (run, strategy) = {**base, **changes}, run_of(name)
    torch.set_num_threads(1)
    join()
    small = {
        key: min(value, 2) if key in ("num_hidden_layers", "n_layer") else value
        for key, value in base.items()
    }
    first = prepare_step(
        {**small, "vocab_size": 512}, dtype, {"rank": adapter.get("rank", 8)}, run, strategy
    )
    for _ in range(2):  # loads the libraries, and compiles what a step of this many tokens calls
        first()
    del first
    speeds = measure_speeds(dtype)
    memory.give_back()
    rest = memory.resident()
    step = prepare_step(base, dtype, adapter, run, strategy)
    step()
    times: list[float] = []
    peak = memory.peak_of(lambda: times.extend(step() for _ in range(steps)))
    return {"memory": peak - rest, "seconds": statistics.median(times), **speeds}


def predict(name: str, speeds: Mapping[str, float], changes: Mapping[str, Any]) -> dict[str, float]:
    base, dtype, adapter, _ = CONFIGURATIONS[name]
    model = countable_model({**base, **changes}, DTYPES[dtype])
    veneer.attach(model, veneer.LoraConfig(**{"rank": 8, **adapter}))
    peak, bandwidth = speeds["operations"] / PEAK_SHARE, speeds["bytes"] / BANDWIDTH_SHARE
    machine = Hardware("here", 1, peak, peak, bandwidth, 1, 1, 1, Network(1, None), "measured")
    run, strategy = run_of(name)
    devices = PROCESSES if strategy else 1
    planned = Planner(model).plan(
        replace(run, accumulate=devices), strategy or "ddp", devices, machine
    )
    return {
        "planned memory": planned.total,
        "slack": planned.memory["slack"],
        "planned seconds": planned.seconds or 0,
    }


def plan_arms(
    stack: Any, seed: int, name: str, steps: int = 3, changes: Mapping[str, Any] | None = None
) -> Arms:
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={PROCESSES}",
        "--local-ranks-filter=0",
    ]

    def run(env: Mapping[str, str]) -> dict[str, float]:
        measured = runner.call(
            "cases.planning:run_alone",
            *(name, steps, changes or {}),
            env={**os.environ, **env},
            prefix=several if run_of(name)[1] else [],
        )
        return {**measured, **predict(name, measured, changes or {})}

    return {"as it comes": partial(run, {}), "giving back": partial(run, memory.GIVES_BACK)}


PLAN = Case(
    "plan_errors",
    "`veneer plan` beside what runs take here: the most that a step holds, and seconds of CPU "
    "time. docs/plan.md "
    "has the table.",
    "the configuration; glibc keeps some of what is freed (`as it comes`), or gives it back. The "
    "planner is told "
    "the speed "
    "of a large product and of a pass over memory, measured beside it",
    "as it comes",
    [{"threads": 1, "name": name} for name in CONFIGURATIONS],
    plan_arms,
    {"steps": 1, "changes": {"vocab_size": 512, "num_hidden_layers": 1}},
    shown={
        "memory": ("memory", "bytes"),
        "planned memory": ("planned", "bytes"),
        "seconds": ("CPU seconds", ".2f"),
    },
    apart=True,
    group="plan",
    minutes=85,
)
CASES = (PLAN,)
