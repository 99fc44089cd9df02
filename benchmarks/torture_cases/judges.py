"""The meaning of "right". Each judge takes a library and answers with a Result."""

from __future__ import annotations

import contextlib
import linecache
import logging
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from torture_cases.library import (
    CRASHES,
    REFUSES,
    RIGHT,
    UNCHECKED,
    WRONG,
    Adapter,
    Library,
    NotOffered,
    Result,
)

#: of outputs in float32, relative to the largest
NEAR = 1e-5
#: errors of a program that went wrong, however they are raised
BUGS = (AttributeError, LookupError, AssertionError, RecursionError)
#: a notice that names no fault: "already merged, nothing to do"
NOTICE = re.compile("nothing to do", re.IGNORECASE)


def shorten_text(text: object, length: int = 100) -> str:
    line = " ".join(re.sub(rf"{tempfile.gettempdir()}/\w+/", "", str(text)).split())
    return line if len(line) <= length else f"{line[:length]}…"


def describe_error(error: BaseException) -> str:
    """A one-line form of an error."""
    return f"{type(error).__name__}: {shorten_text(error)}".removesuffix(": ")


def is_refusal(error: BaseException) -> bool:
    """Whether a ``raise`` with a message ends in this error: of the library, or of a function that
    it hands the value to. An error from inside an operator is a crash, and so are BUGS."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return line.startswith("raise") and bool(str(error)) and not isinstance(error, BUGS)


def judge_error(error: Exception) -> Result:
    if isinstance(error, NotOffered):
        return Result(REFUSES, f"not offered: {error}")
    if is_refusal(error):
        return Result(REFUSES, describe_error(error))
    return Result(CRASHES, describe_error(error), got=describe_error(error), right="no error")


def distance(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference; infinite for values that are no numbers."""
    difference = first.detach().double() - second.detach().double()
    return difference.abs().nan_to_num(nan=float("inf")).max().item()


def add_noise(adapter: Adapter, size: float = 0.3) -> None:
    """Normal noise on all adapter parameters, so that nothing is hidden by a zero."""
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=size)


def attach_random(
    library: Library,
    model: nn.Module,
    targets: Sequence[str] | str,
    size: float = 0.3,
    **options: Any,
) -> Adapter:
    adapter = library.attach(model, targets, **options)
    adapter.prepare()
    add_noise(adapter, size)
    return adapter


def copy_weights(adapter: Adapter) -> dict[str, Tensor]:
    return {path: weight.detach().clone() for path, weight in adapter.weights().items()}


def base_error(adapter: Adapter, before: dict[str, Tensor]) -> float:
    """How far the base's weights are from their values before."""
    weights = adapter.weights()
    return max(
        distance(weights[path], weight) if path in weights else float("inf")
        for path, weight in before.items()
    )


def judge_base(adapter: Adapter, before: dict[str, Tensor]) -> Result:
    """The base has its very bits."""
    error = base_error(adapter, before)
    state = "is not finite" if error == float("inf") else f"is off by {error:.2g}"
    text = f"after unmerging, the base {state if error else 'has its very bits'}"
    return Result(WRONG if error else RIGHT, text, f"{error:.2g}", "0", {"off": error})


def judge_layer(
    library: Library,
    model: nn.Module,
    *inputs: Tensor,
    targets: Sequence[str] | str = ("layer",),
    **options: Any,
) -> Result:
    """An adapter attaches, changes the output, gets a gradient for all its parameters, gives the
    same output merged (with its own parameters at zero, so that only the weights can hold it), and
    leaves the base as it was after unmerging."""
    with torch.no_grad():
        base = model.eval()(*inputs)
    adapter = attach_random(library, model, targets, **options)
    parameters = adapter.parameters()
    if not parameters:
        return Result(UNCHECKED, "attaches nothing, without an error")
    output = adapter.model(*inputs)
    size, change = output.abs().max().item(), distance(output, base)
    if output.requires_grad:
        (output * torch.randn_like(output)).sum().backward()
    blind = sum(
        p.grad is None or not p.grad.abs().sum() > 0 or not p.grad.isfinite().all()
        for p in parameters
    )
    before = copy_weights(adapter)
    adapter.merge()
    values = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.zero_()
    merged = distance(output, adapter.model(*inputs))
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    adapter.unmerge()
    again, unmerged = distance(output, adapter.model(*inputs)), base_error(adapter, before)
    conditions = {
        f"no effect in forward (changes it by {change:.1g})": change < 1e-3 * size,
        f"no gradient for {blind} of {len(parameters)} adapter tensors": blind > 0,
        f"forward differs from merged by {merged:.2g} on outputs of {size:.2g}": (
            merged > NEAR * size
        ),
        f"forward after unmerging is off by {again:.2g}": again > NEAR * size,
        f"the base is off by {unmerged:.1g} after unmerging": unmerged > 1e-6,
    }
    problems = [text for text, is_problem in conditions.items() if is_problem]
    exact = f"to {unmerged:.0e}" if unmerged else "exactly"
    text = f"forward equals merged to {merged / size:.0e}, unmerging restores {exact}"
    return Result(
        WRONG if problems else RIGHT,
        "; ".join(problems) or text,
        f"{merged:.2g} between forward and merged",
        "0",
        {"blind": float(blind), "merged": merged / size, "unmerged": unmerged},
    )


def judge_refusal(action: Callable[[], object]) -> Result:
    """Bad input is refused, in any words."""
    try:
        action()
    except Exception as error:
        return judge_refused(error)
    return Result(UNCHECKED, "accepted", "accepted", "an error")


def judge_refused(error: Exception) -> Result:
    """An error that names the bad input is the right answer to it."""
    result = judge_error(error)
    offered = result.outcome == REFUSES and not isinstance(error, NotOffered)
    return Result(RIGHT, f"refused: {result.text}") if offered else result


@contextlib.contextmanager
def capture_warnings(library: Library) -> Iterator[list[str]]:
    """Collects the warnings of a library, through ``warnings`` or a logger; none is printed."""
    texts: list[str] = []

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and record.name.lower().startswith(library.package):
            texts.append(record.getMessage())

    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        mock.patch.object(logging.Logger, "handle", handle),
    ):
        try:
            yield texts
        finally:
            texts += [
                str(warning.message)
                for warning in caught
                if f"/{library.package}/" in warning.filename
                and not NOTICE.search(str(warning.message))
            ]


def count_misrounded(weight: Tensor, exact: Tensor) -> int:
    """How many values of a bfloat16 ``weight`` have a neighbour that is strictly closer to
    ``exact``, in float64."""
    steps = weight.detach().contiguous().view(torch.int16)
    closest = (weight.detach().double() - exact).abs()
    neighbours = [(steps + step).view(torch.bfloat16).double() for step in (-1, 1)]
    closer = [(neighbour - exact).abs() < closest for neighbour in neighbours]
    return int((closer[0] | closer[1]).sum())
