"""Why the server has an engine of its own: tokens per CPU-second of one thread on SmolLM2-135M's shape, 16 rows, beside
transformers' `generate` with its cache (the floor) and transformers' continuous batching (`generate_batch`), on one
base without adapters. In interleaved rounds.

    python benchmarks/engine.py
    python benchmarks/engine.py --dtype float32 --runs 3 --out FOLDER

Prefill is 16 prompts of 128 tokens up to the first answer's token of each; decode, the steps behind them while all rows
run: taken between the steps where these can be seen, and as the difference of a long and a short run of
`generate_batch`, which has a thread of its own. Its manager is made once, outside of what is measured. The engine's
steps hold all that it does in them: scheduling, sampling, text, delivery.

Predicted: decode 1.3 × the rate of `generate` in float32 (no copy of the cache a token) and 1.5 × in bfloat16; the
same rate in prefill; twice the rate of `generate_batch`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from candidates import DTYPES, llama, sharing
from candidates import options as options_of
from report import measure, show, write

ROWS, PROMPT, STEPS = 16, 128, 16
FLOOR = "transformers, generate"


class Stamp:
    """A logits processor that notes when each step is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.times.append(time.process_time())
        return scores


def generate(model: Any, prompts: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of `generate`: up to the first token, and a step behind it."""

    def stamps(steps: int) -> tuple[float, list[float]]:
        stamp, start = Stamp(), time.process_time()
        with torch.inference_mode():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=steps, min_new_tokens=steps,
                do_sample=False, pad_token_id=0, logits_processor=[stamp],
            )  # fmt: skip
        return start, stamp.times

    def prefill() -> float:
        start, times = stamps(1)
        return times[0] - start

    def decode() -> float:
        _, times = stamps(STEPS + 1)
        return (times[-1] - times[0]) / STEPS

    return {"prefill": prefill, "decode": decode}


def batching(model: Any, prompts: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of `generate_batch`, whose steps are the difference of two runs."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = GenerationConfig(max_new_tokens=STEPS + 1, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(steps: int) -> float:
        paged = ContinuousBatchingConfig(
            page_size=32, num_blocks=256, max_batch_tokens=512, allow_block_sharing=False, use_cuda_graph=False
        )
        start = time.process_time()
        made = model.generate_batch(
            prompts.tolist(), generation_config=config, continuous_batching_config=paged, persistent_manager=True,
            max_new_tokens=steps,
        )  # fmt: skip
        spent = time.process_time() - start
        if [len(one.generated_tokens) for one in made.values()] != [steps] * len(prompts):
            raise RuntimeError("generate_batch did not answer all requests")
        return spent

    run(STEPS + 1)
    return {"prefill": lambda: run(1), "decode": lambda: (run(STEPS + 1) - run(1)) / STEPS}


def ours(model: Any, prompts: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of the engine, stepped by hand."""
    from veneer.serve.engine import Engine
    from veneer.serve.requests import Request, Sampling

    engine = Engine(model, Plain(), rows=len(prompts), length=PROMPT + 4 * STEPS)

    def submit(tokens: int) -> list[Any]:
        pieces: list[Any] = []
        sampling = Sampling(tokens, temperature=0.0, ignore_eos=True)
        for ids in prompts.tolist():
            engine.submit(Request(tuple(ids), {}, sampling, 600, ""), pieces.append)
        return pieces

    @torch.inference_mode()
    def prefill() -> float:
        submit(1)
        start = time.process_time()
        while engine.waiting or engine.running:
            engine.step()
        return time.process_time() - start

    @torch.inference_mode()
    def decode() -> float:
        submit(2 * STEPS)  # the first ones are some steps ahead when the last one is there
        while engine.running < len(prompts):
            engine.step()
        start = time.process_time()
        for _ in range(STEPS):
            engine.step()
        spent = time.process_time() - start
        if engine.running != len(prompts):
            raise RuntimeError("rows left before the steps were over")
        while engine.running:
            engine.step()
        return spent / STEPS

    return {"prefill": prefill, "decode": decode}


class Plain:
    """A tokenizer: each token is a letter."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(97 + id % 26) for id in ids)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    parser = options_of(__doc__, layers=30, runs=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for dtype in options.dtype:
        torch.manual_seed(0)
        base = llama(options.layers, 0, options.tiny, use_cache=True).to(DTYPES[dtype]).eval().requires_grad_(False)
        prompts = torch.randint(0, base.config.vocab_size, (ROWS, PROMPT))
        made = {
            FLOOR: generate(sharing(base), prompts),
            "transformers, continuous batching": batching(paged := sharing(base), prompts),
            "veneer": ours(sharing(base), prompts),
        }
        for phase, tokens in (("prefill", ROWS * PROMPT), ("decode", ROWS)):
            setting = {"dtype": dtype, "phase": phase, "rows": ROWS, "layers": options.layers}
            runs = {name: phases[phase] for name, phases in made.items()}
            case = measure(runs, floor=FLOOR, runs=options.runs, **setting)
            for row in case["rows"].values():
                row["rate"] = round(tokens / row["seconds"], 1)  # tokens per CPU-second
            show("engine", case)
            print(
                "  tokens per CPU-second: " + ", ".join(f"{name} {row['rate']}" for name, row in case["rows"].items())
            )
            cases.append(case)
        paged.destroy_cached_continuous_batching_manager()  # pyright: ignore[reportCallIssue]
    result = {"cases": cases}
    if options.out is None and (options.dtype, options.layers, options.tiny) != (list(DTYPES), 30, False):
        return {"name": "engine", **result}
    return write("engine", result, options.out)


if __name__ == "__main__":
    main()
