"""The arithmetic of the experiments on words: forgetting at one loss of the task, and the directions
that a repair takes."""

from __future__ import annotations

import pytest
import torch
from experiments.study import FAILED, HELD, OPEN, cell_id

import veneer
from experiments import forgetting, repair, words
from veneer.adapter_files.folder import read
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.intruders import find_intruders


@pytest.fixture
def adapter(tmp_path):
    """A model with a change that is large enough for intruders, and its folder."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 24))
    handle = veneer.attach(model, veneer.LoraConfig(rank=3, targets="all"))
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter.data)
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    return model, folder


def test_directions_below_a_threshold_are_those_of_a_search_with_it(adapter):
    model, folder = adapter
    expected = [*find_intruders(read(folder), FrozenWeights(model), threshold=0.7)]
    selected = [
        repair.select_below(weight, 0.7) for weight in repair.find_directions(folder, model)
    ]
    assert sum(weight.count for weight in expected) > 0
    for weight, selection in zip(expected, selected, strict=True):
        assert selection.count == weight.count
        torch.testing.assert_close(selection.intruders[0].U, weight.intruders[0].U)


def test_the_control_takes_as_much_in_other_directions(adapter):
    model, folder = adapter
    for weight in repair.find_directions(folder, model):
        control = repair.randomise(weight, 0)
        torch.testing.assert_close(control.intruders[0].S, weight.intruders[0].S)
        eye = torch.eye(control.count, dtype=torch.float64)
        torch.testing.assert_close(control.intruders[0].U.mT @ control.intruders[0].U, eye)
        assert (control.intruders[0].U * weight.intruders[0].U).sum(0).abs().max() < 0.9


def test_forgetting_is_measured_when_the_task_is_at_its_target():
    points = [(0, 8.0, 3.0), (8, 3.0, 3.1), (16, 1.0, 3.3), (24, 0.5, 4.0)]
    assert forgetting.rise_at(points, 2.0) == pytest.approx(0.2)
    assert forgetting.rise_at(points, 3.0) == pytest.approx(0.1)
    assert forgetting.rise_at(points, 0.4) is None


def make_runs(rises):
    """Runs whose middle rate is the best, with these rises by arm and seed."""
    runs = []
    for arm, rates in forgetting.PLAN.rates.items():
        cells = [forgetting.PLAN.cell(arm, rate, 100) for rate in rates]
        cells += [forgetting.PLAN.cell(arm, rates[1], seed) for seed in forgetting.PLAN.seeds]
        for cell in cells:
            rise = rises[arm][cell["seed"] % 100]
            aside = abs(cell["rate"] - rates[1])
            runs.append({**cell, "rise": rise, "aside": aside, "cell": cell_id(cell)})
    return runs


@pytest.mark.parametrize(
    ("lora", "full", "verdict"),
    [
        ([0.1, 0.11, 0.12], [0.3, 0.32, 0.31], HELD),
        ([0.3, 0.32, 0.31], [0.1, 0.11, 0.12], FAILED),
        ([0.2, 0.2, 0.2], [0.1, 0.3, 0.25], OPEN),
        ([0.1, None, 0.12], [0.3, 0.32, 0.31], OPEN),  # two seeds reach the target with both
    ],
)
def test_the_three_ends_of_forgetting(lora, full, verdict):
    (claim,) = forgetting.claims(make_runs({forgetting.LORA: lora, forgetting.FULL: full}))
    assert claim.verdict == verdict


def test_words_that_choose_do_not_give_results_nor_train():
    splits = words.load_words({"toy": True})
    spellings = [{word.spelling for word in split} for split in splits]
    assert not spellings[0] & spellings[1]
    assert not spellings[0] & spellings[2]
    assert not spellings[1] & spellings[2]


def test_general_text_aside_is_not_that_of_the_results(tmp_path):
    from veneer import models

    tokenizer = models.load_tokenizer(words.write_toy_base(tmp_path / "base"))
    texts = (
        words.general_text({"toy": True}, tokenizer, first=start, rows=2)[0] for start in (0, 2)
    )
    first, second = ([row["input_ids"] for row in text.rows] for text in texts)
    assert [len(row) for row in first] == [8, 8]
    assert not {tuple(row) for row in first} & {tuple(row) for row in second}


def test_a_reward_of_full_size_reads_the_last_number():
    from experiments.full.rewards import last_number

    written = [
        "So 3 + 4 = 7.",
        [{"role": "assistant", "content": "It is 1,234"}],
        "nothing",
        "7 or 8",
    ]
    right = ["… #### 7", "#### 1234", "#### 7", "#### 7"]
    assert last_number(written, answer=right) == [1.0, 1.0, 0.0, 0.0]
