"""The parts of `make gpu` that take time on the device: training steps, and decoding for rows with
different adapters.

Candidates take turns; a round is a call of each. The numbers are medians with quartiles, ratios are
to the floor of the same round: the frozen base. A candidate that cannot be built or runs out of
memory is a row that says so.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpu_models
from candidates import load_bank, peft_with, save_random, sharing, step
from gpu_place import Place, Skipped, import_library

ROWS, PROMPT, TOKENS, ADAPTERS = 16, 64, 32, 8
LEAST, MOST = 3, 15  # rounds


def first_line(problem: Exception) -> str:
    lines = [*str(problem).strip().splitlines(), ""]
    return f"{type(problem).__name__}: {lines[0]}"[:200]


def build_candidates(makes: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """(what could be built, why the others could not)."""
    candidates, why = {}, {}
    for name, make in makes.items():
        try:
            candidates[name] = make()
        except Skipped as reason:
            why[name] = str(reason)
        except Exception as problem:  # a peer's failure is a row of the result, as it stands
            why[name] = first_line(problem)
    return candidates, why


def rounds(
    target: Place, runs: Mapping[str, Callable[[], object]], until: float, repeats: int = 1
) -> tuple[dict[str, list[float]], dict[str, int | None], dict[str, str]]:
    """(seconds by round, peak bytes of a call, why a candidate fell out). The first call warms up,
    the second one is looked at for memory; the rounds end at ``until`` (``time.monotonic``), but
    not before the third."""
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        if time.monotonic() > until:
            failed[name] = "no time was left"
            continue
        try:
            run()
            peaks[name] = target.peak(run)
        except Exception as problem:
            failed[name] = first_line(problem)
        if not target.quick:
            gc.collect()  # what a candidate that fell out has left
            if target.kind == "cuda":
                torch.cuda.empty_cache()
    names = list(peaks)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(0 if not names else 1 if target.quick else MOST):
        if number >= LEAST and time.monotonic() > until:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(
                target.seconds(lambda name=name: [runs[name]() for _ in range(repeats)]) / repeats
            )
    return times, peaks, failed


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles, under the names of a row: ratio, low, high."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "ratio": round(statistics.median(ordered), digits),
        "low": round(ordered[quarter], digits),
        "high": round(ordered[-1 - quarter], digits),
    }


def table(
    times: dict[str, list[float]],
    peaks: dict[str, int | None],
    why: dict[str, str],
    floor: str,
    tokens: int,
) -> dict[str, Any]:
    """Rows of a case: ratio and seconds with quartiles, tokens a second, bytes; or why there is
    none."""
    rows: dict[str, Any] = {}
    for name, values in times.items():
        seconds = spread(values, 6)
        row: dict[str, Any] = {
            "seconds": seconds["ratio"],
            "seconds_low": seconds["low"],
            "seconds_high": seconds["high"],
            "tokens": round(tokens / seconds["ratio"], 1),
            "peak": peaks.get(name),
        }
        if floor in times:
            row |= spread(value / base for value, base in zip(values, times[floor], strict=True))
        rows[name] = row
    return {**rows, **{name: {"why": text} for name, text in why.items()}}


def compare(
    target: Place, makes: dict[str, Callable[[], Any]], until: float, tokens: int
) -> dict[str, Any]:
    """Build the candidates, of which the first is the floor, and measure them in rounds."""
    built, why = build_candidates(makes)
    times, peaks, failed = rounds(target, built, until)
    floor = next(iter(makes))
    return {
        "floor": floor,
        "runs": max(map(len, times.values()), default=0),
        "rows": table(times, peaks, why | failed, floor, tokens),
    }


def stepping(candidate: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A whole training step. The first one sees that all that trains has a gradient."""
    optimiser, checked = candidate.optimizer(), []

    def run() -> None:
        step(candidate, optimiser, batch)
        if not checked:
            without = sum(parameter.grad is None for parameter in candidate.parameters)
            if without:
                raise RuntimeError(
                    f"{without} of {len(candidate.parameters)} adapter parameters got no gradient"
                )
            checked.append(True)

    return run


def steps(
    target: Place, name: str, storage: str, candidates: Sequence[str], until: float
) -> dict[str, Any]:
    """A training step of each candidate on one model: forward, loss, backward, AdamW."""
    if storage == "nf4" and "moe" in name:
        raise Skipped("bitsandbytes has 4 bits for linear layers, and none for stacks of experts")
    torch.manual_seed(0)
    base = gpu_models.build(target, name, storage)
    batch_rows, length = gpu_models.QUICK if target.quick else gpu_models.BATCHES[name]
    ids = torch.randint(0, base.config.vocab_size, (batch_rows, length), device=target.device)
    batch = {"input_ids": ids, "labels": ids}
    setting = {"model": name, "storage": storage, "rows": batch_rows, "length": length}

    def build_step(label: str) -> Callable[[], None]:
        return stepping(gpu_models.CANDIDATES[label](base, name, target), batch)

    with warnings.catch_warnings(action="ignore"):
        makes = {label: partial(build_step, label) for label in candidates}
        return {"setting": setting, **compare(target, makes, until, batch_rows * length)}


