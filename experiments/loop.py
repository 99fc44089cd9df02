"""What all methods that are compared have in common: one training loop, one order of rows; and what
each method trains.

begin(model, "adapters", head=("classifier",))      now just the parameters of that method are trainable
train(trained(model), batches, loss, steps=300, rate=1e-3)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import veneer

METHODS = ("full", "head", "bias", "adapters", "lora")


def rise_and_fall(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate rises over the first `warmup` of the steps and then falls to 0, both linearly."""
    rise = max(1, round(warmup * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )


def train(
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    steps: int,
    rate: float,
    warmup: float = 0.1,
    groups: Sequence[dict[str, Any]] | None = None,
) -> float:
    """AdamW, the rate as in `rise_and_fall`, gradients clipped to a norm of 1. `groups`: AdamW's,
    where parameters have rates of their own. The mean loss of the last tenth of the steps."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(groups or trained, rate, weight_decay=0.0, fused=True)
    schedule = rise_and_fall(optimizer, steps, warmup)
    last = []
    for step, batch in enumerate(itertools.islice(batches, steps)):
        found = loss(batch)
        found.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= steps - max(1, steps // 10):
            last.append(found.item())
    return sum(last) / len(last)


def batches_of(
    count: int, size: int, seed: int, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Batches of `size` of `count` rows, epoch after epoch, without an end; the rows that fill none
    at the end of an epoch are left out of it. With `lengths`, rows of like length come together: 16
    batches that follow each other have the rows that chance gave them, but among themselves in the
    order of their lengths."""
    draw = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=draw).tolist()
        if lengths is not None:
            pools = [order[start : start + 16 * size] for start in range(0, count, 16 * size)]
            order = [row for pool in pools for row in sorted(pool, key=lengths.__getitem__)]
        whole = [order[start : start + size] for start in range(0, count - size + 1, size)]
        chosen = (
            torch.randperm(len(whole), generator=draw).tolist()
            if lengths is not None
            else range(len(whole))
        )
        yield from (whole[number] for number in chosen)


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))): Houlsby et al. 2019 (arXiv:1902.00751), section 2.1. `up` begins at 0,
    so that the model begins as its base."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def add_bottlenecks(model: nn.Module, inner: int, after: str = "output.dense") -> None:
    """A bottleneck behind each linear layer whose path ends with `after`, before the residual is
    added: those behind attention and behind the feed-forward part of a block of BERT."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(after):
            own = Bottleneck(module.out_features, inner)
            module.add_module("bottleneck", own)
            module.register_forward_hook(lambda module, inputs, output, own=own: own(output))


def begin(
    model: nn.Module,
    method: str,
    *,
    head: Sequence[str] = (),
    lora: veneer.LoraConfig | None = None,
    inner: int = 16,
    after: str = "output.dense",
) -> int:
    """Make trainable what `method` trains, and in each method the modules of `head`. How many
    numbers those are without the head's.

    `adapters`: bottlenecks of width `inner`, and the layer norms, as Houlsby et al. have it.
    `lora`: as the config says, whose `train_also` must name the head."""
    in_head = {
        id(own): own.numel() for path in head for own in model.get_submodule(path).parameters()
    }
    if method == "lora":
        veneer.attach(model, lora)
    else:
        if method == "adapters":
            add_bottlenecks(model, inner, after)
        norms = {
            id(own)
            for module in model.modules()
            if isinstance(module, nn.LayerNorm)
            for own in module.parameters()
        }
        for path, parameter in model.named_parameters():
            wanted = {
                "full": True,
                "head": False,
                "bias": path.endswith("bias"),
                "adapters": ".bottleneck." in path or id(parameter) in norms,
            }[method]
            parameter.requires_grad_(wanted or id(parameter) in in_head)
    return sum(parameter.numel() for parameter in trained(model)) - sum(in_head.values())


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
