"""What "right" means. Each judge takes a library and answers with a Result."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from torture_cases.library import Adapter, Library, NotOffered, Result

#: of outputs in float32, relative to the largest
NEAR = 1e-5


def said(error: BaseException) -> str:
    """A one-line form of an error."""
    line = " ".join(re.sub(rf"{tempfile.gettempdir()}/\w+/", "", str(error)).split())
    return f"{type(error).__name__}{': ' if line else ''}{line[:90]}{'…' if len(line) > 90 else ''}"


def distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where either is not a number."""
    difference = (one.detach().double() - other.detach().double()).abs()
    return difference.nan_to_num(nan=float("inf")).max().item()


def noise(adapter: Adapter, size: float = 0.3) -> None:
    """Normal noise on all trained numbers, so that nothing is hidden by a zero."""
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=size)


def randomise(adapter: Adapter, size: float = 0.3) -> None:
    """Noise on all trained numbers, and the model ready to be called."""
    adapter.ready()
    noise(adapter, size)


def bits(adapter: Adapter) -> dict[str, Tensor]:
    return {path: weight.detach().clone() for path, weight in adapter.weights().items()}


def off(adapter: Adapter, before: dict[str, Tensor]) -> float:
    """How far the base's weights are from what they were."""
    now = adapter.weights()
    return max(
        distance(now[path], weight) if path in now else float("inf")
        for path, weight in before.items()
    )


def state(error: float) -> str:
    """In words, a base that is off by ``error``."""
    if error == 0:
        return "has its very bits"
    return "is not finite" if error == float("inf") else f"is off by {error:.2g}"


def sound(
    library: Library,
    model: nn.Module,
    *inputs: Tensor,
    targets: Sequence[str] | str = ("layer",),
    rank: int = 2,
    **options: Any,
) -> Result:
    """An adapter attaches, changes the output, gets a gradient for all its numbers, gives the same
    output merged (when its own numbers are zero, to be sure that it is the weights that hold it),
    and leaves the base as it was after unmerging."""
    with torch.no_grad():
        base = model.eval()(*inputs)
    try:
        adapter = library.attach(model, targets, rank=rank, **options)
    except NotOffered:
        raise
    except library.refusal as error:
        return Result(False, f"refused: {said(error)}")
    randomise(adapter)
    parameters = adapter.parameters()
    if not parameters:
        return Result(False, "attaches nothing, without an error")
    output = adapter.model(*inputs)
    size, problems = output.abs().max().item(), []
    if output.requires_grad:
        (output * torch.randn_like(output)).sum().backward()
    change = distance(output, base)
    if change < 1e-3 * size:
        problems.append(f"no effect in forward (changes it by {change:.1g})")
    blind = sum(
        p.grad is None or not p.grad.abs().sum() > 0 or not p.grad.isfinite().all()
        for p in parameters
    )
    if blind:
        problems.append(f"no gradient for {blind} of {len(parameters)} trained tensors")
    measures, before = {"change": change / size, "blind": float(blind)}, bits(adapter)
    try:
        adapter.merge()
        numbers = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.zero_()
        differs = distance(output, adapter.model(*inputs))
        for parameter, number in zip(parameters, numbers, strict=True):
            parameter.data.copy_(number)
        measures["merged"] = differs / size
        if measures["merged"] > NEAR:
            problems.append(
                f"forward differs from merged by {differs:.2g} on outputs of {size:.2g}"
            )
        adapter.unmerge()
        measures["again"] = distance(output, adapter.model(*inputs)) / size
        if measures["again"] > NEAR:
            problems.append(f"forward after unmerging is off by {measures['again'] * size:.2g}")
        measures["unmerged"] = off(adapter, before)
        if measures["unmerged"] > 1e-6:
            problems.append(f"the base is off by {measures['unmerged']:.1g} after unmerging")
    except Exception as error:
        problems.append(f"cannot merge: {said(error)}")
    if problems:
        return Result(False, "; ".join(problems), measures)
    exact = f"to {measures['unmerged']:.0e}" if measures["unmerged"] else "exactly"
    return Result(
        True,
        f"forward equals merged to {measures['merged']:.0e}, unmerging restores {exact}",
        measures,
    )


def refused(library: Library, action: Callable[[], object]) -> Result:
    """The library raises an error of its own instead of accepting."""
    with heard() as warned:
        try:
            action()
        except NotOffered:
            raise
        except library.refusal as error:
            return Result(True, f"refused: {said(error)}")
    return Result(False, "accepted, with a warning" if warned else "accepted silently")


@contextlib.contextmanager
def heard() -> Iterator[list[object]]:
    """Collects what is warned of, through ``warnings`` or a logger, and keeps it off the screen."""
    loud: list[object] = []

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            loud.append(record)

    with (
        warnings.catch_warnings(record=True) as warned,
        mock.patch.object(logging.Logger, "handle", handle),
    ):
        warnings.simplefilter("always")
        yield loud
        loud += warned


def wrongly_rounded(weight: Tensor, exact: Tensor) -> int:
    """How many values of a bfloat16 ``weight`` have a neighbour that is strictly closer to
    ``exact``, in float64."""
    steps = weight.detach().contiguous().view(torch.int16)
    closest = (weight.detach().double() - exact).abs()
    neighbours = [(steps + step).view(torch.bfloat16).double() for step in (-1, 1)]
    closer = [(neighbour - exact).abs() < closest for neighbour in neighbours]
    return int((closer[0] | closer[1]).sum())


def calls(action: Callable[[], object]) -> int:
    """How many functions ``action`` calls: a cost that no other process disturbs."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count