# decoding


def _ours(
    target: Place, model: Any, prompts: list[list[int]], tokens: int
) -> Callable[[], list[list[int]]]:
    """The work of the server's engine: prompts, then a token for each row a step, the most likely
    one."""
    from veneer.models.decode.forward import Forward
    from veneer.models.decode.slots import Slots
    from veneer.serve.requests import Sampling
    from veneer.serve.sampling import Sampler, sample

    forward, length = Forward(model), len(prompts[0])

    def run() -> list[list[int]]:
        slots = Slots(len(prompts), length + tokens, target.device)
        samplers = [Sampler(Sampling(max_tokens=tokens, temperature=0.0)) for _ in prompts]
        with torch.inference_mode():
            rows: Any = [slots.allocate(length + tokens) for _ in prompts]
            answers = [_tokens(sample(forward.fill(slots, rows, prompts), samplers))]
            for number in range(tokens - 1):
                lengths = [length + number] * len(prompts)
                logits = forward.decode(slots, rows, answers[-1], lengths)
                answers.append(_tokens(sample(logits, samplers)))
        return [list(row) for row in zip(*answers, strict=True)]

    return run


def _tokens(chosen: Any) -> list[int]:
    return [int(getattr(choice, "token", choice)) for choice in chosen]


def _theirs(
    target: Place, base: Any, folder: Path, names: list[str], prompts: list[list[int]], tokens: int
) -> Any:
    """PEFT's adapter_names in transformers' generate."""
    import_library("peft")
    model: Any = peft_with(base, folder, names)
    ids = torch.tensor(prompts, device=target.device)
    rows = list(itertools.islice(itertools.cycle(names), len(prompts)))

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=rows,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                use_cache=True,
            )

    return run


def vllm_(
    target: Place, base: Any, folder: Path, names: list[str], prompts: list[list[int]], tokens: int
) -> Any:
    """vLLM with as many adapters, from the same folders; with CUDA graphs, as it comes."""
    vllm = import_library("vllm")
    from tests.support.tiny import tiny_tokenizer
    from vllm.lora.request import LoRARequest  # pyright: ignore

    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = vllm.LLM(
        str(folder / "base"),
        enable_lora=True,
        max_loras=len(names),
        max_lora_rank=gpu_models.RANK,
        dtype="bfloat16",
        max_model_len=PROMPT + TOKENS,
        gpu_memory_utilization=0.5,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [
        LoRARequest(name, number + 1, str(folder / name)) for number, name in enumerate(names)
    ]
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    rows = list(itertools.islice(itertools.cycle(requests), len(prompts)))
    return lambda: model.generate(inputs, sampling, lora_request=rows, use_tqdm=False)


def decode(target: Place, until: float, apart: bool = False) -> dict[str, Any]:
    """Prompts of 16 rows and their answers on SmolLM2-135M: the base, a bank of 8 adapters in mixed
    order, PEFT; or, in a process of its own, vLLM beside the bank."""

    torch.manual_seed(0)
    base = gpu_models.build(target, "smollm2-135m", "bf16").eval()
    prompt, tokens = (4, 3) if target.quick else (PROMPT, TOKENS)
    prompts = torch.randint(3, base.config.vocab_size, (ROWS, prompt)).tolist()
    with (
        tempfile.TemporaryDirectory() as name,
        warnings.catch_warnings(action="ignore"),
    ):
        folder = Path(name)
        names = save_random(base, folder, ADAPTERS)
        chosen = list(itertools.islice(itertools.cycle(names), ROWS))

        def with_bank() -> Any:
            bank = load_bank(base, folder, names)
            run = _ours(target, bank.model, prompts, tokens)

            def with_rows() -> Any:
                with bank.rows(chosen):
                    return run()

            return with_rows

        peer, create = ("vllm", vllm_) if apart else ("peft", _theirs)
        makes: dict[str, Callable[[], Any]] = {
            "base, Veneer's engine": lambda: _ours(target, sharing(base), prompts, tokens),
            "veneer, 8 adapters": with_bank,
            f"{peer}, 8 adapters": lambda: create(target, base, folder, names, prompts, tokens),
        }
        setting = {
            "model": "smollm2-135m",
            "rows": ROWS,
            "prompt": prompt,
            "tokens": tokens,
            "adapters": ADAPTERS,
        }
        return {"setting": setting, **compare(target, makes, until, ROWS * tokens)}
