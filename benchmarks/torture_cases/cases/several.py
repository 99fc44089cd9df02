"""Several adapters on one model: combined, mixed in a batch, in threads, compiled, and many of
them."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torture_cases.cases._case import case
from torture_cases.judges import (
    NEAR,
    calls,
    distance,
    randomise,
    refused,
    said,
)
from torture_cases.library import Adapter, Library, NotOffered, Result, Selection
from torture_cases.models import Holder, Stack

WEIGHTED = "add_weighted_adapter with rsLoRA"
#: on which so many adapters are
LAYERS = 64


def several(
    library: Library, model: nn.Module, names: Sequence[str], targets=("linear",), **options: Any
) -> Adapter:
    """Adapters ``names`` on one model, with noise in each; the last is returned."""
    for name in names:
        adapter = library.attach(model, targets, name=name, **options)
        randomise(adapter)
        model = adapter.model
    return adapter


@case(
    WEIGHTED,
    weighted_rslora_cat={"how": "cat"},
    weighted_rslora_svd={"how": "svd"},
    weighted_dora={"how": "cat", "variant": "dora"},
)
def weighted(library: Library, how: str, variant: str = "rslora") -> Result:
    """A weighted sum of two adapters changes the output by the weighted sum of their changes."""
    model, x = Holder(nn.Linear(16, 16)), torch.randn(5, 16)
    adapter = several(library, model, ["one", "two"], ["layer"], variant=variant, rank=4)
    with torch.no_grad():
        outputs = {
            name: library.call(adapter.model, x, name).double() for name in ("one", "two", None)
        }
        try:
            combined = library.combine(adapter, ["one", "two"], [0.7, 0.4], how, "sum")
        except NotOffered:
            raise
        except library.refusal as error:  # right for DoRA, where no adapter is the sum of two
            return Result(variant == "dora", f"refused: {said(error)}")
        change = library.call(combined.model, x, "sum").double() - outputs[None]
    expected = 0.7 * (outputs["one"] - outputs[None]) + 0.4 * (outputs["two"] - outputs[None])
    error = (change - expected).norm().item() / expected.norm().item()
    ratio = change.norm().item() / expected.norm().item()
    return Result(
        error < NEAR,
        f"off by {error:.2g}; {ratio:.2f} times as large as it should be",
        {"off": error},
    )


@case(WEIGHTED)
def weighted_under_an_existing_name(library: Library) -> Result:
    adapter = several(library, Holder(nn.Linear(16, 16)), ["one", "two"], ["layer"])
    return refused(
        library, lambda: library.combine(adapter, ["one", "two"], [0.7, 0.4], "cat", "one")
    )


@case("exception during a mixed batch")
def exception_during_a_mixed_batch(library: Library) -> Result:
    adapter = several(library, Stack(), ["one", "two"])
    model, x, rows = adapter.model, torch.randn(3, 16), ["one", None, "two"]
    with torch.no_grad():
        alone = [library.call(model, x, name) for name in rows]
        mixed = library.call(model, x, rows)
        rowwise = max(distance(mixed[row], output[row]) for row, output in enumerate(alone))
        with contextlib.suppress(ArithmeticError):
            library.call(model, torch.full_like(x, float("nan")), rows)
        after = distance(library.call(model, x, "one"), alone[0])
    text = f"rows are off by {rowwise:.0e}; the next plain call after an exception by {after:.2g}"
    return Result(max(rowwise, after) < NEAR, text, {"rows": rowwise, "after": after})


THREADS = "two threads with adapter_names / set_adapter"


@case(
    THREADS,
    two_threads_one_adapter_each={"selections": ["one", "two"]},
    two_threads_mixed_batches={"selections": [["one", None, "two"], ["two", "one", None]]},
)
def threads(library: Library, selections: Sequence[Selection], each: int = 300) -> Result:
    adapter = several(library, Stack(4), ["one", "two"])
    model, x, wrong = adapter.model, torch.randn(3, 16), []
    with torch.no_grad():
        expected = [library.call(model, x, selection) for selection in selections]
    barrier = threading.Barrier(len(selections))

    def work(selection: Selection, output: Tensor) -> None:
        barrier.wait()
        for _ in range(each):
            try:
                with torch.no_grad():
                    right = distance(library.call(model, x, selection), output) < NEAR
            except Exception:  # a thread's exception would be lost
                right = False
            if not right:
                wrong.append(selection)

    workers = [
        threading.Thread(target=work, args=pair) for pair in zip(selections, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total = each * len(selections)
    return Result(
        not wrong, f"{len(wrong)} of {total} results are wrong", {"wrong": float(len(wrong))}
    )


@case("switching 12 adapters under torch.compile")
def twelve_adapters_compiled(library: Library) -> Result:
    """All outputs right, no recompile limit hit, and a second round that compiles nothing."""
    names, x = ["one", *(f"n{number}" for number in range(1, 12))], torch.randn(3, 16)
    adapter = several(library, Stack(), names)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example: Any):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled, rounds, error = torch.compile(adapter.model, backend=backend), [], 0.0
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        warnings.simplefilter("ignore")  # torch.compile's own deprecations
        expected = [library.call(adapter.model, x, name) for name in names]
        for _ in range(2):
            for name, output in zip(names, expected, strict=True):
                try:
                    error = max(
                        error, distance(library.call(adapter.model, x, name, compiled), output)
                    )
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    return Result(
                        False, f"hits the recompile limit at adapter {name}, after {graphs} graphs"
                    )
            rounds.append(graphs)
    text = f"{rounds[0]} graphs for 12 adapters, {rounds[1] - rounds[0]} more in a second round; off by {error:.0e}"
    return Result(
        error < NEAR and rounds[0] == rounds[1], text, {"graphs": float(rounds[0]), "off": error}
    )


@case("128th adapter on 64 layers")
def adapter_128_on_64_layers(library: Library) -> Result:
    """Judged by function calls, which no other process disturbs; the times are told beside them."""
    first = calls(lambda: library.attach(Stack(LAYERS, 8), ["linear"]))
    model, times = Stack(LAYERS, 8), []
    for number in range(127):
        start = time.perf_counter()
        adapter = library.attach(model, ["linear"], name=f"n{number}" if number else "one")
        times.append(time.perf_counter() - start)
        model = adapter.model
    last = calls(lambda: library.attach(model, ["linear"], name="last"))
    text = f"{last / first:.2f} times the calls of the first; {times[0] * 1e3:.0f} ms, then {times[-1] * 1e3:.0f} ms"
    return Result(last < 1.5 * first, text, {"calls": last / first})
