"""A forward pass without gradients: base (the floor), adapted, merged, and PEFT's adapted, on SmolLM2-135M's shape.

CPU time of one thread. Predicted: merged 1.00; adapted 1.15 for one token and 1.03 for 256; PEFT above both.
"""

from __future__ import annotations

import copy
import time
import warnings

import peft
import torch
import transformers

import veneer
from report import compare

CONFIG = transformers.LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(CONFIG).eval()
    adapted, merged, theirs = (copy.deepcopy(base) for _ in range(3))
    veneer.attach(adapted, veneer.LoraConfig(rank=8))
    veneer.attach(merged, veneer.LoraConfig(rank=8)).merge(keep=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules="all-linear")).eval()
    return {"base": base, "veneer merged": merged, "veneer adapted": adapted, "peft adapted": theirs}


def timed(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> float:
    with torch.inference_mode():
        start = time.process_time()
        for _ in range(repeats):
            model(ids, logits_to_keep=1)
        return (time.process_time() - start) / repeats


if __name__ == "__main__":
    torch.set_num_threads(1)
    candidates = models()
    for tokens, repeats in ((1, 5), (256, 1)):
        ids = torch.randint(0, CONFIG.vocab_size, (1, tokens))
        calls = {name: lambda model=model: timed(model, ids, repeats) for name, model in candidates.items()}  # noqa: B023
        compare(f"forward_{tokens}", calls, floor="base", runs=9)
