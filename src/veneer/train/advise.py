"""`veneer advise`: rank and rate to start from, by what is known, each with its source.

    rank    trainable numbers ≥ tokens that are learnt, to the next power of two
    rate    ten times that of training everything, half as much again for a run of few steps; of a Llama or a Qwen
            10 · 5e-5 · (2000 / width)^p
    scale   alpha / r with alpha 32, so that the rate does not hang on the rank
    where   all linear layers

It is where to begin a search, and no more: `try_out` trains a few of its neighbours for a short
while, at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import ConfigError
from veneer.models.remote_code import with_trust_of_config
from veneer.train.config import TrainConfig, make_config
from veneer.train.prepare import Prepared
from veneer.train.tasks import TASKS

REGRET = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"
PRIMER = "Tinker's documentation, LoRA Primer, tinker-docs.thinkingmachines.ai"
COOKBOOK = (
    "tinker-cookbook, hyperparam_utils.get_lr, github.com/thinking-machines-lab/tinker-cookbook"
)
QLORA = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314"
LORA = "Hu et al. 2021, LoRA, arXiv:2106.09685"

#: the smallest and the largest rank that is advised
RANKS = 4, 512
#: the exponent p by which rates fall with the width, where somebody fitted it, and the rate
#: elsewhere
EXPONENTS, USUAL = {"llama": 0.781, "qwen": 0.0775}, 2e-4
#: steps of a run that counts as short, and how much higher its rate is; steps of a trial
SHORT, FASTER, TRIAL = 100, 1.5, 48


class Advice(NamedTuple):
    """A setting of `TrainConfig`, why it is advised, and whose finding that is."""

    setting: str
    value: Any
    why: str
    source: str


@with_trust_of_config
def advise(config: TrainConfig) -> tuple[list[Advice], Prepared]:
    """What to start from on the data and base of `config`; and its data, read. No weights are.
    Raises as `fit`."""
    if config.task != "sft":
        problem = f"task {config.task}, of whose rows nobody knows how much they teach"
        raise ConfigError(
            problem, "task sft", "start from the defaults, and try a few rates with `veneer sweep`"
        )
    task = TASKS["sft"](config)
    task.read_data()
    task.open()
    prepared = task.prepare()
    learnt, numbers, width, kind = prepared.train.trained_tokens, *_base(config)
    return [_rank(learnt, numbers), _rate(width, kind, prepared.steps), *_rest()], prepared


def _rank(learnt: int, numbers: int) -> Advice:
    low, high = RANKS
    wanted = 2 ** math.ceil(math.log2(max(learnt / numbers, 1)))
    rank = min(max(wanted, low), high)
    why = f"{learnt:,} tokens are learnt, and a rank has {numbers:,} numbers: {rank * numbers:,} "
    why += (
        "are at least as many"
        if wanted <= high
        else "are fewer, so training everything may learn more"
    )
    return Advice("rank", rank, why, PRIMER)


def _rate(width: int, kind: str, steps: int) -> Advice:
    family = next((name for name in EXPONENTS if name in kind), None)
    if family is None:
        rate, why, source = (
            USUAL,
            f"ten times {USUAL / 10:g}, which is usual for training everything",
            REGRET,
        )
    else:
        rate, source = 10 * 5e-5 * (2000 / width) ** EXPONENTS[family], COOKBOOK
        why = (
            f"ten times the rate of training everything, as fitted to a {family} of width {width:,}"
        )
    if steps <= SHORT:
        rate, source = rate * FASTER, REGRET if source == REGRET else f"{source}; {REGRET}"
        why += f"; half as much again for a run of {steps} steps, since B begins at 0"
    return Advice("learning_rate", float(f"{rate:.2g}"), why, source)


def _rest() -> list[Advice]:
    return [
        Advice(
            "alpha",
            32.0,
            "alpha / r: the best rate is then nearly the same for every rank",
            f"{LORA}; {REGRET}",
        ),
        Advice(
            "targets",
            "all-linear",
            "attention alone learns less, at as many numbers too",
            f"{REGRET}; {QLORA}",
        ),
        Advice(
            "batch_size", 8, "adapters lose more by a large batch than full training does", REGRET
        ),
    ]


def _base(config: TrainConfig) -> tuple[int, int, str]:
    """(numbers of an adapter of rank 1, width, kind) of a base, of its config alone."""
    import torch

    from veneer.config import LoraConfig
    from veneer.handle import attach
    from veneer.models.locate import config_of
    from veneer.models.meta import countable_model

    told = config_of(config.base)
    told = getattr(told, "text_config", None) or told
    model = countable_model(config.base, torch.bfloat16)
    numbers = attach(model, LoraConfig(rank=1, targets="all-linear")).summary().trainable
    embedding: Any = model.get_input_embeddings()
    return numbers, int(embedding.weight.shape[1]), str(told.model_type)


def configured(config: TrainConfig, advice: Sequence[Advice]) -> TrainConfig:
    """`config` as advised."""
    return make_config({**config.content(), **{one.setting: one.value for one in advice}})


def try_out(
    config: TrainConfig, advice: Sequence[Advice], steps: int, folder: Path, **options: Any
) -> list[Advice] | None:
    """The advice, with the rank and the rate that did best in a short sweep of its neighbours in
    `folder`: a third and three times the rate, and a quarter of the rank. None: it was interrupted,
    with a checkpoint. ``options``: as `sweep` takes them."""
    from veneer.train.sweep.run import sweep
    from veneer.train.sweep.settings import make_sweep

    given = {one.setting: one.value for one in advice}
    rate, rank = given["learning_rate"], given["rank"]
    axes = {
        "learning_rate": [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)],
        "rank": list(dict.fromkeys([max(1, rank // 4), rank])),
    }
    steps = min(steps, TRIAL)
    tried = configured(config, advice).model_copy(update={"output": folder, "max_steps": steps})
    found = sweep(tried, make_sweep({"axes": axes}), **options)
    if found.interrupted:
        return None
    facts = found.facts
    best = next(one for one in facts["candidates"] if one["name"] == facts["best"])
    why = f"best of {len(facts['candidates'])} after {steps} steps, loss {best['loss']:.4f}"
    return [
        one._replace(value=best["changes"][one.setting], why=f"{why}; advised was {one.value:g}", source=str(folder))
        if one.setting in best["changes"] else one
        for one in advice
    ]  # fmt: skip


def as_yaml(config: TrainConfig, advice: Sequence[Advice]) -> str:
    """The configuration file of a run as advised, with the reasons as comments."""
    import yaml

    default, advised = TrainConfig.defaults(), {one.setting for one in advice}
    own = {
        name: value for name, value in config.content().items()
        if name not in advised and (name not in default or value != default[name])
    }  # fmt: skip
    lines = [yaml.safe_dump(own, sort_keys=False, allow_unicode=True).rstrip()]
    for one in advice:
        line = yaml.safe_dump({one.setting: one.value}).rstrip()
        lines += ["", f"# {one.why}", f"#   {one.source}", line]
    return "\n".join(lines) + "\n"
