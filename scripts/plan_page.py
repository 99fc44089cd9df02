"""docs/plan.md: what `veneer plan` says of bases from 8 billion to a trillion numbers, how far off
it is where it was measured (benchmarks/results/plan_errors/), and beside what others have
published."""

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
    BYTES,
    CONTEXT,
    DEVICES,
    LAUNCH,
    LINKS,
    PRODUCTS,
    SLACK,
    Hardware,
)
from veneer.train.plan.serving import BUSY, Load, plan_service
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
#: the shapes that their makers publish in config.json
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
WHOSE = {
    "8B": "Llama 3.1 8B", "70B": "Llama 3.1 70B", "405B": "Llama 3.1 405B",
    "1T experts": "Kimi K2: 384 experts, 8 a token, which `all-linear` does not adapt",
}  # fmt: skip
#: base -> (hardware, devices) of its table
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
    chosen = targets.split(",") if "," in targets else targets
    veneer.attach(model, veneer.LoraConfig(rank=rank, targets=chosen, dtype=dtype))
    return Planner(model)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose cells are aligned to the right, but for the first column."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def training(base: str) -> list[str]:
    made = planner(base)
    rows = []
    for quantize in (None, "nf4") if "experts" not in base else (None,):
        for device, count in MACHINES[base]:
            run = Run(1, 4096, accumulate=count, checkpointing=True, quantize=quantize)
            for strategy in ("ddp", "fsdp", "tp") if count > 1 else ("ddp",):
                if strategy == "tp" and count > DEVICES[device].devices_per_machine:
                    continue  # its sums are waited for, over a network
                if strategy == "ddp" and count > 1 and base != "8B":
                    continue  # as much memory as one device
                if strategy != "ddp" and quantize:
                    continue  # packed weights are not spread
                rows.append(cells(made.plan(run, strategy, count, DEVICES[device])))
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
        f"{made.total / 1e9:,.1f} billion numbers, of which {made.trainable / 1e6:,.1f} million"
        " train beside them"
    )
    return [f"### {base}", "", f"{WHOSE[base]}. {count}.", "", *table(heads, rows), ""]


def cells(one: RunPlan) -> list[str]:
    assert one.seconds is not None
    assert one.speed is not None
    return [
        f"{one.devices} × {one.hardware}", one.strategy if one.devices > 1 else "",
        one.run.quantize or "bf16", f"{one.memory['base'] / GIB:.1f}", f"{one.total / GIB:.1f}",
        "fits" if one.fits else "too much", f"{one.sent / 1e9:,.1f}", f"{one.seconds:.2f}",
        f"{one.speed:,.0f}",
    ]  # fmt: skip


def serving() -> list[str]:
    rows = []
    for base, rank, device, count in (
        ("8B", 16, "l40s", 1), ("8B", 16, "h100", 1), ("8B", 64, "h100", 1), ("70B", 16, "h100", 4),
        ("405B", 16, "h200", 8), ("1T experts", 16, "h200", 16),
    ):  # fmt: skip
        load = Load(requests=100, prompt=1024, answer=256, adapters=10_000, rows=64, devices=count)
        one = plan_service(planner(base, rank).model, load, DEVICES[device])
        name = [base, str(rank), f"{count} × {device}", f"{one.adapter / 2**20:,.0f}"]
        if not one.rows:
            rows.append([*name, f"{one.row / 2**20:,.0f}", "0", "", "", "", "", ""])
            continue
        rows.append([
            *name, f"{one.row / 2**20:,.0f}", str(one.rows), f"{one.in_memory:,}",
            f"{1e3 * one.step:.0f}", f"{one.answered:.1f}", str(one.replicas), f"{one.hits:.0%}",
        ])  # fmt: skip
    heads = [
        "base", "rank", "a replica", "MiB an adapter", "MiB a row", "rows", "adapters in memory",
        "ms a token", "requests/s", "replicas", "found in memory",
    ]  # fmt: skip
    return table(heads, rows)


