"""How many numbers LoRA trains, and how large its checkpoints are: tables 2 to 4 of Hu et al. 2021,
exactly.

A model is made of its configuration (`shapes/`) on torch's meta device, which takes no memory, and
the adapter is attached to it as to any model; its parameters are counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import veneer
from experiments.study import FAILED, HELD, HU, ROOT, Cell, Claim, Experiment, Fixed, Run, table
from veneer.models.meta import countable_model
from veneer.train.plan import memory
from veneer.train.plan.training_plan import Planner
from veneer.train.plan.training_plan import Run as Step

SHAPES = ROOT / "experiments" / "shapes"
TITLES = {
    "roberta-base": "RoBERTa base",
    "roberta-large": "RoBERTa large",
    "deberta-v2-xxlarge": "DeBERTa XXL",
    "gpt2-medium": "GPT-2 M",
    "gpt2-large": "GPT-2 L",
    "gpt3-175b": "GPT-3 175B",
    "smollm2-135m": "SmolLM2-135M",
}
#: model -> {adapted weights: ranks}, as in the paper; SmolLM2 is not the paper's
ADAPTERS: dict[str, dict[str, tuple[int, ...]]] = {
    "roberta-base": {"q, v": (8,)},
    "roberta-large": {"q, v": (8,)},
    "deberta-v2-xxlarge": {"q, v": (8, 16)},
    "gpt2-medium": {"q, v": (4,)},
    "gpt2-large": {"q, v": (4,)},
    "gpt3-175b": {"q, v": (1, 2, 4, 8, 64), "q, k, v, o": (1, 2, 4, 64)},
    "smollm2-135m": {"q, v": (8,), "q, k, v, o": (8,), "all linear": (8,)},
}
#: the numbers printed in tables 2, 3, 4 and 15 of the paper, in millions
PRINTED = {
    "roberta-base": {"all": "125.0", "biases": "0.1", "q, v, r = 8": "0.3"},
    "roberta-large": {"all": "355.0", "q, v, r = 8": "0.8"},
    "deberta-v2-xxlarge": {"all": "1500.0", "q, v, r = 16": "4.7"},
    "gpt2-medium": {"all": "354.92", "q, v, r = 4": "0.35"},
    "gpt2-large": {"all": "774.03", "q, v, r = 4": "0.77"},
    "gpt3-175b": {
        "all": "175,255.8",
        "biases": "14.2",
        "q, v, r = 1": "4.7",
        "q, v, r = 2": "9.4",
        "q, v, r = 4": "18.8",
        "q, v, r = 8": "37.7",
        "q, v, r = 64": "301.9",
        "q, k, v, o, r = 1": "9.4",
        "q, k, v, o, r = 2": "18.8",
        "q, k, v, o, r = 4": "37.7",
        "q, k, v, o, r = 64": "603.8",
    },
}
TABLES = {
    "table 2": ("roberta-base", "roberta-large", "deberta-v2-xxlarge"),
    "table 3": ("gpt2-medium", "gpt2-large"),
    "tables 4 and 15": ("gpt3-175b",),
}
#: ends of the paths of q, k, v and o; GPT-2 has the first three in one matrix, a third each
ENCODER_OUTPUT = "attention.output.dense"
ENDS = {
    "roberta": {"q": "self.query", "k": "self.key", "v": "self.value", "o": ENCODER_OUTPUT},
    "deberta-v2": {"q": "query_proj", "k": "key_proj", "v": "value_proj", "o": ENCODER_OUTPUT},
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
}
GB = 1e9
PLAN = Fixed([{"model": model} for model in ADAPTERS], exact=True)
ABOUT = f"""
Tables 2 to 4 and 15 of {HU} print how many numbers each method trains, and section 4.2 says what
that means for GPT-3 175B: a checkpoint of 35 MB instead of 350 GB, and 350 GB of GPU memory instead
of 1.2 TB. Here the models are made from their configurations (`experiments/shapes/`, as their
makers publish them; GPT-3's from table 2.1 of [Brown et al.
2020](https://arxiv.org/abs/2005.14165)) on torch's meta device, and the adapters are attached as to
any model. Nothing is measured: these numbers are exact, and a test holds them. A printed number is
right if it is the count rounded or cut to as many digits; the table says how far the others are
off. "All" of an encoder is without any head, and the paper rounds it: 125 and 355 million are names
of models more than counts.

GPT-2 and GPT-3 have q, k and v in one matrix. The paper gives q and v a pair of factors each, and
so do these counts: a separate adapter on each third (`slices`). One adapter on q and v together
would share A, and train 3 / 4 as many.

Sizes are of 16-bit numbers, without the header of a file. Any of these configurations can be
planned with:

```console
veneer plan --base experiments/shapes/gpt3-175b.json --rank 4 --targets attn.c_attn --batch 1 \\
    --activation-checkpointing
```
"""


def run(cell: Cell) -> dict[str, Any]:
    name = cell["model"]
    model = make_model(name)
    numbers = {
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "biases": sum(
            parameter.numel()
            for path, parameter in model.named_parameters()
            if path.endswith("bias")
        ),
    }
    for weights, ranks in ADAPTERS[name].items():
        for rank in ranks:
            handles = attach_adapters(model, weights, rank)
            count = sum(handle.summary().trainable for handle in handles)
            numbers[f"{weights}, r = {rank}"] = count
            for handle in handles:
                handle.detach()
    return {"numbers": numbers} | ({"memory": step_memory(model)} if name == "gpt3-175b" else {})


def make_model(name: str) -> Any:
    """The model of a configuration, in 16 bits on the meta device."""
    import transformers

    fields = json.loads((SHAPES / f"{name}.json").read_text())
    if fields["model_type"] in ("gpt2", "llama"):
        return countable_model(fields, torch.float16)
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, dtype=torch.float16)


def attach_adapters(model: Any, weights: str, rank: int) -> list[veneer.Handle]:
    """Adapters on "q, v" and the like, or "all linear"."""
    if weights == "all linear":
        return [veneer.attach(model, veneer.LoraConfig(rank=rank))]
    letters = weights.split(", ")
    if model.config.model_type != "gpt2":
        ends = ENDS[model.config.model_type]
        targets = [ends[letter] for letter in letters]
        return [veneer.attach(model, veneer.LoraConfig(rank=rank, targets=targets))]
    handles = []
    for letter in letters:
        target = "attn.c_proj" if letter == "o" else "attn.c_attn"
        slices = {}
        if letter != "o":
            slices = {"slices": {target: tuple(letter == third for third in "qkv")}}
        config = veneer.LoraConfig(rank=rank, targets=[target], **slices)
        handles.append(veneer.attach(model, config, letter))
    return handles


def step_memory(model: Any) -> dict[str, dict[str, int]]:
    """Bytes of a training step of one row of 2,048 tokens with activation checkpointing, by their
    use: of LoRA with as many numbers as q and v have at rank 4, as `veneer plan` counts it, and of
    full fine-tuning by the same rules, without activations."""
    parameters = [p for p in model.parameters() if p.requires_grad_(True).requires_grad]
    full = memory.memory_breakdown(model, "adamw_torch", None)
    for parameter in parameters:
        parameter.requires_grad_(False)
    # as many numbers as q and v with a pair each, and a single adapter, as a step needs it
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=["attn.c_attn"]))
    lora = Planner(model).plan(Step(1, 2048, checkpointing=True)).memory
    handle.detach()
    return {"full": full, "lora": lora}


def is_printed(number: int, printed: str) -> bool:
    """Whether a count is the number printed in millions, rounded or cut to its digits."""
    digits = len(printed.partition(".")[2])
    unit = 10 ** (6 - digits)
    return round(millions(printed) * 10**digits) in (number // unit, (number + unit // 2) // unit)


def millions(printed: str) -> float:
    return float(printed.replace(",", ""))


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        printed_numbers = PRINTED.get(run["model"], {})
        for label, number in run["numbers"].items():
            printed = printed_numbers.get(label)
            if label == "biases" and printed is None:
                continue
            deviation = ""
            if printed is not None and not is_printed(number, printed):
                deviation = f"{millions(printed) * 1e6 / number - 1:+.2%}"
            size = f"{2 * number / GB:,.1f} GB" if number > 5e8 else f"{2 * number / 1e6:,.1f} MB"
            printed = "" if printed is None else f"{printed} M"
            rows.append((TITLES[run["model"]], label, f"{number:,}", printed, deviation, size))
    head = ("model", "trained", "numbers", "printed", "off by", "checkpoint, 16 bits")
    memories = [memory_table(run["memory"]) for run in runs if "memory" in run]
    return "\n\n".join([table(head, rows), *memories])


def memory_table(breakdowns: Mapping[str, Mapping[str, int]]) -> str:
    uses = list(dict.fromkeys(use for sizes in breakdowns.values() for use in sizes))
    rows = [
        (
            use,
            *(f"{sizes[use] / GB:,.2f}" if use in sizes else "–" for sizes in breakdowns.values()),
        )
        for use in uses
    ]
    rows.append(("all", *(f"{sum(sizes.values()) / GB:,.1f}" for sizes in breakdowns.values())))
    lead = (
        "Training GPT-3 175B in 16 bits with Adam, GB in all devices together, as `veneer plan`"
        " counts it: LoRA at rank 4 with as many numbers as on q and v, one row of 2,048 tokens,"
        ' activations checkpointed. Full fine-tuning without its activations: "adapter" is then the'
        " model."
    )
    return lead + "\n\n" + table(("used by", "full fine-tuning", "LoRA"), rows)


def exactly(is_true: bool) -> str:
    """The end of a claim on counts, which have no spread."""
    return HELD if is_true else FAILED


def claims(runs: Sequence[Run]) -> list[Claim]:
    by_model = {run["model"]: run for run in runs}
    results = [
        count_claim(source, [by_model[model] for model in models if model in by_model])
        for source, models in TABLES.items()
        if any(model in by_model for model in models)
    ]
    if "deberta-v2-xxlarge" in by_model:
        numbers = by_model["deberta-v2-xxlarge"]["numbers"]
        eight, sixteen = numbers["q, v, r = 8"], numbers["q, v, r = 16"]
        results.append(
            Claim(
                "DeBERTa XXL's 4.7 M numbers are r = 8 on q and v",
                f"{HU}, tables 2 and 10",
                f"r = 8 is {eight:,}; 4.7 M is r = 16 ({sixteen:,}), as in the authors' scripts",
                exactly(is_printed(eight, "4.7")),
            )
        )
    if "gpt3-175b" in by_model:
        results += size_claims(by_model["gpt3-175b"])
    return results


def count_claim(source: str, runs: Sequence[Run]) -> Claim:
    """LoRA's numbers of one table."""
    counts = [
        (f"{TITLES[run['model']]}, {label}", run["numbers"][label], printed)
        for run in runs
        for label, printed in PRINTED[run["model"]].items()
        if "r =" in label
    ]
    wrong = [
        f"{name}: {printed} M, is {number:,}"
        for name, number, printed in counts
        if not is_printed(number, printed)
    ]
    evidence = f"{len(counts) - len(wrong)} of {len(counts)}"
    evidence += f"; a misprint: {'; '.join(wrong)}" if wrong else ""
    text = "LoRA trains as many numbers as are printed"
    return Claim(text, f"{HU}, {source}", evidence, exactly(not wrong))


def size_claims(run: Run) -> list[Claim]:
    numbers, memories = run["numbers"], run["memory"]
    base, adapter = 2 * numbers["all"], 2 * numbers["q, v, r = 4"]
    full, lora = (sum(memories[name].values()) for name in ("full", "lora"))
    states = full - memories["full"]["gradients"]
    return [
        Claim(
            "GPT-3's checkpoint shrinks about 10,000 ×, from 350 GB to 35 MB, at r = 4 on q and v",
            f"{HU}, section 4.2",
            f"{base / adapter:,.0f} ×, from {base / GB:.1f} GB to {adapter / 1e6:.1f} MB"
            f" ({adapter / 2**20:.1f} MiB)",
            exactly(abs(base / adapter / 10_000 - 1) < 0.1),
        ),
        Claim(
            "training GPT-3 takes 350 GB instead of 1.2 TB: up to 2/3 of the memory is saved",
            f"{HU}, section 4.2",
            f"{lora / GB:,.0f} GB planned, of which the base is"
            f" {memories['lora']['base'] / GB:,.1f}; full fine-tuning {states / GB:,.0f} GB for"
            f" weights and Adam's states, {full / GB:,.0f} with all gradients: 1.2 TB lies between",
            exactly(states < 1.2e12 < full and lora < full / 3),
        ),
    ]


EXPERIMENT = Experiment(
    title="Numbers and sizes",
    about=ABOUT,
    plan=PLAN,
    run=run,
    tables=tables,
    claims=claims,
    toy={"model": "gpt2-medium"},
    full=(
        "glue-roberta-base.yaml",
        "glue-roberta-large.yaml",
        "glue-deberta-xxl.yaml",
        "e2e-gpt2-medium.yaml",
        "e2e-gpt2-large.yaml",
    ),
)
