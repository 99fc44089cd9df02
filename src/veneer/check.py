"""Prove on a live model that every attached adapter is seen: reached in train and in eval mode, and given a
gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.adapted import own_class
from veneer.attach import adapters, need_group, only_name, unwrap
from veneer.errors import CheckError, raise_all, sentence
from veneer.select import use


@dataclass(frozen=True)
class CheckReport:
    """Which layers were proven to be seen."""

    adapter: str
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"adapter {self.adapter!r}: all {len(self.layers)} layers change the output and receive a gradient"


def check(model: nn.Module, example: Any, name: str | None = None) -> CheckReport:
    """Run ``example`` through ``model`` and prove that each of the adapter's layers is part of what comes out.

    A layer can be passed by without an error: a fused fast path in eval mode, a weight that is read directly, a
    module that this kind of input never reaches. So one pass without gradients in eval mode must reach each layer
    (that is where fast paths are taken), and one with gradients must give each a non-zero, finite gradient. The
    model's modes, gradients and random state are restored.

    Args:
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        name: the adapter; None takes the only one.

    Raises:
        CheckError: names every layer that is not seen, and how.
    """
    model = unwrap(model)
    name = only_name(model, name)
    if need_group(model).merged is not None:
        found = f"{need_group(model).merged!r} merged into the weights, where no adapter runs"
        raise CheckError(sentence(found, "an unmerged model", "call veneer.unmerge(model) first"))
    args, kwargs = _arguments(example)
    parts = [entry for entry in adapters(model, name) if any(True for _ in entry[2].parameters())]
    modes = {module: module.training for module in model.modules()}
    trainable = {p: p.requires_grad for _, _, part in parts for p in part.parameters()}
    with torch.random.fork_rng(), use(model, name):
        try:
            reached: set[int] = set()
            with context.changed(reached=reached), torch.no_grad():
                model.eval()(*args, **kwargs)
            for parameter in trainable:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                output = model(*args, **kwargs)
                total = sum((_weighted(tensor) for tensor in _floats(output)), torch.zeros(()))
            gradients = _gradients(total, list(trainable))
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
    problems = []
    for path, module, part in parts:
        where = f"{path!r} ({own_class(module).__name__})"
        found = [gradients[p] for p in part.parameters() if gradients[p] is not None]
        if id(part) not in reached:
            problem = f"{where} is not reached in eval mode"
        elif not any(gradient.abs().sum() > 0 for gradient in found):
            problem = f"{where} receives no gradient"
        elif not all(gradient.isfinite().all() for gradient in found):
            problem = f"{where} receives a gradient that is not finite"
        else:
            continue
        problems.append(
            sentence(problem, "a layer that the output depends on", "exclude it, or give an example that reaches it")
        )
    raise_all(CheckError, f"The output does not see all of adapter {name!r}", problems)
    return CheckReport(name, tuple(path for path, _, _ in parts))


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple) else ((example,), {})


def _floats(value: Any):
    """Every floating-point tensor with a gradient in an output of nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.requires_grad:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _weighted(tensor: Tensor) -> Tensor:
    """A random projection to a scalar: a plain sum is constant after a softmax or a layer norm, and would hide a
    gradient."""
    return (tensor.float() * torch.randn(tensor.shape, device=tensor.device)).sum().cpu()


def _gradients(total: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
    if not total.requires_grad:
        return dict.fromkeys(parameters)
    return dict(zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
