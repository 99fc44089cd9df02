"""Veneer beside an earlier commit of itself, whose checkout $BEFORE names.

A process imports one of the two trees, prepares the work and waits for its turn."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import runner
from runner import Arms, Case

OURS = "veneer"
#: begins the name of the arm of an earlier commit; the commit follows
EARLIER = "veneer at "


def earlier_arms() -> list[str]:
    """The arm of the commit whose tree $BEFORE names, if it names one."""
    if "BEFORE" not in os.environ:
        return []
    done = subprocess.run(
        ["git", "-C", os.environ["BEFORE"], "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"Found: BEFORE={os.environ['BEFORE']} ({done.stderr.strip()}). Expected: a checkout "
            "of an earlier commit. Do: git worktree add FOLDER COMMIT, and name that folder"
        )
    return [EARLIER + done.stdout.strip()]


#: the arm of the earlier commit; without $BEFORE nothing runs it
FLOOR = next(iter(earlier_arms()), "veneer before")


def prepare_work(
    work: str,
    folder: Path,
    dtype: str = "bfloat16",
    layers: int = 0,
    tokens: int = 0,
    tiny: bool = False,
) -> Callable[[], object]:
    """The work, as a call that does it once. Imports what both trees have alone."""
    import torch

    import veneer
    from candidates import load_bank, make, save_random, text, training_step
    from cases.calls import (
        CODE,
        ROWS,
        call_in_bank,
        decode_with_cache,
        frozen_llama,
        without_gradients,
    )
    from cases.files import write_checkpoint

    torch.manual_seed(0)
    if work == "import":
        return lambda: subprocess.run([sys.executable, "-c", CODE["veneer"]], check=True)
    if work == "merge":
        from veneer.tools.merge_checkpoint import merge_checkpoint

        write_checkpoint(folder, *((0.002, 128) if tiny else (0.375, 2048)), seed=0)

        def merge() -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            merge_checkpoint(folder / "base", [folder / "a0"], folder / "out", rounding="nearest")

        return merge
    if work == "rollouts":
        return prepare_rollouts(dtype, tokens, tiny)
    base = frozen_llama(layers, dtype, tiny)
    if work == "training step":
        return training_step(make("veneer", base.train(), "llama", 8), text(base, tokens))
    if work == "forward":
        ids = torch.randint(0, base.config.vocab_size, (1, tokens))
        veneer.attach(base, veneer.LoraConfig(rank=8, alpha=16))
        return without_gradients(lambda: base(ids, logits_to_keep=1))
    names = save_random(base, folder, 8)
    bank = load_bank(base, folder, names)
    choice = [names[row % len(names)] for row in range(ROWS)]
    return without_gradients(call_in_bank(bank, choice, decode_with_cache(bank.model, tokens)))


def prepare_rollouts(dtype: str, tokens: int, tiny: bool) -> Callable[[], object]:
    """The answers of a step of GRPO, as in the case ``rollouts``, drawn as this tree draws them."""
    import veneer
    from candidates import ALPHA
    from cases.rollouts import generate_as_veneer, load_policy

    model, tokenizer, prompts = load_policy(0, dtype, 2, 2, tiny)
    veneer.attach(model, veneer.LoraConfig(rank=8, alpha=ALPHA))
    generate, seeds = generate_as_veneer(model, tokenizer, tokens), itertools.count()
    return lambda: generate(prompts, next(seeds))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def answer_turns(setting: str) -> None:
    """Do the work once for each line of standard input, and answer each with its CPU seconds."""
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        unit = prepare_work(**json.loads(setting), folder=Path(folder))
        print(json.dumps("ready"), file=sys.__stdout__, flush=True)
        for _ in sys.stdin:
            before = cpu_seconds()
            unit()
            print(json.dumps(cpu_seconds() - before), file=sys.__stdout__, flush=True)


def earlier_comparison(stack: contextlib.ExitStack, seed: int, **setting: Any) -> Arms:
    def start(tree: Path) -> subprocess.Popen[str]:
        sources = [tree / "src", runner.ROOT / "benchmarks", runner.ROOT]
        process = subprocess.Popen(
            [sys.executable, "-m", "cases.earlier", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources))},
        )
        stack.enter_context(process)
        stack.callback(process.terminate)
        return process

    def answer(process: subprocess.Popen[str]) -> Any:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(
                f"{setting['work']}: a process ended with {process.wait()}; see its errors"
            )
        return json.loads(line)

    def run(process: subprocess.Popen[str]) -> dict[str, float]:
        print("once", file=process.stdin, flush=True)
        return {"cpu": answer(process)}

    processes = {FLOOR: start(Path(os.environ["BEFORE"])), OURS: start(runner.ROOT)}
    for process in processes.values():
        answer(process)
    return {name: partial(run, process) for name, process in processes.items()}


def missing() -> str | None:
    return None if "BEFORE" in os.environ else "the checkout of an earlier commit in $BEFORE"


STEP = {"work": "training step", "layers": 6, "tokens": 1024}
FORWARD = {"work": "forward", "layers": 6, "tokens": 256}
MIXED = {"work": "16 rows, 8 adapters", "layers": 6, "tokens": 64}

EARLIER_COMMIT = Case(
    "earlier",
    "The same work by this commit and by an earlier one ($BEFORE names its checkout): six layers "
    "of SmolLM2-135M's shape, a plain loop.",
    "the same script, libraries, weights and rank 8 on all linear layers; a step of 4 × 256 tokens "
    "with AdamW (fused), a forward pass of 256 tokens, a token of each of 16 rows that use 8 "
    "adapters on transformers' cache, merging an adapter into 0.4 GiB on disk, and a fresh "
    "interpreter that imports what attaching needs",
    FLOOR,
    [
        *(
            {"threads": "default", "dtype": dtype, **work}
            for work in (STEP, FORWARD, MIXED)
            for dtype in ("float32", "bfloat16")
        ),
        *({"threads": 1, "dtype": "bfloat16", **work} for work in (STEP, FORWARD, MIXED)),
        {"threads": "default", "work": "merge"},
        {"threads": "default", "work": "import"},
    ],
    earlier_comparison,
    {"tiny": True, "layers": 1, "tokens": 4},
    rounds=3,
    minutes=11.5,
    group="earlier",
    lacks=missing,
)
ROLLOUTS_EARLIER = Case(
    "rollouts_earlier",
    "The answers of a step of GRPO by this commit and by an earlier one ($BEFORE names its "
    "checkout), which called transformers' generate.",
    "the same script, libraries, base (SmolLM2-135M), prompts and seeds: 8 answers to each of 2 "
    "word problems, of up to 48 tokens; each commit draws them in its own way",
    FLOOR,
    [
        {"threads": "default", "work": "rollouts", "dtype": dtype, "tokens": 48}
        for dtype in ("float32", "bfloat16")
    ],
    earlier_comparison,
    {"tiny": True, "tokens": 4},
    rounds=2,
    minutes=10,
    group="earlier",
    lacks=missing,
)
CASES = (EARLIER_COMMIT, ROLLOUTS_EARLIER)

if __name__ == "__main__":
    answer_turns(sys.argv[1])
