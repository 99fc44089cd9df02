"""Find out what each trainer does with an adapter of Veneer and of PEFT, by training runs.

`docs/trainers.md` shows the results; `python -m scripts.trainers` repeats the runs.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tests.support import adapter_libraries as libraries
from tests.support.adapter_libraries import (
    PEFT,
    VENEER,
    Library,
    attach_adapter,
    load_model,
    outputs,
    same,
    size,
    trained,
)
from tests.support.trainers import HALF, HEADS, RUNS, STEPS, Outcome, Run, write_bases

YES, NOT_OFFERED = "yes", "not offered by the trainer"
#: allowed ratio of checkpoint sizes; they differ by names and the metadata of a library
LARGEST = 1.1


class Case:
    """The adapter of one library in one trainer. Each method fills a cell of the table. The main
    run is made once, when the first method needs it."""

    def __init__(self, library: Library, run: Run, bases: Path, folder: Path) -> None:
        self.library, self.run, self.bases, self.folder = library, run, bases, folder

    def model(self, seed: int) -> Any:
        return attach_adapter(self.library, self.bases, self.run, seed)

    def train(self, model: Any, name: str, **options: Any) -> Outcome:
        options.setdefault("integration", self.library.integration(self.run))
        return self.run.train(model, self.folder / name, **options)

    @cached_property
    def first(self) -> tuple[Any, Outcome]:
        """(the model, the outcome) of an uninterrupted run."""
        model = self.model(1)
        self.before = trained(model), libraries.frozen(model)
        return model, self.train(model, "first")

    def checkpoint(self, step: int) -> Path:
        _ = self.first
        return self.folder / "first" / self.run.checkpoint.format(step)

    def alone(self) -> str:
        """Whether training changed every B, and no bit of the base."""
        model, _ = self.first
        numbers, base = self.before
        after = trained(model)
        unchanged = [name for name in numbers if torch.equal(numbers[name], after[name])]
        frozen_values = libraries.frozen(model)
        changed = [name for name in base if not torch.equal(base[name], frozen_values[name])]
        if unchanged or changed:
            return f"no: {', '.join(unchanged)} stayed, {', '.join(changed)} moved"
        return YES

    def holds(self) -> str:
        """Whether checkpoints contain no weight of the base."""
        if any(
            libraries.holds_the_base(self.checkpoint(step), self.bases, self.run)
            for step in (HALF, STEPS)
        ):
            return "no: the base is in it"
        return YES

    def resume(self) -> str:
        """Whether a run that is resumed from the checkpoint at step `HALF`, in a model with other
        adapter values, ends with the values of the first run."""
        model, _ = self.first
        again = self.model(2)
        self.train(again, "again", resume=self.folder / "first")
        return YES if same(trained(again), trained(model)) else "no: other numbers"

    def bare(self) -> str:
        """Like `resume`, but the trainer attaches the adapter to the base."""
        model, _ = self.first
        base = load_model(self.bases, self.run)
        resumed = self.folder / "first"
        outcome = self.train(base, "bare", resume=resumed, integration=self.library.bare(self.run))
        return YES if same(trained(outcome.model), trained(model)) else "no: the base is trained"

    def best(self) -> str:
        """Whether the model at the end is that of the best checkpoint instead of the last."""
        snapshots: list[dict[str, torch.Tensor]] = []
        model = self.model(1)
        self.train(model, "best", best=lambda model: snapshots.append(trained(model)))
        first, _ = self.first
        last = same(trained(first), snapshots[0])
        return (
            YES
            if len(snapshots) == 1 and same(trained(model), snapshots[0]) and not last
            else "no: other numbers"
        )

    def loads(self) -> str:
        """Whether `from_pretrained` of what the trainer saves gives the trained model."""
        model, outcome = self.first
        outcome.save(self.folder / "saved")
        expected = outputs(model)
        results = outputs(
            HEADS[self.run.head].from_pretrained(self.folder / "saved", dtype=torch.float32)
        )
        distance = float((results - expected).abs().max())
        if torch.equal(expected, outputs(load_model(self.bases, self.run))):
            return "no: the base"
        return YES if distance < 1e-5 else f"no: {distance:.0e} away"

    def reference(self) -> str:
        """Whether the reference model, with which the policy is compared, shares all its memory
        with the policy."""
        model, outcome = self.first
        if outcome.reference is None:
            return YES
        model_pointers = {
            value.untyped_storage().data_ptr() for value in model.state_dict().values()
        }
        reference_tensors = [
            value
            for value in outcome.reference.state_dict().values()
            if isinstance(value, torch.Tensor)
        ]
        unshared_count = sum(
            value.numel()
            for value in reference_tensors
            if value.untyped_storage().data_ptr() not in model_pointers
        )
        return "no: a second copy" if unshared_count or not reference_tensors else YES


#: name of a cell (a method of `Case`) → the heading of its column
CELLS: dict[str, str] = {
    "alone": "trains the adapter alone",
    "holds": "checkpoints hold it alone",
    "resume": "resumed, equal bit for bit",
    "bare": "the same, attached by the trainer",
    "best": "best model at the end",
    "loads": "`from_pretrained` of what it saves",
    "reference": "reference without a second copy",
}


def has_cell(run: Run, cell: str) -> bool:
    return cell not in run.lacks and (cell != "reference" or run.compares)


def answer(case: Case, cell: str) -> str:
    """The text of a cell: `YES`, `NOT_OFFERED`, or "no" with the reason."""
    if not has_cell(case.run, cell):
        return NOT_OFFERED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(case, cell)()
    except Exception as error:
        path = re.compile(r"/\S*/")
        return f"no: {type(error).__name__}, {path.sub('', str(error)).splitlines()[0][:100]}"


def rows(only: Callable[[Run], bool] = lambda run: True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(trainer, {library: {cell: text}, "size": size of Veneer's checkpoint / size of PEFT's})."""
    with tempfile.TemporaryDirectory() as temporary:
        bases = Path(temporary) / "bases"
        write_bases(bases)
        for run in filter(only, RUNS):
            folder = Path(temporary) / run.name
            cases = {
                library.name: Case(library, run, bases, folder / library.name)
                for library in (VENEER, PEFT)
            }
            results: dict[str, Any] = {
                name: {cell: answer(case, cell) for cell in CELLS} for name, case in cases.items()
            }
            ratio = max(
                size(cases["Veneer"].checkpoint(step)) / size(cases["PEFT"].checkpoint(step))
                for step in (HALF, STEPS)
            )
            yield run.name, {**results, "size": round(ratio, 2)}
