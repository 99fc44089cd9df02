"""Results beside float64: what the checks of `make gpu` share.

``CHECKS`` maps a name to a function of a ``Place``, which returns what it saw in a few words and
raises ``Wrong`` or ``Skipped``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tests.support import moe
from tests.support.tiny import tiny_model
from tests.support.toys import bits, error, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import veneer
from gpu_place import Place, Watch, no_watch

Check = Callable[[Place], str]
CHECKS: dict[str, Check] = {}
# : relative errors that a dtype may bring, of outputs; gradients may have ten times as much, of the
# largest one
WITHIN = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}
IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))


class Wrong(AssertionError):  # noqa: N818 (no error of the program)
    """Another result than in float64."""


def same_bits(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """``Wrong`` unless the base holds what ``bits`` copied before a merge."""
    if any(not torch.equal(one, before[name]) for name, one in bits(model).items()):
        raise Wrong("unmerged: other bits than before")


def check(name: str) -> Callable[[Check], Check]:
    def add(run: Check) -> Check:
        CHECKS[name] = run
        return run

    return add


def on(device: Any, tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda one: one.detach().to(device), tree)


def wide(tree: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor,
        lambda one: one.detach().cpu().double() if one.is_floating_point() else one.detach().cpu(),
        tree,
    )


def exact(model: Any) -> Any:
    """A copy in float64 on the processor."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(wide(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = wide(buffer)
    made = copy.deepcopy(model, copies).cpu().double()
    if hasattr(made, "set_experts_implementation"):
        moe.set_way(made, "eager")  # grouped products have no float64
    return made


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: cuDNN rounds the inputs of convolutions to 10 bits unless it is
    told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    products, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before, products


def near(what: str, found: Tensor, wanted: Tensor, within: float) -> None:
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}")
    off = error(found.detach().cpu(), wanted.detach().cpu())
    if not off <= within:  # nor is nan
        raise Wrong(f"{what}: off by {off:.1e}, {within:.0e} is allowed")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def near_gradients(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], within: float
) -> None:
    """All of them, each to a part of the largest."""
    if found.keys() != wanted.keys():
        raise Wrong(f"gradients of other parameters: {sorted(found.keys() ^ wanted.keys())[:4]}")
    largest = max((float(one.norm()) for one in wanted.values()), default=0.0)
    for name, one in wanted.items():
        off = float((found[name].detach().cpu().double() - one).norm())
        if not off <= 10 * within * largest:
            raise Wrong(f"gradient of {name}: off by {off / (largest or 1):.1e} of the largest")


def learn(
    model: Any, run: Callable[[Any], Tensor], watch: Watch = no_watch
) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradients of its mean square)."""
    if watch is not no_watch:
        run(model)  # the first call finds out what later ones know
    model.zero_grad(set_to_none=True)
    with watch("forward"):
        y = run(model)
    loss = (y.float() if y.itemsize < 4 else y).square().mean()
    with watch("backward"):
        loss.backward()
    return y, gradients(model)


def against_float64(
    place: Place,
    model: Any,
    inputs: Any,
    run: Callable[[Any, Any], Tensor],
    within: float,
    case: str = "",
) -> None:
    """The outputs and gradients of an adapted model beside those of its definition."""
    definition = exact(model)
    with veneer.use(definition, "default", path="materialised"):
        wanted, wanted_gradients = learn(definition, lambda one: run(one, wide(inputs)))
    found, found_gradients = learn(model, lambda one: run(one, inputs), named(place, case))
    near("output", found, wanted, within)
    near_gradients(found_gradients, wanted_gradients, within)


def named(place: Place, case: str) -> Watch:
    """The watch of one case of several."""
    return (lambda operation: place.watch(f"{case}-{operation}")) if case else place.watch


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def llama(
    place: Place,
    dtype: torch.dtype = torch.float32,
    name: str = "default",
    layers: int = 2,
    **config: Any,
):
    """(a small Llama on the device with a random adapter, its handle)."""
    model = tiny_model(num_hidden_layers=layers).to(dtype).to(place.device)
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=4, **{"targets": "all-linear", **config}), name=name
    )
    randomise(handle, 0.1)
    return model.train(), handle
