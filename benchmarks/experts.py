"""A mixture of experts with adapters on all experts: one token, and one training step. The base, Veneer and PEFT. CPU
time of one thread, in interleaved rounds.

Qwen3-MoE's shape at a small size: 4 layers of width 512, 64 experts of 256, 4 of them for each token; rank 8 on both
stacks of all layers, with transformers' own choice of how experts are computed. A token is a call without gradients and
without cache. A step is forward with the model's loss, and backward, of 2 × 256 tokens; that of the base carries the
gradient to the embedded input, as any step over a frozen base must. "bf16 adapters" is PEFT with
autocast_adapter_dtype=False.

    python benchmarks/experts.py
    python benchmarks/experts.py --implementation eager --out FOLDER

Predicted: one token 1.25 (fp32) and 1.3 (bf16), a step 1.10 and 1.18; PEFT 30 and more for a token, as it forms W + ΔW
of all experts, and 2.5 for a step.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import veneer
from candidates import ALPHA, DTYPES
from report import measure, show, write

STACKS = ("gate_up_proj", "down_proj")
TOKENS = (2, 256)


def build(tiny: bool) -> Any:
    width, experts = (32, 4) if tiny else (512, 64)
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, intermediate_size=2 * width, moe_intermediate_size=width // 2, num_experts=experts,
        num_experts_per_tok=2 if tiny else 4, num_hidden_layers=1 if tiny else 4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=width // 8, vocab_size=4096, decoder_sparse_step=1,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def with_peft(model: Any, narrow: bool) -> Any:
    targets = [f"mlp.experts.{name}" for name in STACKS]
    config = peft.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, autocast_adapter_dtype=not narrow).eval()


def models(dtype: torch.dtype, implementation: str | None, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    base = build(tiny).to(dtype)
    if implementation is not None:
        base.set_experts_implementation(implementation)
    made = {"base": base, "veneer": copy.deepcopy(base), "peft": with_peft(copy.deepcopy(base), False)}
    config = veneer.LoraConfig(rank=8, alpha=ALPHA, targets=[f"experts.{name}" for name in STACKS])
    veneer.attach(made["veneer"], config)
    if dtype is not torch.float32:
        made["peft, bf16 adapters"] = with_peft(copy.deepcopy(base), True)
    return made


def token(model: Any, ids: torch.Tensor, repeats: int) -> float:
    with torch.no_grad():
        start = time.process_time()
        for _ in range(repeats):
            model(input_ids=ids, use_cache=False)
        return (time.process_time() - start) / repeats


def step(model: Any, ids: torch.Tensor) -> float:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    start = time.process_time()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    return time.process_time() - start


def case(dtype: str, implementation: str | None, runs: int, tiny: bool) -> list[dict[str, Any]]:
    made = models(DTYPES[dtype], implementation, tiny)
    one, many = torch.randint(0, 4096, (1, 1)), torch.randint(0, 4096, (2, 16) if tiny else TOKENS)
    tokens = {name: lambda m=model: token(m, one, 1 if tiny else 3) for name, model in made.items()}
    steps = {name: lambda m=model: step(m, many) for name, model in made.items()}
    setting = {"dtype": dtype, **({} if implementation is None else {"implementation": implementation})}
    return [
        measure(tokens, floor="base", runs=3 * runs, call="one token", **setting),
        measure(steps, floor="base", runs=runs, call="a step", **setting),
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--implementation", choices=("eager", "batched_mm", "grouped_mm"))
    parser.add_argument("--runs", type=int, default=9, help="rounds of steps; three times as many of a token")
    parser.add_argument("--tiny", action="store_true", help="a toy's size")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [one for dtype in options.dtype for one in case(dtype, options.implementation, options.runs, options.tiny)]
    for one in cases:
        show("experts", one)
    usual = (options.dtype, options.implementation, options.tiny) == (list(DTYPES), None, False)
    if options.out is None and not usual:
        return {"name": "experts", "cases": cases}
    return write("experts", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
