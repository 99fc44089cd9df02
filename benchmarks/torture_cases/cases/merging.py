"""Merging: exact, atomic, and back to the very bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from torture_cases.cases._case import case
from torture_cases.judges import (
    bits,
    noise,
    off,
    randomise,
    said,
    state,
    wrongly_rounded,
)
from torture_cases.library import Adapter, Library, Result
from torture_cases.models import Holder, Stack

DRIFT = "bf16 base: merge + unmerge 1 / 100 / 1000 times"


@case(
    DRIFT, merge_once={"times": 1}, merge_100_times={"times": 100}, merge_1000_times={"times": 1000}
)
def drift(library: Library, times: int) -> Result:
    adapter = library.attach(Holder(nn.Linear(32, 32)).bfloat16(), ["layer"])
    randomise(adapter, 0.05)
    before = bits(adapter)
    for _ in range(times):
        adapter.merge()
        adapter.unmerge()
    error = off(adapter, before)
    return Result(error == 0, f"the base {state(error)}", {"off": error})


SAFE = "safe merge rounds twice; is not atomic"


@case(SAFE)
def merge_rounds_once(library: Library) -> Result:
    model = Holder(nn.Linear(128, 128)).bfloat16()
    exact = model.layer.weight.detach().double()
    adapter = library.attach(model, ["layer"])
    randomise(adapter, 0.1)
    exact = exact + adapter.delta("layer")
    adapter.merge(safe=True)
    wrong = wrongly_rounded(adapter.weights()["layer.weight"], exact)
    share = wrong / exact.numel()
    return Result(
        wrong == 0, f"{share:.1%} of the weights are not correctly rounded", {"wrong": float(wrong)}
    )


def poisoned(
    library: Library, dtype: torch.dtype, poison: Callable[[list[nn.Parameter]], object]
) -> Adapter:
    adapter = library.attach(Stack(2).to(dtype), ["linear"])
    randomise(adapter)
    poison(adapter.parameters())
    return adapter


@case(SAFE)
def merge_is_atomic(library: Library) -> Result:
    adapter = poisoned(
        library,
        torch.float32,
        lambda parameters: parameters[-1].data.view(-1)[0].fill_(float("nan")),
    )
    before = bits(adapter)
    try:
        adapter.merge(safe=True)
    except library.refusal as error:
        changed = [
            path
            for path, weight in adapter.weights().items()
            if not torch.equal(weight, before[path])
        ]
        text = f"refused ({said(error)}); {', '.join(changed) or 'nothing'} merged"
        return Result(not changed, text, {"changed": float(len(changed))})
    return Result(False, "a NaN in layer 2 is merged without an error")


NOT_FINITE = "NaN or fp16 overflow without safe merge"


@case(
    NOT_FINITE,
    merge_of_nan={"dtype": torch.float32, "value": float("nan")},
    merge_that_overflows_fp16={"dtype": torch.float16, "value": 3e4},
)
def merge_not_finite(library: Library, dtype: torch.dtype, value: float) -> Result:
    adapter = poisoned(
        library, dtype, lambda parameters: [p.data.fill_(value) for p in parameters[-2:]]
    )
    before = bits(adapter)
    try:
        adapter.merge()
    except library.refusal as error:
        return Result(
            off(adapter, before) == 0, f"refused: {said(error)}", {"off": off(adapter, before)}
        )
    adapter.unmerge()
    return Result(
        False, f"merged without an error; after unmerging, the base {state(off(adapter, before))}"
    )


EDITED = "weights edited while merged, then unmerge"


@case(EDITED)
def adapter_edited_while_merged(library: Library) -> Result:
    adapter = library.attach(Holder(nn.Linear(16, 16)), ["layer"])
    randomise(adapter)

    before = bits(adapter)
    adapter.merge()
    noise(adapter)
    adapter.unmerge()
    error = off(adapter, before)
    return Result(error == 0, f"after unmerging, the base {state(error)}", {"off": error})


@case(EDITED)
def base_edited_while_merged(library: Library) -> Result:
    """Either the edit survives unmerging, or unmerging is refused."""
    adapter = library.attach(Holder(nn.Linear(16, 16)), ["layer"])
    randomise(adapter)
    before = bits(adapter)["layer.weight"]
    adapter.merge()
    adapter.weights()["layer.weight"].data[0, 0] += 1
    try:
        adapter.unmerge()
    except library.refusal as error:
        return Result(True, f"refused: {said(error)}")
    kept = (adapter.weights()["layer.weight"] - before)[0, 0].item()
    lost = abs(kept - 1) > 1e-5
    return Result(not lost, "the edit is lost, silently" if lost else "the edit is kept")
