"""How much memory a run will take, before it takes it.

    weights      Σ base weights · their bytes; packed ones as they lie: nf4 takes 0.516 bytes a number, int8 1 + 4 / in
    unpacked     the largest packed weight in the dtype of the products: one at a time is unpacked for its product
    adapter      Σ trained parameters · (their bytes · 2 for value and gradient) + optimiser state
    activations  tokens · (layers · per layer + head)     what the backward pass needs of the forward pass

An optimiser in 8 bits keeps a byte for each state of a number and a float32 scale for 256 of them; of a tensor with
fewer than 4,096 numbers it keeps float32 (bitsandbytes, and torchao in the parameter's dtype). A paged one keeps as
much, which a GPU that runs out moves to main memory. Offloaded activations lie in main memory, all but one layer's.

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

import re
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import state_of
from veneer.attach.summary import size
from veneer.bases import storage_of
from veneer.train.config import TrainConfig

#: numbers kept a parameter, by a part of the optimiser's name; Adam's is 2
STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3}
#: numbers that share a scale, and from how many on a tensor's state has few bits
BLOCK, FEW = {8: 256, 4: 128}, 4096


def estimate(model: Any, config: TrainConfig, tokens: int, labelled: int) -> str:
    """What one step of `tokens` tokens (padding included) will hold, `labelled` of which carry a label; in words."""
    parts, elsewhere = predict(model, config, tokens, labelled)
    text = f"about {size(sum(parts.values()))} ({', '.join(f'{name} {size(parts[name])}' for name in parts)})"
    return f"{text}, and activations of {size(elsewhere)} in main memory" if config.offload_activations else text


def predict(model: Any, config: TrainConfig, tokens: int, labelled: int) -> tuple[dict[str, int], int]:
    """Bytes by what holds them, and those of the activations that wait in main memory. Arguments as `estimate`."""
    base, unpacked = weights(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {"base": base, **({"one weight unpacked": unpacked} if unpacked else {})}
    parts["adapter with optimiser"] = round(sum(2 * p.nbytes + states(p, config.optimiser) for p in trained))
    parts["activations"] = offloaded = 0
    shape = model.config.get_text_config()
    h, layers = getattr(shape, "hidden_size", None), getattr(shape, "num_hidden_layers", None)
    if h is not None and layers is not None:  # else no transformer that describes itself; an honest floor remains
        b = model.dtype.itemsize
        m = getattr(shape, "intermediate_size", None) or 4 * h
        layer = tokens * (8 * h + b * (3 * h + 3 * m + 3 * h + m + 7 * config.rank))
        head = labelled * getattr(shape, "vocab_size", 0) * (b + 8)
        every = layers * tokens * b * h if config.activation_checkpointing else layers * layer
        at_once = layer if config.activation_checkpointing or config.offload_activations else 0
        offloaded = every if config.offload_activations else 0
        parts["activations"] = every - offloaded + at_once + head
    return parts, offloaded


def weights(model: nn.Module) -> tuple[int, int]:
    """(bytes of the frozen weights as they lie, scales included; bytes of the largest packed one as its layer unpacks
    it)."""
    total, largest, seen = 0, 0, set[int]()
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is None or weight.requires_grad or id(weight) in seen:
                continue
            seen.add(id(weight))
            storage: Any = storage_of(weight)
            if storage is None or storage.name == "plain":
                total += weight.nbytes
                continue
            storage.prepare(module)
            try:
                total += sum(tensor.nbytes for tensor in storage.stored(weight).values())
            finally:
                if state_of(module) is None:
                    storage.release(module)
            dtype = getattr(model, "dtype", torch.float32)
            largest = max(largest, storage.shape(weight).numel() * dtype.itemsize)
    return total, largest


def states(parameter: Tensor, optimiser: str) -> float:
    """Bytes that an optimiser of this name keeps for a parameter."""
    name, numbers = optimiser.lower(), parameter.numel()
    count = next((count for part, count in STATES.items() if part in name), 2)
    few = re.search(r"(?<!\d)([48])bit", name)
    if few is not None and numbers >= FEW:
        bits = int(few[1])
        return count * (numbers * bits / 8 + 4 * -(-numbers // BLOCK[bits]))
    library = few is not None or "32bit" in name or "bnb" in name  # bitsandbytes keeps float32 of all others
    return count * numbers * (4 if library and "torch" not in name else parameter.element_size())


def peak() -> int:
    """The most memory held so far, in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
