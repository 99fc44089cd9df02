"""Does rank 1 suffice for reinforcement learning?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import small, smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, grouped, table

REWARD = Path(__file__).resolve().parent.parent / "examples" / "rewards.py"
RANKS, RATES, STEPS, WORDS = (1, 8, 32), (1e-3, 3e-3), 80, 32
#: a gain of reward that is no chance
LEAST = 0.01
ABOUT = f"""
"LoRA Without Regret" (Schulman et al. 2025) finds that for policy gradients rank 1 does as well as full fine-tuning, as
an episode tells about one bit. Here it is rank 1 beside higher ranks, with `veneer train`, task grpo (Shao et al. 2024,
[arXiv:2402.03300](https://arxiv.org/abs/2402.03300)): letters → phonemes by reward alone, which is how much of an
answer is the dictionary's (`examples/rewards.py:close`, 0 to 1). SmolLM2 is too dear for this grid here, so the base is
a small Llama of ours (0.45 million numbers, float32) that was trained from nothing on the words to train on, for 100
steps of 64 of them: it knows what an answer is, and has much to learn.

All runs: adapters on all linear layers, alpha 16 (so that the scale is 16 / rank), {STEPS} steps of 8 answers to
{WORDS} words, cosine after 5 % of warm-up. The rate of each rank is the better one of two, by the reward over 300
held-out words that do not judge; the table is of 500 others, answered by chance as in training (temperature 1), since
that is what policy gradients raise. Decided before the run: it holds if rank 1 gains at least 90 % of the best rank's
gain over the base; if none gains {LEAST}, nothing can be told.

A first run, of 40 steps of 8 words at 3e-4 and 1e-3, judged greedily, was of no use: no rank gained (-0.003 to -0.005).
With rank 8 and a seed of its own, 60 steps of 8 words then gained 0.015 by chance at 1e-3, 0.005 at 5e-3, and 80 steps
of 32 words 0.045 at 2e-3; steps, words and rates are from these.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [{"smoke": True, "rank": 1, "rate": 1e-2, "seeds": 1, "steps": 2, "words": 8}]
    settings = {"seeds": 2, "steps": STEPS, "words": WORDS}
    return [{"rank": rank, "rate": rate, **settings} for rank in RANKS for rate in RATES]


def run(cell: Cell) -> dict[str, Any]:
    from veneer import models
    from veneer.train.config import make_config
    from veneer.train.run import fit

    found: dict[str, Any] = {"rewards": [], "choosing": []}
    with smollm2.place(cell) as (folder, _):
        learnt, choosing, judging = smollm2.words(cell)
        base = small.base(learnt, folder / "small", steps=1 if cell.get("smoke") else 100)
        rows = folder / "train.jsonl"
        lines = [
            json.dumps({"prompt": word.prompt, "phonemes": word.completion}) for word in learnt
        ]
        rows.write_text("\n".join(lines) + "\n")
        settings = {
            "task": "grpo",
            "base": base,
            "data": str(rows),
            "reward": [f"{REWARD}:close"],
            "answers": 8,
        }
        settings |= {"answer_tokens": 12, "rank": cell["rank"], "alpha": 16}
        settings |= {
            "learning_rate": cell["rate"],
            "schedule": "cosine",
            "warmup": 0.05,
            "batch_size": cell["words"],
        }
        settings |= {"max_steps": cell["steps"], "save_every": cell["steps"], "precision": "fp32"}
        plain = models.load_base(base, precision="fp32")
        found["base"] = _reward(plain.model, plain.tokenizer, judging)
        for seed in range(cell["seeds"]):
            result = fit(
                make_config({**settings, "seed": seed, "output": folder / f"run-{seed}"}),
                quiet=True,
            )
            found["rewards"].append(_reward(result.model, result.tokenizer, judging))
            found["choosing"].append(_reward(result.model, result.tokenizer, choosing))
            found["trainable"] = result.metrics["trainable_parameters"]
    return found


def _reward(model: Any, tokenizer: Any, words: Sequence[Any]) -> float:
    from examples.rewards import close

    from veneer.train.generate import generate

    prompts = [word.prompt for word in words]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=12, batch_size=100, temperature=1.0, seed=0
    )
    return statistics.mean(close(answers, [word.completion for word in words]))


def _best(runs: Sequence[Run]) -> list[Run]:
    """Of each rank the rate with the highest reward over the words that choose."""
    return [
        max(own, key=lambda run: statistics.mean(run["choosing"]))
        for own in grouped(runs, "rank").values()
    ]


def tables(runs: Sequence[Run]) -> str:
    best, rows = _best(runs), []
    for run in runs:
        rewards = [
            statistics.mean(run["rewards"]),
            statistics.stdev(run["rewards"]) if len(run["rewards"]) > 1 else 0.0,
        ]
        chosen = (
            f"{statistics.mean(run['choosing']):.3f}{' (the better rate)' if run in best else ''}"
        )
        told = "{:.3f} ± {:.3f}".format(*rewards)
        rows.append(
            (
                run["rank"],
                f"{run['rate']:g}",
                f"{run['trainable']:,}",
                chosen,
                told,
                f"{run['cpu']:.0f} s",
            )
        )
    seeds = (
        f"Mean ± deviation over {runs[0]['seeds']} seeds, which the CPU time is of. "
        f"The base: {runs[0]['base']:.3f}."
    )
    head = ("rank", "rate", "numbers trained", "reward, choosing", "reward, judging", "CPU time")
    return f"{table(head, rows)}\n\n{seeds}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    gains = {run["rank"]: statistics.mean(run["rewards"]) - run["base"] for run in _best(runs)}
    least, most = gains[min(gains)], max(gains.values())
    found = ", ".join(f"rank {rank}: {gain:+.3f}" for rank, gain in gains.items())
    source = "[Schulman et al. 2025](https://thinkingmachines.ai/blog/lora)"
    held = least >= 0.9 * most if most >= LEAST else None
    return [
        Claim(
            "rank 1 suffices for reinforcement learning",
            source,
            f"gain of reward over the base: {found}",
            held,
        )
    ]


EXPERIMENT = Experiment(
    title="The rank that reinforcement learning needs", about=ABOUT, cells=cells, run=run, tables=tables,
    claims=claims, full=("rank-for-rl.yaml",), data=smollm2.lacking,
)  # fmt: skip
