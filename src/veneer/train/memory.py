"""How much memory a run will take, before it takes it.

    weights      Σ base parameters · their bytes
    adapter      Σ trained parameters · (their bytes · 2 for value and gradient + optimiser state)
    activations  tokens · (layers · per layer + head)     what the backward pass needs of the forward pass

Per token and decoder layer with frozen weights (h hidden, m MLP width, b bytes an activation, r rank). Frozen linear
layers save no input of their own; the adapters on them do, and adapters on one input share it. Counted from what
autograd saves of a Llama block on the CPU, where it is exact (SmolLM2-135M, bf16: 19.8 MiB a layer for 864 tokens, by
formula and by count):

    two norms       2 · 4h                  the fp32 copy of their input
    attention       3h · b                  q, k, v, the latter two repeated to all heads
    MLP             3m · b                  gate, SiLU(gate), up
    adapters        (3h + m + 7r) · b       inputs of q/k/v, o, gate/up and down; what comes out of each A

The head: vocabulary · (b + 4 + 4) for each position with a label (logits, their fp32 copy, the log-probabilities). With
activation checkpointing a layer keeps h·b, and one layer at a time is held in full. Python, the kernels' own workspace
and the allocator's slack come on top: the estimate is good to about 30 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from veneer.attach.summary import size

STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 1, "lion": 1, "rmsprop": 1}  # numbers kept a parameter; Adam's is 2


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for."""

    weights: int
    adapter: int
    activations: int

    def __str__(self) -> str:
        total = self.weights + self.adapter + self.activations
        parts = f"base {size(self.weights)}, adapter with optimiser {size(self.adapter)}"
        return f"about {size(total)} ({parts}, activations {size(self.activations)})"


def estimate(model: Any, *, tokens: int, labelled: int, rank: int, optimiser: str, checkpointing: bool) -> Estimate:
    """What one step of `tokens` tokens (padding included) will hold, `labelled` of which carry a label."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = next((count for name, count in STATES.items() if name in optimiser.lower()), 2)
    adapter = sum(int(p.nbytes * (2 + states)) for p in trained)
    weights = sum(p.nbytes for p in frozen)
    config: Any = model.config.get_text_config()
    h, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if h is None or layers is None:  # not a transformer that describes itself; an honest floor is what remains
        return Estimate(weights, adapter, 0)
    b = frozen[0].element_size() if frozen else 4
    m = getattr(config, "intermediate_size", None) or 4 * h
    layer = 8 * h + b * (3 * h + 3 * m + 3 * h + m + 7 * rank)
    body = tokens * (layers * b * h + layer) if checkpointing else tokens * layers * layer
    return Estimate(weights, adapter, body + labelled * getattr(config, "vocab_size", 0) * (b + 8))


def peak() -> int:
    """The most memory held so far, in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
