"""Whatever runs a model in evaluation mode leaves each of its modules in the mode that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.support.tiny import tiny_model, tiny_tokenizer

from veneer.context import evaluation_mode
from veneer.train.causal import must_not_see_later_tokens
from veneer.train.evaluate import evaluate
from veneer.train.generate import generate
from veneer.train.prepare import Rows
from veneer.train.tasks._base import reference

IDS = list(range(5, 15))


def run_reference(model: Any) -> None:
    with reference(model):
        assert not any(module.training for module in model.modules())


RUNS: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda model: evaluate(
        model, Rows([{"input_ids": IDS, "labels": IDS}], [len(IDS)], [0])
    ),
    "generate": lambda model: generate(model, tiny_tokenizer(), ["a"], max_new_tokens=2),
    "causality": lambda model: must_not_see_later_tokens(model, "tiny"),
    "reference": run_reference,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_modules_in_evaluation_mode_stay_in_it(run: Callable[[Any], Any]) -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    run(model)
    assert [module.training for module in model.modules()] == modes


def test_modes_come_back_after_an_error() -> None:
    model = tiny_model().train()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not model.training
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())
