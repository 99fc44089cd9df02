"""One training loop and one order of rows for all methods, and the parameters that each method
trains.

make_trainable(model, "adapters", head=("classifier",))
train(trainable(model), batches, loss, steps=300, rate=1e-3)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import veneer

METHODS = ("full", "head", "bias", "adapters", "lora")


def warmup_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate rises linearly over the first `warmup` of the steps, then falls linearly to 0."""
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
    """AdamW without weight decay, `warmup_schedule`, gradients clipped to a norm of 1. `groups` are
    those of AdamW, for parameters with rates of their own. Returns the mean loss of the last tenth
    of the steps."""
    parameters, losses = list(parameters), []
    optimizer = torch.optim.AdamW(groups or parameters, rate, weight_decay=0.0, fused=True)
    schedule = warmup_schedule(optimizer, steps, warmup)
    for batch in itertools.islice(batches, steps):
        batch_loss = loss(batch)
        batch_loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(batch_loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def draw_batches(
    count: int, size: int, seed: int, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Batches of `size` of `count` rows, epoch after epoch, without an end. The rows that fill no
    batch at the end of an epoch are left out of it. With `lengths`, rows of like length share a
    batch: chance draws pools of 16 batches, and each pool is sorted by length."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        if lengths is not None:
            pools = [order[start : start + 16 * size] for start in range(0, count, 16 * size)]
            order = [row for pool in pools for row in sorted(pool, key=lengths.__getitem__)]
        batches = [order[start : start + size] for start in range(0, count - size + 1, size)]
        if lengths is not None:
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[number] for number in shuffled]
        yield from batches


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))): Houlsby et al. 2019 (arXiv:1902.00751), section 2.1. `up` starts at 0,
    so that the model starts as its base."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def add_bottlenecks(model: nn.Module, inner: int, suffix: str = "output.dense") -> None:
    """Add a bottleneck behind each linear layer whose path ends with `suffix`, before the residual
    is added: in a block of BERT, behind attention and behind the feed-forward layers."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(suffix):
            bottleneck = Bottleneck(module.out_features, inner)
            module.add_module("bottleneck", bottleneck)
            module.register_forward_hook(
                lambda module, inputs, output, bottleneck=bottleneck: bottleneck(output)
            )


def make_trainable(
    model: nn.Module,
    method: str,
    *,
    head: Sequence[str] = (),
    lora: veneer.LoraConfig | None = None,
    inner: int = 16,
) -> int:
    """Make the parameters of a method trainable, and with every method the modules of `head`.
    Returns their count without the head's.

    `adapters`: bottlenecks of width `inner` and the layer norms, as Houlsby et al. train them.
    `lora`: by its config, whose `train_also` must name the head."""
    head_sizes = {
        id(parameter): parameter.numel()
        for path in head
        for parameter in model.get_submodule(path).parameters()
    }
    if method == "lora":
        veneer.attach(model, lora)
    else:
        if method == "adapters":
            add_bottlenecks(model, inner)
        norms = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.LayerNorm)
            for parameter in module.parameters()
        }
        for path, parameter in model.named_parameters():
            trains = {
                "full": True,
                "head": False,
                "bias": path.endswith("bias"),
                "adapters": ".bottleneck." in path or id(parameter) in norms,
            }[method]
            parameter.requires_grad_(trains or id(parameter) in head_sizes)
    count = sum(parameter.numel() for parameter in trainable(model))
    return count - sum(head_sizes.values())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
