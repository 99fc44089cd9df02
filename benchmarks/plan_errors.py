"""`veneer plan` beside what runs take here: peak memory of a step, and ratios of times between configurations.

Each configuration is trained for some steps, in a process of its own (those with a strategy in two, started by
torchrun), on one thread, with random weights. Memory is the most that the process has resident during a step, less
what it had once a smaller model had taken steps of as many tokens: all libraries are loaded then. glibc keeps some of
what is freed, which is resident and not held; so each configuration runs once more, in a process that gives back what
is freed. Time is that of the processor, the median of the steps. The planner is told two numbers of this machine for
each dtype, measured beside each configuration: the speed of a large product, and of a pass over memory.

    python benchmarks/plan_errors.py
    python benchmarks/plan_errors.py --only llama-fp32 --steps 1

Predicted: memory that is held within 10 % for all, 5 % for most; ratios of times within 15 %, further off for attention
over 1,024 tokens, which a processor computes at a fraction of the speed of its products.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import veneer
from report import child, write
from train_memory import resident, status
from veneer.distributed import average_gradients
from veneer.models.load import load_head
from veneer.models.meta import countable_model
from veneer.train.loss import token_loss
from veneer.train.plan.hardware import BYTES, PRODUCTS, Hardware, Network
from veneer.train.plan.training import Planner, Run
from veneer.train.processes import join
from veneer.train.sharding import shard

#: the shape of SmolLM2-135M with fewer blocks, and others of about its width
LLAMA = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip
GEMMA = {**QWEN, "model_type": "gemma3_text", "num_hidden_layers": 6}
GPT2 = {
    "model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 32000, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
EXPERTS = {
    **QWEN, "model_type": "qwen3_moe", "num_hidden_layers": 4, "moe_intermediate_size": 384, "num_experts": 16,
    "num_experts_per_tok": 4,
}  # fmt: skip
#: name -> (base, dtype, adapter, run)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
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
#: glibc gives back what is freed, but for pieces below 128 KiB; it would take its threshold from the largest so far
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
#: processes of a case with a strategy
PROCESSES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_of(name: str) -> Run:
    """Of one process: with a strategy, the planner is given as many examples for each."""
    own = {"batch": 4, "length": 256, **CASES[name][3]}
    return Run(**{key: value for key, value in own.items() if key != "strategy"})


def strategy_of(name: str) -> str | None:
    return CASES[name][3].get("strategy")


def made(base: dict[str, Any], dtype: str, quantize: str | None) -> Any:
    """The model with random weights, by way of its files if it is packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in base.items() if key != "model_type"}
    config = AutoConfig.for_model(base["model_type"], **fields)
    if quantize is None:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(folder)
        gc.collect()
        kind = "AutoModelForCausalLM"
        return load_head(folder, kind, precision="bf16", device="cpu", attention="sdpa", quantize=quantize)  # pyright: ignore[reportArgumentType]


class Trained:
    """A model that takes steps. It is alone in this process."""

    def __init__(
        self, base: dict[str, Any], dtype: str, adapter: dict[str, Any], run: Run, strategy: str | None
    ) -> None:
        torch.manual_seed(0)
        self.model = made(base, dtype, run.quantize).train()
        veneer.attach(self.model, veneer.LoraConfig(**{"rank": 8, **adapter}))
        if run.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        if strategy == "fsdp":
            shard(self.model, torch.device("cpu"))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.several = strategy is not None
        self.optimiser = torch.optim.AdamW(self.trained, fused=True)
        ids = torch.randint(0, base["vocab_size"], (run.batch, run.length))
        labels = ids.clone()
        labels[:, : round(run.length * (1 - run.labelled))] = -100
        self.inputs = {"input_ids": ids, "labels": labels, "use_cache": False}

    def step(self) -> float:
        """Seconds of the processor."""
        start = time.process_time()
        token_loss(self.model, self.inputs).total.backward()
        if self.several:
            average_gradients(self.trained)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.process_time() - start


def speeds(dtype: str) -> tuple[float, float]:
    """(operations a second of a large product, bytes a second of a pass over memory), of the processor's time."""
    x = torch.randn(1024, 1024, dtype=DTYPES[dtype])
    y = torch.randn(1 << 24)

    def seconds(run: Any, count: int) -> float:
        run()
        times = []
        for _ in range(count):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return statistics.median(times)

    out = torch.empty_like(y)
    return 2 * 1024**3 / seconds(lambda: x @ x, 15), 3 * y.nbytes / seconds(lambda: torch.add(y, y, out=out), 15)


