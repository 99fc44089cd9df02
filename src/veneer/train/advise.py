"""`veneer advise`: initial settings for a run, from published results, each with its source.

    rank      trainable numbers ≥ tokens with a label, rounded up to a power of two
    rate      ten times that of full fine-tuning, 1.5 times as much for a short run; for Llama and
              Qwen 10 · 5e-5 · (2000 / width)^p
    scale     alpha / r with alpha 32, so that the best rate does not depend on the rank
    targets   all linear layers

The advice is only a starting point for a search: `try_out` trains a few neighbouring settings for a
short time, all at once.
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

#: smallest and largest advised rank
RANKS = 4, 512
#: exponent p of the rate's decrease with the width, for the families with a published fit; the rate
#: for all others
EXPONENTS, USUAL = {"llama": 0.781, "qwen": 0.0775}, 2e-4
#: maximal steps of a short run; factor of its rate; maximal steps of a trial
SHORT, FASTER, TRIAL = 100, 1.5, 48


class Advice(NamedTuple):
    """A setting of `TrainConfig`, its advised value, the reason, and the reason's source. The field
    names are the keys of `veneer advise --json`."""

    setting: str
    value: Any
    why: str
    source: str


@with_trust_of_config
def advise(config: TrainConfig) -> tuple[list[Advice], Prepared]:
    """(advice for the data and base of `config`, the prepared data). Reads no weights. Raises as
    `fit` does."""
    if config.task != "sft":
        problem = f"task {config.task}, of whose rows nobody knows how much they teach"
        raise ConfigError(
            problem, "task sft", "start from the defaults, and try a few rates with `veneer sweep`"
        )
    task = TASKS["sft"](config)
    task.read_data()
    task.open_base()
    prepared = task.prepare()
    learnt, numbers, width, kind = prepared.train.trained_tokens, *_base(config)
    advice = [_rank(learnt, numbers), _rate(width, kind, prepared.steps), *_fixed_advice()]
    return advice, prepared


def _rank(learnt: int, numbers: int) -> Advice:
    low, high = RANKS
    wanted = 2 ** math.ceil(math.log2(max(learnt / numbers, 1)))
    rank = min(max(wanted, low), high)
    reason = (
        f"{learnt:,} tokens are learnt, and a rank has {numbers:,} numbers: {rank * numbers:,} "
    )
    reason += (
        "are at least as many"
        if wanted <= high
        else "are fewer, so training everything may learn more"
    )
    return Advice("rank", rank, reason, PRIMER)


def _rate(width: int, kind: str, steps: int) -> Advice:
    family = next((name for name in EXPONENTS if name in kind), None)
    if family is None:
        rate, source = USUAL, REGRET
        reason = f"ten times {USUAL / 10:g}, which is usual for training everything"
    else:
        rate, source = 10 * 5e-5 * (2000 / width) ** EXPONENTS[family], COOKBOOK
        reason = (
            f"ten times the rate of training everything, as fitted to a {family} of width {width:,}"
        )
    if steps <= SHORT:
        rate, source = rate * FASTER, REGRET if source == REGRET else f"{source}; {REGRET}"
        reason += f"; half as much again for a run of {steps} steps, since B begins at 0"
    return Advice("learning_rate", float(f"{rate:.2g}"), reason, source)


def _fixed_advice() -> list[Advice]:
    """The settings that depend neither on the data nor on the base."""
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
    """(trainable numbers of an adapter of rank 1, width, model type) of a base, from its config."""
    import torch

    from veneer.config import LoraConfig
    from veneer.handle import attach
    from veneer.models.locate import config_of
    from veneer.models.meta import countable_model

    base_config = config_of(config.base)
    base_config = getattr(base_config, "text_config", None) or base_config
    model = countable_model(config.base, torch.bfloat16)
    numbers = attach(model, LoraConfig(rank=1, targets="all-linear")).summary().trainable
    embedding: Any = model.get_input_embeddings()
    return numbers, int(embedding.weight.shape[1]), str(base_config.model_type)


def apply_advice(config: TrainConfig, advice: Sequence[Advice]) -> TrainConfig:
    """`config` with the advised settings."""
    return make_config({**config.content(), **_values(advice)})


def _values(advice: Sequence[Advice]) -> dict[str, Any]:
    return {setting: value for setting, value, *_ in advice}


def try_out(
    config: TrainConfig, advice: Sequence[Advice], steps: int, folder: Path, **options: Any
) -> list[Advice] | None:
    """The advice with the best rank and rate of a short sweep in `folder`, over a third, one and
    three times the advised rate and over a quarter of and the full advised rank. None if the sweep
    was interrupted; it then left a checkpoint. ``options``: arguments of `sweep`."""
    from veneer.train.sweep.sweep_run import sweep
    from veneer.train.sweep.sweep_settings import make_sweep

    values = _values(advice)
    rate, rank = values["learning_rate"], values["rank"]
    axes = {
        "learning_rate": [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)],
        "rank": list(dict.fromkeys([max(1, rank // 4), rank])),
    }
    steps = min(steps, TRIAL)
    trial = apply_advice(config, advice).model_copy(update={"output": folder, "max_steps": steps})
    result = sweep(trial, make_sweep({"axes": axes}), **options)
    if result.interrupted:
        return None
    facts = result.facts
    best = next(run for run in facts["candidates"] if run["name"] == facts["best"])
    reason = f"best of {len(facts['candidates'])} after {steps} steps, loss {best['loss']:.4f}"
    return [
        (
            Advice(
                setting, best["changes"][setting], f"{reason}; advised was {value:g}", str(folder)
            )
            if setting in best["changes"]
            else Advice(setting, value, first_reason, source)
        )
        for setting, value, first_reason, source in advice
    ]


def as_yaml(config: TrainConfig, advice: Sequence[Advice]) -> str:
    """The YAML configuration of a run with the advised settings, and the reasons as comments."""
    import yaml

    default, advised = TrainConfig.defaults(), _values(advice)
    settings = {
        name: value
        for name, value in config.content().items()
        if name not in advised and (name not in default or value != default[name])
    }
    lines = [yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()]
    for setting, value, reason, source in advice:
        line = yaml.safe_dump({setting: value}).rstrip()
        lines += ["", f"# {reason}", f"#   {source}", line]
    return "\n".join(lines) + "\n"
