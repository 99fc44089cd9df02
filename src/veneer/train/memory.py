"""How much memory a run will take, before it takes it.

    weights      Σ base parameters · their bytes
    adapter      Σ trained parameters · (their bytes · 2 for value and gradient + optimiser state)
    activations  tokens · (layers · per layer + head)     what the backward pass needs of the forward pass

Per token and decoder layer with frozen weights (h hidden, m MLP width, b bytes an activation, r rank). Frozen linear
layers save no input of their own; the adapters on them do, and adapters on one input share it. As autograd saves of a
Llama block on the CPU (SmolLM2-135M, bf16: 19.8 MiB a layer for 864 tokens, by formula and by count):

    two norms       2 · 4h                  the fp32 copy of their input
    attention       3h · b                  q, k, v, the latter two repeated to all heads
    MLP             3m · b                  gate, SiLU(gate), up
    adapters        (3h + m + 7r) · b       inputs of q/k/v, o, gate/up and down; what comes out of each A

The head: vocabulary · (b + 4 + 4) for each position with a label (logits, their fp32 copy, the log-probabilities). With
activation checkpointing a layer keeps h·b, and one layer at a time is held in full. Python, the kernels' own workspace
and the allocator's slack come on top: the estimate is good to about 30 %.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.attach.summary import size
from veneer.train.config import TrainConfig

STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 1, "lion": 1, "rmsprop": 1}  # numbers kept a parameter; Adam's is 2


def estimate(model: Any, config: TrainConfig, tokens: int, labelled: int) -> str:
    """What one step of `tokens` tokens (padding included) will hold, `labelled` of which carry a label; in words."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    weights, trained = sum(p.nbytes for p in frozen), sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = next((count for name, count in STATES.items() if name in config.optimiser.lower()), 2)
    shape, activations = model.config.get_text_config(), 0
    h, layers = getattr(shape, "hidden_size", None), getattr(shape, "num_hidden_layers", None)
    if h is not None and layers is not None:  # else no transformer that describes itself; an honest floor remains
        b = frozen[0].element_size() if frozen else 4
        m = getattr(shape, "intermediate_size", None) or 4 * h
        layer = 8 * h + b * (3 * h + 3 * m + 3 * h + m + 7 * config.rank)
        activations = tokens * (layers * b * h + layer if config.activation_checkpointing else layers * layer)
        activations += labelled * getattr(shape, "vocab_size", 0) * (b + 8)
    parts = {"base": weights, "adapter with optimiser": int(trained * (2 + states)), "activations": activations}
    return f"about {size(sum(parts.values()))} ({', '.join(f'{name} {size(parts[name])}' for name in parts)})"


def peak() -> int:
    """The most memory held so far, in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