def give_back() -> None:
    """Give what is free to the system: kept, it would pass for memory of the libraries."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Linux


def alone(name: str, steps: int) -> dict[str, Any]:
    """What one configuration takes; of several processes, each."""
    base, dtype, adapter, _ = CASES[name]
    run, strategy = run_of(name), strategy_of(name)
    join()
    small = {key: min(value, 2) if key in ("num_hidden_layers", "n_layer") else value for key, value in base.items()}
    small["vocab_size"] = 512
    first = Trained(small, dtype, {"rank": adapter.get("rank", 8)}, run, strategy)
    for _ in range(2):  # loads the libraries, and compiles what a step of this many tokens calls
        first.step()
    del first
    speed = speeds(dtype)
    give_back()
    rest = resident()
    trained = Trained(base, dtype, adapter, run, strategy)
    trained.step()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on
    times = [trained.step() for _ in range(steps)]
    return {"memory": status("VmHWM") - rest, "seconds": statistics.median(times), "speed": speed}


def predicted(name: str, speed: Sequence[float]) -> dict[str, float]:
    base, dtype, adapter, _ = CASES[name]
    model = countable_model(base, DTYPES[dtype])
    veneer.attach(model, veneer.LoraConfig(**{"rank": 8, **adapter}))
    peak, bandwidth = speed[0] / PRODUCTS, speed[1] / BYTES
    here = Hardware("here", 1, peak, peak, bandwidth, 1, 1, 1, Network(1, None), "measured")
    run, devices = run_of(name), PROCESSES if strategy_of(name) else 1
    planned = Planner(model).plan(replace(run, accumulate=devices), strategy_of(name) or "ddp", devices, here)
    return {"memory": planned.total, "slack": planned.memory["slack"], "seconds": planned.seconds or 0.0}


def taken(name: str, steps: int, **env: str) -> dict[str, Any]:
    """What ``alone`` finds in a process of its own; of several, the first, and the others must end well."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "--local-ranks-filter=0"]
    first, *rest = [*(several if strategy_of(name) else []), __file__, "--alone", name, "--steps", str(steps)]
    return child(first, *rest, env=env)


def case(name: str, steps: int, known: dict[str, Any]) -> dict[str, Any]:
    measured = known.get(name) or taken(name, steps)
    if "held" not in measured:
        measured["held"] = taken(name, 1, **GIVES_BACK)["memory"]
    planned = predicted(name, measured["speed"])
    row = {"name": name, "dtype": CASES[name][1], "measured": measured, "predicted": planned}
    row |= {f"{what}_error": planned["memory"] / measured[what] - 1 for what in ("memory", "held")}
    return row


def with_time_errors(rows: list[dict[str, Any]]) -> None:
    """How far each ratio of times is off: measured and predicted times beside those of the others of their dtype. Not
    of several processes, which share the memory's bandwidth and wait for each other."""
    rows = [row for row in rows if strategy_of(row["name"]) is None]
    for row in rows:
        alike = [one for one in rows if one["dtype"] == row["dtype"]]
        ratios = [math.log(one["predicted"]["seconds"] / one["measured"]["seconds"]) for one in alike]
        own = row["predicted"]["seconds"] / row["measured"]["seconds"]
        row["time_error"] = own / math.exp(statistics.median(ratios)) - 1


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--measured", type=Path, help="a result of this benchmark: plan again for what it measured")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.alone:
        found = alone(options.alone, options.steps)
        print(json.dumps(found))
        return found
    before = json.loads(options.measured.read_text())["rows"] if options.measured else []
    known, rows = {row["name"]: row["measured"] for row in before}, []
    for name in options.only:
        rows.append(case(name, options.steps, known))
        row = rows[-1]
        print(
            f"{name:<26} memory {row['measured']['memory'] / 2**20:8.1f} MiB, predicted {row['memory_error']:+.1%}, "
            f"held {row['measured']['held'] / 2**20:8.1f} MiB, predicted {row['held_error']:+.1%}; "
            f"step {row['measured']['seconds']:.3f} s, predicted {row['predicted']['seconds']:.3f} s",
            flush=True,
        )
    with_time_errors(rows)
    for row in rows:
        time_error = f"   time beside the others {row['time_error']:+.1%}" if "time_error" in row else ""
        print(f"{row['name']:<26} memory {row['memory_error']:+.1%}, held {row['held_error']:+.1%}{time_error}")
    if options.out is None and options.only != list(CASES):
        return {"name": "plan_errors", "rows": rows}
    return write("plan_errors", {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