def measured_rows() -> tuple[str, list[dict[str, Any]]]:
    """(where they are from, what was planned and measured of each configuration): of the latest
    record, or of the program that was there before the runner."""
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
                name: statistics.median(p["rounds"][arm][0][name] for p in case["processes"])
                for name in NUMBERS
            }
            for arm in ("as it comes", "giving back")
        }
        plain, held = numbers["as it comes"], numbers["giving back"]["memory"]
        name = case["setting"]["name"]
        row = {
            "name": name, "several": name.endswith(("ddp", "fsdp")),
            "dtype": "bf16" if "bf16" in name else "fp32",
            "measured": {"memory": plain["memory"], "held": held, "seconds": plain["seconds"]},
            "predicted": {"memory": plain["planned memory"], "seconds": plain["planned seconds"]},
            "memory_error": plain["planned memory"] / plain["memory"] - 1,
            "held_error": plain["planned memory"] / held - 1,
        }  # fmt: skip
        rows.append(row)
    for row in (
        alone := [row for row in rows if not row["several"]]
    ):  # processes wait for each other
        times = [
            math.log(one["predicted"]["seconds"] / one["measured"]["seconds"])
            for one in alone if one["dtype"] == row["dtype"]
        ]  # fmt: skip
        own = row["predicted"]["seconds"] / row["measured"]["seconds"]
        row["time_error"] = own / math.exp(statistics.median(times)) - 1
    return f"Recorded on commit `{recorded[-1]['commit'][:12]}`.", rows


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
    found = {name: [abs(row[name]) for row in rows_measured if name in row] for name in ERRORS}
    within = {name: sum(error <= limit for error in found[name]) for name, limit in ERRORS.items()}
    middle = {name: statistics.median(errors) for name, errors in found.items()}
    said = (
        f"Of {len(rows)} configurations, what is held is within 10 % of the plan for"
        f" {within['held_error']} (median "
        f"{middle['held_error']:.1%}), what is resident for {within['memory_error']} (median "
        f"{middle['memory_error']:.1%}); of {len(found['time_error'])}, the ratio of times is"
        " within 15 % for "
        f"{within['time_error']} (median {middle['time_error']:.1%})."
    )
    return [note, "", *table(heads, rows), "", said]


ERRORS = {"held_error": 0.10, "memory_error": 0.10, "time_error": 0.15}


def published() -> list[str]:
    """Beside figures of others; who they are stands in the text of the page."""
    nemo = planner("8B").plan(Run(2, 4096, accumulate=16), hardware=DEVICES["h100"])
    large = [
        planner("70B").plan(Run(1, 4096, accumulate=32), how, 8, DEVICES["h100"])
        for how in ("fsdp", "tp")
    ]
    tune = planner("8B", 8, "q_proj,v_proj", "bfloat16")
    card, other = DEVICES["rtx4090"], Run(2, 2048, checkpointing=True)
    lora = tune.plan(other, hardware=card)
    packed = tune.plan(Run(2, 2048, checkpointing=True, quantize="nf4"), hardware=card)
    whole = tune.plan(Run(2, 2048), hardware=card)
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
                f"70B, 8 H100, {one.strategy}: tokens/s each",
                "NeMo AutoModel (TP 2 · PP 4)",
                "659",
                f"{one.speed:,.0f}",
                off(one.speed, 659),
            ]
            for one in large
        ),
        [
            "8B, LoRA, checkpointed: GiB",
            "torchtune",
            "16.2",
            gib(lora),
            off(lora.total / GIB, 16.2),
        ],
        ["8B, LoRA: GiB", "torchtune", "30.3", gib(whole), off(whole.total / GIB, 30.3)],
        [
            "8B, QLoRA, checkpointed: GiB",
            "torchtune",
            "7.4",
            gib(packed),
            off(packed.total / GIB, 7.4),
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
            f"{packed.speed:,.0f}",
            off(packed.speed, 2413),
        ],
    ]
    return table(["what", "by", "published", "planned", "off"], rows)


def of_peak(tokens: float, peak: float, checkpointing: bool) -> str:
    """The share of a peak (TFLOP/s) that so many tokens a second of torchtune's 8B take."""
    one = planner("8B", 8, "q_proj,v_proj", "bfloat16").plan(
        Run(2, 2048, checkpointing=checkpointing)
    )
    return f"{tokens * one.operations / one.tokens / peak / 1e12:.0%}"


def gib(one: RunPlan) -> str:
    return f"{one.total / GIB:.1f}"


def off(found: float | None, wanted: float) -> str:
    assert found is not None
    return f"{found / wanted - 1:+.0%}"


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
            f"`{one.name}`",
            f"{one.memory / 1e9:.0f}",
            f"{one.peak16 / 1e12:,.0f}",
            f"{one.peak32 / 1e12:,.0f}",
            f"{one.memory_bandwidth / 1e9:,.0f}",
            f"{one.link_bandwidth / 1e9:.0f}",
            str(one.devices_per_machine),
            f"{one.network.bandwidth / 1e9:g}",
            linked(one),
        ]
        for one in DEVICES.values()
    ]
    return table(heads, rows)


def linked(one: Hardware) -> str:
    network = f", [network]({one.network.source})" if one.network.source else ""
    return f"[device]({one.source}){network}"


def page() -> str:
    text = (ROOT / "scripts" / "plan_page.md").read_text()
    parts = {
        "training": [line for base in BASES for line in training(base)][:-1],
        "serving": serving(),
        "measured": measured(),
        "published": published(),
        "devices": devices(),
    }
    for name, lines in parts.items():
        text = text.replace(f"{{{{{name}}}}}", "\n".join(lines))
    shares = {
        "products": f"{PRODUCTS:.0%}",
        "bytes": f"{BYTES:.0%}",
        "links": f"{LINKS:.0%}",
        "slack": f"{SLACK:.0%}",
        "context": f"{CONTEXT / GIB:g}",
        "launch": f"{1e6 * LAUNCH:g}",
        "busy": f"{BUSY:.0%}",
        "tuned": of_peak(3083, 165.2, True),
        "tuned6000": of_peak(4699, 154.8, False),
    }
    for name, value in shares.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text
