"""The answers of a step of GRPO: 8 to each prompt, drawn from a model with the adapter that
trains."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

import veneer
from candidates import ALPHA, DTYPES, llama, sharing, with_peft
from cases.files import BASE
from runner import Arms, Case

ANSWERS = 8
SYSTEM = (
    "You solve word problems. Write the calculation, then the result behind four number signs, and "
    "nothing else."
)
NAMES = ("Ada", "Ben", "Chloe", "Dan", "Emma", "Finn", "Grace", "Hugo")
PROBLEMS = (
    ("{0} has {2} apples and buys {3} more. {0} gives {4} of them to {1}. How many are left?",
     "{2} + {3} - {4} = {5} #### {5}"),
    ("{0} reads {2} pages on Monday and {3} on Tuesday. {1} reads {4} pages less than {0} in all. "
     "How many pages does {1} read?", "{2} + {3} - {4} = {5} #### {5}"),
)  # fmt: skip


def write_chat(draw: random.Random, examples: int) -> list[dict[str, str]]:
    """A word problem, behind examples with their answers."""
    messages = [{"role": "system", "content": SYSTEM}]
    for _ in range(examples + 1):
        problem, answer = draw.choice(PROBLEMS)
        first, second, less = draw.randint(11, 60), draw.randint(11, 60), draw.randint(2, 10)
        words = *draw.sample(NAMES, 2), first, second, less, first + second - less
        messages.append({"role": "user", "content": problem.format(*words)})
        messages.append({"role": "assistant", "content": answer.format(*words)})
    return messages[:-1]


def load_policy(
    seed: int, dtype: str, prompts: int, examples: int, tiny: bool
) -> tuple[Any, Any, list[list[int]]]:
    """A base, its tokenizer, and the ids of prompts, each `ANSWERS` times."""
    draw = random.Random(seed)
    if tiny:
        torch.manual_seed(seed)
        base: Any = llama(1, 0, tiny, use_cache=True).to(DTYPES[dtype])
        tokenizer: Any = SimpleNamespace(eos_token_id=2, pad_token_id=0)
        ids = [[draw.randrange(3, 96) for _ in range(8)] for _ in range(prompts)]
    else:
        from veneer import models
        from veneer.train.generate import encode

        loaded = models.load_base(BASE, precision={"float32": "fp32", "bfloat16": "bf16"}[dtype])
        base, tokenizer = loaded.model, loaded.tokenizer
        ids = [encode(write_chat(draw, examples), tokenizer) for _ in range(prompts)]
    return base.requires_grad_(False), tokenizer, [prompt for prompt in ids for _ in range(ANSWERS)]


def generate_as_veneer(
    model: Any, tokenizer: Any, tokens: int, **options: Any
) -> Callable[..., list[list[int]]]:
    from veneer.train.generate import continuations

    return lambda encoded, seed: continuations(
        model.train(),
        tokenizer,
        encoded,
        max_new_tokens=tokens,
        temperature=1.0,
        batch_size=len(encoded),
        seed=seed,
        **options,
    )


def generate_as_trl(model: Any, tokenizer: Any, tokens: int) -> Callable[..., list[list[int]]]:
    """The call of ``GRPOTrainer._generate_single_turn`` with neither vLLM nor continuous batching,
    and the configuration that the trainer makes of its defaults."""
    from transformers import GenerationConfig
    from trl.trainer.utils import pad

    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        cache_implementation=None,
        disable_compile=True,
    )

    @torch.no_grad()
    def generate(encoded: Sequence[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        rows = [torch.tensor(ids) for ids in encoded]
        inputs = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(ids) for ids in rows], padding_value=0, padding_side="left")
        new = model.generate(input_ids=inputs, attention_mask=mask, generation_config=config)
        end = tokenizer.eos_token_id
        answers = new[:, inputs.shape[1] :].tolist()
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in answers]

    return generate


def rollouts_arms(
    stack: Any, seed: int, dtype: str, prompts: int, examples: int, tokens: int, tiny: bool = False
) -> Arms:
    base, tokenizer, encoded = load_policy(seed, dtype, prompts, examples, tiny)
    model = sharing(base)
    veneer.attach(model, veneer.LoraConfig(rank=8, alpha=ALPHA))
    peft = with_peft(
        sharing(base),
        narrow=dtype != "float32",
        r=8,
        lora_alpha=ALPHA,
        target_modules="all-linear",
    )

    def arm(generate: Callable[..., list[list[int]]]) -> Callable[[], dict[str, float]]:
        seeds = itertools.count(1000 * seed)  # the same ones for every arm, new ones each time

        def run() -> dict[str, float]:
            answers = generate(encoded, next(seeds))
            assert len(answers) == len(encoded)
            return {"tokens": sum(map(len, answers)) / len(answers)}

        return run

    return {
        "transformers, generate": arm(
            generate_as_veneer(model, tokenizer, tokens, rollouts="generate")
        ),
        "trl": arm(generate_as_trl(peft.train(), tokenizer, tokens)),
        "veneer, engine": arm(generate_as_veneer(model, tokenizer, tokens, rollouts="engine")),
    }


ROLLOUTS = Case(
    "rollouts",
    "The answers of a step of GRPO with SmolLM2-135M: 8 to each of 2 word problems, of up to 48 "
    "tokens, with two worked examples before each.",
    "the same base, prompts, limits and temperature, rank 8 on all linear layers; transformers' "
    "generate is what Veneer called before, and draws the same answers as the engine in fp32; trl "
    "is the call of its GRPOTrainer, with PEFT",
    "transformers, generate",
    [
        {"threads": "default", "dtype": dtype, "prompts": 2, "examples": 2, "tokens": 48}
        for dtype in DTYPES
    ],
    rollouts_arms,
    {"tiny": True, "tokens": 6},
    shown={"wall": ("wall time", "ratio"), "tokens": ("tokens of an answer", ".1f")},
    rounds=2,
    group="tasks",
    minutes=8,
)
CASES = (ROLLOUTS,)
