"""`veneer advise`: initial settings for a run, from published results, each with its source.

    rank      the least power of two with which the adapter has at least as many parameters as there
              are tokens with a label
    rate      ten times the rate of full fine-tuning; for Llama and Qwen models of hidden size w,
              10 · 5e-5 · (2000 / w)^p with p of `WIDTH_EXPONENTS`; 1.5 times that for a short run
    scale     alpha / r with alpha 32, so that the best rate does not depend on the rank
    targets   all linear layers

The advice is only a starting point for a search. `try_out` searches: it trains a few neighbouring
settings for a short time, all at once.
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

LORA_WITHOUT_REGRET = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"
LORA_PRIMER = "Tinker's documentation, LoRA Primer, tinker-docs.thinkingmachines.ai"
TINKER_COOKBOOK = (
    "tinker-cookbook, hyperparam_utils.get_lr, github.com/thinking-machines-lab/tinker-cookbook"
)
QLORA_PAPER = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314"
LORA_PAPER = "Hu et al. 2021, LoRA, arXiv:2106.09685"

#: the smallest and the largest rank that is advised
RANK_LIMITS = 4, 512
#: the exponent p of the learning rate 10 · 5e-5 · (2000 / hidden size)^p, by model family with a
#: published fit; and the learning rate for all other families
WIDTH_EXPONENTS, DEFAULT_RATE = {"llama": 0.781, "qwen": 0.0775}, 2e-4
#: the maximal number of steps of a run that counts as short; the factor by which such a run's
#: learning rate is raised; the maximal number of steps of each run of `try_out`
SHORT_RUN_STEPS, SHORT_RUN_FACTOR, TRIAL_STEPS = 100, 1.5, 48


class Advice(NamedTuple):
    """A setting of `TrainConfig`, its advised value, the reason, and the reason's source. The field
    names are the keys of `veneer advise --json`."""

    setting: str
    value: Any
    why: str
    source: str


#: the advice that depends neither on the data nor on the base
FIXED_ADVICE = (
    Advice(
        "alpha",
        32.0,
        "alpha / r: the best rate is then nearly the same for every rank",
        f"{LORA_PAPER}; {LORA_WITHOUT_REGRET}",
    ),
    Advice(
        "targets",
        "all-linear",
        "attention alone learns less, at as many numbers too",
        f"{LORA_WITHOUT_REGRET}; {QLORA_PAPER}",
    ),
    Advice(
        "batch_size",
        8,
        "adapters lose more by a large batch than full training does",
        LORA_WITHOUT_REGRET,
    ),
)


@with_trust_of_config
def advise(config: TrainConfig) -> tuple[list[Advice], Prepared]:
    """Return (advice for the data and base of `config`, the prepared data). Reads no weights.
    Raises `ConfigError` for a task other than sft, and the errors that `fit` raises for the data or
    the base."""
    if config.task != "sft":
        raise ConfigError(
            f"task {config.task}, of whose rows nobody knows how much they teach",
            "task sft",
            "start from the defaults, and try a few rates with `veneer sweep`",
        )
    task = TASKS["sft"](config)
    task.read_data()
    task.open_base()
    prepared = task.prepare()
    label_count = prepared.train.head_token_count
    parameters_per_rank, hidden_size, model_type = _read_base_sizes(config)
    advice = [
        _advise_rank(label_count, parameters_per_rank),
        _advise_rate(hidden_size, model_type, prepared.steps),
        *FIXED_ADVICE,
    ]
    return advice, prepared


def _advise_rank(label_count: int, parameters_per_rank: int) -> Advice:
    lowest_rank, highest_rank = RANK_LIMITS
    needed_rank = 2 ** math.ceil(math.log2(max(label_count / parameters_per_rank, 1)))
    rank = min(max(needed_rank, lowest_rank), highest_rank)
    reason = (
        f"{label_count:,} tokens are learnt, and a rank has {parameters_per_rank:,} numbers:"
        f" {rank * parameters_per_rank:,} "
    )
    reason += (
        "are at least as many"
        if needed_rank <= highest_rank
        else "are fewer, so training everything may learn more"
    )
    return Advice("rank", rank, reason, LORA_PRIMER)


def _advise_rate(hidden_size: int, model_type: str, steps: int) -> Advice:
    family = next((name for name in WIDTH_EXPONENTS if name in model_type), None)
    if family is None:
        rate, source = DEFAULT_RATE, LORA_WITHOUT_REGRET
        reason = f"ten times {DEFAULT_RATE / 10:g}, which is usual for training everything"
    else:
        rate, source = 10 * 5e-5 * (2000 / hidden_size) ** WIDTH_EXPONENTS[family], TINKER_COOKBOOK
        reason = (
            f"ten times the rate of training everything, as fitted to a {family} of width"
            f" {hidden_size:,}"
        )
    if steps <= SHORT_RUN_STEPS:
        rate *= SHORT_RUN_FACTOR
        if source != LORA_WITHOUT_REGRET:
            source = f"{source}; {LORA_WITHOUT_REGRET}"
        reason += f"; half as much again for a run of {steps} steps, since B begins at 0"
    return Advice("learning_rate", float(f"{rate:.2g}"), reason, source)


def _read_base_sizes(config: TrainConfig) -> tuple[int, int, str]:
    """(number of parameters of an adapter of rank 1 on all linear layers, hidden size, model type
    such as "llama") of the base, computed from its config alone, without weights."""
    import torch

    from veneer.config import LoraConfig
    from veneer.handle import attach
    from veneer.models.locate import config_of
    from veneer.models.meta import countable_model

    base_config = config_of(config.base)
    base_config = getattr(base_config, "text_config", None) or base_config
    model = countable_model(config.base, torch.bfloat16)
    parameters_per_rank = (
        attach(model, LoraConfig(rank=1, targets="all-linear")).summary().trainable
    )
    embedding: Any = model.get_input_embeddings()
    return parameters_per_rank, int(embedding.weight.shape[1]), str(base_config.model_type)


def apply_advice(config: TrainConfig, advice: Sequence[Advice]) -> TrainConfig:
    """`config` with the advised settings."""
    return make_config({**config.content(), **_values_by_setting(advice)})


def _values_by_setting(advice: Sequence[Advice]) -> dict[str, Any]:
    return {setting: value for setting, value, *_ in advice}


def try_out(
    config: TrainConfig, advice: Sequence[Advice], steps: int, folder: Path, **options: Any
) -> list[Advice] | None:
    """Improve the advised learning rate and rank by a sweep: train short runs with 1/3, 1 and 3
    times the advised rate, each with the advised rank and with a quarter of it, and replace the
    advice by the settings of the best run.

    Args:
        steps: the number of steps of the full run. The runs of the sweep take no more than that,
            and at most `TRIAL_STEPS`.
        folder: the output folder of the sweep.
        options: further arguments of `sweep`.

    Returns:
        The improved advice; None if the sweep was interrupted. Its checkpoint in `folder` then
        holds its state.
    """
    from veneer.train.sweep.sweep_run import sweep
    from veneer.train.sweep.sweep_settings import make_sweep

    advised_values = _values_by_setting(advice)
    rate, rank = advised_values["learning_rate"], advised_values["rank"]
    axes = {
        "learning_rate": [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)],
        "rank": list(dict.fromkeys([max(1, rank // 4), rank])),
    }
    steps = min(steps, TRIAL_STEPS)
    trial_config = apply_advice(config, advice).model_copy(
        update={"output": folder, "max_steps": steps}
    )
    result = sweep(trial_config, make_sweep({"axes": axes}), **options)
    if result.interrupted:
        return None
    sweep_facts = result.facts
    best_candidate = next(
        candidate
        for candidate in sweep_facts["candidates"]
        if candidate["name"] == sweep_facts["best"]
    )
    reason = (
        f"best of {len(sweep_facts['candidates'])} after {steps} steps,"
        f" loss {best_candidate['loss']:.4f}"
    )
    return [
        (
            Advice(
                entry.setting,
                best_candidate["changes"][entry.setting],
                f"{reason}; advised was {entry.value:g}",
                str(folder),
            )
            if entry.setting in best_candidate["changes"]
            else entry
        )
        for entry in advice
    ]


def as_yaml(config: TrainConfig, advice: Sequence[Advice]) -> str:
    """The YAML configuration of a run with the advised settings, and the reasons as comments."""
    import yaml

    default_values, advised_values = TrainConfig.defaults(), _values_by_setting(advice)
    settings = {
        name: value
        for name, value in config.content().items()
        if name not in advised_values
        and (name not in default_values or value != default_values[name])
    }
    lines = [yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()]
    for setting, value, reason, source in advice:
        line = yaml.safe_dump({setting: value}).rstrip()
        lines += ["", f"# {reason}", f"#   {source}", line]
    return "\n".join(lines) + "\n"
