"""Make docs/plan.md: the predictions of `veneer plan` for bases with 8 billion to a trillion
parameters, their measured errors (benchmarks/results/plan_errors/), and a comparison with published
figures."""

from __future__ import annotations

import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/

from benchmarks import runner

import veneer
from veneer.models.meta import countable_model
from veneer.train.plan.hardware import (
    BANDWIDTH_SHARE,
    DEVICES,
    FRAGMENTATION_SHARE,
    LAUNCH_SECONDS,
    LINK_SHARE,
    PEAK_SHARE,
    RESERVED_BYTES,
    Hardware,
)
from veneer.train.plan.serving import BUSY_SHARE, Load, plan_service
from veneer.train.plan.training_plan import Planner, Run, RunPlan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
#: shapes of the bases, as published in their config.json
BASES: dict[str, dict[str, Any]] = {
    "8B": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405B": {
        **_LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "1T experts": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
        "num_key_value_heads": 64, "n_routed_experts": 384, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "vocab_size": 163840,
    },
}  # fmt: skip
#: the model with the shape of each base
MODEL_NAMES = {
    "8B": "Llama 3.1 8B", "70B": "Llama 3.1 70B", "405B": "Llama 3.1 405B",
    "1T experts": "Kimi K2: 384 experts, 8 a token, which `all-linear` does not adapt",
}  # fmt: skip
#: base -> (hardware, number of devices) of the rows of its table
MACHINES = {
    "8B": [("rtx4090", 1), ("h100", 1), ("h100", 8)],
    "70B": [("h100", 2), ("h100", 4), ("h100", 8), ("b200", 1)],
    "405B": [("h100", 8), ("h100", 64), ("h200", 8), ("h200", 16), ("b200", 8)],
    "1T experts": [("h100", 64), ("h200", 64), ("b200", 64)],
}


@cache
def planner(
    base: str, rank: int = 16, targets: str = "all-linear", dtype: str | None = None
) -> Planner:
    model = countable_model(BASES[base], torch.bfloat16)
    target_patterns = targets.split(",") if "," in targets else targets
    veneer.attach(model, veneer.LoraConfig(rank=rank, targets=target_patterns, dtype=dtype))
    return Planner(model)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def training(base: str) -> list[str]:
    base_planner = planner(base)
    rows = []
    for quantize in (None, "nf4") if "experts" not in base else (None,):
        for device, count in MACHINES[base]:
            run = Run(1, 4096, accumulate=count, checkpointing=True, quantize=quantize)
            for strategy in ("ddp", "fsdp", "tp") if count > 1 else ("ddp",):
                if strategy == "tp" and count > DEVICES[device].devices_per_machine:
                    continue  # its sums would wait for the network
                if strategy == "ddp" and count > 1 and base != "8B":
                    continue  # it needs as much memory as on one device
                if strategy != "ddp" and quantize:
                    continue  # packed weights cannot be sharded
                rows.append(cells(base_planner.plan(run, strategy, count, DEVICES[device])))
    heads = [
        "devices",
        "by",
        "base",
        "base, GiB",
        "all, GiB",
        "",
        "GB sent",
        "s a step",
        "tokens/s each",
    ]
    count = (
        f"{base_planner.total / 1e9:,.1f} billion numbers, of which"
        f" {base_planner.trainable / 1e6:,.1f} million"
        " train beside them"
    )
    return [f"### {base}", "", f"{MODEL_NAMES[base]}. {count}.", "", *table(heads, rows), ""]


def cells(plan: RunPlan) -> list[str]:
    assert plan.seconds is not None
    assert plan.speed is not None
    return [
        f"{plan.devices} × {plan.hardware}", plan.strategy if plan.devices > 1 else "",
        plan.run.quantize or "bf16", f"{plan.memory['base'] / GIB:.1f}", f"{plan.total / GIB:.1f}",
        "fits" if plan.fits else "too much", f"{plan.sent / 1e9:,.1f}", f"{plan.seconds:.2f}",
        f"{plan.speed:,.0f}",
    ]  # fmt: skip


def serving() -> list[str]:
    rows = []
    for base, rank, device, count in (
        ("8B", 16, "l40s", 1), ("8B", 16, "h100", 1), ("8B", 64, "h100", 1), ("70B", 16, "h100", 4),
        ("405B", 16, "h200", 8), ("1T experts", 16, "h200", 16),
    ):  # fmt: skip
        load = Load(requests=100, prompt=1024, answer=256, adapters=10_000, rows=64, devices=count)
        plan = plan_service(planner(base, rank).model, load, DEVICES[device])
        name = [base, str(rank), f"{count} × {device}", f"{plan.adapter / 2**20:,.0f}"]
        if not plan.rows:
            rows.append([*name, f"{plan.row / 2**20:,.0f}", "0", "", "", "", "", ""])
            continue
        rows.append([
            *name, f"{plan.row / 2**20:,.0f}", str(plan.rows), f"{plan.in_memory:,}",
            f"{1e3 * plan.step:.0f}", f"{plan.answered:.1f}", str(plan.replicas),
            f"{plan.hits:.0%}",
        ])  # fmt: skip
    heads = [
        "base", "rank", "a replica", "MiB an adapter", "MiB a row", "rows", "adapters in memory",
        "ms a token", "requests/s", "replicas", "found in memory",
    ]  # fmt: skip
    return table(heads, rows)


