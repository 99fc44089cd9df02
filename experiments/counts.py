"""How many numbers LoRA trains, and how large its checkpoints are: tables 2 to 4 of Hu et al. 2021,
exactly.

A model is made of its configuration (`shapes/`) on torch's meta device, which takes no memory, and
the adapter is attached to it as to any other; what is counted are its parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import veneer
from experiments.experiment import HU, Cell, Claim, Experiment, Run, table
from veneer.models.meta import countable_model
from veneer.train.plan import memory
from veneer.train.plan.training_plan import Planner
from veneer.train.plan.training_plan import Run as Step

SHAPES = Path(__file__).resolve().parent / "shapes"
NAMES = {
    "roberta-base": "RoBERTa base", "roberta-large": "RoBERTa large", "deberta-v2-xxlarge": "DeBERTa XXL",
    "gpt2-medium": "GPT-2 M", "gpt2-large": "GPT-2 L", "gpt3-175b": "GPT-3 175B", "smollm2-135m": "SmolLM2-135M",
}  # fmt: skip
#: model -> {what is adapted: ranks}, as the paper has it; SmolLM2 is not the paper's
ADAPTERS: dict[str, dict[str, tuple[int, ...]]] = {
    "roberta-base": {"q, v": (8,)},
    "roberta-large": {"q, v": (8,)},
    "deberta-v2-xxlarge": {"q, v": (8, 16)},
    "gpt2-medium": {"q, v": (4,)},
    "gpt2-large": {"q, v": (4,)},
    "gpt3-175b": {"q, v": (1, 2, 4, 8, 64), "q, k, v, o": (1, 2, 4, 64)},
    "smollm2-135m": {"q, v": (8,), "q, k, v, o": (8,), "all linear": (8,)},
}
#: what the paper prints in its tables 2, 3, 4 and 15, in millions
PRINTED = {
    "roberta-base": {"all": "125.0", "biases": "0.1", "q, v, r = 8": "0.3"},
    "roberta-large": {"all": "355.0", "q, v, r = 8": "0.8"},
    "deberta-v2-xxlarge": {"all": "1500.0", "q, v, r = 16": "4.7"},
    "gpt2-medium": {"all": "354.92", "q, v, r = 4": "0.35"},
    "gpt2-large": {"all": "774.03", "q, v, r = 4": "0.77"},
    "gpt3-175b": {
        "all": "175,255.8", "biases": "14.2", "q, v, r = 1": "4.7", "q, v, r = 2": "9.4", "q, v, r = 4": "18.8",
        "q, v, r = 8": "37.7", "q, v, r = 64": "301.9", "q, k, v, o, r = 1": "9.4", "q, k, v, o, r = 2": "18.8",
        "q, k, v, o, r = 4": "37.7", "q, k, v, o, r = 64": "603.8",
    },
}  # fmt: skip
# : the ends of the paths of q, k, v and o; GPT-2 has the first three in one matrix, of which each
# is a third
ENDS = {
    "roberta": {
        "q": "self.query",
        "k": "self.key",
        "v": "self.value",
        "o": "attention.output.dense",
    },
    "deberta-v2": {
        "q": "query_proj",
        "k": "key_proj",
        "v": "value_proj",
        "o": "attention.output.dense",
    },
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
}
GB, GIB = 1e9, 2**30
ABOUT = f"""
Tables 2 to 4 and 15 of {HU} print how many numbers each method trains, and its section 4.2 what that means for GPT-3
175B: a checkpoint of 35 MB instead of 350 GB, and 350 GB of GPU memory instead of 1.2 TB. Here the models are made from
their configurations (`experiments/shapes/`, as their makers publish them; GPT-3's from table 2.1 of
[Brown et al. 2020](https://arxiv.org/abs/2005.14165)) on torch's meta device, and the adapters attached as to any other
model. Nothing is measured: these numbers are exact, and a test holds them. What is printed is right where it is the
number rounded or cut to as many digits; elsewhere the table says how far it is off. "All" of an encoder is without any
head, and the paper's are rounder there: those are names of models more than counts.

GPT-2 and GPT-3 have q, k and v in one matrix. The paper gives q and v a pair of factors each, and so do these counts:
an adapter of its own on each third (`slices`). One adapter on q and v together would share A, and train
3 / 4 as many.

Sizes are those of 16-bit numbers; the header of a file comes on top. Any of these configurations can be planned with:

```console
veneer plan --base experiments/shapes/gpt3-175b.json --rank 4 --targets attn.c_attn --batch 1 --activation-checkpointing
```
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [{"model": "gpt2-medium"}]
    return [{"model": model} for model in ADAPTERS]


def run(cell: Cell) -> dict[str, Any]:
    name = cell["model"]
    model = made(name)
    numbers = {
        "all": sum(own.numel() for own in model.parameters()),
        "biases": sum(
            own.numel() for path, own in model.named_parameters() if path.endswith("bias")
        ),
    }
    for what, ranks in ADAPTERS[name].items():
        for rank in ranks:
            handles = attached(model, what, rank)
            numbers[f"{what}, r = {rank}"] = sum(handle.summary().trainable for handle in handles)
            for handle in handles:
                handle.detach()
    return {"numbers": numbers} | ({"memory": memory_of(model)} if name == "gpt3-175b" else {})


def made(name: str) -> Any:
    """The model of a configuration, in 16 bits on the meta device."""
    import transformers

    fields = json.loads((SHAPES / f"{name}.json").read_text())
    if fields["model_type"] in ("gpt2", "llama"):
        return countable_model(fields, torch.float16)
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, dtype=torch.float16)


def attached(model: Any, what: str, rank: int) -> list[veneer.Handle]:
    """Adapters on "q, v" and the like, or "all linear"."""
    if what == "all linear":
        return [veneer.attach(model, veneer.LoraConfig(rank=rank))]
    letters = what.split(", ")
    if model.config.model_type != "gpt2":
        ends = ENDS[model.config.model_type]
        return [
            veneer.attach(
                model, veneer.LoraConfig(rank=rank, targets=[ends[letter] for letter in letters])
            )
        ]
    found = []
    for letter in letters:
        target = "attn.c_proj" if letter == "o" else "attn.c_attn"
        slices = (
            {} if letter == "o" else {"slices": {target: tuple(letter == third for third in "qkv")}}
        )
        found.append(
            veneer.attach(model, veneer.LoraConfig(rank=rank, targets=[target], **slices), letter)
        )
    return found


def memory_of(model: Any) -> dict[str, dict[str, int]]:
    """Bytes of a training step of one row of 2,048 tokens with activation checkpointing, by what
    holds them: of LoRA with as many numbers as q and v have at rank 4, as `veneer plan` counts it,
    and of full fine-tuning by the same rules, without activations."""
    trained = [own for own in model.parameters() if own.requires_grad_(True).requires_grad]
    full = memory.memory_breakdown(model, "adamw_torch", None)
    for own in trained:
        own.requires_grad_(False)
    # as many numbers as q and v with a pair each, and one adapter, as a step needs it
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=["attn.c_attn"]))
    lora = Planner(model).plan(Step(1, 2048, checkpointing=True)).memory
    handle.detach()
    return {"full": full, "lora": lora}


