"""Steps of training: time and memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import memory
import veneer
from candidates import (
    ALPHA,
    ARCHITECTURES,
    DTYPES,
    llama,
    make,
    names,
    sharing,
    step,
    training_step,
)
from runner import Arms, Case
from veneer.train.loss import causal_loss

EQUAL = (
    "the same frozen weights, batch, rank 8 on all linear layers, AdamW (fused); `floor` is what "
    "any step over a frozen base must do: forward, and the gradient carried back to the embedded "
    "input"
)
PEERS = (
    "`peft` and `veneer` are a plain loop with transformers' own attention (sdpa) and loss; "
    "`peft, bf16 adapters` is PEFT with autocast_adapter_dtype=False; `own loss and attention` "
    "are those of `veneer train`"
)


def build(architecture: str, dtype: str, layers: int, tokens: int, tiny: bool) -> tuple[Any, Any]:
    shape = ARCHITECTURES[architecture]
    base = shape.build(layers, min(tokens, 256), tiny=tiny).to(DTYPES[dtype])
    return base, shape.batch(base, tokens)


def step_arms(
    stack: Any,
    seed: int,
    dtype: str,
    layers: int,
    tokens: int,
    architecture: str = "llama",
    rank: int = 8,
    dropout: bool = False,
    peers: bool = False,
    rows: int = 0,
    tiny: bool = False,
) -> Arms:
    torch.manual_seed(seed)
    base, batch = build(architecture, dtype, layers, tokens, tiny)
    if rows:  # shorter ones
        batch = {name: value.reshape(rows, -1) for name, value in batch.items()}

    def arm(name: str) -> Callable[[], None]:
        # Full fine-tuning changes its weights; all others share the frozen ones.
        model = copy.deepcopy(base) if name.startswith("full") else sharing(base)
        return training_step(make(name, model, architecture, rank), batch)

    return {name: arm(name) for name in names(architecture, dtype, dropout, peers)}


def memory_arms(
    stack: Any, seed: int, dtype: str, layers: int, tokens: int, tiny: bool = False, rank: int = 8
) -> Arms:
    def measure(name: str) -> dict[str, float]:
        torch.manual_seed(seed)
        base, batch = build("llama", dtype, layers, tokens, tiny)
        candidate = make(name, base, "llama", rank)
        optimizer = candidate.optimizer()
        gc.collect()
        rest = memory.resident()
        saved = memory.saved_bytes(candidate, batch)  # a step, but for its last part
        if optimizer is not None:
            optimizer.step()
        peak = memory.peak_of(partial(step, candidate, optimizer, batch))
        return {"saved": saved, "peak": peak, "above": max(peak - rest, 1)}

    arm_names = names("llama", dtype, dropout=False, peers=False)
    return {name: partial(measure, name) for name in arm_names}


def many_arms(
    stack: Any, seed: int, dtype: str, layers: int, adapters: int, tokens: int, tiny: bool = False
) -> Arms:
    torch.manual_seed(seed)
    plain: Any = llama(layers, tokens, tiny=tiny).to(DTYPES[dtype])
    base: Any = sharing(plain)
    veneer.models.use_products(base)
    runs = [f"run-{number}" for number in range(adapters)]
    rows = {name: torch.randint(0, base.config.vocab_size, (1, tokens)) for name in runs}
    batches = {name: {"input_ids": ids, "labels": ids} for name, ids in rows.items()}

    def apart(name: str, model: Any) -> Callable[[], None]:
        steps = [
            training_step(make(name, sharing(model), "llama", 8), batches[run]) for run in runs
        ]

        def all_steps() -> None:
            for run_step in steps:
                run_step()

        return all_steps

    config = veneer.LoraConfig(rank=8, alpha=ALPHA)
    together = veneer.train_many(sharing(base), dict.fromkeys(runs, config))
    optimizer = torch.optim.AdamW(
        [parameter for run in together.values() for parameter in run.parameters()],
        lr=1e-4,
        fused=True,
    )

    def at_once() -> None:
        together.backward(batches, causal_loss)
        optimizer.step()
        optimizer.zero_grad()

    narrow = "peft, bf16 adapters"
    return {
        "peft, one after another": apart("peft", plain),
        **({f"{narrow}, one after another": apart(narrow, plain)} if dtype != "float32" else {}),
        "veneer, one after another": apart("veneer, own loss and attention", plain),
        "veneer, at once": at_once,
    }


TOY = {"tiny": True, "layers": 1, "tokens": 16}
WHOLE = {"layers": 30, "tokens": 1024}

STEP = Case(
    "step",
    "A training step of the whole SmolLM2-135M, as a user with defaults has it: default threads, "
    "wall time.",
    f"{EQUAL}. {PEERS}",
    "floor",
    [{"threads": "default", "dtype": dtype, **WHOLE} for dtype in DTYPES]
    + [
        {"threads": "default", "dtype": dtype, **WHOLE, "tokens": 256, "rows": 4}
        for dtype in DTYPES
    ],
    step_arms,
    {**TOY, "rows": 2},
    rounds=2,
    minutes=17,
)
STEP_ONE = Case(
    "step_one_thread",
    "The same of 2 of its layers on one thread, with dropout of 0.05, loralib and full fine-tuning"
    " too.",
    f"{EQUAL}. {PEERS}",
    "floor",
    [
        {"threads": 1, "dtype": dtype, "layers": 2, "tokens": 512, "dropout": True, "peers": True}
        for dtype in DTYPES
    ],
    step_arms,
    TOY,
    shown={"wall": ("wall time", "ratio"), "cpu": ("CPU time", "ratio")},
    minutes=6.5,
)
STEP_OTHERS = Case(
    "step_others",
    "A training step of two layers of BERT, and of ResNet-50's first blocks.",
    f"{EQUAL}. {PEERS}; convolutions are adapted too",
    "floor",
    [
        {"threads": "default", "architecture": name, "dtype": dtype, "layers": 2, "tokens": 512}
        for name, dtype in (("bert", "float32"), ("bert", "bfloat16"), ("resnet", "bfloat16"))
    ],
    step_arms,
    TOY,
    minutes=5.2,
)
MEMORY = Case(
    "step_memory",
    "What a training step of the whole SmolLM2-135M holds: the peak of the process, and what "
    "autograd keeps for backward.",
    f"{EQUAL}. {PEERS}. Each arm has its processes to itself; the peak is of one step after a "
    "first, of model, libraries and optimiser together",
    "floor",
    [{"threads": "default", "dtype": dtype, **WHOLE} for dtype in DTYPES],
    memory_arms,
    TOY,
    shown={
        "peak": ("peak of the process", "ratio"),
        "above": ("above the model at rest", "ratio"),
        "saved": ("kept for backward", "ratio"),
    },
    apart=True,
    minutes=26,
)
MANY = Case(
    "many",
    "Adapters trained at once on one base, beside the same steps one after another; four layers.",
    "the same rows, a row an adapter, rank 8 on all linear layers, a forward, a backward and "
    "AdamW's step of each",
    "peft, one after another",
    [{"threads": "default", "dtype": "bfloat16", "layers": 4, "adapters": 8, "tokens": 16}],
    many_arms,
    {**TOY, "tokens": 4, "adapters": 2},
    minutes=2.7,
)
CASES = (STEP, STEP_ONE, STEP_OTHERS, MEMORY, MANY)