def measured_rows() -> tuple[str, list[dict[str, Any]]]:
    """(a note on their source, the planned and measured numbers of each configuration), from the
    latest record, or from the program that recorded them before the runner existed."""
    recorded = runner.records("plan_errors", RESULTS)
    if not recorded:
        before = json.loads((RESULTS / "before" / "plan_errors.json").read_text())
        return "Recorded before by another program; the runner's own record is pending.", before[
            "rows"
        ]
    rows = []
    for case in recorded[-1]["cases"]:
        numbers = {
            arm: {
                name: statistics.median(
                    process["rounds"][arm][0][name] for process in case["processes"]
                )
                for name in NUMBERS
            }
            for arm in ("as it comes", "giving back")
        }
        usual, held = numbers["as it comes"], numbers["giving back"]["memory"]
        name = case["setting"]["name"]
        row = {
            "name": name, "several": name.endswith(("ddp", "fsdp")),
            "dtype": "bf16" if "bf16" in name else "fp32",
            "measured": {"memory": usual["memory"], "held": held, "seconds": usual["seconds"]},
            "predicted": {"memory": usual["planned memory"], "seconds": usual["planned seconds"]},
            "memory_error": usual["planned memory"] / usual["memory"] - 1,
            "held_error": usual["planned memory"] / held - 1,
        }  # fmt: skip
        rows.append(row)
    for row in (
        single_rows := [row for row in rows if not row["several"]]
    ):  # several processes wait for each other
        log_ratios = [
            math.log(single_row["predicted"]["seconds"] / single_row["measured"]["seconds"])
            for single_row in single_rows if single_row["dtype"] == row["dtype"]
        ]  # fmt: skip
        time_ratio = row["predicted"]["seconds"] / row["measured"]["seconds"]
        row["time_error"] = time_ratio / math.exp(statistics.median(log_ratios)) - 1
    return f"Recorded on commit `{recorded[-1]['commit'][:12]}`.", rows


#: the numbers of an arm in a record of plan_errors
NUMBERS = ("memory", "seconds", "planned memory", "planned seconds")


def measured() -> list[str]:
    note, rows_measured = measured_rows()
    heads = [
        "configuration", "planned, MiB", "held", "error", "resident", "error", "step, s",
        "error of its ratio",
    ]  # fmt: skip
    rows = [
        [
            row["name"], f"{row['predicted']['memory'] / 2**20:,.0f}",
            f"{row['measured']['held'] / 2**20:,.0f}", f"{row['held_error']:+.1%}",
            f"{row['measured']['memory'] / 2**20:,.0f}", f"{row['memory_error']:+.1%}",
            f"{row['measured']['seconds']:.2f}",
            f"{row['time_error']:+.1%}" if "time_error" in row else "",
        ]
        for row in rows_measured
    ]  # fmt: skip
    errors_by_name = {
        name: [abs(row[name]) for row in rows_measured if name in row] for name in ERRORS
    }
    counts = {
        name: sum(error <= limit for error in errors_by_name[name])
        for name, limit in ERRORS.items()
    }
    medians = {name: statistics.median(errors) for name, errors in errors_by_name.items()}
    summary = (
        f"Of {len(rows)} configurations, what is held is within 10 % of the plan for"
        f" {counts['held_error']} (median "
        f"{medians['held_error']:.1%}), what is resident for {counts['memory_error']} (median "
        f"{medians['memory_error']:.1%}); of {len(errors_by_name['time_error'])}, the ratio of"
        " times is within 15 % for "
        f"{counts['time_error']} (median {medians['time_error']:.1%})."
    )
    return [note, "", *table(heads, rows), "", summary]


#: kind of error -> the limit within which the page counts it
ERRORS = {"held_error": 0.10, "memory_error": 0.10, "time_error": 0.15}