def is_printed(number: int, printed: str) -> bool:
    """Whether a count is what is printed in millions, rounded or cut to its digits."""
    digits = len(printed.partition(".")[2])
    unit = 10 ** (6 - digits)
    return round(millions(printed) * 10**digits) in (number // unit, (number + unit // 2) // unit)


def millions(printed: str) -> float:
    return float(printed.replace(",", ""))


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        printed = PRINTED.get(run["model"], {})
        for what, number in run["numbers"].items():
            if what == "biases" and what not in printed:
                continue
            told = printed.get(what)
            off = (
                ""
                if told is None
                else ""
                if is_printed(number, told)
                else f"{millions(told) * 1e6 / number - 1:+.2%}"
            )
            size = f"{2 * number / GB:,.1f} GB" if number > 5e8 else f"{2 * number / 1e6:,.1f} MB"
            rows.append(
                (
                    NAMES[run["model"]],
                    what,
                    f"{number:,}",
                    "" if told is None else f"{told} M",
                    off,
                    size,
                )
            )
    parts = [
        table(("model", "trained", "numbers", "printed", "off by", "checkpoint, 16 bits"), rows)
    ]
    for run in runs:
        if "memory" in run:
            parts.append(memory_table(run["memory"]))
    return "\n\n".join(parts)


def memory_table(parts: dict[str, dict[str, int]]) -> str:
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    rows = [
        (name, *(f"{own[name] / GB:,.2f}" if name in own else "–" for own in parts.values()))
        for name in names
    ]
    rows.append(("all", *(f"{sum(own.values()) / GB:,.1f}" for own in parts.values())))
    head = (
        "Training GPT-3 175B in 16 bits with Adam, GB in all devices together, as `veneer plan` counts it: LoRA at "
        "rank 4 with as many numbers as on q and v, one row of 2,048 tokens, activations checkpointed. Full "
        'fine-tuning without its activations: "adapter" is then the model.'
    )
    return head + "\n\n" + table(("held by", "full fine-tuning", "LoRA"), rows)


def claims(runs: Sequence[Run]) -> list[Claim]:
    by_model = {run["model"]: run for run in runs}
    found = []
    for source, models in (
        ("table 2", ("roberta-base", "roberta-large", "deberta-v2-xxlarge")),
        ("table 3", ("gpt2-medium", "gpt2-large")),
        ("tables 4 and 15", ("gpt3-175b",)),
    ):
        own = [by_model[model] for model in models if model in by_model]
        if own:
            found.append(counted(source, own))
    if "deberta-v2-xxlarge" in by_model:
        numbers = by_model["deberta-v2-xxlarge"]["numbers"]
        eight, sixteen = numbers["q, v, r = 8"], numbers["q, v, r = 16"]
        found.append(
            Claim(
                "DeBERTa XXL's 4.7 M numbers are r = 8 on q and v", f"{HU}, tables 2 and 10",
                f"r = 8 is {eight:,}; 4.7 M is r = 16 ({sixteen:,}), as the authors' scripts have it",
                is_printed(eight, "4.7"),
            )
        )  # fmt: skip
    if "gpt3-175b" in by_model:
        found += large(by_model["gpt3-175b"])
    return found


def counted(source: str, runs: Sequence[Run]) -> Claim:
    """LoRA's numbers of one table."""
    pairs = [
        (f"{NAMES[run['model']]}, {what}", run["numbers"][what], told)
        for run in runs
        for what, told in PRINTED[run["model"]].items()
        if "r =" in what
    ]
    wrong = [
        f"{name}: {told} M, is {number:,}"
        for name, number, told in pairs
        if not is_printed(number, told)
    ]
    said = f"{len(pairs) - len(wrong)} of {len(pairs)}" + (
        "; a misprint there: " + "; ".join(wrong) if wrong else ""
    )
    return Claim("LoRA trains as many numbers as are printed", f"{HU}, {source}", said, not wrong)


def large(run: Run) -> list[Claim]:
    numbers, parts = run["numbers"], run["memory"]
    base, adapter = 2 * numbers["all"], 2 * numbers["q, v, r = 4"]
    full, lora = (sum(parts[name].values()) for name in ("full", "lora"))
    states = full - parts["full"]["gradients"]
    return [
        Claim(
            "GPT-3's checkpoint shrinks about 10,000 ×, from 350 GB to 35 MB, at r = 4 on q and v",
            f"{HU}, section 4.2",
            f"{base / adapter:,.0f} ×, from {base / GB:.1f} GB to {adapter / 1e6:.1f} MB ({adapter / 2**20:.1f} MiB)",
            abs(base / adapter / 10_000 - 1) < 0.1,
        ),
        Claim(
            "training GPT-3 takes 350 GB instead of 1.2 TB: up to 2/3 of the memory is saved", f"{HU}, section 4.2",
            f"{lora / GB:,.0f} GB planned, of which the base is {parts['lora']['base'] / GB:,.1f}; full fine-tuning "
            f"{states / GB:,.0f} GB for weights and Adam's states, {full / GB:,.0f} with all gradients: 1.2 TB lies "
            "between",
            states < 1.2e12 < full and lora < full / 3,
        ),
    ]  # fmt: skip


FULL = (
    "glue-roberta-base",
    "glue-roberta-large",
    "glue-deberta-xxl",
    "e2e-gpt2-medium",
    "e2e-gpt2-large",
)
EXPERIMENT = Experiment(
    "Numbers and sizes",
    ABOUT,
    cells,
    run,
    tables,
    claims,
    full=tuple(f"{name}.yaml" for name in FULL),
)
