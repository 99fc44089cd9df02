"""One training step on SmolLM2-135M's shape: floor, full fine-tuning, PEFT, Veneer; fp32 and bf16. CPU time of one
thread.

The floor is what any step over a frozen base must do: forward, and the gradient carried back to the embedding's
output. AdamW steps count.
Predicted: full 1.45, PEFT 1.2 (fp32) and 1.3 (bf16), Veneer 1.15 and 1.1.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import peft
import torch
import transformers

import veneer
from report import compare

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def candidates(layers: int, dtype: torch.dtype) -> dict[str, tuple[torch.nn.Module, list[torch.nn.Parameter]]]:
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(dtype)
    floor, full, ours, theirs, lean = (copy.deepcopy(base) for _ in range(5))
    floor.requires_grad_(False)
    handle = veneer.attach(ours, veneer.LoraConfig(rank=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=8, target_modules="all-linear")
        default = peft.get_peft_model(theirs, config)
        low = peft.get_peft_model(lean, config, autocast_adapter_dtype=False)
    models = {
        "floor": (floor, []),
        "full fine-tuning": (full, list(full.parameters())),
        "veneer": (ours, handle.parameters()),
        "peft": (default, [p for p in default.parameters() if p.requires_grad]),
    }
    if dtype != torch.float32:
        models["peft, bf16 adapters"] = (low, [p for p in low.parameters() if p.requires_grad])
    return models


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, ids: torch.Tensor) -> float:
    start = time.process_time()
    if optimizer is None:  # the floor: a gradient with respect to the embedded input is carried through every layer
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # pyright: ignore[reportCallIssue]
        model(inputs_embeds=embedded, labels=ids).loss.backward()
    else:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return time.process_time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="30 is the whole model; 8 shows the same ratios sooner")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        ids = torch.randint(0, SHAPE["vocab_size"], (4, 256))
        made = candidates(options.layers, dtype)
        optimizers = {n: torch.optim.AdamW(ps, lr=1e-4, fused=True) if ps else None for n, (_, ps) in made.items()}
        calls = {n: lambda n=n: step(made[n][0], optimizers[n], ids) for n in made}  # noqa: B023
        compare(f"train_step_{str(dtype).removeprefix('torch.')}", calls, floor="floor", runs=options.runs)