def published() -> list[str]:
    """A table of published figures and the plan's; the page's text names their sources."""
    nemo = planner("8B").plan(Run(2, 4096, accumulate=16), hardware=DEVICES["h100"])
    large_plans = [
        planner("70B").plan(Run(1, 4096, accumulate=32), strategy, 8, DEVICES["h100"])
        for strategy in ("fsdp", "tp")
    ]
    tune_planner = planner("8B", 8, "q_proj,v_proj", "bfloat16")
    device, checkpointed_run = DEVICES["rtx4090"], Run(2, 2048, checkpointing=True)
    lora = tune_planner.plan(checkpointed_run, hardware=device)
    qlora = tune_planner.plan(Run(2, 2048, checkpointing=True, quantize="nf4"), hardware=device)
    uncheckpointed = tune_planner.plan(Run(2, 2048), hardware=device)
    flops = nemo.operations / nemo.tokens / 1e9
    rows = [
        [
            "8B, one H100: tokens/s",
            "NeMo AutoModel",
            "12,473",
            f"{nemo.speed:,.0f}",
            off(nemo.speed, 12473),
        ],
        ["8B, one H100: GFLOP a token", "NeMo AutoModel", "32.2", f"{flops:.1f}", off(flops, 32.2)],
        *(
            [
                f"70B, 8 H100, {plan.strategy}: tokens/s each",
                "NeMo AutoModel (TP 2 · PP 4)",
                "659",
                f"{plan.speed:,.0f}",
                off(plan.speed, 659),
            ]
            for plan in large_plans
        ),
        [
            "8B, LoRA, checkpointed: GiB",
            "torchtune",
            "16.2",
            gib(lora),
            off(lora.total / GIB, 16.2),
        ],
        [
            "8B, LoRA: GiB",
            "torchtune",
            "30.3",
            gib(uncheckpointed),
            off(uncheckpointed.total / GIB, 30.3),
        ],
        [
            "8B, QLoRA, checkpointed: GiB",
            "torchtune",
            "7.4",
            gib(qlora),
            off(qlora.total / GIB, 7.4),
        ],
        [
            "8B, LoRA, RTX 4090: tokens/s",
            "torchtune",
            "3,083",
            f"{lora.speed:,.0f}",
            off(lora.speed, 3083),
        ],
        [
            "8B, QLoRA, RTX 4090: tokens/s",
            "torchtune",
            "2,413",
            f"{qlora.speed:,.0f}",
            off(qlora.speed, 2413),
        ],
    ]
    return table(["what", "by", "published", "planned", "off"], rows)


def of_peak(tokens: float, peak: float, checkpointing: bool) -> str:
    """The share of a device's peak (TFLOP/s) that torchtune's 8B needs at ``tokens`` per second."""
    plan = planner("8B", 8, "q_proj,v_proj", "bfloat16").plan(
        Run(2, 2048, checkpointing=checkpointing)
    )
    return f"{tokens * plan.operations / plan.tokens / peak / 1e12:.0%}"


def gib(plan: RunPlan) -> str:
    return f"{plan.total / GIB:.1f}"


def off(planned: float | None, published_value: float) -> str:
    """The relative difference of a planned value from the published one."""
    assert planned is not None
    return f"{planned / published_value - 1:+.0%}"


def devices() -> list[str]:
    heads = [
        "name",
        "GB",
        "TFLOP/s, 16 bits",
        "TFLOP/s, float32",
        "GB/s",
        "GB/s to others",
        "machine",
    ]
    heads += ["GB/s to other machines", "sources"]
    rows = [
        [
            f"`{device.name}`",
            f"{device.memory / 1e9:.0f}",
            f"{device.peak16 / 1e12:,.0f}",
            f"{device.peak32 / 1e12:,.0f}",
            f"{device.memory_bandwidth / 1e9:,.0f}",
            f"{device.link_bandwidth / 1e9:.0f}",
            str(device.devices_per_machine),
            f"{device.network.bandwidth / 1e9:g}",
            link_sources(device),
        ]
        for device in DEVICES.values()
    ]
    return table(heads, rows)


def link_sources(device: Hardware) -> str:
    network = f", [network]({device.network.source})" if device.network.source else ""
    return f"[device]({device.source}){network}"


def page() -> str:
    text = (ROOT / "scripts" / "plan_page.md").read_text()
    sections = {
        "training": [line for base in BASES for line in training(base)][:-1],
        "serving": serving(),
        "measured": measured(),
        "published": published(),
        "devices": devices(),
    }
    for name, lines in sections.items():
        text = text.replace(f"{{{{{name}}}}}", "\n".join(lines))
    shares = {
        "products": f"{PEAK_SHARE:.0%}",
        "bytes": f"{BANDWIDTH_SHARE:.0%}",
        "links": f"{LINK_SHARE:.0%}",
        "slack": f"{FRAGMENTATION_SHARE:.0%}",
        "context": f"{RESERVED_BYTES / GIB:g}",
        "launch": f"{1e6 * LAUNCH_SECONDS:g}",
        "busy": f"{BUSY_SHARE:.0%}",
        "tuned": of_peak(3083, 165.2, True),
        "tuned6000": of_peak(4699, 154.8, False),
    }
    for name, value in shares.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text
